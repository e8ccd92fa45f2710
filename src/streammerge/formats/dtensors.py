"""Rank files: each rank's state dict in a file of its own, with tensors that torch has distributed (DTensor).

A file such as ``model_world_size_4_rank_0.pt`` holds the rank's part of each tensor, the mesh of ranks, and how the tensor
is placed on it. Nothing of the mesh is made: the parts are joined where they lie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats.base import Container
from streammerge.formats.pieces import PIECE_BYTES, Box, PieceOf, assembled, check_boxes, checked_shape
from streammerge.formats.shards import ReadFile
from streammerge.pickles.state_dict import is_distributed
from streammerge.pickles.training_state import bars, is_training_state
from streammerge.pickles.tree import Instance, TensorRef, flat_tensor, mapping_items
from streammerge.sources.base import Source
from streammerge.stores.base import Location
from streammerge.tensors.spec import TensorSpec

NAME = "PyTorch files of several ranks"
"""What :class:`Container` calls the format."""
_FILE = re.compile(
    r"(?P<stem>.*?)(?P<world>_?world_size_\d+)?(?P<word>[._-]?rank[._-]?)(?P<rank>\d{1,6})\.(pt|pth|bin|ckpt)",
    re.IGNORECASE,
)
_STATE = re.compile(r"(?i)(optim|extra|rng|random|sched|scaler|data|train).*")
_DEEPEST = 8
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


def sets_of(names: Sequence[str]) -> dict[str, dict[int, str]]:
    """Returns the sets of rank files among names: what a set is called -> rank -> name."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        match = _FILE.fullmatch(name)
        if match and not _STATE.fullmatch(match["stem"]):
            found.setdefault(f"{match['stem']}{match['world'] or ''}", {})[int(match["rank"])] = name
    return {called: files for called, files in found.items() if len(files) > 1}


def read(folder: Location, files: Mapping[int, str], read_file: ReadFile) -> Container:
    """Returns the container of a set of rank files. Raises FormatError; nothing in them is executed."""
    where = printable(folder)
    absent = [rank for rank in range(max(files)) if rank not in files]
    told = re.search(r"world_size_(\d{1,6})", files[max(files)])
    absent += list(range(max(files) + 1, int(told[1]) if told else 0))
    if absent:
        raise FormatError(f"{where}: the files of the ranks {listed(list(map(str, absent)))} are absent; copy those of all")
    containers = [read_file(folder / files[rank]) for rank in sorted(files)]
    try:
        return _Reading(where, containers).container(folder)
    except StreammergeError:
        raise
    except _DAMAGE as error:
        raise FormatError(
            f"{where}: a distributed tensor in its rank files is damaged ({type(error).__name__}: {printable(error)}); "
            "nothing was executed"
        ) from error


@dataclass(frozen=True, slots=True)
class _Part:
    """One rank's part of a distributed tensor."""

    dtype_of: TensorRef
    shape: tuple[int, ...]
    box: Box
    mesh: tuple[int, ...]


