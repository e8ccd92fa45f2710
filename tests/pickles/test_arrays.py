"""numpy's arrays in pickles: what numpy itself reads is the oracle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streammerge.pickles.arrays import KEPT_BYTES, Arrays, Payload, dtype_of, in_c_order, is_array, numpy_dtype, unread_kind
from streammerge.pickles.repickle import repickle
from streammerge.pickles.tree import TensorRef
from streammerge.pickles.unpickle import unpickle
from streammerge.sources.base import Allocated, Source, read_whole
from streammerge.sources.deflated import Deflated, unpacked
from streammerge.sources.inline import Inline
from streammerge.stores.inputs import InputFiles
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec, contiguous_strides

CODES = ("<f8", "<f4", "<f2", ">f4", ">f8", ">c8", "<c8", "<c16", "<i8", "<i4", ">i2", "|i1", "<u8", "<u2", "|u1", "|b1")
SHAPES: tuple[tuple[int, ...], ...] = ((), (0, 3), (1,), (7,), (3, 5), (2, 3, 4), (301, 433))
PROTOCOLS = range(6)


def drawn() -> dict[str, Any]:
    """Returns every dtype in every difficult shape and both orders."""
    chance, made = np.random.RandomState(3), dict[str, Any]()
    for code in CODES:
        for shape in SHAPES:
            numbers = np.asarray(chance.randn(*shape) * 100) if code[1] != "b" else np.asarray(chance.randn(*shape) > 0)
            numbers = (np.abs(numbers) if code[1] == "u" else numbers).astype(code)
            made[f"{code}{shape}C"] = np.array(numbers, code, order="C")
            made[f"{code}{shape}F"] = np.array(numbers, code, order="F")
    return made


def octets_of(source: Source, folder: Path) -> bytes:
    """Reads a source, and unpacks its record first if it has one."""
    if isinstance(source, Deflated):
        path, record = source.path, source.record
        packed = path.read(record.offset, record.compressed_bytes)
        pieces = (packed[start : start + 1013] for start in range(0, len(packed), 1013))
        plain = folder / "unpacked"
        plain.write_bytes(b"".join(unpacked(record, pieces)))
        assert plain.stat().st_size == record.nbytes
        source = source.inflated(parse(plain), 0)
    return bytes(read_whole(source, Allocated(InputFiles({}).get)))


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.sampled(2, by="protocol")
def test_every_number_is_what_numpy_reads(tmp_path: Path, protocol: int, in_file: bool) -> None:
    content = drawn()
    data = pickle.dumps(content, protocol)
    (tmp_path / "in.pkl").write_bytes(b"before" + data)
    arrays = Arrays(parse(tmp_path / "in.pkl"), 6) if in_file else Arrays("in memory")
    tree = unpickle(data, arrays=arrays)
    assert list(tree) == list(content)
    for name, expected in content.items():
        ref = tree[name]
        assert isinstance(ref, TensorRef)
        assert is_array(ref)
        entry = ref.entry
        assert entry is not None
        assert (entry.spec.dtype.torch_name, entry.spec.shape) == (expected.dtype.name, expected.shape), name
        little = np.ascontiguousarray(expected.astype(expected.dtype.newbyteorder("<")))
        assert octets_of(entry, tmp_path) == little.tobytes(), name
    assert len({ref.entry.place for ref in tree.values() if ref.entry.nbytes}) == sum(a.size > 0 for a in content.values())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_unchanged_array_is_written_as_it_is(protocol: int) -> None:
    content = {name: array for name, array in drawn().items() if array.nbytes < 1000}
    content["shared"] = content["<f4(7,)C"]
    back = pickle.loads(repickle(unpickle(pickle.dumps(content, protocol))))
    assert list(back) == list(content)
    assert back["shared"] is back["<f4(7,)C"]
    for name, array in content.items():
        assert type(back[name]) is np.ndarray
        assert (back[name].shape, back[name].dtype) == (array.shape, array.dtype.newbyteorder("<"))
        assert back[name].tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes(), name
        assert back[name].flags.writeable


class Named(np.ndarray):
    """A class of arrays, as np.memmap and np.matrix are."""


def test_the_class_of_an_array_stays() -> None:
    back = pickle.loads(repickle(unpickle(pickle.dumps([np.ones(3).view(Named), np.matrix([[1.0]])], 4))))
    assert [type(each) for each in back] == [Named, np.matrix]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_long_bytes_are_passed_over_and_others_read(tmp_path: Path, protocol: int) -> None:
    """Long texts and bytes of a file are read, long arrays are not, whatever their order in the file."""
    text, octets = "ü" * KEPT_BYTES, bytes(range(256)) * 300
    names = np.array(["a", "bc"] * 20_000)
    content = {"t": text, "w": np.ones(KEPT_BYTES), "o": octets, "b": bytearray(octets), "n": names, "again": octets}
    data = pickle.dumps(content, protocol)
    arrays = Arrays(parse(tmp_path), 0)
    tree = unpickle(data, arrays=arrays)
    assert (tree["t"], tree["o"], tree["again"]) == (text, octets, octets)
    assert pickle.loads(repickle({name: tree[name] for name in "tob"}))["b"] == octets
    assert np.array_equal(pickle.loads(repickle(tree["n"])), names)
    assert isinstance(tree["w"], TensorRef)
    assert [source.nbytes for source in arrays.sources] == [8 * KEPT_BYTES]
    if protocol:  # protocol 0 has texts without lengths
        assert arrays.left_bytes >= 8 * KEPT_BYTES
    assert not arrays.unclaimed


def test_arrays_of_python_2(tmp_path: Path) -> None:
    """Python 2 wrote bytes as strings. Their numbers may look like text in UTF-8."""
    for numbers in (b"\xc3\xa9\x00\x00", b"plain ascii!", b"\xff\xfe\xfd\xfc", bytes(range(256)) * 400):
        size = len(numbers)
        call = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(J" + size.to_bytes(
            4, "little"
        )
        kind = b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        data = b"\x80\x02" + call + kind + b"T" + size.to_bytes(4, "little") + numbers + b"tb."
        assert pickle.loads(data, encoding="latin1").tobytes() == numbers
        (tmp_path / "in.pkl").write_bytes(data)
        for arrays in (Arrays(), Arrays(parse(tmp_path / "in.pkl"), 0)):
            ref = unpickle(data, arrays=arrays)
            assert octets_of(ref.entry, tmp_path) == numbers


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.array([{}, 1], object), "objects"),
        (np.zeros(2, [("a", "f4"), ("b", "i4")]), "records"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "masked numbers"),
        (np.zeros(2, np.longdouble), "f16 numbers"),
        (np.array(["text"]), ""),
        (np.array(["2026-01-01"], "M8[D]"), ""),
    ],
)
def test_arrays_without_plain_numbers_stay_inert(array: Any, kind: str) -> None:
    data = pickle.dumps(array, 4)
    node = unpickle(data)
    assert not is_array(node)
    assert unread_kind(node) == kind
    assert pickle.loads(repickle(node)).tolist() == array.tolist()


@pytest.mark.parametrize(
    "change", [(b"K\x02K\x03\x86", b"K\x02K\x04\x86"), (b"K\x02K\x03\x86", b"K\x02J\xff\xff\xff\xff\x86")]
)
def test_an_array_whose_bytes_do_not_fit_is_no_array(change: tuple[bytes, bytes]) -> None:
    data = pickle.dumps(np.ones((2, 3)), 4)
    assert change[0] in data
    frame = data.index(b"\x95")  # without the frame, whose length would be wrong
    assert not is_array(unpickle((data[:frame] + data[frame + 9 :]).replace(*change)))


def test_a_value_that_reaches_beyond_the_file_is_damage(tmp_path: Path) -> None:
    from streammerge.errors import FormatError

    data = pickle.dumps(np.ones(KEPT_BYTES), 4)
    with pytest.raises(FormatError, match="it ends in a value"):
        unpickle(data[:-KEPT_BYTES], arrays=Arrays(parse(tmp_path), 0))


def test_dtypes_there_and_back() -> None:
    for dtype in DType:
        kind = numpy_dtype(dtype)
        if kind is None:
            assert dtype.kind == "packed" or dtype.torch_name.startswith(("bfloat", "float8", "complex32"))
            continue
        assert dtype_of(kind) == (dtype, 1)
        assert pickle.loads(repickle(kind)) == np.dtype(dtype.torch_name)
    assert dtype_of(unpickle(pickle.dumps(np.dtype(">c16")))) == (DType.C128, 8)
    for other in (np.dtype("U3"), np.dtype("O"), np.dtype([("a", "f4")]), np.dtype(("f4", 3)), np.float32, 3):
        assert dtype_of(unpickle(pickle.dumps(other))) is None


@pytest.mark.parametrize("code", ["u1", "f2", "f4", "f8", "c16"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (1, 7, 1, 2), (0, 2)])
def test_fortran_order_becomes_c_order(code: str, shape: tuple[int, ...]) -> None:
    array = np.array(np.abs(np.random.RandomState(1).randn(*shape) * 99), code, order="F")
    strides = tuple(reversed(contiguous_strides(tuple(reversed(shape)))))
    spec = TensorSpec("w", numpy_to(code), shape)
    assert in_c_order(array.tobytes(order="F"), spec, strides) == array.tobytes(order="C")


def numpy_to(code: str) -> DType:
    found = dtype_of(unpickle(pickle.dumps(np.dtype(code))))
    assert found is not None
    return found[0]


def test_a_payload_is_short_as_text() -> None:
    assert repr(Payload(3, 10_000, "raw")) == "<10000 bytes>"
    assert isinstance(unpickle(pickle.dumps(np.ones(2), 2)).entry, Inline)
