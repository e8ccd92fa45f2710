"""The container: where tensors lie in their storages, and which storages are refused. And the layout of a file."""

from __future__ import annotations

import pytest
import torch

import streammerge as sm
from streammerge.formats.base import MOST_EXPANDED_BYTES, Container, LayoutFile, Literal, StorageBytes, flat_tensor
from streammerge.pickles.tree import StorageRef, TensorRef
from streammerge.sources.deflated import PackedRecord
from streammerge.sources.stored import Stored
from streammerge.sources.strided import Strided
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

PATH, OTHER = parse("x.pth"), parse("y.pth")
STORES = {
    "0": StorageBytes(PATH, 64, 48),
    "packed": StorageBytes(PATH, 0, 400, PackedRecord(500, 40, 400)),
    "none": StorageBytes(OTHER, 0, 0),
}


def ref(key: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorRef:
    return TensorRef(StorageRef(key, DType.F32, 12), DType.F32, offset, shape, strides)


def container(tree: dict[str, TensorRef]) -> Container:
    return Container(PATH, "zip", tree, STORES, (PATH, OTHER), pickled=True)


@pytest.mark.parametrize("shape", [(), (1,), (12,), (3, 4), (0, 4), (2, 3, 2)])
def test_a_contiguous_tensor_begins_at_its_offset(shape: tuple[int, ...]) -> None:
    made = container({}).locate("w", ref("0", 0, shape, torch.empty(shape).stride()))
    assert isinstance(made, Stored)
    assert (made.begin, made.nbytes) == ((PATH, 64), 4 * torch.empty(shape).numel())


def test_a_view_is_strided_and_reaches_as_far_as_torch_says() -> None:
    view = torch.arange(12.0).reshape(3, 4).t()
    made = container({}).locate("w", ref("0", 0, tuple(view.shape), view.stride()))
    assert isinstance(made, Strided)
    assert made.strides == view.stride()
    for shape, strides, offset in (
        ((3, 4), (4, 1), 1),
        ((4, 3), (1, 4), 1),
        ((13,), (1,), 0),
        ((2,), (12,), 0),
        ((1,), (1,), -1),
    ):
        with pytest.raises(sm.FormatError, match=r"x\.pth: tensor w reaches to byte -?\d+ of a storage of 48 bytes"):
            container({}).locate("w", ref("0", offset, shape, strides))


def test_false_storages_and_endless_views_are_refused() -> None:
    with pytest.raises(sm.FormatError, match="lies in storage nowhere, which the file does not have"):
        container({}).locate("w", ref("nowhere", 0, (1,), (1,)))
    with pytest.raises(sm.FormatError, match="expanded beyond reason"):
        container({}).locate("w", ref("0", 0, (MOST_EXPANDED_BYTES,), (0,)))
    container({}).locate("w", ref("0", 0, (MOST_EXPANDED_BYTES // 4,), (0,)))


def test_spans_are_sorted_by_file_once_and_without_empty_ones() -> None:
    flat = flat_tensor(Stored(TensorSpec("b", DType.U8, (7,)), OTHER, 3))
    twice = flat_tensor(Stored(TensorSpec("c", DType.U8, (7,)), OTHER, 3))
    empty = flat_tensor(Stored(TensorSpec("e", DType.U8, (0,)), OTHER, 1))
    made = container({"b": flat, "c": twice, "e": empty})
    assert made.tensor_spans() == {PATH: [(64, 48), (500, 40)], OTHER: [(3, 7)]}
    assert made.locate("other", flat).spec == TensorSpec("other", DType.U8, (7,))


def test_the_receipt_replaces_its_blank_and_nothing_else() -> None:
    literals = (Literal(0, b"head 0000"), Literal(50, b"tail"))
    file = LayoutFile("x", 60, {"w": 9}, literals, receipt=b"0000")
    assert file.around({}, b"0000") == [*literals]
    assert file.around({}, b"1234") == [Literal(0, b"head 1234"), Literal(50, b"tail")]
    sealed = LayoutFile("x", 60, {}, literals, b"0000", lambda sums, receipt: [Literal(sums[9], receipt)])
    assert sealed.around({9: 5}, b"1234") == [Literal(5, b"1234")]
