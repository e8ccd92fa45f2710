"""Runs mergekit's own test suite, with every merge in it made by streammerge.

``python tests/mergekit_suite.py FOLDER``, in an environment with mergekit 0.1.5, transformers and pytest, where FOLDER is
the unpacked source distribution of mergekit; ``scripts/mergekit-suite`` sets both up. A test counts as *expressible* if
every merge in it, at least one, is one that a recipe can ask for. mergekit computes each merge too:
its result is compared with ours, its gradients are kept where a test asks for gradients, and where both refuse, the test
sees mergekit's words. So a test passes through us only if our tensors satisfy it.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BAR = 0.945  # 350 of 370
_DRAWN = ("dare_linear", "dare_ties", "della", "della_linear")
_BY_DESIGN = {
    "test_task_arithmetic_values_and_gradients": "random numbers are not torch's",
    "test_linear_zero_weight_sum_follows_tensor_division": "weights that sum to 0 have no mean; mergekit's is NaN",
    "test_truncation_preserves_donor_config": "vocab_size follows the rows, so the model loads",
    "test_truncation_copies_out_of_range_metadata": "vocab_size follows the rows, so the model loads",
    "test_raw_graph_rejects_differing_buffers_before_casting": "integers of equal values are equal, whatever their widths",
}
"""What README states as a difference on purpose, and the tests that ask for the other way."""
_OF_ITS_KERNELS = ("peak_memory", "scratch", "allocations", "finite_differences", "autocast", "math_device")
"""Tests of what mergekit's kernels allocate, or of how it runs them: another program's result says nothing about that."""


class Unexpressible(Exception):
    """A merge that no recipe can ask for: the reason is its text."""


class Suite:
    """The pytest plugin: replaces mergekit's merges, and counts."""

    def __init__(self) -> None:
        self.test = ""
        self.ours: Counter[str] = Counter()
        self.not_ours: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.worst: dict[str, tuple[float, str]] = {}
        self.inside = False

    # -- what pytest calls ---------------------------------------------------------------------------------------------

    def pytest_runtest_setup(self, item: Any) -> None:
        self.test = item.name
        if item.module.__name__.endswith("test_sparsify"):
            item.module.sparsify = self.sparsify

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rsplit("::", 1)[-1]
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name] = report.outcome
            if report.outcome == "failed":
                self.failures[name] = str(getattr(report.longrepr, "reprcrash", report.longrepr))[-300:]

    # -- counting ------------------------------------------------------------------------------------------------------

    def _asked(self) -> None:
        self.ours[self.test] += 1

    def _refused(self, why: str) -> None:
        self.not_ours.setdefault(self.test, why)

    def _compare(self, ours: Any, theirs: Any, name: str, drawn: bool, narrow: bool = False) -> None:
        assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, mergekit {theirs.dtype}"
        assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)}, mergekit {tuple(theirs.shape)}"
        if drawn or not theirs.numel() or not theirs.dtype.is_floating_point or not theirs.isfinite().all():
            return
        largest = float(theirs.abs().max())
        difference = float((ours.double() - theirs.detach().double()).abs().max())
        relative = difference / largest if largest else difference
        kind = str(theirs.dtype).removeprefix("torch.") + ", computed in 16 bits by mergekit" * narrow
        if relative > self.worst.get(kind, (0.0, ""))[0]:
            self.worst[kind] = (relative, f"{self.test}: {name}")

    # -- merges of tensors ---------------------------------------------------------------------------------------------

    def merge(
        self,
        models: list[Mapping[str, Any]],
        method: str,
        shared: Mapping[str, Any],
        own: list[dict[str, Any]],
        base: int | None,
        dtype: Any = None,
        out_dtype: Any = None,
    ) -> dict[str, Any]:
        """One merge by streammerge, of files, into a file."""
        import torch
        from safetensors.torch import load_file, save_file

        import streammerge as sm

        if any(t.device.type != "cpu" for tensors in models for t in tensors.values()):
            raise Unexpressible("a device")
        if any(v is not None and not (isinstance(v, torch.dtype) and v.is_floating_point) for v in (dtype, out_dtype)):
            raise ValueError(f"{dtype} and {out_dtype} are no floating-point dtypes")
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for number, tensors in enumerate(models):
                paths.append(f"{folder}/{number}.safetensors")
                cast = {
                    name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().clone().contiguous()
                    for name, t in tensors.items()
                }
                save_file(cast, paths[-1])
            recipe: dict[str, Any] = {
                "merge_method": method,
                "models": [{"model": path, "parameters": values} for path, values in zip(paths, own, strict=True)],
                "parameters": dict(shared),
            }
            if base is not None:
                recipe["base_model"] = paths[base]
            if out_dtype is not None:
                recipe["out_dtype"] = str(out_dtype).removeprefix("torch.")
            self._asked()
            try:
                sm.merge(recipe=recipe, out=f"{folder}/out.safetensors", workers=1, allow_nonfinite=True, integers="error")
            except sm.StreammergeError as error:
                raise ValueError(str(error)) from error
            return load_file(f"{folder}/out.safetensors")

    def groups(self, method: Any, groups: Any, parameters: list[dict[str, Any]], dtype: Any, out_dtype: Any) -> list[Any]:
        """mergekit's groups with bound parameters, each merged by us."""
        results = []
        for number, (group, bound) in enumerate(zip(groups, parameters, strict=True)):
            shared = {name: value for name, value in bound.items() if not isinstance(value, Mapping)}
            own = [
                {name: value[entry.id] for name, value in bound.items() if isinstance(value, Mapping) and entry.id in value}
                for entry in group.entries
            ]
            name = group.metadata.name or f"tensor{number}.weight"
            base = next((i for i, entry in enumerate(group.entries) if entry.is_base), None)
            models = [{name: entry.tensor} for entry in group.entries]
            merged = self.merge(models, method.spec.name, _plain(shared), [_plain(o) for o in own], base, dtype, out_dtype)
            results.append(merged[name])
        return results

    def patch(self) -> None:
        import mergekit.merge
        import mergekit.merge_methods as methods
        import mergekit.scripts.merge_raw_pytorch as raw
        from mergekit.graph import Executor
        from mergekit.merge_methods import api, base

        suite = self
        call, execute, state_dicts = base.MergeMethod.__call__, base.MergeMethod._execute_resolved, api.merge_state_dicts
        run_merge, plan_flat_merge = mergekit.merge.run_merge, raw.plan_flat_merge
        built_in = {method.spec.name: method for method in methods.registered_methods()}

        def execute_ours(self: Any, groups: Any, parameters: Any, **options: Any) -> Any:
            theirs = execute(self, groups, parameters, **options)
            if suite.inside or built_in.get(self.spec.name) is not self:
                return theirs
            try:
                found = suite.groups(self, groups, parameters, options.get("dtype"), options.get("out_dtype"))
            except Unexpressible as why:
                suite._refused(str(why))
                return theirs
            return tuple(suite._with_gradients(o, t, self.spec.name) for o, t in zip(found, theirs, strict=True))

        def call_ours(self: Any, groups: Any, /, **options: Any) -> Any:
            try:
                return call(self, groups, **options)
            except (ValueError, TypeError) as error:
                if not suite.inside and built_in.get(self.spec.name) is self:
                    suite._refuse_too(self, tuple(groups), options, error)
                raise

        def state_dicts_ours(models: Any, method: Any, **options: Any) -> Any:
            return suite._state_dicts(state_dicts, built_in, models, method, options)

        def run_ours(config: Any, out_path: Any, options: Any = None, **more: Any) -> None:
            suite._run(run_merge, config, out_path, options, more)

        def plan_ours(config: Any, out_path: str, union: bool, intersection: bool, options: Any) -> Any:
            return suite._raw(plan_flat_merge, config, out_path, union, intersection, options)

        start = Executor.__init__

        def start_ours(executor: Any, targets: Any, *arguments: Any, **options: Any) -> None:
            start(
                executor,
                [targets.ours] if isinstance(targets, _Raw) and not suite.inside else targets,
                *arguments,
                **options,
            )

        Executor.__init__ = start_ours
        base.MergeMethod.__call__, base.MergeMethod._execute_resolved = call_ours, execute_ours
        api.merge_state_dicts = methods.merge_state_dicts = state_dicts_ours
        mergekit.merge.run_merge, raw.plan_flat_merge = run_ours, plan_ours
        self.built_in, self.bind = built_in, base.MergeMethod._bind_group_parameters

    def _with_gradients(self, ours: Any, theirs: Any, method: str, name: str = "tensor") -> Any:
        """Our numbers, with mergekit's graph of gradients behind them."""
        self._compare(ours, theirs, name, method in _DRAWN)
        if not theirs.requires_grad:
            return ours
        return theirs if ours.equal(theirs) else theirs + (ours - theirs).detach()

    def _refuse_too(self, method: Any, groups: Any, options: dict[str, Any], error: Exception) -> None:
        """Raises if a recipe makes what mergekit refuses."""
        from mergekit.merge_methods import TensorGroup

        if not groups or not all(isinstance(group, TensorGroup) for group in groups):
            self._refused("not a merge")
            return
        parameters = options.get("parameters") or {}
        bound = []
        for number, group in enumerate(groups):
            try:
                bound.append(self.bind(method, group, parameters, number, len(groups)))
            except (TypeError, ValueError):  # what a recipe is to refuse
                bound.append(dict(parameters))
        try:
            self.groups(method, groups, bound, options.get("dtype"), options.get("out_dtype"))
        except Unexpressible as why:
            self._refused(str(why))
        except ValueError:
            pass
        else:
            raise AssertionError(f"streammerge merges what mergekit refuses: {error}")

    def _state_dicts(self, original: Any, built_in: Any, models: Any, method: Any, options: dict[str, Any]) -> Any:
        name = method if isinstance(method, str) else method.spec.name
        if built_in.get(name) is not (method if not isinstance(method, str) else built_in.get(name)):
            return original(models, method, **options)
        theirs, error = None, None
        before, self.inside = self.inside, True
        try:
            theirs = original(models, method, **options)
        except Exception as caught:  # noqa: BLE001 (mergekit's refusal, whatever it is)
            error = caught
        finally:
            self.inside = before
        try:
            ours = self._state_dicts_ours(built_in[name], models, options)
        except Unexpressible as why:
            self._refused(str(why))
            if error is not None:
                raise error from None
            return theirs
        except ValueError:
            if error is not None:
                raise error from None
            raise
        if error is not None:
            raise AssertionError(f"streammerge merges what mergekit refuses: {error}")
        assert set(ours) == set(theirs), f"{sorted(ours)}, mergekit {sorted(theirs)}"
        return {k: self._with_gradients(ours[k], t, name, k) for k, t in theirs.items()}

    def _state_dicts_ours(self, method: Any, models: Any, options: dict[str, Any]) -> dict[str, Any]:
        import torch
        from mergekit.merge_methods import PerGroupValues, TensorGroup

        ids = list(models) if isinstance(models, Mapping) else list(range(len(models)))
        if None in ids:
            raise Unexpressible("models without a name")
        found = list(models.values()) if isinstance(models, Mapping) else list(models)
        tensors = [m.state_dict() if isinstance(m, torch.nn.Module) else dict(m) for m in found]
        parameters = options.get("parameters") or {}
        if any(isinstance(value, PerGroupValues) for value in parameters.values()):
            raise Unexpressible("values by group")
        if not options.get("strict", True):
            raise Unexpressible("names that all models have")
        base = ids.index(options["base"]) if options.get("base") is not None else None
        first = [next(iter(t.values())) for t in tensors]
        group = TensorGroup.from_tensors(first, ids=ids, base_index=base)
        try:
            bound = self.bind(method, group, parameters, 0, 1)
        except TypeError as error:
            raise ValueError(str(error)) from error
        own = [{k: v[i] for k, v in bound.items() if isinstance(v, Mapping) and i in v} for i in ids]
        shared = {k: v for k, v in bound.items() if not isinstance(v, Mapping)}
        return self.merge(
            tensors,
            method.spec.name,
            _plain(shared),
            [_plain(o) for o in own],
            base,
            options.get("dtype"),
            options.get("out_dtype"),
        )

    # -- configurations ------------------------------------------------------------------------------------------------

    def _run(self, original: Any, config: Any, out_path: Any, options: Any, more: dict[str, Any]) -> None:
        import yaml

        import streammerge as sm

        recipe = yaml.safe_load(config.to_yaml())  # mergekit's run changes its configuration
        choices: dict[str, Any] = {}
        if options is not None and options.unsafe_truncate_embeddings:
            choices["unsafe_truncate_embeddings"] = True
        with tempfile.TemporaryDirectory() as folder:
            theirs, error = f"{folder}/theirs", None
            before, self.inside = self.inside, True
            try:
                original(config, theirs, options, **more)
            except Exception as caught:  # noqa: BLE001 (mergekit's refusal, whatever it is)
                error = caught
            finally:
                self.inside = before
            self._asked()
            try:
                result = sm.merge(
                    recipe=_cast_first(recipe, Path(folder)), out=f"{out_path}/", overwrite=True, workers=1, **choices
                )
            except sm.StreammergeError as ours:
                if error is not None:
                    raise error from None
                raise ValueError(str(ours)) from ours
            for text in result.warnings:
                logging.warning(text)
            if error is not None:
                raise AssertionError(f"streammerge merges what mergekit refuses: {error}")
            self._folders(theirs, str(out_path), config, recipe)

    def _folders(self, theirs: str, ours: str, config: Any, recipe: Any) -> None:
        from mergekit.io import LazyTensorLoader

        a, b = (LazyTensorLoader.from_disk(path) for path in (theirs, ours))
        for name in a.index.tensor_paths:
            # mergekit writes some names as transformers 5 holds them, with a prefix that files lack.
            end = name.partition(".")[2]
            found = (
                [name] if name in b.index.tensor_paths else [each for each in b.index.tensor_paths if each.endswith(end)]
            )
            if len(found) != 1:
                continue
            x, y = a.get_tensor(name), b.get_tensor(found[0])
            asked = config.out_dtype or config.dtype
            if asked and x.is_floating_point() and str(y.dtype) == f"torch.{asked}":
                x = x.to(y.dtype)  # mergekit leaves some of its methods' results in float32
            if x.shape == y.shape or not _tokens(recipe):  # the order of new tokens is one of a hash table there
                narrow = config.dtype in ("bfloat16", "float16")
                self._compare(y, x, name, config.merge_method in _DRAWN or _tokens(recipe), narrow)

    def _raw(self, original: Any, config: Any, out_path: str, union: bool, intersection: bool, options: Any) -> Any:
        """A raw configuration: planned at once, and run as mergekit's only task."""
        from mergekit.graph import Executor, Task

        import streammerge as sm

        recipe = {key: value for key, value in config.model_dump(mode="json").items() if value is not None}
        for model in recipe["models"]:
            if model.get("parameters") is None:
                model.pop("parameters", None)
        policy = {"on_missing": "union" if union else "drop"} if union or intersection else {}
        suite = self
        self._asked()
        refusal: Exception | None = None
        plan_error: Exception | None = None
        try:
            tasks = original(config, out_path, union, intersection, options)
        except Exception as caught:  # noqa: BLE001 (mergekit's refusal, whatever it is)
            plan_error = caught
        try:
            sm.plan(recipe=recipe, out=f"{out_path}/", **policy)
        except sm.StreammergeError as caught:
            refusal = caught
        if plan_error is not None:
            if refusal is None:
                raise AssertionError(f"streammerge merges what mergekit refuses: {plan_error}")
            raise plan_error

        class Ours(Task[None]):
            def arguments(self) -> dict[str, Any]:
                return {}

            def execute(self, **_: Any) -> None:
                error = None
                suite.inside = True
                try:
                    Executor(tasks).execute()
                except Exception as caught:  # noqa: BLE001 (mergekit's refusal, whatever it is)
                    error = caught
                finally:
                    suite.inside = False
                with tempfile.TemporaryDirectory() as folder:
                    if error is None:
                        Path(out_path).rename(f"{folder}/theirs")
                    try:
                        cast = _cast_first(recipe, Path(folder))
                        sm.merge(recipe=cast, out=f"{out_path}/", workers=1, overwrite=True, integers="error", **policy)
                    except sm.StreammergeError as caught:
                        raise error or ValueError(str(caught)) from caught
                    if error is not None:
                        raise AssertionError(f"streammerge merges what mergekit refuses: {error}")
                    suite._folders(f"{folder}/theirs", out_path, config, recipe)

        return _Raw(tasks, Ours())

    # -- one tensor without a base -------------------------------------------------------------------------------------

    def sparsify(
        self, tensor: Any, density: float, method: Any, gamma: float = 0, rescale_norm: Any = None, epsilon: float = 0.15
    ) -> Any:
        import torch
        from mergekit.sparsify import sparsify

        theirs = sparsify(tensor, density, method, gamma=gamma, rescale_norm=rescale_norm, epsilon=epsilon)
        ways = {
            "magnitude": "ties",
            "random": "dare_linear",
            "magnitude_outliers": "breadcrumbs",
            "della_magprune": "della_linear",
        }
        name = ways[str(getattr(method, "value", method))]
        kind = getattr(rescale_norm, "value", rescale_norm)
        if kind in ("l2", "linf"):
            self._refused(f"rescaling by {kind}")
            return theirs
        shared: dict[str, Any] = {"normalize": False, "rescale": kind == "l1"}
        own: dict[str, Any] = {"weight": 1.0, "density": density}
        if name == "breadcrumbs":
            own["gamma"] = gamma
        if name == "della_linear":
            own["epsilon"] = epsilon
        merged = self.merge([{"w": torch.zeros_like(tensor)}, {"w": tensor}], name, shared, [{}, own], 0)["w"]
        self._compare(merged, theirs, "w", name in _DRAWN)
        return merged

    # -- the count -----------------------------------------------------------------------------------------------------

    def report(self) -> int:
        ran = {name: result for name, result in self.outcomes.items() if result != "skipped"}
        expressible = {
            name
            for name in ran
            if self.ours[name] and name not in self.not_ours and not any(part in name for part in _OF_ITS_KERNELS)
        }
        passed = {name for name in expressible if ran[name] == "passed"}
        designed = {name for name in expressible - passed if name.partition("[")[0] in _BY_DESIGN}
        for name in sorted(expressible - passed):
            why = _BY_DESIGN.get(name.partition("[")[0])
            print(f"  {'by design' if why else 'FAILED   '}  {name}: {why or self.failures.get(name, '')}")
        for name in sorted(set(ran) - expressible):
            if ran[name] != "passed":
                print(f"  not expressible, and failed: {name}: {self.failures.get(name, '')}")
        print(f"tests that ran: {len(ran)}; skipped for want of a device: {len(self.outcomes) - len(ran)}")
        print(f"not expressible (internals of mergekit): {len(ran) - len(expressible)}")
        for why, count in Counter(self.not_ours[n] for n in ran if n in self.not_ours).most_common():
            print(f"    of these for {why}: {count}")
        print(f"expressible: {len(expressible)}; passed through us: {len(passed)}; other by design: {len(designed)}")
        print("largest differences from mergekit, relative to the largest number of a tensor:")
        for kind, (worst, where) in sorted(self.worst.items()):
            print(f"    {kind}: {worst:.2g} ({where})")
        return 0 if expressible and len(passed) >= _BAR * len(expressible) else 1


