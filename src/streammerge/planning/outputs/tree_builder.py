"""Gives the tensors of a pickle their bytes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, printable
from streammerge.pickles.arrays import array_over, is_array, native, numpy_dtype
from streammerge.pickles.candidates import Found
from streammerge.pickles.repickle import Edit, storage_ref
from streammerge.pickles.tree import Blank, Enclosed, StorageRef, TensorRef, is_quantised, walk
from streammerge.planning.aligned import Merged
from streammerge.sources.base import Source
from streammerge.sources.inline import Inline
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec, contiguous_strides

BARE = TensorRef(StorageRef("", None, 0), DType.F32, 0, (), ())
"""A tensor without a wrapper."""


class Builder:
    """Gives every tensor of a pickle its own bytes: a storage, or for an array of numpy a blank in the pickle.

    ``plain``: the output is a plain pickle, in which storages are blanks too. ``arrays``: every tensor is an array.
    ``kept``: the arrays of the first input whose bytes stay in the pickle.
    """

    def __init__(self, edit: Edit, plain: bool, arrays: bool) -> None:
        self.edit, self.plain, self.arrays = edit, plain, arrays
        self.storages: dict[str, tuple[str, int]] = {}
        self.tensors: dict[str, tuple[TensorSpec, Merged | None, Source | None]] = {}
        self.kept: list[Source] = []
        self._merged: dict[str, Merged] = {}
        self._made: dict[tuple[str, bool], StorageRef] = {}
        self._copies: dict[tuple[object, ...], StorageRef] = {}
        self._dtypes: dict[DType, Any] = {}

    def place_merged(self, merged: Merged) -> None:
        """Makes a merged tensor known. It gets its bytes where it is put into the tree."""
        self._merged[merged.spec.name] = merged

    def _home(self, name: str, as_array: bool) -> StorageRef:
        """Returns the bytes of a merged tensor in a storage or in an array. A tensor that stands as both has them twice."""
        made = self._made.get((name, as_array))
        if made is None:
            merged = self._merged[name]
            made = self._made[name, as_array] = self._place(merged.spec, merged, None, as_array)
        return made

    def _place(self, spec: TensorSpec, merged: Merged | None, source: Source | None, as_array: bool) -> StorageRef:
        label = spec.name
        while label in self.tensors:
            label += "'"
        self.tensors[label] = (spec, merged, source)
        if as_array:
            return Blank.of(label, spec.nbytes)
        key = label if self.plain else str(len(self.storages))
        self.storages[label] = (key, spec.nbytes)
        made = storage_ref(key, spec.dtype, spec.numel)
        return Enclosed(key, made.dtype, made.numel) if self.plain else made

    def _fresh(self, spec: TensorSpec, storage: StorageRef, like: TensorRef | None) -> TensorRef:
        if isinstance(storage, Blank) and not isinstance(storage, Enclosed):
            return array_over(storage, spec.dtype, spec.shape, like, self._dtype(spec, like))
        made = TensorRef(storage, spec.dtype, 0, spec.shape, contiguous_strides(spec.shape))
        if like is not None:
            made.requires_grad, made.state = like.requires_grad, like.state
            made.wrapper = () if is_quantised(like) else like.wrapper
        return made

    def _dtype(self, spec: TensorSpec, like: TensorRef | None) -> Any:
        """Returns the pickled dtype of an array: the input's where it is the same."""
        if like is not None and is_array(like) and native(like.wrapper[3], spec.dtype):
            return like.wrapper[3]
        if spec.dtype not in self._dtypes:
            self._dtypes[spec.dtype] = numpy_dtype(spec.dtype)
        if self._dtypes[spec.dtype] is None:
            raise RecipeError(
                f"{printable(spec.name)} would be an array of {spec.dtype.torch_name}, which numpy does not have; "
                "pass another `dtype`, or write a .safetensors file"
            )
        return self._dtypes[spec.dtype]

    def stand_in(self, name: str, node: TensorRef) -> TensorRef:
        """Returns a tensor over the bytes of the merged tensor ``name``: an array if ``node`` is one, else with its
        wrapper."""
        spec = self._merged[name].spec
        return self._fresh(spec, self._home(name, self.arrays or is_array(node)), node)

    def added(self, name: str, like: TensorRef) -> TensorRef:
        """Returns the merged tensor ``name`` for a new entry: an array if its neighbour ``like`` is one."""
        return self.stand_in(name, like if is_array(like) else BARE)

    def standing_in(self, own: str, found: Found, name: str, entry: Source) -> str:
        """Returns the name of the tensor that stands in the place of ``found``: the merged tensor ``name``, made of
        ``entry``, or the same in the dtype of ``found``."""
        merged = self._merged[name]
        spec = merged.spec
        dtype = found.ref.dtype if found.node is None else found.node.dtype
        if dtype is spec.dtype or spec.dtype is not entry.spec.dtype or dtype.kind != spec.dtype.kind:
            return name
        self.place_merged(replace(merged, spec=replace(spec, name=own, dtype=dtype), tied=()))
        return own

    def place_rest(self, tree: Any, base: CheckpointIndex, home: dict[str, str]) -> None:
        """Copies from the first input all tensors that are still reachable and were not merged.

        A tensor that is a merged tensor under another path becomes that one. ``home``: base name -> merged name.
        """
        merged = {(base.plain or base).entries[name].place: made for name, made in home.items()}
        nodes = deque(walk(tree, self.edit.skipped()))
        while nodes:
            path, node = nodes.popleft()
            if id(node) in self.edit.replaced:
                continue
            if isinstance(node, TensorRef) and is_quantised(node):  # it stays as it is, with its integers and scales
                nodes.extend(((*path, *below), part) for below, part in walk(node.wrapper[1]))
                continue
            if isinstance(node, TensorRef):
                name = ".".join(map(str, path))
                entry = base.container.locate(name, node)
                if is_array(node) and isinstance(node.entry, Inline):
                    self.kept.append(entry)
                    continue
                if entry.nbytes and entry.place in merged:
                    self.edit.replaced[id(node)] = self.stand_in(merged[entry.place], node)
                    continue
                storage = self._copies.get(entry.place)
                if storage is None:
                    storage = self._place(entry.spec, None, entry, self.arrays or is_array(node))
                    self._copies[entry.place] = storage
                self.edit.replaced[id(node)] = self._fresh(entry.spec, storage, node)
            elif isinstance(node, StorageRef):
                octets = TensorRef(StorageRef(node.key, None, node.nbytes), DType.U8, 0, (node.nbytes,), (1,))
                entry = base.container.locate(f"storage {node.key}", octets)
                made = self._place(entry.spec, None, entry, as_array=False)
                self.edit.replaced[id(node)] = type(made)(made.key, node.dtype, node.numel, kind=node.kind)