class _Reading:
    def __init__(self, where: str, containers: list[Container]) -> None:
        self.where, self.containers = where, containers
        self.everything: list[Source] = []
        self.mesh = ""
        self.distributed = 0

    def container(self, folder: Location) -> Container:
        tree = self._node([container.tree for container in self.containers], (), 0)
        if not self.distributed:
            flat = any("_flat_param" in name for name in map(str, dict(mapping_items(self.containers[0].tree) or ())))
            what = "parameters that FSDP has flattened" if flat else "no distributed tensors"
            raise FormatError(
                f"{self.where}: its rank files hold {what}, so how they belong together is not known; save a full state "
                "dict, or give one of the files"
            )
        files = tuple(file for container in self.containers for file in container.files)
        made = Container(folder, NAME, tree, {}, files, arrays=self.everything)
        made.held_bytes = max(container.held_bytes for container in self.containers)
        made.held_bytes += PIECE_BYTES * sum(len(source.blobs) for source in self.everything)
        for container in self.containers:
            made.skipped |= container.tensor_spans()
        made.own_files = r".*rank[._-]?\d+\.(pt|pth|bin|ckpt)"
        made.facts["ranks"] = str(len(self.containers))
        if self.mesh:
            made.facts["mesh"] = self.mesh
        return made

    def _node(self, nodes: list[Any], path: tuple[Any, ...], depth: int) -> Any:
        """Returns a node of the first rank's tree with its tensors whole. ``nodes``: the same node of every rank."""
        first = nodes[0]
        if is_distributed(first):
            return self._whole(nodes, ".".join(map(str, path)))
        if isinstance(first, TensorRef):
            return self._added(self.containers[0].locate(".".join(map(str, path)), first))
        items = mapping_items(first)
        if items is None or depth > _DEEPEST:
            return None
        others = [dict(mapping_items(node) or ()) for node in nodes]
        made: dict[Any, Any] = {}
        for key, value in items:
            if isinstance(key, str | int) and not bars(key) and not is_training_state(key, value):
                node = self._node([other.get(key) for other in others], (*path, key), depth + 1)
                if node is not None:
                    made[key] = node
        return made or None

    def _added(self, source: Source) -> TensorRef:
        self.everything.append(source)
        return flat_tensor(source)

    def _whole(self, nodes: list[Any], name: str) -> TensorRef:
        """Returns the whole of a distributed tensor. A part that several ranks have counts once."""
        what = f"{self.where}: tensor {printable(name)}"
        pieces: dict[Box, PieceOf] = {}
        shape: tuple[int, ...] | None = None
        for rank, (node, container) in enumerate(zip(nodes, self.containers, strict=True)):
            if not is_distributed(node):
                raise FormatError(f"{what} is not in the file of rank {rank}; the files are of two checkpoints")
            part = _part(node, rank, what)
            if shape not in (None, part.shape):
                raise FormatError(f"{what} has the shapes {list(shape or ())} and {list(part.shape)} in two ranks' files")
            shape = part.shape
            self.mesh = self.mesh or _mesh_text(node, part.mesh)
            if part.box not in pieces:
                pieces[part.box] = PieceOf(part.box[0], container.locate(name, part.dtype_of))
        if shape is None:
            raise FormatError(f"{what} has no parts")
        self.distributed += 1
        check_boxes(list(pieces), shape, what)
        dtypes = {piece.source.spec.dtype for piece in pieces.values()}
        if len(dtypes) > 1:
            raise FormatError(f"{what} has parts of different dtypes; the files are of two checkpoints")
        spec = TensorSpec(name, dtypes.pop(), shape)
        return self._added(assembled(spec, list(pieces.values()), self.containers[0].path, what))


def _state(node: Any) -> Mapping[str, Any]:
    if not isinstance(node, Instance) or not isinstance(node.state, dict):
        raise TypeError("an object with fields expected")
    return node.state


def _part(node: Instance, rank: int, what: str) -> _Part:
    """Returns the part that a rank has of a DTensor."""
    state = node.args[3]
    fields = state[1] if isinstance(state, tuple) and len(state) == 2 else state
    local, spec = fields["_local_tensor"], _state(fields["_spec"])
    if not isinstance(local, TensorRef):
        raise FormatError(f"{what}: its part of rank {rank} is no plain tensor, which is not read")
    shape = checked_shape(_numbers(_meta(spec["tensor_meta"])), what)
    mesh = _mesh_shape(_state(spec["mesh"]))
    place = _coordinate(_state(spec["mesh"]), mesh, rank)
    box = _box(shape, mesh, place, spec["placements"], what)
    if box[1] != local.shape:
        raise FormatError(
            f"{what}: the part of rank {rank} has the shape {list(local.shape)}, where its placement gives {list(box[1])}; "
            "such a layout is not read"
        )
    return _Part(local, shape, box, mesh)


