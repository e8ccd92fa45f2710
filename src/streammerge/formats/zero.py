"""Checkpoints of DeepSpeed: ZeRO 1, 2 and 3, and the universal form.

Each rank's optimizer holds a part of the float32 master weights as flat tensors. A parameter is a range of these. The
files of the model hold the shapes of the parameters in the order of the flat tensors, the buffers, what is frozen, and
which names are tied. The tensors are those that DeepSpeed's ``zero_to_fp32.py`` makes, without its losses: at stage 1 it
drops frozen parameters.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats.base import Container
from streammerge.formats.pieces import PIECE_BYTES, checked_shape
from streammerge.formats.shards import ReadFile
from streammerge.pickles.tree import Instance, TensorRef, flat_tensor, mapping_items
from streammerge.sources.base import Source
from streammerge.sources.joined import joined
from streammerge.sources.recast import Recast
from streammerge.sources.reshaped import reshaped
from streammerge.stores.base import Location
from streammerge.stores.names import is_inner
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

NAME = "DeepSpeed ZeRO checkpoint"
UNIVERSAL_NAME = "DeepSpeed universal checkpoint"
"""What :class:`Container` calls the formats."""
UNIVERSAL = "zero"
"""The subfolder that holds the parameters of a universal checkpoint."""
_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?P<prefix>(?:bf16_)?zero_pp_rank_)(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_EXPERT = re.compile(r"(layer_\d+_)?expert_\d+_.*|expp_rank_\d+_.*")
_STAGE = re.compile(r"layer_\d+-model_(\d+-)?(states|\d+-model_states)\.pt|layer_\d+-model.*\.pt")
_EXPERT_LAYERS = ("ds_autoep_layers", "autoep_layers")
"""What the model's states tell of experts that AutoEP has placed. At stage 3 no file has a name of its own for them."""
_MOST_RANKS = 1 << 16
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
_CONVERT = "run DeepSpeed's `ds_to_universal.py` and give its output"


def is_file_of(name: str) -> bool:
    """Whether a file belongs to such a checkpoint, by its name."""
    return any(pattern.fullmatch(name) for pattern in (_MODEL, _OPTIM, _EXPERT, _STAGE))


def read(folder: Location, read_file: ReadFile) -> Container:
    """Returns the container of the folder of one step. Raises FormatError; nothing in it is executed."""
    names = [path.name for path in folder.children()]
    where = printable(folder)
    if not (folder / UNIVERSAL).is_folder():
        _refuse_others(names, where)
    try:
        reading = _Reading(folder, names, read_file)
        if (folder / UNIVERSAL).is_folder():
            return reading.universal()
        if any(reading.states.get(key) for key in _EXPERT_LAYERS):
            raise _of_experts(where)
        return reading.partitioned()
    except StreammergeError:
        raise
    except _DAMAGE as error:
        raise FormatError(
            f"{where} is no DeepSpeed checkpoint, or is damaged ({type(error).__name__}: {printable(error)}); nothing was "
            "executed"
        ) from error


def _refuse_others(names: Iterable[str], where: str) -> None:
    """Raises FormatError for the parts of models that were cut in another way too."""
    for name in names:
        found = _MODEL.fullmatch(name) or _OPTIM.fullmatch(name)
        if found and int(found["mp"]):
            raise FormatError(f"{where} is a DeepSpeed checkpoint with tensor parallelism, which is not read; {_CONVERT}")
        if _EXPERT.fullmatch(name):
            raise _of_experts(where)
        if _STAGE.fullmatch(name):
            raise FormatError(f"{where} is a DeepSpeed checkpoint of a pipeline, which is not read; {_CONVERT}")


def _of_experts(where: str) -> FormatError:
    return FormatError(f"{where} is a DeepSpeed checkpoint of a mixture of experts, which is not read; {_CONVERT}")


class _Flat:
    """Flat tensors one behind the other."""

    def __init__(self, tensors: Sequence[Source]) -> None:
        self.tensors = [tensor for tensor in tensors if tensor.spec.numel]
        self.ends = list(accumulate(tensor.spec.numel for tensor in self.tensors))

    @property
    def numel(self) -> int:
        return self.ends[-1] if self.ends else 0

    def cut(self, start: int, stop: int) -> Iterator[Source]:
        """Yields the parts that are elements ``start`` to ``stop``."""
        number = bisect_right(self.ends, start)
        while start < stop:
            tensor, begin = self.tensors[number], self.ends[number] - self.tensors[number].spec.numel
            end = min(stop, self.ends[number])
            part = tensor.rows(start - begin, end - begin)
            if part is None:
                raise ValueError("a flat tensor has no rows")
            yield part
            start, number = end, number + 1


