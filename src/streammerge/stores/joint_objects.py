"""Outputs in S3 that several machines make together. A machine sends whole files, as uploads that it does not complete.

The receipt of a file names its upload. So what a machine sends is invisible, two machines that make the same file send
different uploads, and the one that finishes completes those with a receipt. All others are aborted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from streammerge.errors import StoreError, printable
from streammerge.stores.base import Joint, Location, Output, Staging
from streammerge.stores.files import OutputFile
from streammerge.stores.local import LOCAL
from streammerge.stores.parts import Part, PartedOutput, Sender, Upload, part_bytes
from streammerge.stores.staged import Objects, ObjectStaging, Taken, whole_tag

_UPLOADS = "uploads"


@dataclass(frozen=True, slots=True)
class ObjectJoint(Joint):
    """See :class:`Joint`. ``as_folder``: whether the output is a folder."""

    out: Location
    home: Location
    as_folder: bool
    whole_files: ClassVar[bool] = True

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
        return PartedOutput(self.target(name), size, upload, Sender())

    def _note(self, name: str, upload: Upload) -> Location:
        return self.home / _UPLOADS / hashlib.sha256(f"{name} {_identifier(upload)}".encode()).hexdigest()[:32]

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

    def drop(self, output: Output) -> None:
        if isinstance(output, PartedOutput) and output.upload is not None:
            output.close()
            with contextlib.suppress(StoreError):
                output.sync()
                output.upload.abort()

    def stage(self, overwrite: bool, sent: Mapping[str, str]) -> Staging:
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
        store.delete([item.location for item in store.items(self.home)])


def _identifier(upload: Upload) -> str:
    return str(getattr(upload, "identifier", ""))


class _JointObjectStaging(ObjectStaging):
    """Publishes the uploads of several machines. ``sent``: what the receipt of each file says about its upload."""

    def __init__(self, joint: ObjectJoint, overwrite: bool, sent: Mapping[str, str]) -> None:
        self._joint, self._sent = joint, sent
        super().__init__(joint.out.store, joint.out, overwrite, lasting=False)
        self.as_folder = joint.as_folder

    def create(self, name: str, size: int, keep: bool = False, late: bool = False) -> Output:
        if late or name not in self._sent:
            return super().create(name, size, keep, late)
        identifier, _, tag = self._sent[name].partition(" ")
        target = self.target(name)
        again = self._store.upload_again(target, identifier)
        if again is not None:
            upload, parts = again
            made = PartedOutput(target, size, _Sent(upload), self._sender, part_bytes(size), parts)
            whole = not made.size or all(number in made.parts for number in range(made.count))
        else:
            status = self._store.look(target)  # completed by a run that was killed while it published
            whole = bool(status and status.size == size and tag and str(status.version).strip('"') == tag)
            made = PartedOutput(target, size, None, self._sender, part_bytes(size), whole=True)
        if not whole:
            raise StoreError(
                f"{printable(target)} was sent by a machine, and its upload is gone from the store; "
                "clean what is left, and make it again"
            )
        self._files[name] = made
        return made

    def abort(self, keep: bool = False) -> None:
        super().abort(keep)
        if not keep:
            self._joint.clear()


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


def create_small(store: Objects, location: Location, data: bytes) -> bool:
    """See :meth:`Location.create_small`."""
    try:
        store.put(location, data, "")
    except Taken:
        return store.get(location)[0] == data  # our own request may have been repeated
    return True
