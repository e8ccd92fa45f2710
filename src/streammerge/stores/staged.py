"""Outputs of object stores: sent in parts under their own names, invisible until they are published.

The files of tensors are uploads that are completed when everything is there. Indexes, receipts and other small files come
last, by conditional put; they are the record that the output is whole. Beside it, in a hidden folder, stand the lock and
the journal: objects that are written once each, since an object store does not append. An object of the journal also tells
the tags of the parts that were sent since the one before, so that a next run takes over only parts that the store still has
under these tags.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from streammerge.errors import LockedError, StoreError, printable
from streammerge.stores import lock
from streammerge.stores.base import JournalFile, Location, Output, Staging, Status
from streammerge.stores.local import LOCAL
from streammerge.stores.parts import Part, PartedOutput, Sender, SmallOutput, Upload
from streammerge.stores.remembering import forget
from streammerge.stores.space import exists_already
from streammerge.stores.written_files import OutputFile

LEASE_SECONDS = 180.0
"""A run on another machine that has not renewed its lock for this time has ended."""
BEAT_SECONDS = 30.0
_HEX = re.compile("[0-9a-f]{32}")
_PARTS = b"parts "


class Item(NamedTuple):
    """An object of a store: its place, its size, its tag, and when it was written, in seconds since 1970."""

    location: Location
    size: int
    tag: str
    written: float


class Taken(Exception):
    """Raised by a conditional put if the object is there, or is another one now."""


class Objects(Protocol):
    """What a staging needs from its store."""

    def put(self, location: Location, data: bytes, only: str | None = None) -> str:
        """Writes an object, and returns its tag. ``only``: "" if it must be absent, else the tag that it must have. Raises
        :class:`Taken`."""
        ...

    def get(self, location: Location) -> tuple[bytes, Item]:
        """Returns an object. FileNotFoundError if there is none."""
        ...

    def delete(self, locations: Iterable[Location]) -> None:
        """Removes objects; those that are absent count as removed."""
        ...

    def items(self, folder: Location) -> list[Item]:
        """Returns all objects below a folder."""
        ...

    def upload(self, location: Location) -> Upload:
        """Begins an upload."""
        ...

    def upload_again(self, location: Location, identifier: str) -> tuple[Upload, dict[int, Part]] | None:
        """Returns an upload that an earlier run began, and its parts. None if it is gone."""
        ...

    def abort_uploads(self, out: Location, as_folder: bool) -> None:
        """Aborts the uploads of an output that no run goes on with."""
        ...

    def uploads_below(self, place: Location) -> list[Location]:
        """Returns the files whose upload is not complete: of this name, and below it as a folder."""
        ...

    def copy(self, source: Location, status: Status, target: Location) -> bool:
        """Copies a file within the store. Returns False if it cannot."""
        ...

    def check_writable(self, location: Location, overwrite: bool) -> None: ...

    def look(self, location: Location) -> Status | None: ...


PUBLISHING = "publishing"
"""The object that tells which files a run publishes now."""


def half_published(store: Objects, out: Location) -> bool | None:
    """Whether a run was interrupted while it published an output, so that a part of its files is there and nothing else.

    None if all of them are there. False also if no run has begun to publish.
    """
    try:
        data, _ = store.get(home_of(out) / PUBLISHING)
        names = set(json.loads(data))
    except (FileNotFoundError, ValueError):
        return False
    there = {str(item.location) for item in store.items(out)} | ({str(out)} if store.look(out) else set())
    names = {name.rstrip("/") for name in names}
    there = {name.rstrip("/") for name in there}
    return None if there == names else there < names


def home_of(out: Location) -> Location:
    """Returns the hidden folder beside an output."""
    return out.parent / f".{out.name}.streammerge"


class _Recorded(NamedTuple):
    """What the journal tells about an upload."""

    identifier: str
    size: int
    each: int
    parts: dict[int, Part]


class ObjectLock:
    """A lock that is an object, which only one run can create. Its owner renews it; an old one of another machine, or one
    of a process that has ended on this machine, is taken over."""

    ours: set[Location] = set()

    def __init__(self, store: Objects, location: Location, out: Location) -> None:
        self._store, self.location, self._out = store, location, out
        self._owner = lock.this_run()
        self._stop, self._lost = threading.Event(), False
        self._tag = self._take()
        self.ours.add(location)
        self._thread = threading.Thread(target=self._renew, name="streammerge-lock", daemon=True)
        self._thread.start()

    def _text(self) -> bytes:
        return json.dumps({**self._owner._asdict(), "renewed": time.time()}).encode()

    def _take(self) -> str:
        for _ in range(5):
            try:
                return self._store.put(self.location, self._text(), "")
            except Taken:
                pass
            try:
                data, item = self._store.get(self.location)
            except FileNotFoundError:
                continue
            owner = owner_of(data)
            if owner == self._owner and self.location not in self.ours:  # our own request, which was repeated
                return item.tag
            if runs(owner, item, self._store):
                raise LockedError(f"{printable(self._out)} is being written by {owner}; wait for it")
            try:
                return self._store.put(self.location, self._text(), item.tag)
            except Taken:
                continue
        raise LockedError(f"{printable(self._out)} is being written by another run; wait for it")

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._tag = self._store.put(self.location, self._text(), self._tag)
            except Taken:
                self._lost = True
                return
            except StoreError:
                continue

    def check(self) -> None:
        """LockedError if another run has taken over."""
        if self._lost:
            raise LockedError(f"another run has taken over {printable(self._out)}, as this one was silent for long")

    def release(self) -> None:
        self._stop.set()
        self.ours.discard(self.location)
        if not self._lost:
            self._store.delete([self.location])


def owner_of(data: bytes) -> lock.Owner:
    """Returns the owner that a lock names."""
    try:
        said = json.loads(data)
        said.pop("renewed", None)
        return lock.Owner(**said)
    except (ValueError, TypeError, AttributeError):
        return lock.UNKNOWN


def runs(owner: lock.Owner, item: Item, store: Objects) -> bool:
    """Whether the owner of a lock may still be alive. ``item``: the lock."""
    here = lock.this_run()
    if (owner.boot, owner.namespace) == (here.boot, here.namespace) and owner.boot:
        if owner.pid == here.pid:
            return item.location in ObjectLock.ours
        return lock.may_run(owner, None)
    return _now(store, item.location.parent) - item.written < LEASE_SECONDS


def _now(store: Objects, home: Location) -> float:
    """Returns the time by the clock of the store, which the times of its objects are told in.

    This machine's clock may differ from it by more than a lease. It is used where nothing can be written.
    """
    clock = home / "clock"
    try:
        store.put(clock, b"")
        now = store.get(clock)[1].written
        store.delete([clock])
    except (StoreError, OSError):
        return time.time()
    return now


class ObjectJournal(JournalFile):
    """A journal as objects: each is written once, and holds a line about parts and lines of the journal."""

    def __init__(self, store: Objects, folder: Location) -> None:
        self._store, self.folder = store, folder
        self._begun, self._count = "", 0
        self.staging: ObjectStaging | None = None

    def _found(self) -> list[Item]:
        """Returns the objects of the newest journal, in their order."""
        every = sorted(self._store.items(self.folder), key=lambda item: item.location.key)
        if not every:
            return []
        last = every[-1].location.parent.name
        return [item for item in every if item.location.parent.name == last]

    def read(self) -> bytes | None:
        found = self._found()
        return b"".join(self._read(item)[1] for item in found) if found else None

    def recorded(self) -> dict[str, _Recorded]:
        """Returns what the journal tells about uploads, by the names of the files."""
        made: dict[str, _Recorded] = {}
        for item in self._found():
            for name, said in self._read(item)[0].items():
                identifier, size, each, parts = said
                known = made.get(name)
                if known is None or known.identifier != identifier:
                    known = made[name] = _Recorded(identifier, size, each, {})
                known.parts.update({int(number): Part(*part) for number, part in parts.items()})
        return made

    def _read(self, item: Item) -> tuple[dict[str, Any], bytes]:
        data, _ = self._store.get(item.location)
        first, _, rest = data.partition(b"\n")
        try:
            return json.loads(first.removeprefix(_PARTS)), rest
        except ValueError:
            return {}, rest

    def begin(self, data: bytes) -> None:
        before = [item.location for item in self._store.items(self.folder)]
        self._begun, self._count = f"{time.time_ns():020d}", 0
        self._put(data, every=True)
        self._store.delete(before)

    def append(self, data: bytes) -> None:
        self._put(data)

    def _put(self, data: bytes, every: bool = False) -> None:
        said = self.staging.told_parts(every) if self.staging else {}
        line = _PARTS + json.dumps(said, separators=(",", ":")).encode() + b"\n"
        self._store.put(self.folder / self._begun / f"{self._count:08d}", line + data)
        self._count += 1

    def end(self) -> None:
        return

    def clear(self) -> None:
        self._store.delete([item.location for item in self._store.items(self.folder)])


class ObjectStaging(Staging):
    """An output of an object store in the making. ``lasting``: whether a next run can go on with uploads of this one."""

    def __init__(self, store: Any, out: Location, overwrite: bool, lasting: bool = True) -> None:
        self.lasting = lasting
        home = home_of(out)
        journal = ObjectJournal(store, home / "journal")
        super().__init__(out, home, journal)
        journal.staging = self
        self._store: Objects = store
        self._journal, self._overwrite = journal, overwrite
        store.check_writable(out, overwrite)
        self._lock = ObjectLock(store, home / "lock", out)
        self._sender = Sender()
        self._copies: dict[str, tuple[Location, Status]] = {}
        self._recorded: dict[str, _Recorded] | None = None
        self._told: dict[str, set[int]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._published = self._ended = False

    # -------------------------------------------------------------------------------------------------------------- files

    def target(self, name: str) -> Location:
        """Returns the place that a file of the output has when it is published."""
        self.place(name)  # checks the name
        return self.out / name if self.as_folder else self.out

    def create(self, name: str, size: int, keep: bool = False, late: bool = False) -> Output:
        if name in self._files:
            self._dropped(self._files.pop(name))
        self._told.pop(name, None)
        target = self.target(name)
        made: Output
        if late:
            made = SmallOutput(target, size)
        else:
            made = (self._earlier(name, target, size) if keep else None) or self._new(target, size)
        self._files[name] = made
        return made

    def _new(self, target: Location, size: int) -> PartedOutput:
        return PartedOutput(target, size, self._store.upload(target), self._sender)

    def _earlier(self, name: str, target: Location, size: int) -> PartedOutput | None:
        """Returns the file with the parts that an earlier run has sent, as far as the store has them."""
        if self._recorded is None:
            self._recorded = self._journal.recorded() if self.lasting else {}
        said = self._recorded.get(name)
        if said is None or said.size != size:
            return None
        again = self._store.upload_again(target, said.identifier)
        if again is None:
            status = self._store.look(target)
            wanted = whole_tag([said.parts[number] for number in sorted(said.parts)])
            count = max(-(-size // said.each), 1)
            if status and status.size == size and len(said.parts) == count and str(status.version).strip('"') == wanted:
                return PartedOutput(target, size, None, self._sender, said.each, said.parts, whole=True)
            return None
        upload, there = again
        same = {
            number: said.parts[number]
            for number, part in there.items()
            if number in said.parts and (part.size, part.tag) == said.parts[number][:2]
        }
        return PartedOutput(target, size, upload, self._sender, said.each, same)

    def copies(self, source: Location, status: Status, name: str) -> bool:
        if source.store != self.out.store:
            return False
        self._copies[name] = source, status
        return True

    def temporary(self, name: str, size: int, keep: bool = False) -> Output:
        """Makes a file on this machine, since it is read at random."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="streammerge-")
        if name in self._temporary:
            self._temporary.pop(name).close()
        made = self._temporary[name] = OutputFile(LOCAL.parse(self._folder.name) / name, size)
        return made

    def opened(self, location: Location, size: int, keep: bool) -> Output:
        """Never asked for: :meth:`create` and :meth:`temporary` make the files themselves."""
        raise TypeError(f"a file of {type(self).__name__} is made by create or temporary")

    def told_parts(self, every: bool) -> dict[str, Any]:
        """Returns what the journal tells about parts: of all that were sent, or of those that it has not told yet."""
        said: dict[str, Any] = {}
        for name, file in self.outputs.items():
            if not isinstance(file, PartedOutput):
                continue
            identifier = getattr(file.upload, "identifier", "")
            known = self._told.setdefault(name, set())
            if every:
                known.clear()
            parts = {number: part for number, part in file.parts.copy().items() if number not in known}
            if parts or every:
                known.update(parts)
                said[name] = [identifier, file.size, file.part_bytes, parts]
        return said

    # ------------------------------------------------------------------------------------------------------------- the end

    @property
    def published(self) -> bool:
        return self._published

    @property
    def resumable(self) -> bool:
        return self.lasting and bool(self._journal._found())

    def clear(self) -> None:
        self._journal.clear()
        self._recorded = {}
        self._store.abort_uploads(self.out, self.as_folder)

    def commit(self, as_folder: bool) -> None:
        """Completes the uploads, copies side files, and puts small files last."""
        files = self.outputs
        self.close_temporary()
        late = {name: file for name, file in files.items() if isinstance(file, SmallOutput)}
        sent = {name: (file, file.finish()) for name, file in files.items() if isinstance(file, PartedOutput)}
        self._lock.check()
        self._store.check_writable(self.out, self._overwrite)
        names = {str(self.target(name)): None for name in (*files, *self._copies)}
        self._store.put(self.home / PUBLISHING, json.dumps([*names]).encode())
        before = self._replaced(as_folder) if self._overwrite else []
        record = [location for location in before if location.name.endswith(".json") or location.name in late]
        self._store.delete(record)
        for file, parts in sent.values():
            if not file.whole and file.upload is not None:
                file.upload.complete(parts, self._overwrite)
                file.whole = True
        self._store.abort_uploads(self.out, as_folder)  # those whose beginning was not answered
        for name, (source, status) in self._copies.items():
            if not self._store.copy(source, status, self.target(name)):
                raise StoreError(f"{printable(source)} could not be copied by the store")
        for name in sorted(late, key=_rank):
            self._put_last(self.target(name), bytes(late[name].data))
        made = {self.target(name) for name in (*files, *self._copies)}
        self._store.delete([each for each in before if each not in made and each not in record])
        self._published = True
        forget()
        self.abort()

    def _put_last(self, target: Location, data: bytes) -> None:
        try:
            self._store.put(target, data, None if self._overwrite else "")
        except Taken as error:
            if self._store.get(target)[0] != data:  # equal if our own request was repeated, or an earlier run had put it
                raise exists_already(self.out) from error

    def _replaced(self, as_folder: bool) -> list[Location]:
        """Returns the objects of the output that this one replaces."""
        below = [item.location for item in self._store.items(self.out)]
        return below if as_folder or below else []

    def close_temporary(self) -> None:
        for file in self._temporary.values():
            file.close()

    def abort(self, keep: bool = False) -> None:
        if self._ended:
            return
        self._ended = True
        forget()
        self.close_files()
        self._sender.close()
        if self._folder is not None:
            self._folder.cleanup()
        try:
            self._lock.check()
        except LockedError:
            return
        try:
            if not (keep and self.resumable):
                self._remove()
            self._lock.release()
        except StoreError as error:  # what is left can be removed at any time
            self.notes.append(f"{error}; `streammerge clean {printable(self.out)}` removes what is left")
        self._files.clear()
        self._temporary.clear()

    def _remove(self) -> None:
        """Removes uploads, journal and record, as far as there are any."""
        for file in self.outputs.values():
            self._dropped(file)
        if not self._published and self.lasting and self._recorded is not None:
            self._store.abort_uploads(self.out, self.as_folder)
        self._store.delete([self.home / PUBLISHING])
        self._journal.clear()

    def _dropped(self, file: Output) -> None:
        file.close()
        if isinstance(file, PartedOutput) and file.upload is not None and not file.whole:
            file.sync()
            file.upload.abort()


def _rank(name: str) -> tuple[bool, bool, str]:
    """Configurations first, then the index, then the receipt."""
    return name == "streammerge.json", name.endswith(".index.json"), name


def whole_tag(parts: Sequence[Part]) -> str:
    """Returns the tag that S3 gives to an object of these parts, "" if it cannot be told."""
    if not all(_HEX.fullmatch(part.tag) for part in parts):
        return ""
    digest = hashlib.md5(b"".join(bytes.fromhex(part.tag) for part in parts), usedforsecurity=False)
    return f"{digest.hexdigest()}-{len(parts)}"