class _Reading:
    """Reads the checkpoint in one folder."""

    def __init__(self, folder: Location, names: list[str], read_file: ReadFile) -> None:
        self.folder, self.names, self.where, self._read_file = folder, names, printable(folder), read_file
        self.files: list[Location] = []
        self.skipped: dict[Location, list[tuple[int, int]]] = {}
        self.held_bytes = 0
        found = [(int(match["rank"] or 0), name) for name in names if (match := _MODEL.fullmatch(name))]
        if not found:
            raise FormatError(f"{self.where} has no model_states.pt, which holds the shapes of the parameters; copy it too")
        self.model_files = dict(sorted(found))
        self.first = self._opened(self.model_files[min(self.model_files)])
        self.states = _mapping(self.first.tree)
        self.module = _tensors(self.states["module"])
        self.ranks = _rank_count(self.states.get("dp_world_size"))

    def _opened(self, name: str) -> Container:
        """Reads a file. Remembers which ranges of it hold tensors."""
        path = self.folder / name
        if not path.lexists():
            raise FormatError(f"{self.where}: {name} is absent; copy the files of all ranks")
        made = self._read_file(path)
        self.files.append(path)
        self.skipped |= made.tensor_spans()
        self.held_bytes = max(self.held_bytes, made.held_bytes)
        return made

    # ------------------------------------------------------------------------------------------------------- ZeRO 1, 2, 3

    def partitioned(self) -> Container:
        optim = {int(found["rank"]): name for name in self.names if (found := _OPTIM.fullmatch(name))}
        if not optim:
            return self._without_optimizer()
        opened = self._opened(optim[min(optim)])
        state = _mapping(_mapping(opened.tree)["optimizer_state_dict"])
        count = state.get("partition_count")
        ranks = _rank_count(max(count) if isinstance(count, list) and count else count) or self.ranks or len(optim)
        stage3 = "fp32_flat_groups" in state
        prefix = re.sub(r"\d+_mp_rank.*", "", optim[min(optim)])
        flats: list[list[Source]] = []
        for rank in range(ranks):
            name = f"{prefix}{rank}_mp_rank_00_optim_states.pt"
            of_rank = opened if rank == min(optim) else self._opened(name)
            states = _mapping(_mapping(of_rank.tree)["optimizer_state_dict"])
            found = states["fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups"]
            flats.append([_flat(of_rank, ref, name) for ref in _list(found)])
        shapes = [_shapes(group, self.where) for group in _list(self.states["param_shapes"])]
        sources = (
            self._of_stage3({name: shape for group in shapes for name, shape in group.items()}, flats)
            if stage3
            else self._of_stage2(shapes, flats, state)
        )
        stage = _stage(state.get("zero_stage")) or (3 if stage3 else 1)
        made = self._container(NAME, sources, ranks)
        made.facts |= {"ranks": str(ranks), "stage": f"ZeRO {stage}"}
        made.notes.append("beside the weights, not merged: the state of the optimizer")
        halves = {ref.dtype for name, ref in self.module.items() if name in sources and 0 not in ref.shape}
        if halves & {DType.BF16, DType.F16}:
            made.notes.append(
                "the weights of a DeepSpeed checkpoint are the float32 copies of its optimizer; its "
                f"{next(iter(self.model_files.values()))} alone has the 16-bit ones"
            )
        return made

    def _without_optimizer(self) -> Container:
        """Returns the model in the compute dtype, where the files of the optimizer are not there.

        Without ZeRO (stage 0) there are none, and no shapes either: the optimizer lies beside the whole model.
        """
        empty = [name for name, ref in self.module.items() if 0 in ref.shape]
        shapes = [_shapes(group, self.where) for group in _list(self.states["param_shapes"] or [])]
        lost = [name for group in shapes for name in group if name in empty]
        if lost:
            raise FormatError(
                f"{self.where} lacks its optim_states.pt, which hold the parameters of ZeRO 3 ({listed(lost, 4)}); copy "
                "these files too"
            )
        sources = {name: self.first.locate(name, ref) for name, ref in self.module.items()}
        made = self._container(NAME, sources, 1)
        if shapes:
            made.notes.append(
                f"{self.where} has no files of the optimizer, so the weights have the dtype of the computation"
            )
        return made

    def _of_stage2(
        self, shapes: list[dict[str, tuple[int, ...]]], flats: list[list[Source]], state: Mapping[str, Any]
    ) -> dict[str, Source]:
        """Returns the parameters of stages 1 and 2: a group is the parts of all ranks, one behind the other."""
        made: dict[str, Source] = {}
        paddings = state.get("param_alignment_paddings")
        if any(len(of_rank) != len(shapes) for of_rank in flats):
            raise FormatError(
                f"{self.where}: a rank has another number of groups of parameters than the model; it is damaged"
            )
        for number, group in enumerate(shapes):
            whole, at = _Flat([of_rank[number] for of_rank in flats]), 0
            padded = _list(paddings[number]) if isinstance(paddings, list) else [0] * len(group)
            for (name, shape), padding in zip(group.items(), padded, strict=True):
                made[name] = self._parameter(name, shape, [(whole, at, at + math.prod(shape))])
                at += math.prod(shape) + int(padding)
            align = 2 * len(flats)
            if -(-at // align) != -(-whole.numel // align):
                raise FormatError(
                    f"{self.where}: its ranks hold {whole.numel} elements of a group whose parameters need {at}; files of "
                    "two checkpoints are mixed, or one is damaged"
                )
        return made

    def _of_stage3(self, shapes: dict[str, tuple[int, ...]], flats: list[list[Source]]) -> dict[str, Source]:
        """Returns the parameters of stage 3: each rank has as many elements of each parameter, the last ones padded."""
        made: dict[str, Source] = {}
        wholes, at = [_Flat(of_rank) for of_rank in flats], 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = -(-numel // len(wholes))
            cuts = [(whole, at, at + min(part, numel - rank * part)) for rank, whole in enumerate(wholes)]
            made[name] = self._parameter(name, shape, [cut for cut in cuts if cut[2] > cut[1]])
            at += part
        if any(whole.numel != at for whole in wholes):
            raise FormatError(
                f"{self.where}: its ranks hold {listed(sorted({str(whole.numel) for whole in wholes}))} elements where the "
                f"parameters need {at}; files of two checkpoints are mixed, or one is damaged"
            )
        return made

    def _parameter(self, name: str, shape: tuple[int, ...], cuts: list[tuple[_Flat, int, int]]) -> Source:
        parts: list[Source] = []
        for whole, start, stop in cuts:
            if stop > whole.numel:
                raise FormatError(
                    f"{self.where}: parameter {printable(name)} ends at element {stop} of a part of {whole.numel}; files "
                    "of two checkpoints are mixed, or one is damaged"
                )
            parts += whole.cut(start, stop)
        return self._of_parts(name, shape, parts)

    def _of_parts(self, name: str, shape: tuple[int, ...], parts: list[Source]) -> Source:
        if not parts:
            return reshaped(self.first.locate(name, _empty(self.module, name, self.where)), shape)
        return reshaped(joined(name, parts), shape)

    # ---------------------------------------------------------------------------------------------------------- universal

    def universal(self) -> Container:
        shapes: dict[str, tuple[int, ...]] = {}
        for group in _list(self.states["param_shapes"]):
            shapes |= _shapes(group, self.where)
        sources: dict[str, Source] = {}
        for name, shape in shapes.items():
            if not is_inner(name):
                raise FormatError(
                    f"{self.where}: {printable(name)} is not the name of a folder; such a checkpoint is refused"
                )
            container = self._opened(f"{UNIVERSAL}/{name}/fp32.pt")
            tree = container.tree
            ref = tree if isinstance(tree, TensorRef) else _mapping(tree)["param"]
            source = container.locate(name, ref)
            if source.spec.numel != math.prod(shape) and source.spec.shape[1:] != shape[1:]:
                raise FormatError(
                    f"{self.where}: parameter {printable(name)} has {source.spec.numel} elements where its shape "
                    f"{list(shape)} needs {math.prod(shape)}; the file is damaged"
                )
            sources[name] = source if source.spec.numel != math.prod(shape) else reshaped(source, shape)
        return self._container(UNIVERSAL_NAME, sources, self.ranks or len(self.model_files))

    # ------------------------------------------------------------------------------------------------------- what is common

    def _container(self, kind: str, parameters: Mapping[str, Source], ranks: int) -> Container:
        """Returns the container of parameters, with buffers, frozen parameters and tied names in the model's order."""
        buffers = set(map(str, _list(self.states.get("buffer_names") or [])))
        frozen = self._frozen(ranks)
        tied = {str(name): str(first) for name, first in _mapping(self.states.get("shared_params") or {}).items()}
        made: dict[str, Source] = {}
        for name, ref in self.module.items():
            if name in parameters:
                made[name] = parameters[name]
            elif name in frozen:
                made[name] = frozen[name]
            elif name in tied and tied[name] in parameters:
                made[name] = parameters[tied[name]].named(name)
            elif name in buffers or 0 not in ref.shape:
                made[name] = _buffer(self.first.locate(name, ref)) if name in buffers else self.first.locate(name, ref)
            else:
                raise FormatError(f"{self.where}: no rank holds the tensor {printable(name)}, so it is not complete")
        made |= {name: source for name, source in (*parameters.items(), *frozen.items()) if name not in made}
        if not made:
            raise FormatError(f"{self.where} holds no parameters")
        pieces = sum(len(source.blobs) for source in made.values())
        container = Container(
            self.folder, kind, {n: flat_tensor(s.named(n)) for n, s in made.items()}, {}, tuple(self.files)
        )
        container.held_bytes = self.held_bytes + PIECE_BYTES * pieces
        container.skipped = self.skipped
        container.own_files = (
            r".*_(model|optim)_states\.pt|fp32\.pt|exp_avg\w*\.pt|step\.pt|optimizer_state\.pt|zero_to_\w+\.py"
        )
        if (step := self.states.get("global_steps")).__class__ is int:
            container.facts["step"] = str(step)
        return container

    def _frozen(self, ranks: int) -> dict[str, Source]:
        """Returns the frozen parameters: whole in the module, or in fragments of all ranks."""
        shapes = _shapes(self.states.get("frozen_param_shapes") or {}, self.where)
        made: dict[str, Source] = {}
        lost = {}
        for name, shape in shapes.items():
            ref = self.module.get(name)
            if ref is not None and ref.shape == shape and 0 not in shape:
                made[name] = self.first.locate(name, ref)
            else:
                lost[name] = shape
        if not lost:
            return made
        opened = [
            self.first if number == 0 else self._opened(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            for number, rank in enumerate(range(ranks))
        ]
        fragments = [(each, _mapping(_mapping(each.tree)["frozen_param_fragments"])) for each in opened]
        for name, shape in lost.items():
            whole = _Flat([_flat(each, of_rank[name], name) for each, of_rank in fragments])
            made[name] = self._parameter(name, shape, [(whole, 0, math.prod(shape))])
        return made


def _buffer(source: Source) -> Source:
    """Returns a buffer as zero_to_fp32 does: numbers in float32, all else as it is."""
    spec = source.spec
    if spec.dtype is DType.F32 or spec.dtype.kind != "float":
        return source
    return Recast(TensorSpec(spec.name, DType.F32, spec.shape), source)


def _empty(module: Mapping[str, TensorRef], name: str, where: str) -> TensorRef:
    ref = module.get(name)
    if ref is None or 0 not in ref.shape:
        raise FormatError(f"{where}: no rank holds the parameter {printable(name)}")
    return ref


def _mapping(node: Any) -> dict[str, Any]:
    items = mapping_items(node)
    if items is None and isinstance(node, Instance) and isinstance(node.state, dict):
        items = list(node.state.items())
    if items is None:
        raise TypeError(f"a dictionary expected, {type(node).__name__} found")
    return dict(items)


def _list(node: Any) -> list[Any]:
    if isinstance(node, list | tuple):
        return [*node]
    if isinstance(node, dict):  # param_shapes of older versions
        return [node]
    raise TypeError(f"a list expected, {type(node).__name__} found")


def _tensors(node: Any) -> dict[str, TensorRef]:
    return {str(name): ref for name, ref in _mapping(node).items() if isinstance(ref, TensorRef)}


def _shapes(node: Any, where: str) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the parameters of a group, in their order."""
    made: dict[str, tuple[int, ...]] = {}
    for name, size in _mapping(node).items():
        values = size.args[0] if isinstance(size, Instance) and size.path == "torch.Size" and size.args else size
        if not isinstance(values, tuple | list) or not all(isinstance(n, int) and 0 <= n < 1 << 60 for n in values):
            raise TypeError("a shape is no tuple of numbers")
        made[str(name)] = checked_shape(tuple(values), f"{where}: parameter {printable(name)}")
    return made


def _flat(container: Container, ref: Any, what: str) -> Source:
    """Returns a flat tensor. Raises TypeError for anything else."""
    if not isinstance(ref, TensorRef):
        raise TypeError(f"{what} has no flat tensors")
    source = container.locate(what, ref)
    return source if len(source.spec.shape) == 1 else reshaped(source, (source.spec.numel,))


def _rank_count(value: Any) -> int:
    """Returns a number of ranks, 0 if none is told."""
    if not isinstance(value, int):
        return 0
    if not 0 < value < _MOST_RANKS:
        raise ValueError(f"{value} is no number of ranks")
    return value


def _stage(node: Any) -> int:
    """Returns the stage, which is an enum; 0 if none is told."""
    value = node.args[0] if isinstance(node, Instance) and len(node.args) == 1 else node
    return value if isinstance(value, int) else 0