class _Raw(list[Any]):
    """mergekit's tasks of a raw configuration, with the one that has streammerge do it."""

    def __init__(self, tasks: Any, ours: Any) -> None:
        super().__init__(tasks)
        self.ours = ours


def _tokens(recipe: Mapping[str, Any]) -> bool:
    return "tokenizer" in recipe or "tokenizer_source" in recipe


def _cast_first(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe over copies of its models in its dtype: mergekit's `dtype` rounds the inputs, ours the result only."""
    import streammerge as sm

    dtype, copies = recipe.get("dtype"), {}

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copied(each) for key, each in value.items()}
        if isinstance(value, list):
            return [copied(each) for each in value]
        if isinstance(value, str) and value.startswith("/") and Path(value).exists():
            if value not in copies:
                copies[value] = f"{folder}/{len(copies)}{Path(value).suffix or '/'}"
                sm.convert(value, copies[value], dtype=dtype, workers=1)
            return copies[value]
        return value

    return copied(recipe) if dtype and hasattr(__import__("torch"), str(dtype)) else recipe


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as YAML writes them: absent where they are None."""
    return {
        name: value.item() if hasattr(value, "item") else getattr(value, "value", value)
        for name, value in values.items()
        if value is not None
    }


def _common() -> types.ModuleType:
    """mergekit's ``tests/common.py``, which its source distribution lacks: tiny models, and a merge that is looked at."""
    import transformers as t

    module = types.ModuleType("tests.common")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}

    def saved(model: Any, path: Any) -> str:
        model.save_pretrained(path, safe_serialization=True)
        return str(path)

    def llama(path: Any, vocab_size: int = 64) -> str:
        return saved(t.LlamaForCausalLM(t.LlamaConfig(vocab_size=vocab_size, num_attention_heads=16, **small)), path)

    def granite(path: Any, vocab_size: int = 64) -> str:
        config = t.GraniteConfig(vocab_size=vocab_size, num_attention_heads=2, num_key_value_heads=2, **small)
        return saved(t.GraniteForCausalLM(config), path)

    def gpt2(path: Any) -> str:
        return saved(
            t.GPT2LMHeadModel(t.GPT2Config(n_embd=192, n_head=12, n_layer=12, n_positions=64, vocab_size=512)), path
        )

    def llava(path: Any) -> str:
        vision = t.CLIPVisionConfig(
            image_size=32, patch_size=4, num_hidden_layers=2, num_attention_heads=2, hidden_size=64, intermediate_size=128
        )
        text = t.LlamaConfig(vocab_size=64, num_attention_heads=16, **small)
        return saved(
            t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=text, image_seq_length=16)),
            path,
        )

    def run_and_check(
        config: Any,
        check_nan: bool = True,
        check_tensors: bool = True,
        validate: Any = None,
        index_json_name: str | None = None,
        auto_arch: bool = False,
    ) -> None:
        import mergekit.merge
        from mergekit.io import LazyTensorLoader
        from mergekit.options import MergeOptions

        with tempfile.TemporaryDirectory() as folder:
            mergekit.merge.run_merge(config, folder, MergeOptions())
            assert (Path(folder) / "config.json").exists()
            loader = LazyTensorLoader.from_disk(folder)
            names = set(loader.index.tensor_paths)
            assert names
            assert not check_nan or not any(loader.get_tensor(name).isnan().any() for name in names)
            if check_tensors:
                # mergekit looks for the names that transformers has in memory. Ours are the files', so transformers tells.
                architecture = getattr(t, t.AutoConfig.from_pretrained(folder).architectures[0])
                _, loading = architecture.from_pretrained(folder, output_loading_info=True)
                assert not loading["missing_keys"], sorted(loading["missing_keys"])[:3]
            if validate:
                validate(folder)

    module.__dict__.update(
        make_picollama=llama,
        make_picogranite=granite,
        make_gpt2size=gpt2,
        make_picoLlaVa=llava,
        run_and_check_merge=run_and_check,
    )
    return module


def main() -> int:
    import pytest

    folder = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(folder))
    suite = Suite()
    suite.patch()
    sys.modules["tests.common"] = _common()
    pytest.main(
        ["-q", "-p", "no:cacheprovider", "--tb=short", "--rootdir", str(folder), str(folder / "tests"), *sys.argv[2:]],
        plugins=[suite],
    )
    return suite.report()


if __name__ == "__main__":
    sys.exit(main())
