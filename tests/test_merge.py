"""Merging gives the float64 mean rounded once, for every dtype, shape, container and way of running."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import assert_same, load_safetensors, mean, octets, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.tensors.spec import GRAIN

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def saved(folder: Path, *state_dicts: dict[str, torch.Tensor]) -> list[Path]:
    paths = [folder / f"in{number}.safetensors" for number in range(len(state_dicts))]
    for path, state_dict in zip(paths, state_dicts, strict=True):
        save_file(state_dict, path)
    return paths


@pytest.mark.parametrize("dtype", FLOATS + FP8, ids=str)
@pytest.mark.parametrize("weights", [[0.6, 0.4], [1, 1, 1], [0.5, -0.2, 0.7], [1 / 3, 2.5, 0.1, 0.01, 7.0]], ids=str)
def test_linear_is_the_float64_mean_rounded_once(tmp_path: Path, dtype: torch.dtype, weights: list[float]) -> None:
    models = [trained(seed, dtype) for seed in range(len(weights))]
    out = tmp_path / "out.safetensors"
    sm.merge(saved(tmp_path, *models), out, weights=weights)
    merged = load_safetensors(out)
    for name in ("embed.weight", "layer.weight", "layer.bias", "scale", "one", "empty"):
        expected = mean([m[name] for m in models], weights)
        assert merged[name].shape == expected.shape
        assert merged[name].dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(merged[name], expected, rtol=1e-14, atol=1e-15)
        else:
            assert octets(merged[name]) == octets(expected), name


def test_ties_between_two_roundings_go_to_even(tmp_path: Path) -> None:
    """0.6 a + 0.4 b lies exactly between two bfloat16 numbers for one of a few hundred pairs; float32 sums get those
    wrong."""
    make = torch.Generator().manual_seed(5)
    a, b = (torch.randn(200_003, generator=make).bfloat16() for _ in range(2))
    sm.merge(saved(tmp_path, {"w": a}, {"w": b}), tmp_path / "out.safetensors", weights=[0.6, 0.4])
    assert octets(load_safetensors(tmp_path / "out.safetensors")["w"]) == octets(mean([a, b], [0.6, 0.4]))
    naive = (0.6 * a.float() + 0.4 * b.float()).bfloat16()
    assert octets(naive) != octets(mean([a, b], [0.6, 0.4])), "the case is not hard enough to tell"


def test_half_precision_sums_do_not_overflow(tmp_path: Path) -> None:
    models = [{"w": torch.tensor([value], dtype=torch.float16)} for value in (30000.0, 30001.0, 40000.0)]
    sm.merge(saved(tmp_path, *models), tmp_path / "out.safetensors")
    assert load_safetensors(tmp_path / "out.safetensors")["w"].item() == 33344.0


def test_complex_numbers_are_averaged_part_by_part(tmp_path: Path) -> None:
    models = [{"w": torch.randn(5, 7, dtype=torch.complex64)} for _ in range(2)]
    sm.merge(saved(tmp_path, *models), tmp_path / "out.safetensors", weights=[0.25, 0.75])
    assert_same(load_safetensors(tmp_path / "out.safetensors"), {"w": mean([m["w"] for m in models], [0.25, 0.75])})


def test_mixed_dtypes_take_the_first_models(tmp_path: Path) -> None:
    a, b = torch.randn(9).bfloat16(), torch.randn(9)
    sm.merge(saved(tmp_path, {"w": a}, {"w": b}), tmp_path / "out.safetensors")
    expected = ((a.double() + b.double()) / 2).bfloat16()
    assert_same(load_safetensors(tmp_path / "out.safetensors"), {"w": expected})


def test_weights_are_normalised_and_said_so(tmp_path: Path) -> None:
    a, b = torch.randn(9), torch.randn(9)
    paths = saved(tmp_path, {"w": a}, {"w": b})
    result = sm.merge(paths, tmp_path / "out.safetensors", weights=[3, 1])
    assert any("sum to 4" in note for note in result.notes)
    assert_same(load_safetensors(tmp_path / "out.safetensors"), {"w": mean([a, b], [3, 1])})
    sm.merge(paths, tmp_path / "sum.safetensors", weights=[3, 1], normalize=False)
    assert_same(load_safetensors(tmp_path / "sum.safetensors"), {"w": (3 * a.double() + b.double()).float()})


def test_out_dtype_recasts_floats_only(tmp_path: Path) -> None:
    models = [trained(1), trained(2)]
    sm.merge(saved(tmp_path, *models), tmp_path / "out.safetensors", dtype="bfloat16", integers="first")
    merged = load_safetensors(tmp_path / "out.safetensors")
    assert merged["embed.weight"].dtype == torch.bfloat16
    assert merged["position_ids"].dtype == torch.int64
    expected = ((models[0]["layer.bias"].double() + models[1]["layer.bias"].double()) / 2).bfloat16()
    assert octets(merged["layer.bias"]) == octets(expected)


def test_law_2_the_bytes_depend_on_recipe_and_inputs_only(tmp_path: Path) -> None:
    sizes = {"big": 5 * GRAIN + 77, "grain": GRAIN, "odd": GRAIN + 1, "small": 3}
    models = []
    for seed in range(3):
        make = torch.Generator().manual_seed(seed)
        models.append({name: torch.randn(size, generator=make).half() for name, size in sizes.items()})
    paths = saved(tmp_path, *models)
    digests = set()
    for number, options in enumerate(
        [
            {},
            {"workers": 1},
            {"workers": 5, "memory": "64MiB"},
            {"io": "pread"},
            {"io": "pread", "workers": 3, "memory": "24MiB"},
            {"memory": "4GiB", "workers": 8},
        ]
    ):
        out = tmp_path / f"out{number}" / "model.safetensors"
        out.parent.mkdir()
        sm.merge(paths, out, weights=[0.5, 0.3, 0.2], **options)
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        pth = out.with_suffix(".pth")
        sm.merge(paths, pth, weights=[0.5, 0.3, 0.2], **options)
        digests.add("pth" + hashlib.sha256(pth.read_bytes()).hexdigest())
    assert len(digests) == 2
    assert_same(load_safetensors(out), {n: mean([m[n] for m in models], [0.5, 0.3, 0.2]) for n in sizes})


class TestIntegers:
    def merged(self, tmp_path: Path, values: list[torch.Tensor], name: str = "n", **options: str) -> torch.Tensor:
        paths = saved(tmp_path, *[{name: value, "w": torch.ones(2)} for value in values])
        sm.merge(paths, tmp_path / "out.safetensors", **options)
        return load_safetensors(tmp_path / "out.safetensors")[name]

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool], ids=str
    )
    def test_policies(self, tmp_path: Path, dtype: torch.dtype) -> None:
        first, last = torch.tensor([1, 0, 1]).to(dtype), torch.tensor([0, 1, 1]).to(dtype)
        for policy, expected in (("first", first), ("last", last), ("max", torch.tensor([1, 1, 1]).to(dtype))):
            (tmp_path / "out.safetensors").unlink(missing_ok=True)
            assert octets(self.merged(tmp_path, [first, last], integers=policy)) == octets(expected)

    def test_uint64_beyond_int64_compares_as_unsigned(self, tmp_path: Path) -> None:
        values = [torch.tensor([2**64 - 1, 5], dtype=torch.uint64), torch.tensor([3, 2**63], dtype=torch.uint64)]
        assert self.merged(tmp_path, values, integers="max").tolist() == [2**64 - 1, 2**63]

    def test_equal_ones_are_copied(self, tmp_path: Path) -> None:
        assert self.merged(tmp_path, [torch.arange(5)] * 3).tolist() == [0, 1, 2, 3, 4]

    def test_different_ones_are_an_error_that_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(sm.MismatchError, match=r"n holds int64 values that differ.*`integers="):
            self.merged(tmp_path, [torch.arange(5), torch.zeros(5, dtype=torch.int64)])
        assert not (tmp_path / "out.safetensors").exists()

    def test_counters_take_the_largest(self, tmp_path: Path) -> None:
        values = [torch.tensor(101), torch.tensor(103), torch.tensor(100)]
        assert self.merged(tmp_path, values, name="bn.num_batches_tracked").item() == 103

    @pytest.mark.parametrize("io", ["mmap", "pread"])
    @pytest.mark.parametrize("count", [2, 3, 4, 5])
    def test_any_number_of_inputs_is_compared(self, tmp_path: Path, count: int, io: str) -> None:
        for odd in range(count):
            values = [torch.full((4,), 7 if number == odd else 1) for number in range(count)]
            with pytest.raises(sm.MismatchError, match="values that differ"):
                self.merged(tmp_path, values, io=io)
            assert self.merged(tmp_path, values, io=io, integers="max").tolist() == [7] * 4
            (tmp_path / "out.safetensors").unlink()


class TestNonfinite:
    def inputs(self, tmp_path: Path) -> list[Path]:
        bad = torch.ones(GRAIN + 5)
        bad[[3, GRAIN + 1]] = torch.tensor([float("nan"), float("inf")])
        return saved(tmp_path, {"good": torch.ones(3), "bad": torch.ones(GRAIN + 5)}, {"good": torch.ones(3), "bad": bad})

    def test_stops_before_the_output_appears(self, tmp_path: Path) -> None:
        with pytest.raises(sm.VerifyError, match=r"bad: 2 in .*in1\.safetensors"):
            sm.merge(self.inputs(tmp_path), tmp_path / "out.safetensors")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in0.safetensors", "in1.safetensors"]

    def test_allowed_ones_pass_through_with_a_warning(self, tmp_path: Path) -> None:
        result = sm.merge(self.inputs(tmp_path), tmp_path / "out.safetensors", allow_nonfinite=True)
        assert any("bad" in warning for warning in result.warnings)
        merged = load_safetensors(tmp_path / "out.safetensors")["bad"]
        assert merged[3].isnan()
        assert merged[GRAIN + 1].isinf()

    def test_overflow_of_the_result_is_found(self, tmp_path: Path) -> None:
        paths = saved(tmp_path, {"w": torch.full((4,), 60000.0).half()})
        with pytest.raises(sm.VerifyError, match="overflow"):
            sm.merge(paths, tmp_path / "out.safetensors", weights=[2.0], normalize=False)


class TestNames:
    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "xtts.", "module._orig_mod."])
    def test_wrapper_prefixes_are_matched_and_said(self, tmp_path: Path, prefix: str) -> None:
        a, b = trained(1), {prefix + name: value for name, value in trained(2).items()}
        result = sm.merge(saved(tmp_path, a, b), tmp_path / "out.safetensors")
        assert any(prefix in note for note in result.notes)
        expected = mean([a["layer.bias"], trained(2)["layer.bias"]], [1, 1])
        assert octets(load_safetensors(tmp_path / "out.safetensors")["layer.bias"]) == octets(expected)

    def test_missing_tensors_are_listed(self, tmp_path: Path) -> None:
        paths = saved(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2), "c": torch.ones(2)})
        with pytest.raises(sm.MismatchError) as error:
            sm.merge(paths, tmp_path / "out.safetensors")
        assert "lacks 1: b" in str(error.value)
        assert "has 1 that" in str(error.value)
        assert "`on_missing=" in str(error.value)

    @pytest.mark.parametrize(
        ("policy", "expected"),
        [("base", {"a": 2.0, "b": 1.0}), ("drop", {"a": 2.0}), ("average-present", {"a": 2.0, "b": 1.0})],
    )
    def test_missing_policies(self, tmp_path: Path, policy: str, expected: dict[str, float]) -> None:
        paths = saved(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.full((2,), 3.0)})
        sm.merge(paths, tmp_path / "out.safetensors", on_missing=policy)
        assert_same(load_safetensors(tmp_path / "out.safetensors"), {n: torch.full((2,), v) for n, v in expected.items()})

    def test_average_present_averages_over_those_that_have_it(self, tmp_path: Path) -> None:
        values = [{"a": torch.tensor([1.0]), "b": torch.tensor([10.0])}, {"a": torch.tensor([2.0])}]
        values.append({"a": torch.tensor([6.0]), "b": torch.tensor([20.0])})
        sm.merge(saved(tmp_path, *values), tmp_path / "out.safetensors", weights=[1, 1, 3], on_missing="average-present")
        assert load_safetensors(tmp_path / "out.safetensors")["b"].item() == 17.5

    def test_differing_shapes_are_reported_with_a_guess(self, tmp_path: Path) -> None:
        paths = saved(
            tmp_path, {"text_embedding.weight": torch.ones(6153, 2)}, {"text_embedding.weight": torch.ones(6681, 2)}
        )
        with pytest.raises(sm.MismatchError, match="vocabulary 6153 against 6681"):
            sm.merge(paths, tmp_path / "out.safetensors")

    def test_what_the_xtts_loader_drops_may_be_missing(self, tmp_path: Path) -> None:
        tuned = {"xtts.gpt.w": torch.zeros(3), "dvae.w": torch.ones(2)}
        torch.save({"model": tuned, "step": 1}, tmp_path / "tuned.pth")
        torch.save({"model": {"gpt.w": torch.ones(3)}}, tmp_path / "released.pth")
        sm.merge([tmp_path / "tuned.pth", tmp_path / "released.pth"], tmp_path / "out.pth")
        merged = torch.load(tmp_path / "out.pth")["model"]
        assert_same(merged, {"xtts.gpt.w": torch.full((3,), 0.5), "dvae.w": torch.ones(2)})


class TestTies:
    def test_shared_by_all_inputs_is_merged_once(self, tmp_path: Path) -> None:
        values = [torch.randn(4, 3) for _ in range(2)]
        for number, value in enumerate(values):
            torch.save({"model": {"wte": value, "lm_head": value, "b": torch.zeros(2)}}, tmp_path / f"{number}.pth")
        sm.merge([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "out.pth")
        model = torch.load(tmp_path / "out.pth")["model"]
        assert model["wte"].data_ptr() == model["lm_head"].data_ptr()
        assert octets(model["lm_head"]) == octets(mean(values, [1, 1]))
        sm.merge([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "out.safetensors")
        flat = load_safetensors(tmp_path / "out.safetensors")
        assert octets(flat["wte"]) == octets(flat["lm_head"]) == octets(mean(values, [1, 1]))
        sm.merge([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "folder/")
        folder = load_safetensors(
            tmp_path / "folder" / "model.safetensors"
        )  # no configuration says that a loader ties them
        assert set(folder) == {"wte", "lm_head", "b"}

    def test_separate_in_one_input_is_merged_separately(self, tmp_path: Path) -> None:
        tied = torch.ones(3)
        torch.save({"wte": tied, "lm_head": tied}, tmp_path / "0.pth")
        torch.save({"wte": torch.zeros(3), "lm_head": torch.full((3,), 3.0)}, tmp_path / "1.pth")
        result = sm.merge([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "out.pth")
        assert any("lm_head" in warning for warning in result.warnings)
        merged = torch.load(tmp_path / "out.pth")
        assert_same(merged, {"wte": torch.full((3,), 0.5), "lm_head": torch.full((3,), 2.0)})

    def test_packed_weights_are_not_ties(self, tmp_path: Path) -> None:
        flat = [torch.randn(12), torch.randn(12)]
        for number, values in enumerate(flat):
            torch.save({"w_ih": values[:6].view(2, 3), "w_hh": values[6:].view(2, 3)}, tmp_path / f"{number}.pth")
        assert sm.inspect(tmp_path / "0.pth").aliases == {}
        sm.merge([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "out.pth", weights=[0.9, 0.1])
        both = mean(flat, [0.9, 0.1])
        assert_same(torch.load(tmp_path / "out.pth"), {"w_ih": both[:6].view(2, 3), "w_hh": both[6:].view(2, 3)})


def test_views_are_cut_to_their_own_bytes(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(1_000_000)[10:20]}, tmp_path / "view.pth")
    sm.merge([tmp_path / "view.pth"], tmp_path / "out.pth")
    assert (tmp_path / "out.pth").stat().st_size < 5000


def test_numeric_order_and_last(tmp_path: Path) -> None:
    for step in (200, 1000, 90):
        torch.save({"w": torch.tensor([float(step)])}, tmp_path / f"checkpoint-{step}.pt")
    result = sm.merge(str(tmp_path / "checkpoint-*.pt"), tmp_path / "average.safetensors", last=2)
    assert [Path(p).name for p in result.plan.recipe.inputs] == ["checkpoint-200.pt", "checkpoint-1000.pt"]
    assert load_safetensors(tmp_path / "average.safetensors")["w"].item() == 600.0


def test_replacing_is_not_warned_of(tmp_path: Path) -> None:
    paths = saved(tmp_path, {"w": torch.randn(3)}, {"w": torch.randn(3)})
    out = tmp_path / "out.safetensors"
    sm.merge(paths, out)
    assert any("`overwrite=True`" in warning for warning in sm.plan(paths, out).warnings)
    assert not sm.merge(paths, out, overwrite=True).warnings


def test_equal_headers_are_told_apart_by_their_files(tmp_path: Path) -> None:
    """A header is parsed once for all files that contain it; sizes and places stay those of each file."""
    models = [trained(seed) for seed in (1, 2, 3)]
    for model in models:
        model["norm.num_batches_tracked"] = torch.tensor(5)
    paths = saved(tmp_path, *models)
    headers = {path.read_bytes()[:200] for path in paths}
    assert len(headers) == 1, "the case needs equal headers"
    sm.merge(paths, tmp_path / "out.safetensors", weights=[0.2, 0.3, 0.5])
    expected = mean([m["embed.weight"] for m in models], [0.2, 0.3, 0.5])
    assert octets(load_safetensors(tmp_path / "out.safetensors")["embed.weight"]) == octets(expected)
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    with pytest.raises(sm.FormatError, match=r"in2\.safetensors is truncated: 1 bytes"):
        sm.plan(paths)
    paths[2].write_bytes(paths[1].read_bytes() + b"x")
    with pytest.raises(sm.FormatError, match=r"in2\.safetensors has 1 bytes behind"):
        sm.plan(paths)