def _meta(node: Any) -> Any:
    """Returns the shape in a TensorMeta, which is a named tuple."""
    return node.args[0] if isinstance(node, Instance) and node.args else node.state["shape"]


def _numbers(node: Any) -> tuple[int, ...]:
    values = node.args[0] if isinstance(node, Instance) and node.args else node
    if not isinstance(values, tuple | list) or not all(isinstance(n, int) and 0 <= n < 1 << 60 for n in values):
        raise TypeError("a shape is no tuple of numbers")
    return tuple(values)


def _mesh_shape(mesh: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the number of ranks on each axis of a mesh. Older versions of torch keep a tensor of ranks."""
    ranks = mesh.get("mesh", mesh.get("_mesh"))
    if isinstance(ranks, TensorRef):
        return ranks.shape
    layout = _state(mesh["_layout"])
    if "axes" in layout:
        found = [math.prod(_numbers(_state(axis)["shape"])) for axis in layout["axes"]]
    else:
        found = [*_numbers(layout["shape"] if isinstance(layout["shape"], tuple) else (layout["shape"],))]
    if not found or math.prod(found) > 1 << 20 or 0 in found:
        raise ValueError("a mesh without ranks")
    return tuple(found)


def _coordinate(mesh: Mapping[str, Any], shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Returns the place of a rank in its mesh. Older versions of torch leave it out where ranks are in their order."""
    told = mesh.get("_coordinate_on_dim")
    if isinstance(told, tuple | list):
        place = _numbers(told)
    else:
        left, backward = rank % math.prod(shape), list[int]()
        for size in reversed(shape):
            left, at = divmod(left, size)
            backward.append(at)
        place = tuple(reversed(backward))
    if len(place) != len(shape) or any(at >= size for at, size in zip(place, shape, strict=True)):
        raise ValueError("a rank lies outside its mesh")
    return place


def _box(shape: tuple[int, ...], mesh: tuple[int, ...], place: tuple[int, ...], placements: Any, what: str) -> Box:
    """Returns the part of a tensor at a place of the mesh: each axis of the mesh cuts what the one before has left.

    A strided shard is cut after all others: FSDP cuts what tensor parallelism has left, although its axis comes first.
    """
    if not isinstance(placements, tuple | list) or len(placements) != len(mesh):
        raise ValueError("a tensor is not placed on every axis of its mesh")
    kinds = [each.path.rpartition(".")[2] if isinstance(each, Instance) else "" for each in placements]
    unread = [kind for kind in kinds if kind not in ("Shard", "Replicate", "_StridedShard")]
    if unread:
        raise FormatError(f"{what} is placed as {listed(list(map(printable, unread)))}, which is not read; save it sharded")
    offsets, sizes = [0] * len(shape), [*shape]
    order = sorted(range(len(mesh)), key=lambda axis: kinds[axis] == "_StridedShard")
    for axis in order:
        if kinds[axis] == "Replicate":
            continue
        dim = _state(placements[axis])["dim"]
        dim += len(shape) if dim < 0 else 0
        length = -(-sizes[dim] // mesh[axis])
        begin = min(place[axis] * length, sizes[dim])
        offsets[dim] += begin
        sizes[dim] = min(length, sizes[dim] - begin)
    return tuple(offsets), tuple(sizes)


def _mesh_text(node: Instance, shape: tuple[int, ...]) -> str:
    state = node.args[3]
    fields = state[1] if isinstance(state, tuple) and len(state) == 2 else state
    mesh = _state(_state(fields["_spec"])["mesh"])
    names = mesh.get("_mesh_dim_names", mesh.get("mesh_dim_names"))
    sizes = " x ".join(map(str, shape))
    return f"{sizes} ({', '.join(map(printable, names))})" if isinstance(names, tuple | list) and names else sizes
