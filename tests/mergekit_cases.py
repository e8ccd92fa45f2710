"""Configurations that mergekit 0.1.5 has run, and the models that it ran them on.

``python tests/mergekit_cases.py``, with mergekit 0.1.5 and transformers installed, writes mergekit's results to
``tests/data/mergekit.json``. Every tensor of these models holds one number, which encodes model, layer and kind. A
single number of the output therefore shows which tensors were merged with which weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LAYERS = 4
KINDS = {
    "model.layers.{}.self_attn.q_proj.weight": (2, 2),
    "model.layers.{}.self_attn.k_proj.weight": (2, 2),
    "model.layers.{}.self_attn.v_proj.weight": (2, 2),
    "model.layers.{}.self_attn.o_proj.weight": (2, 2),
    "model.layers.{}.mlp.gate_proj.weight": (3, 2),
    "model.layers.{}.mlp.up_proj.weight": (3, 2),
    "model.layers.{}.mlp.down_proj.weight": (2, 3),
    "model.layers.{}.input_layernorm.weight": (2,),
    "model.layers.{}.post_attention_layernorm.weight": (2,),
}
LOOSE = {"model.embed_tokens.weight": (5, 2), "model.norm.weight": (2,), "lm_head.weight": (5, 2)}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2,
    "intermediate_size": 3,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MODELS = {"base": 1.0, "a": 3.0, "b": 7.0, "c": -2.0}

CASES = {
    "linear": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
""",
    "not normalised, and text for a number": """
models:
  - {model: a, parameters: {weight: 1e-1}}
  - {model: b, parameters: {weight: -2}}
merge_method: linear
parameters: {normalize: false}
""",
    "gradients and filters": """
models:
  - model: a
    parameters:
      weight:
        - {filter: mlp, value: [0, 1.5]}
        - {filter: q_proj, value: [0.1, 0.9, 0.2]}
        - value: .5
  - model: b
    parameters: {weight: [1, 2, 3, 4, 5, 6]}
merge_method: linear
parameters: {normalize: false}
""",
    "falling through the levels": """
models:
  - {model: a, parameters: {weight: {filter: mlp, value: [0, 1]}}}
  - {model: b, parameters: {weight: [{filter: attn, value: 3}, {filter: '*', value: 0.2}]}}
  - {model: c}
merge_method: linear
parameters: {weight: [{filter: layernorm, value: 7}, {value: [0.5, 0.25]}], normalize: false}
""",
    "a base that is a model": """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: base, parameters: {weight: 2}}
base_model: base
merge_method: linear
parameters: {normalize: false}
""",
    "a base that becomes a model": """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b}
base_model: base
merge_method: linear
parameters: {weight: 0.25, normalize: false}
""",
    "stacked": """
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
merge_method: passthrough
""",
    "one model thrice": """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [1, 3]}]
  - sources: [{model: a, layer_range: [3, 4]}]
merge_method: passthrough
""",
    "scaled": """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources:
    - model: c
      layer_range: [1, 4]
      parameters:
        scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: [0.5, 2]}, {value: 1.0}]
merge_method: passthrough
""",
    "slices of shifted layers": """
slices:
  - sources:
    - {model: a, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
    - {model: b, layer_range: [1, 3]}
    parameters: {weight: {filter: attn, value: 0.9}}
  - sources:
    - {model: c, layer_range: [2, 4], parameters: {weight: [{filter: mlp, value: [0.1, 1]}, {value: 0.4}]}}
    - {model: b, layer_range: [0, 2], parameters: {weight: 2}}
merge_method: linear
parameters: {weight: 0.25, normalize: false}
""",
    "slices of one layer": """
slices:
  - sources:
    - {model: a, layer_range: [0, 1], parameters: {weight: [0.2, 0.8]}}
    - {model: b, layer_range: [3, 4], parameters: {weight: 1}}
  - sources:
    - {model: a, layer_range: [1, 4], parameters: {weight: [0.2, 0.8, 0.3]}}
    - {model: b, layer_range: [0, 3], parameters: {weight: 1e-1}}
merge_method: linear
parameters: {normalize: false}
""",
    "filters see the input's name": """
slices:
  - sources:
    - {model: a, layer_range: [2, 4], parameters: {weight: [{filter: layers.2, value: 5}, {value: 1}]}}
    - {model: b, layer_range: [0, 2], parameters: {weight: [{filter: layers.0, value: 11}, {value: 1}]}}
merge_method: linear
parameters: {normalize: false}
""",
    "task arithmetic over slices": """
slices:
  - sources:
    - {model: base, layer_range: [0, 3]}
    - {model: a, layer_range: [0, 3], parameters: {weight: 0.4}}
    - {model: b, layer_range: [1, 4], parameters: {weight: [0.1, 0.6]}}
merge_method: task_arithmetic
base_model: base
parameters: {lambda: [0.7, 0.1]}
""",
    "shared filters see the output's name": """
models:
  - {model: a}
  - {model: b}
merge_method: task_arithmetic
base_model: base
parameters:
  weight: 0.5
  lambda: [{filter: layers.1, value: 2}, {filter: mlp, value: [0, 1]}, {value: 0.5}]
""",
    "slerp with a base in each slice": """
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    base_model: b
    parameters: {t: 0.3}
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
merge_method: slerp
base_model: a
parameters: {t: [0, 1]}
""",
    "gradient slerp": """
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
""",
    "a base in one slice only": """
slices:
  - sources:
    - {model: a, layer_range: [0, 2], parameters: {weight: 0.4}}
    - {model: base, layer_range: [1, 3]}
    base_model: base
  - sources:
    - {model: b, layer_range: [2, 4]}
    - {model: c, layer_range: [2, 4], parameters: {weight: 0.3}}
    base_model: b
merge_method: task_arithmetic
""",
    "anchors and merge keys": """
models:
  - &one {model: a, parameters: &p {weight: 1}}
  - {<<: *one, model: b}
  - {model: c, parameters: {<<: *p, weight: 0.5}}
merge_method: linear
""",
    "modules": """
modules:
  default:
    slices:
      - sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1}}, {model: b, layer_range: [1, 3]}]
    parameters: {weight: [{filter: mlp, value: 0.1}]}
merge_method: linear
parameters: {weight: 3, normalize: false}
""",
}


