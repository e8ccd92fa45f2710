"""Loads every checkpoint whole, averages, saves, as most scripts do. Arguments: output, inputs."""

import sys

from safetensors.torch import load_file, save_file

out, *paths = sys.argv[1:]
weights = [0.5, 0.3, 0.2] if len(paths) == 3 else [1 / len(paths)] * len(paths)
models = [load_file(path) for path in paths]
merged = {}
for name, first in models[0].items():
    total = first.float() * weights[0]
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total += model[name].float() * weight
    merged[name] = total.to(first.dtype)
save_file(merged, out, metadata={"format": "pt"})
