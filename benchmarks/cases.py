"""The benchmark cases: commands of streammerge, each with a reference that only moves the bytes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.files import Model


@dataclass(frozen=True, slots=True)
class Case:
    """``arguments`` of streammerge; {0}, {1} are the inputs and {out} is the output.

    ``reference``: "cat+cp" reads all inputs and writes one output, "cp" copies one, "pass" starts Python. ``bar``: the
    target ratio to the reference. ``cold``: the inputs are not in the page cache. ``peers``: the method, if other tools
    have it too. ``quick``: part of a short run. ``most_cpu_seconds`` and ``most_bytes``: of the whole process; above them
    the run is a regression.
    """

    name: str
    models: tuple[Model, ...]
    arguments: tuple[str, ...]
    out: str = "out.safetensors"
    reference: str = "cat+cp"
    bar: float | None = None
    cold: bool = False
    peers: str = ""
    quick: bool = False
    most_cpu_seconds: float | None = None
    most_bytes: int | None = None

    @property
    def merges(self) -> bool:
        return self.reference == "cat+cp"


def _models(count: int, gigabytes: float = 2.0, **kind: str) -> tuple[Model, ...]:
    return tuple(Model(gigabytes, number, **kind) for number in range(count))


def _merge(models: tuple[Model, ...], *arguments: str, based: bool = False) -> tuple[str, ...]:
    inputs = [f"{{{number}}}" for number in range(len(models))]
    base = ("--base", inputs.pop(0)) if based else ()
    return ("merge", *inputs, *base, "-o", "{out}", "--format", "json", "--no-progress", *arguments)


def _linear(name: str, models: tuple[Model, ...], **more: object) -> Case:
    weights = ("--weights", "0.5,0.3,0.2") if len(models) == 3 else ()
    return Case(name, models, _merge(models, *weights), **more)  # type: ignore[arg-type]


def _method(method: str, *parameters: str, count: int = 3, based: bool = False, peers: str = "") -> Case:
    models = _models(count)
    return Case(method, models, _merge(models, *_arguments(method, parameters), based=based), peers=peers)


def _small(method: str, *parameters: str, count: int = 3, based: bool = False) -> Case:
    """Many small tensors: at most three times the CPU seconds of ``linear`` on the same files."""
    models = _models(count, 3.02, shape="small")
    arguments = _merge(models, *_arguments(method, parameters), based=based)
    return Case(f"{method} of 46,000 small tensors", models, arguments)


def _arguments(method: str, parameters: tuple[str, ...]) -> tuple[str, ...]:
    return ("--method", method, *(part for parameter in parameters for part in ("-p", parameter)))


def _convert(name: str, model: Model, out: str, bar: float) -> Case:
    return Case(name, (model,), ("convert", "{0}", "-o", "{out}", "--format", "json", "--no-progress"), out, "cp", bar)


_PTH, _LEGACY = Model(form="pth"), Model(form="legacy")

CASES: tuple[Case, ...] = (
    _linear("linear", _models(3), bar=1.8, peers="linear", quick=True),
    # Tools that load whole checkpoints need more memory for the largest than a small machine has.
    *(
        _linear(f"linear of {size:g} GB", _models(2, size), peers="linear" if size < 8 else "")
        for size in (1.0, 2.0, 4.0, 8.0)
    ),
    *(_linear(f"linear of {count} inputs", _models(count, 1.0)) for count in (4, 8, 16)),
    _linear("linear in float32", _models(3, 2.0, dtype="float32")),
    _linear("one giant tensor", _models(2, 4.0, shape="giant")),
    _linear("46,000 small tensors", _models(3, 3.02, shape="small"), bar=2.0),
    _linear("linear, cold cache", _models(3), cold=True),
    _linear("linear of .pth", _models(2, 2.0, form="pth"), out="out.pth"),
    _linear("linear of legacy .pth", _models(2, 2.0, form="legacy"), out="out.pth"),
    _method("ties", "density=0.5", based=True, peers="ties"),
    _method("slerp", "t=0.4", count=2, peers="slerp"),
    _method("karcher", peers="karcher"),
    _method("dare_linear", "density=0.5", based=True, peers="dare_linear"),
    _method("model_stock", based=True, peers="model_stock"),
    _method("sce", "select_topk=0.5", based=True, peers="sce"),
    _method("nuslerp", count=2, peers="nuslerp"),
    _method("task_arithmetic", based=True, peers="task_arithmetic"),
    _method("dare_ties", "density=0.5", based=True, peers="dare_ties"),
    _method("della", "density=0.5", based=True, peers="della"),
    _method("breadcrumbs", "density=0.5", based=True, peers="breadcrumbs"),
    _method("arcee_fusion", count=2, based=True, peers="arcee_fusion"),
    _small("slerp", "t=0.4", count=2),
    _small("nuslerp", count=2),
    _small("multislerp"),
    _small("karcher"),
    _small("model_stock", based=True),
    _small("task_arithmetic", based=True),
    *(_small(method, "density=0.5", based=True) for method in ("ties", "dare_linear", "dare_ties", "breadcrumbs", "della")),
    _small("sce", "select_topk=0.5", based=True),
    _small("arcee_fusion", count=2, based=True),
    _small("ram", based=True),
    _convert(".pth to safetensors", _PTH, "out.safetensors", 1.15),
    _convert("legacy .pth to safetensors", _LEGACY, "out.safetensors", 1.15),
    _convert("safetensors to .pth", Model(), "out.pth", 1.3),
    Case("--help", (), ("--help",), reference="pass", quick=True),
    Case("inspect 2 GB", (Model(),), ("inspect", "{0}"), reference="pass", quick=True),
    Case(
        "plan of two 1.56 TB models",
        tuple(Model(1560.0, number, shape="sparse") for number in range(2)),
        ("plan", "{0}", "{1}"),
        reference="pass",
        most_cpu_seconds=4.0,
        most_bytes=200 << 20,
    ),
    Case("plan three 2 GB", _models(3), ("plan", "{0}", "{1}", "{2}"), reference="pass", quick=True),
)
