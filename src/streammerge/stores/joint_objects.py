"""Outputs in S3 that several machines make together, as uploads that they do not complete, so that nothing is visible.

A small file is one machine's. Its receipt names the upload, so two machines that make the same file send different uploads,
and the one that finishes completes those with a receipt. All others are aborted.

A large file has one upload, whose identifier is an object that only one machine can create. Each machine sends the parts
that lie in its range. What is left of the range at both ends, because a part begins in one range and ends in the next, is
an object beside the receipts (*edge*). The machine that finishes joins these to parts. Whoever sends a part twice sends
the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from streammerge.errors import StoreError, printable
from streammerge.stores.base import Joint, Location, Output, Sent, Staging
from streammerge.stores.local import LOCAL
from streammerge.stores.parts import Part, PartedOutput, Sender, Upload, part_bytes
from streammerge.stores.staged import PUBLISHING, Objects, ObjectStaging, Taken, half_published, home_of, whole_tag
from streammerge.stores.written_files import OutputFile

_UPLOADS, _EDGES, _WHOLE = "uploads", "edges", "whole"
_FILES = "files"
_PART = "part "
_TRIES = 5


@dataclass(frozen=True, slots=True)
class ObjectJoint(Joint):
    """See :class:`Joint`. ``as_folder``: whether the output is a folder."""

    out: Location
    home: Location
    as_folder: bool
    whole_files: ClassVar[bool] = True
    shares_files: ClassVar[bool] = True

    @property
    def _store(self) -> Objects:
        return self.out.store  # type: ignore[return-value]

    def target(self, name: str) -> Location:
        """Returns the place that a file has when the output is published."""
        return self.out / name if self.as_folder else self.out

    def begin(self, folders: tuple[str, ...]) -> None:
        """Does nothing: an object needs no folder."""

    def exists(self) -> bool:
        return bool(self._store.items(self.home))

    def open(self, name: str, size: int) -> Output:
        upload = self._store.upload(self.target(name))
        self._note(name, upload).replace_small(json.dumps([name, _identifier(upload)]).encode())
        return _OwnOutput(self.target(name), size, upload, Sender())

    def _note(self, name: str, upload: Upload) -> Location:
        return self.home / _UPLOADS / _short(f"{name} {_identifier(upload)}")

    def temporary(self, name: str, size: int) -> Output:
        folder = tempfile.mkdtemp(prefix="streammerge-")
        return OutputFile(LOCAL.parse(folder) / name, size)

    def remove(self, location: Location) -> None:
        with contextlib.suppress(OSError):
            os.unlink(location.key)
            os.rmdir(location.parent.key)

    def sent(self, output: Output) -> str:
        if not isinstance(output, PartedOutput) or output.upload is None:
            raise ValueError("a file of this output is an upload")
        parts = output.finish()
        return f"{_identifier(output.upload)} {whole_tag(parts)}"

    def open_part(self, name: str, size: int) -> Output:
        target, place = self.target(name), self.home / _UPLOADS / f"shared-{_short(name)}"
        for _ in range(_TRIES):
            try:
                identifier = json.loads(self._store.get(place)[0])[1]
            except FileNotFoundError:
                made = self._store.upload(target)
                if not place.create_small(json.dumps([name, _identifier(made)]).encode()):
                    made.abort()
                continue
            again = self._store.upload_again(target, identifier)
            if again is None:
                break
            return _OwnOutput(target, size, _Sent(again[0]), Sender())
        raise StoreError(f"{printable(target)} has no upload any more; finish it, or clean what is left and begin again")

    def sent_part(self, output: Output, start: int, stop: int) -> str:
        if not isinstance(output, PartedOutput) or output.upload is None:
            raise ValueError("a file of this output is an upload")
        output.sync()
        output.check()
        inner, edges = _cut(start, stop, output)
        for begin, end in edges:
            data = bytearray(end - begin)
            output.read_into(memoryview(data), begin)
            self._store.put(self.edge(output.location, begin, end), b"%08x" % zlib.crc32(data) + data)
        return f"{_identifier(output.upload)} {_PART}{_digest(output.parts, inner)}"

    def edge(self, target: Location, begin: int, end: int) -> Location:
        """Returns the place of bytes that are less than a part of a file."""
        return self.home / _EDGES / f"{_short(target.name)}-{begin}-{end}"

    def edge_bytes(self, target: Location, begin: int, end: int) -> bytes:
        """Returns bytes of a file that are less than a part. Raises StoreError if they are lost or damaged."""
        try:
            data = self._store.get(self.edge(target, begin, end))[0]
        except FileNotFoundError:
            data = b""
        if len(data) != 8 + end - begin or data[:8] != b"%08x" % zlib.crc32(data[8:]):
            raise _gone(target)
        return data[8:]

    def whole(self, target: Location) -> Location:
        """Returns the object that holds the tag of a file whose parts are all known, before its upload is completed."""
        return self.home / _WHOLE / _short(target.name)

    def drop(self, output: Output) -> None:
        if isinstance(output, PartedOutput) and output.upload is not None:
            output.close()
            with contextlib.suppress(StoreError):
                output.sync()
                output.upload.abort()

    def stage(self, overwrite: bool, sent: Mapping[str, Sequence[Sent]]) -> Staging:
        return _JointObjectStaging(self, overwrite, sent)

    def published(self) -> bool:
        return False

    def clear(self) -> None:
        store = self._store
        notes = store.items(self.home / _UPLOADS)
        for item in notes:
            with contextlib.suppress(FileNotFoundError, ValueError, StoreError):
                name, identifier = json.loads(store.get(item.location)[0])
                again = store.upload_again(self.target(name), identifier)
                if again is not None:
                    again[0].abort()
        self._remove_home()

    def _remove_home(self) -> None:
        """Removes what is in the home, and the record of a run that was killed after it had published all files."""
        store = self._store
        store.delete([item.location for item in store.items(self.home)])
        if half_published(store, self.out) is None:
            store.delete([home_of(self.out) / PUBLISHING])


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _cut(start: int, stop: int, output: PartedOutput) -> tuple[range, list[tuple[int, int]]]:
    """Returns the numbers of the parts that lie in a range, and the rest of the range at both ends."""
    each = output.part_bytes
    first, last = -(-start // each), output.count if stop == output.size else stop // each
    if first > last:
        return range(0), [(start, stop)]
    ends = [(start, min(first * each, stop)), (min(last * each, stop), stop)]
    return range(first, last), [(begin, end) for begin, end in ends if begin < end]


def _digest(parts: Mapping[int, Part], numbers: range) -> str:
    """Returns a digest of the tags of parts, all of which must be there."""
    return _short(" ".join(parts[number].tag for number in numbers))


def _gone(target: Location) -> StoreError:
    return StoreError(
        f"{printable(target)} was sent by a machine, and its upload is gone from the store; "
        "clean what is left, and make it again"
    )


def _identifier(upload: Upload) -> str:
    return str(getattr(upload, "identifier", ""))


@dataclass(frozen=True, slots=True)
class CopiedJoint(ObjectJoint):
    """An output in a store whose client names no uploads. A machine writes whole files below the home, under names that no
    other machine uses. The store copies those with a receipt to their places when the output is published."""

    shares_files: ClassVar[bool] = False

    def open(self, name: str, size: int) -> Output:
        place = self.home / _FILES / uuid.uuid4().hex
        return _OwnOutput(self.target(name), size, _Elsewhere(self._store.upload(place), place), Sender())

    def sent(self, output: Output) -> str:
        if not isinstance(output, PartedOutput) or not isinstance(output.upload, _Elsewhere):
            raise TypeError("a file of this output is an upload")
        parts = output.finish()
        output.upload.complete(parts, True)
        output.whole = True
        return output.upload.place.name

    def stage(self, overwrite: bool, sent: Mapping[str, Sequence[Sent]]) -> Staging:
        return _CopiedStaging(self, overwrite, sent)

    def clear(self) -> None:
        self._remove_home()


class _Elsewhere(Upload):
    """An upload to another place than that of its file."""

    in_order = True

    def __init__(self, upload: Upload, place: Location) -> None:
        self._upload, self.place = upload, place

    def send(self, number: int, data: memoryview) -> Part:
        return self._upload.send(number, data)

    def complete(self, parts: Sequence[Part], replaces: bool) -> None:
        self._upload.complete(parts, replaces)

    def abort(self) -> None:
        self._upload.abort()


class _SentStaging(ObjectStaging):
    """Publishes what several machines have sent. ``sent``: what the receipts say about each file."""

    def __init__(self, joint: ObjectJoint, overwrite: bool, sent: Mapping[str, Sequence[Sent]]) -> None:
        self._joint, self._sent, self._keeps = joint, sent, False
        super().__init__(joint.out.store, joint.out, overwrite, lasting=False)
        self.as_folder = joint.as_folder

    def abort(self, keep: bool = False) -> None:
        self._keeps = keep
        super().abort(keep)
        if not keep:
            self._joint.clear()

    def _remove(self) -> None:
        if not self._keeps:
            super()._remove()
            return
        for file in self.outputs.values():  # the next run knows by the record that it may go on publishing
            self._dropped(file)


class _JointObjectStaging(_SentStaging):
    """Publishes the uploads of several machines."""

    def __init__(self, joint: ObjectJoint, overwrite: bool, sent: Mapping[str, Sequence[Sent]]) -> None:
        super().__init__(joint, overwrite, sent)
        self._large: list[PartedOutput] = []

    def create(self, name: str, size: int, keep: bool = False, late: bool = False) -> Output:
        if late or name not in self._sent:
            return super().create(name, size, keep, late)
        sent, target = self._sent[name], self.target(name)
        made = self._shared(target, size, sent) if _PART in sent[0].said else self._whole(target, size, sent[0].said)
        self._files[name] = made
        return made

    def _whole(self, target: Location, size: int, said: str) -> PartedOutput:
        """Returns a file that one machine has sent. Raises StoreError if it is gone."""
        identifier, _, tag = said.partition(" ")
        again = self._store.upload_again(target, identifier)
        if again is None:
            return self._completed(target, size, tag)
        upload, parts = again
        made = PartedOutput(target, size, _Sent(upload), self._sender, part_bytes(size), parts)
        if made.size and not all(number in made.parts for number in range(made.count)):
            raise _gone(target)
        return made

    def _completed(self, target: Location, size: int, tag: str) -> PartedOutput:
        """Returns a file that a run has completed which was killed while it published."""
        status = self._store.look(target)
        if not (status and status.size == size and tag and str(status.version).strip('"') == tag):
            raise _gone(target)
        return PartedOutput(target, size, None, self._sender, part_bytes(size), whole=True)

    def _shared(self, target: Location, size: int, sent: Sequence[Sent]) -> PartedOutput:
        """Returns a file of which several machines have sent ranges, with the parts that lie over two of them. Raises
        StoreError if something of it is gone."""
        again = self._store.upload_again(target, sent[0].said.partition(" ")[0])
        if again is None:
            with contextlib.suppress(FileNotFoundError):
                return self._completed(target, size, self._store.get(self._joint.whole(target))[0].decode())
            raise _gone(target)
        upload, there = again
        known: dict[int, Part] = {}
        ends: list[tuple[int, int]] = []
        measure = PartedOutput(target, size, None, self._sender, part_bytes(size))
        for start, stop, said in sorted(sent):
            inner, edges = _cut(start, stop, measure)
            if not all(number in there for number in inner) or not said.endswith(f" {_PART}{_digest(there, inner)}"):
                raise _gone(target)
            known.update({number: there[number] for number in inner})
            ends += edges
        made = PartedOutput(target, size, _Sent(upload), self._sender, part_bytes(size), known)
        for begin, end in ends:  # in their order, so that each part is complete before the next one begins
            made.write_full(self._joint.edge_bytes(target, begin, end), begin)
        self._large.append(made)
        return made

    def commit(self, as_folder: bool) -> None:
        for file in self._large:
            self._store.put(self._joint.whole(file.location), whole_tag(file.finish()).encode())
        super().commit(as_folder)


class _CopiedStaging(_SentStaging):
    """Publishes files that several machines have written below the home."""

    def create(self, name: str, size: int, keep: bool = False, late: bool = False) -> Output:
        if late or name not in self._sent:
            return super().create(name, size, keep, late)
        place, target = self._joint.home / _FILES / self._sent[name][0].said, self.target(name)
        status = self._store.look(place)
        if status is None or status.size != size:
            raise _gone(target)
        self._copies[name] = place, status
        made = self._files[name] = PartedOutput(target, size, None, self._sender, whole=True)
        return made


class _OwnOutput(PartedOutput):
    """A file with threads of its own, which end with it."""

    def close(self) -> None:
        super().close()
        self._sender.close()


class _Sent(Upload):
    """An upload that another machine has sent. It stays until it is completed."""

    def __init__(self, upload: Upload) -> None:
        self._upload, self.identifier = upload, _identifier(upload)

    def send(self, number: int, data: memoryview) -> Part:
        return self._upload.send(number, data)

    def complete(self, parts: Sequence[Part], replaces: bool) -> None:
        self._upload.complete(parts, replaces)

    def abort(self) -> None:
        """Does nothing: a next run may complete it."""


def joint_of(out: Location, key: str) -> ObjectJoint:
    """Returns the place where machines make an output together."""
    return ObjectJoint(out, out.parent / f".{out.name}.{key}.machines", out.ends_in_slash)


def copied_joint_of(out: Location, key: str) -> CopiedJoint:
    """Returns the place where machines make an output together, in a store whose client names no uploads."""
    return CopiedJoint(out, out.parent / f".{out.name}.{key}.machines", out.ends_in_slash)


def create_small(store: Objects, location: Location, data: bytes) -> bool:
    """See :meth:`Location.create_small`."""
    try:
        store.put(location, data, "")
    except Taken:
        return store.get(location)[0] == data  # our own request may have been repeated
    return True
