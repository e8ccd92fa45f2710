"""Computes the same weighted mean with sd-mecha, two models at a time. Arguments: output, buffer in bytes, inputs."""

import sys

import sd_mecha

out, buffer, *paths = sys.argv[1:]
weights = [0.5, 0.3, 0.2] if len(paths) == 3 else [1 / len(paths)] * len(paths)
mean, total = sd_mecha.model(paths[0]), weights[0]
for path, weight in zip(paths[1:], weights[1:], strict=True):
    total += weight
    mean = sd_mecha.weighted_sum(mean, sd_mecha.model(path), alpha=weight / total)
sd_mecha.merge(mean, output=out, total_buffer_size=int(buffer), merge_device="cpu")