def numbers(value: float) -> dict[str, tuple[float, tuple[int, ...]]]:
    """Returns name -> the number that fills the tensor, and its shape."""
    made = {name: (value + 0.01 * place, shape) for place, (name, shape) in enumerate(LOOSE.items())}
    for layer in range(LAYERS):
        for place, (name, shape) in enumerate(KINDS.items()):
            made[name.format(layer)] = (value + 0.1 * layer + 0.001 * place, shape)
    return made


def write_models(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for model, value in MODELS.items():
        (folder / model).mkdir(parents=True)
        tensors = {name: torch.full(shape, number) for name, (number, shape) in numbers(value).items()}
        save_file(tensors, folder / model / "model.safetensors", {"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps(CONFIG))


def read(folder: Path) -> dict[str, float]:
    """Returns name -> the one number in each tensor."""
    from safetensors.torch import load_file

    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    assert all((t == t.flatten()[0]).all() for t in tensors.values())
    return {name: float(t.flatten()[0]) for name, t in sorted(tensors.items())}


def main() -> None:
    import os
    import tempfile

    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    target = Path(__file__).parent / "data" / "mergekit.json"
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_models(Path(folder))
        for name, text in CASES.items():
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            run_merge(config, "out", MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))
            layers = json.loads(Path("out/config.json").read_text())["num_hidden_layers"]
            made[name] = {"layers": layers, "tensors": read(Path("out"))}
            __import__("shutil").rmtree("out")
    target.write_text(json.dumps(made, indent=1) + "\n")
    sys.stdout.write(f"{len(made)} cases in {target}\n")


if __name__ == "__main__":
    main()
