"""Tensors whose shapes or kinds of numbers differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors, mean, octets
from safetensors.torch import save_file

import streammerge as sm

CONV = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(**models: dict[str, torch.Tensor]) -> list[str]:
    for name, tensors in models.items():
        save_file(tensors, f"{name}.safetensors")
    return [f"{name}.safetensors" for name in models]


def merged(inputs: list[str], **options: Any) -> tuple[dict[str, torch.Tensor], sm.MergeResult]:
    result = sm.merge(inputs, "out.safetensors", overwrite=True, **options)
    return load_safetensors(Path("out.safetensors")), result


def test_an_inpainting_model_keeps_its_channels() -> None:
    """The recipe of the image-model mergers: inpainting + (custom - base). The first model gives the shape."""
    base = {CONV: draw(1, 32, 4, 3, 3), "b": draw(2, 4)}
    custom = {CONV: draw(3, 32, 4, 3, 3), "b": draw(4, 4)}
    inpainting = {CONV: draw(5, 32, 9, 3, 3), "b": draw(6, 4)}
    paths = write(inpainting=inpainting, custom=custom, base=base)
    out, result = merged(paths[:2], base=paths[2], method="add_difference")
    new = (inpainting[CONV][:, :4].double() + custom[CONV].double() - base[CONV].double()).float()
    assert octets(out[CONV]) == octets(torch.cat([new, inpainting[CONV][:, 4:]], 1))
    assert octets(out["b"]) == octets((inpainting["b"].double() + custom["b"].double() - base["b"].double()).float())
    assert any("leading block [32, 4, 3, 3]" in warning for warning in result.warnings)
    assert sm.verify("out.safetensors").equal_elems


def test_an_ordinary_model_first_is_no_extension() -> None:
    paths = write(custom={CONV: draw(3, 8, 4, 3, 3)}, inpainting={CONV: draw(5, 8, 9, 3, 3)})
    with pytest.raises(sm.MismatchError, match=r"give the inpainting model first[^$]*`\"leading\"`"):
        sm.plan(paths)
    out, _ = merged(paths, on_shape="leading")
    assert octets(out[CONV]) == octets(mean([draw(3, 8, 4, 3, 3), draw(5, 8, 9, 3, 3)[:, :4]], [1, 1]))


def test_several_extensions_are_two_architectures() -> None:
    wide = {CONV: draw(3, 8, 9, 3, 3), "other": draw(4, 8, 6, 1, 1)}
    with pytest.raises(sm.MismatchError, match="these tensors differ") as caught:
        sm.plan(write(a=wide, b={CONV: draw(5, 8, 4, 3, 3), "other": draw(6, 8, 5, 1, 1)}))
    assert CONV in str(caught.value)
    alike = {CONV: draw(3, 8, 9, 3, 3), "ema": draw(4, 8, 9, 3, 3)}
    assert sm.plan(write(c=alike, d={CONV: draw(5, 8, 4, 3, 3), "ema": draw(6, 8, 4, 3, 3)}))


SHAPES = [
    ((5,), (3,)),
    ((3,), (5,)),
    ((4, 7), (4, 5)),
    ((4, 7), (3, 9)),
    ((6, 7), (4, 5)),
    ((3, 4, 5), (2, 3, 4)),
    ((301, 433), (280, 400)),
    ((2, 200_003), (3, 190_001)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_leading_block_is_merged_and_the_rest_is_the_firsts(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    one, two = (draw(seed, *shape).to(dtype) for seed, shape in enumerate(shapes))
    block = tuple(slice(0, min(sizes)) for sizes in zip(*shapes, strict=True))
    for wanted in (dtype, torch.float16):
        expected = one.to(wanted, copy=True)
        expected[block] = ((one[block].double() + two[block].double()) / 2).to(wanted)
        digests = set()
        for how in ({}, {"workers": 1, "memory": "64MiB"}, {"io": "pread"}):
            asked = {} if wanted is dtype else {"dtype": wanted}
            out, _ = merged(write(a={"w": one}, b={"w": two}), on_shape="leading", **asked, **how)
            digests.add(octets(out["w"]))
        assert digests == {octets(expected)}


def test_a_method_with_passes_sees_the_block_only() -> None:
    one, two = draw(1, 40, 9), draw(2, 40, 4)
    out, _ = merged(write(a={"w": one}, b={"w": two}), on_shape="leading", method="slerp", parameters={"t": 0.5})
    whole, _ = merged(write(a={"w": one[:, :4].contiguous()}, b={"w": two}), method="slerp", parameters={"t": 0.5})
    assert octets(out["w"][:, :4]) == octets(whole["w"])
    assert octets(out["w"][:, 4:]) == octets(one[:, 4:])


def test_an_overflow_in_a_block_is_an_error_and_a_common_infinity_is_none() -> None:
    one, two = draw(1, 4, 9), draw(2, 4, 5)
    one[0, 0] = two[0, 0] = math.inf
    out, result = merged(write(a={"w": one}, b={"w": two}), on_shape="leading")
    assert out["w"][0, 0] == math.inf
    assert not [warning for warning in result.warnings if "NaN" in warning]
    one[1, 1] = 1e30
    with pytest.raises(sm.VerifyError, match=r"1 in the result \(overflow\)"):
        merged(write(a={"w": one}, b={"w": two}), on_shape="leading", dtype="float16")


@pytest.mark.parametrize("shapes", [((3, 4), (12,)), ((), (1,)), ((0, 4), (3, 5))], ids=str)
def test_what_has_no_common_block(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    paths = write(a={"w": draw(1, *shapes[0])}, b={"w": draw(2, *shapes[1])})
    with pytest.raises(sm.MismatchError, match="these tensors differ") as caught:
        sm.plan(paths, on_shape="leading")
    assert '"leading"' not in str(caught.value)


def test_no_policy_makes_a_merge_of_nothing() -> None:
    one, two = {"w": draw(1, 3, 4), "v": draw(1, 5)}, {"w": draw(2, 3, 7), "v": draw(2, 6)}
    with pytest.raises(sm.MismatchError, match=r"nothing of b\.safetensors would go into the output"):
        sm.plan(write(a=one, b=two), on_shape="base")
    assert sm.plan(write(a=one | {"u": draw(3, 2)}, b=two | {"u": draw(4, 2)}), on_shape="base")


class TestKinds:
    """The same integers in another dtype."""

    @pytest.mark.parametrize("first", [torch.int64, torch.float16, torch.float32, torch.int32])
    @pytest.mark.parametrize("second", [torch.int64, torch.float16, torch.int32])
    def test_equal_ones_stay_integers(self, first: torch.dtype, second: torch.dtype) -> None:
        numbers = torch.arange(77)[None]
        paths = write(a={"w": draw(1, 3), "ids": numbers.to(first)}, b={"w": draw(2, 3), "ids": numbers.to(second)})
        out, _ = merged(paths)
        whole = [dtype for dtype in (first, second) if not dtype.is_floating_point]
        assert out["ids"].dtype == (whole or [first])[0]
        assert torch.equal(out["ids"].long(), numbers)

    def test_others_are_an_error_that_names_the_option(self) -> None:
        paths = write(a={"w": draw(1, 3), "ids": torch.arange(4)}, b={"w": draw(2, 3), "ids": torch.arange(4) + 0.5})
        with pytest.raises(sm.MismatchError, match=r'ids holds int64 and float32 values .*`integers="first"`'):
            merged(paths)
        for policy, wanted in (("first", [0, 1, 2, 3]), ("last", [0, 1, 2, 3]), ("max", [0, 1, 2, 3])):
            out, _ = merged(paths, integers=policy)
            assert out["ids"].tolist() == wanted
            assert out["ids"].dtype == torch.int64

    def test_the_largest_counter(self) -> None:
        paths = write(
            a={"w": draw(1, 3), "bn.num_batches_tracked": torch.tensor(7.0)},
            b={"w": draw(2, 3), "bn.num_batches_tracked": torch.tensor(9)},
        )
        assert merged(paths)[0]["bn.num_batches_tracked"].item() == 9

    def test_complex_and_real_numbers_differ(self) -> None:
        with pytest.raises(sm.MismatchError, match="complex64 in b"):
            sm.plan(write(a={"w": draw(1, 3)}, b={"w": draw(2, 3).to(torch.complex64)}))
