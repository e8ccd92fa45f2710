"""The built-in chat templates. ``jinja2`` renders them where it is installed."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.planning.outputs.templates import BUILT_IN
from streammerge.recipe.vocabulary import TEMPLATES

SAID = [{"role": "system", "content": "S "}, {"role": "user", "content": " hi"}]
RENDERED = {
    "alpaca": "S\n\n### Instruction:\nhi### Response:\n",
    "chatml": "<|im_start|>system\nS <|im_end|>\n<|im_start|>user\n hi<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "    [|system|]S \n        [|endofturn|]\n\n    [|user|] hi\n        \n\n    [|assistant|]\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>\n<|start_header_id|>user<|end_header_id|>\n\nhi"
    "<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] S \n\n hi [/INST]",
}


def test_every_name_has_its_text() -> None:
    assert tuple(BUILT_IN) == TEMPLATES
    assert all("messages" in text for text in BUILT_IN.values())


@pytest.mark.parametrize("name", BUILT_IN)
def test_they_render_as_mergekits(name: str) -> None:
    jinja = pytest.importorskip("jinja2", reason="jinja2 is not installed")
    environment: Any = jinja.Environment(trim_blocks=True, lstrip_blocks=True)
    made = environment.from_string(BUILT_IN[name])
    assert made.render(messages=SAID, add_generation_prompt=True, bos_token="<s>", eos_token="</s>") == RENDERED[name]
