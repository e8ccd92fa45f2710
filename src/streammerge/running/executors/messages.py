"""Messages between a process and its workers: pickles over a socket, each after its length.

The coordinating process sends WORK (with its number), UNIT, END (of the work) and QUIT to a worker. The worker answers with
RESULT, ERROR, CLOSED (the work) and GONE. To stop a work, the coordinating process sends STOP and the work's number to the
server.
"""

from __future__ import annotations

import copyreg
import ctypes
import io
import itertools
import pickle
import socket
import struct
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WORK, UNIT, END, QUIT, RESULT, ERROR, CLOSED, GONE, STOP = range(9)
_HEAD = struct.Struct("<BQ")
_RECEIVED_BYTES = 1 << 20
Message = tuple[int, bytes]


def framed(kind: int, data: bytes = b"") -> bytes:
    """Returns a message as bytes."""
    return _HEAD.pack(kind, len(data)) + data


def pickled(value: Any) -> bytes:
    """Returns a pickle. Torch tensors in it are plain bytes, which is twenty times as fast as torch's own way."""
    if "torch" not in sys.modules:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | {sys.modules["torch"].Tensor: _reduced}
    pickler.dump(value)
    return stream.getvalue()


def _reduced(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.device.type != "cpu" or tensor.requires_grad or tensor.is_quantized or tensor.layout != _torch().strided:
        reduced: tuple[Any, ...] = tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        return reduced
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    data = ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.nbytes else b""
    return _tensor, (data, tensor.dtype, tuple(tensor.shape))


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    flat: torch.Tensor = _torch().frombuffer(bytearray(data), dtype=dtype) if data else _torch().empty(0, dtype=dtype)
    return flat.reshape(shape)


def _torch() -> Any:
    import torch

    return torch


class Received:
    """Cuts received bytes into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, data: bytes) -> list[Message]:
        """Adds bytes. Returns the messages that are now complete."""
        self._bytes += data
        found, at = [], 0
        while len(self._bytes) >= at + _HEAD.size:
            kind, nbytes = _HEAD.unpack_from(self._bytes, at)
            stop = at + _HEAD.size + nbytes
            if len(self._bytes) < stop:
                break
            found.append((kind, bytes(memoryview(self._bytes)[at + _HEAD.size : stop])))
            at = stop
        del self._bytes[:at]
        return found


class Line:
    """A socket on which this process waits for the other side."""

    def __init__(self, link: socket.socket) -> None:
        self._link, self._received = link, Received()
        self._messages: list[Message] = []

    def receive(self) -> Message:
        """Returns the next message. Raises EOFError when the other side is gone."""
        while not self._messages:
            data = self._link.recv(_RECEIVED_BYTES)
            if not data:
                raise EOFError
            self._messages += self._received.take(data)
        return self._messages.pop(0)

    def send(self, kind: int, data: bytes = b"") -> None:
        self._link.sendall(framed(kind, data))


class RemoteTraceback(Exception):
    """The traceback of an error in a worker process. It is the last cause of the error, and is shown for debugging."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def pickled_error(error: BaseException) -> bytes:
    """Returns the pickle of an error with all its causes. A RuntimeError replaces each that cannot be pickled."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    chain: list[bytes] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(_pickled_one(cause))
        cause = cause.__cause__
    return pickled((chain, text))


def _pickled_one(error: BaseException) -> bytes:
    try:
        data = pickled(error)
        pickle.loads(data)
    except Exception:  # noqa: BLE001 - a user's own error class may fail in any way
        return pickled(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def unpickled_error(data: bytes) -> BaseException:
    chain, text = pickle.loads(data)
    errors: list[BaseException] = [*map(pickle.loads, chain), RemoteTraceback(text)]
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]
