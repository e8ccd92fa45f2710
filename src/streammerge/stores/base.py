"""The protocol of stores, which separates the code that merges from the places where bytes live.

A :class:`Location` names a file or a folder in a store. It passes each question on to its :class:`Store`. A store of
one's own needs :meth:`Store.status`, :meth:`Store.is_folder`, :meth:`Store.list_names` and :meth:`Store.opened` to hold
inputs. To hold outputs too, it needs :meth:`Store.check_writable`, :meth:`Store.stage`, :meth:`Store.sweep`,
:meth:`Store.write_whole`, :meth:`Store.make_folder`, and :meth:`Store.reopen` unless it is of :attr:`Store.one_process`.
"""

from __future__ import annotations

import fnmatch
import io
import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple

from streammerge.errors import ChangedError, FormatError, RecipeError, printable
from streammerge.stores.keys import MAGIC, Key, normal
from streammerge.stores.names import is_inner
from streammerge.stores.streams import InputStream

if TYPE_CHECKING:  # local files do without
    from streammerge.stores.ahead import Ahead


class Status(NamedTuple):
    """The state of a file at one moment. Equal states mean equal bytes.

    ``place``: which file it is; two names with the same place are one file. ``size``: bytes. ``version``: changes when
    the content changes, such as a modification time or an entity tag.
    """

    place: tuple[object, ...]
    size: int
    version: object


class Location(Key):
    """A file or folder in a store, by its name. Immutable, hashable, ordered, picklable.

    ``key``: the name within the store, without a trailing slash. ``str()`` gives back what the user typed. Two locations
    are equal when they have the same store and key; :meth:`resolve` makes two spellings of one place equal.
    """

    __slots__ = ("_hash", "_text", "store")

    def __init__(self, store: Store, key: str | None = None, text: str | None = None) -> None:
        if key is None:
            raise TypeError("a Location has a store and a key; streammerge.location(text) reads one from a text or a path")
        self.store = store
        self.key = normal(key)
        self._text = store.spelled(self.key) if text is None else text
        self._hash = hash((store.scheme, self.key))

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._text!r})"

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Location) and self.key == other.key and self.store == other.store

    def __lt__(self, other: Location) -> bool:
        return (self.store.scheme, self.key) < (other.store.scheme, other.key)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.store, self.key, self._text)

    def _at(self, key: str) -> Location:
        return type(self)(self.store, key)

    @property
    def is_absolute(self) -> bool:
        """Whether the name means the same wherever the process runs."""
        return self.store.always_absolute or self.key.startswith("/")

    @property
    def ends_in_slash(self) -> bool:
        """Whether the user typed it as a folder."""
        return self._text.endswith("/")

    # ---------------------------------------------------------------------------------------------- what the store knows

    def absolute(self) -> Location:
        """The same, counted from the store's root; links stay."""
        return self.store.absolute(self)

    def resolve(self) -> Location:
        """The same without links and relative parts: equal for two names of one place."""
        return self.store.resolve(self)

    def status(self) -> Status:
        """The file now. FormatError when it is absent or no regular file."""
        return self.store.status(self)

    @property
    def size(self) -> int:
        """Bytes of the file. FormatError when it is absent or no regular file."""
        return self.store.status(self).size

    def exists(self) -> bool:
        """Whether a file or folder is there, links followed."""
        return self.store.exists(self)

    def lexists(self) -> bool:
        """Whether the name is there, even as a link that leads to nothing."""
        return self.store.lexists(self)

    def is_file(self) -> bool:
        return self.store.is_file(self)

    def is_folder(self) -> bool:
        return self.store.is_folder(self)

    def children(self) -> list[Location]:
        """The files and folders directly in a folder, sorted by name. OSError when it cannot be listed."""
        return [self / name for name in sorted(self.store.list_names(self))]

    def glob(self) -> list[Location]:
        """Returns the files and folders that match the name as a pattern."""
        return self.store.glob(self)

    def open(
        self,
        expected: Status | None = None,
        polite: bool = False,
        damaged: list[Damage] | None = None,
        ahead: Ahead | None = None,
    ) -> Input:
        """The file, opened for reading at offsets. ChangedError when it is no longer what was ``expected``.

        ``ahead``: fetches what is read next, if :attr:`Store.reads_ahead`.
        """
        if ahead is not None and self.store.reads_ahead:
            return self.store.opened_ahead(self, expected, ahead)
        return self.store.open(self, expected, polite, damaged)

    def stream(self) -> BinaryIO:
        """Opens the file as a buffered stream, which the caller closes. Raises FormatError if it cannot be opened."""
        return self.store.stream(self)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly ``nbytes`` at ``offset``. FormatError when the file ends before."""
        with self.stream() as stream:
            stream.seek(offset)
            data = stream.read(nbytes)
        if len(data) != nbytes:
            raise FormatError(f"{printable(self)} ends at byte {offset + len(data)}, {nbytes - len(data)} bytes too early")
        return data

    def broken_link(self) -> str:
        """Returns the message about a link that leads to nothing, "" for anything else."""
        return self.store.broken_link(self)

    @property
    def local_path(self) -> str | None:
        """The path by which other libraries can open it; None where it is no file of this machine."""
        return self.store.local_path(self)

    # ------------------------------------------------------------------------------------------------------------ outputs

    def check_writable(self, overwrite: bool) -> None:
        """RecipeError when the output exists and may not be replaced, or its folder is absent."""
        self.store.check_writable(self, overwrite)

    def stage(self, overwrite: bool = False) -> Staging:
        """Begins an output under this name. LockedError when another run makes it, RecipeError when it may not be made."""
        return self.store.stage(self, overwrite)

    def reopen(self, size: int) -> Output:
        """A file of an output in the making, opened once more: a worker process writes to it. OSError when absent."""
        return self.store.reopen(self, size)

    def sweep(self) -> None:
        """Removes the files of a killed run that cannot be continued: it had not begun to write, or it was finished."""
        self.store.sweep(self)

    def write_whole(self, data: bytes, overwrite: bool) -> None:
        """Writes a small file, whole and durable, or not at all. RecipeError when that cannot be done."""
        self.store.write_whole(self, data, overwrite)

    def make_folder(self) -> None:
        """Makes the folder, and those above it, where they are absent."""
        self.store.make_folder(self)

    def remove_files(self, names: Collection[str]) -> None:
        """Removes a file, or of a folder the files of these names and the folders that are empty then."""
        self.store.remove_files(self, names)

    def free_bytes(self) -> int | None:
        """Bytes that can still be written here; None when the store cannot tell."""
        return self.store.free_bytes(self)

    def replace_small(self, data: bytes) -> None:
        """Writes a small file, new or over the old one. Readers on other machines see it when they open the file again."""
        self.store.replace_small(self, data)

    def create_small(self, data: bytes, durable: bool = True) -> bool:
        """Creates a small file, whole. Returns False if it exists. Of several machines that call it at once, one gets
        True."""
        return self.store.create_small(self, data, durable)

    def join(self, key: str) -> Joint:
        """Returns the place where several machines make this output. ``key``: the same on all of them."""
        return self.store.join(self, key)


class Damage(NamedTuple):
    """An input that lost bytes while it was mapped. ``size``: its bytes when it was opened."""

    location: Location
    size: int


class Input(ABC):
    """A file opened for reading. Any number of threads may read at once."""

    location: Location
    size: int

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer from ``offset``. ChangedError when the file ends before."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Returns the bytes: without a copy if :attr:`Store.mappable`, otherwise read into memory.

        ChangedError when the file ends before.
        """
        buffer = memoryview(bytearray(nbytes))
        self.read_into(buffer, offset)
        return buffer

    def announce(self, offset: int, nbytes: int) -> None:
        """Says that the range is read next, so that a remote file can be fetched ahead."""
        return

    def is_cached(self, offset: int) -> bool:
        """Whether the system has this byte in its cache. False if that is not known."""
        return False

    def will_need(self, offset: int, nbytes: int) -> None:
        """Asks the system to read the range into its cache, and does not wait for it. Does nothing where it cannot."""
        return

    def read_into_cache(self, offset: int, nbytes: int, sink: int) -> None:
        """Reads the range into the system's cache, and waits for it. Does nothing where the system has no such call.
        ``sink``: a descriptor of the null device."""
        return

    def alone(self, offset: int, nbytes: int) -> memoryview:
        """Returns the bytes of a short range near which nothing is read soon: of a remote file no more than these are asked
        for. ChangedError when the file ends before."""
        buffer = memoryview(bytearray(nbytes))
        self.read_into(buffer, offset)
        return buffer

    def held(self, offset: int, nbytes: int) -> memoryview | None:
        """Returns the bytes if they are in memory in one place already, so that they need not be copied."""
        return None

    def release(self, offset: int, nbytes: int) -> None:
        """Says that the range is not needed soon, so that its memory can be given back."""
        return

    def close(self) -> None:
        """Closes the file. Views of it stay valid."""
        return

    def ended(self, offset: int, nbytes: int) -> ChangedError:
        """The error of a file that is shorter than it was."""
        return ChangedError(
            f"{printable(self.location)} ended before byte {offset + nbytes}: it was changed while it was read; start again"
        )


class Output(ABC):
    """A file of known size in the making. Any number of threads may write at once, at offsets, in any order.

    ``kept``: whether the bytes of an earlier run are in it. ``synced``: whether nothing was written since the last
    :meth:`sync`.
    """

    location: Location
    size: int
    kept: bool = False
    synced: bool = True
    in_parts: ClassVar[bool] = False
    """Whether it is sent in parts: what is sent cannot be read back, and what is not sent is not kept."""

    @abstractmethod
    def write_full(self, data: Any, offset: int) -> None:
        """Writes all bytes of a buffer at ``offset``. ValueError when they do not fit into the file."""

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills the buffer from ``offset``. Returns how many bytes there were."""

    def check(self) -> None:
        """Raises the OSError of a write whose failure the system reported late."""
        return

    def holds(self, offset: int, nbytes: int) -> bool:
        """Whether these bytes are kept if the process ends now, once :meth:`sync` has returned."""
        return True

    def preset(self, literals: Iterable[tuple[int, bytes]]) -> None:
        """Says which bytes are known before the others, as (offset, bytes), if it is sent in parts."""
        return

    def halted_by(self, halt: Callable[[], object]) -> None:
        """``halt`` raises an exception when the run is stopping. A write that waits calls it."""
        return

    def sync(self) -> None:
        """Waits until everything written is durable. After an OSError no byte of the file can be trusted."""
        self.synced = True

    def close(self) -> None:
        """Ends writing."""
        return

    def check_range(self, offset: int, nbytes: int) -> None:
        """ValueError when the bytes do not fit into the file."""
        if offset < 0 or offset + nbytes > self.size:
            name = self.location.name
            raise ValueError(f"bytes {offset} to {offset + nbytes} lie outside {name} of {self.size} bytes")


class JournalFile(ABC):
    """A small file beside an output in the making, to which the journal appends."""

    @abstractmethod
    def read(self) -> bytes | None:
        """Returns the whole content, None only if the file is absent. Raises OSError if it may be there."""

    @abstractmethod
    def begin(self, data: bytes) -> None:
        """Replaces the whole content by these bytes, in one durable step. :meth:`append` then adds to them."""

    @abstractmethod
    def append(self, data: bytes) -> None:
        """Adds bytes, durably."""

    @abstractmethod
    def end(self) -> None:
        """Closes the file."""


class Staging(ABC):
    """An output in the making, which appears under its name whole, at :meth:`commit`, or not at all.

    One run at a time has it. ``home``: the hidden folder that holds all of it. ``content``: the folder in which its files
    can be read back before they are published. ``journal_file``: holds the journal. ``notes``: sentences about promises
    that this place cannot keep. A store of one's own defines :meth:`opened` and what follows it.
    """

    def __init__(self, out: Location, home: Location, journal_file: JournalFile) -> None:
        self.out, self.home, self.journal_file = out, home, journal_file
        self.content = home / "output"
        self.notes: list[str] = []
        self.as_folder = True
        """Whether the output is a folder. Set before the first file is made."""
        self._files: dict[str, Output] = {}
        self._temporary: dict[str, Output] = {}

    def create(self, name: str, size: int, keep: bool = False, late: bool = False) -> Output:
        """Makes a file of the output, and closes the one that had this name.

        ``name``: its name; in a folder also a path below it (:func:`streammerge.stores.names.is_inner`), whose folders are
        made. ``keep``: keeps the bytes of an earlier run if the file exists in this size. ``late``: whether it is a small
        file that says that the output is whole, such as an index. Raises ValueError for a name that leads out of it.
        """
        return self._added(self._files, name, self.place(name), size, keep)

    def temporary(self, name: str, size: int, keep: bool = False) -> Output:
        """A file that can be read back by its location and goes when the staging ends. ``keep``: as for :meth:`create`."""
        return self._added(self._temporary, name, self.home / name, size, keep)

    def _added(self, files: dict[str, Output], name: str, location: Location, size: int, keep: bool) -> Output:
        if name in files:
            files.pop(name).close()
        file = files[name] = self.opened(location, size, keep)
        return file

    def copies(self, source: Location, status: Status, name: str) -> bool:
        """Whether the store itself copies a file into the output when it is published, so that it need not be sent."""
        return False

    def place(self, name: str) -> Location:
        """Returns where a file of the output is made. Raises ValueError for a name that leads out of the output."""
        if name in (".", "..") or ("/" in name and not is_inner(name)):
            raise ValueError(f"{name!r} is not the name of a file in an output")
        return self.content / name

    @property
    def outputs(self) -> dict[str, Output]:
        """The files of the output by name, at this moment. A copy: other threads ask while files are added."""
        return dict(self._files)

    @property
    def temporaries(self) -> dict[str, Output]:
        """The temporary files by name, at this moment; a copy, as :attr:`outputs`."""
        return dict(self._temporary)

    def close_files(self) -> None:
        """Ends writing to all files."""
        for file in (*self._files.values(), *self._temporary.values()):
            file.close()

    @abstractmethod
    def opened(self, location: Location, size: int, keep: bool) -> Output:
        """Makes a file below :attr:`home`, and the folders above it. ``keep``: as for :meth:`create`."""

    @abstractmethod
    def clear(self) -> None:
        """Removes what an earlier run left."""

    @abstractmethod
    def commit(self, as_folder: bool) -> None:
        """Publishes: in one step, readers see the new output instead of nothing or of the old one."""

    @abstractmethod
    def abort(self, keep: bool = False) -> None:
        """Removes all that was made, or leaves it for a next run to continue. Does nothing after a commit."""

    @property
    @abstractmethod
    def published(self) -> bool:
        """Whether the output's name now leads to the files that were made here."""

    @property
    @abstractmethod
    def resumable(self) -> bool:
        """Whether a next run can continue from here."""


class Sent(NamedTuple):
    """Bytes ``start`` to ``stop`` of a file that a machine has sent. ``said``: what :meth:`Joint.sent` has returned for the
    whole file, or :meth:`Joint.sent_part` for the range."""

    start: int
    stop: int
    said: str


class Joint(ABC):
    """An output that several machines make together. Plain data that can be pickled.

    ``home``: the hidden folder that holds all of it. ``content``: the folder of its files. ``whole_files``: whether files
    are sent, each by one machine from begin to end (:meth:`open`), or by several of which each has a range
    (:meth:`open_part`) if it ``shares_files``; otherwise machines write ranges of one file.
    """

    out: Location
    home: Location
    whole_files: ClassVar[bool] = False
    shares_files: ClassVar[bool] = True

    @property
    def content(self) -> Location:
        return self.home / "output"

    @abstractmethod
    def begin(self, folders: tuple[str, ...]) -> None:
        """Makes the home, and these folders in it, where they are absent. Any machine may be the first."""

    @abstractmethod
    def open(self, name: str, size: int) -> Output:
        """Opens a file of the output, and makes it if it is absent. Any machine may be the first."""

    @abstractmethod
    def temporary(self, name: str, size: int) -> Output:
        """Makes a file that one machine needs for a while, under a name that no other machine uses."""

    @abstractmethod
    def remove(self, location: Location) -> None:
        """Removes a temporary file."""

    def target(self, name: str) -> Location:
        """Returns where a file of the output is written."""
        return self.content / name

    def exists(self) -> bool:
        """Whether a machine has begun."""
        return self.home.is_folder()

    def sent(self, output: Output) -> str:
        """Sends what is left of a whole file, and returns how :meth:`stage` finds it again."""
        return ""

    def open_part(self, name: str, size: int) -> Output:
        """Opens a file that several machines send, so that this one can send a range of it.

        Asked of an output with ``whole_files`` that ``shares_files``, for a file too long for one machine.
        """
        raise self._lacks("open_part")

    def sent_part(self, output: Output, start: int, stop: int) -> str:
        """Sends what is left of a range of a file, and returns how :meth:`stage` finds it again.

        Asked for a file of :meth:`open_part`, when all pieces in the range are written.
        """
        raise self._lacks("sent_part")

    def _lacks(self, method: str) -> RecipeError:
        return RecipeError(
            f"{printable(self.out)}: several machines send a file of it together, and {type(self).__name__} lacks "
            f"{method}; add the method, or say shares_files = False"
        )

    def drop(self, output: Output) -> None:
        """Forgets a file, or a range of one, that another machine has made too."""
        output.close()

    @abstractmethod
    def stage(self, overwrite: bool, sent: Mapping[str, Sequence[Sent]]) -> Staging:
        """Returns the staging that publishes the output. One machine at a time calls this, the last one.

        ``sent``: the name of each file that was sent -> the ranges of it.
        """

    @abstractmethod
    def published(self) -> bool:
        """Whether the output was published from here, and the home is only to be removed."""

    @abstractmethod
    def clear(self) -> None:
        """Removes the home and all that is in it."""


class Store(ABC):
    """A place where bytes live, named by the ``scheme`` in ``scheme://name``.

    ``mappable``: whether :meth:`Input.view` needs no memory of its own. ``one_process``: whether other processes see
    other bytes, so that workers have to be threads. ``always_absolute``: whether a name means the same on every machine and
    in every folder; False if names hold paths of this machine. ``reads_ahead``: whether inputs are fetched before they are
    read (:meth:`Store.opened_ahead`). ``sends_parts``: whether the files of outputs are sent in parts, by one process.
    ``resumes``: whether an interrupted output goes on where it was.
    ``keeps_history``: whether what an output replaces is still there, so that nothing is lost. ``private``: whether names
    tell of the user's own places, such as buckets. A receipt then names inputs by their paths below a common folder, as it
    does for local files. ``modules``: what workers import for its inputs. A store pickles by its class, so its constructor
    takes no arguments.
    """

    scheme: ClassVar[str]
    mappable: ClassVar[bool] = False
    one_process: ClassVar[bool] = False
    reads_ahead: ClassVar[bool] = False
    sends_parts: ClassVar[bool] = False
    resumes: ClassVar[bool] = True
    keeps_history: ClassVar[bool] = False
    always_absolute: ClassVar[bool] = True
    private: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __reduce__(self) -> str | tuple[Any, ...]:
        return type(self), ()

    # -------------------------------------------------------------------------------------------------------------- names

    def parse(self, text: str) -> Location:
        """The location that a user means by ``scheme://name``. Raises RecipeError for an invalid name."""
        return Location(self, self.without_scheme(text), text)

    def without_scheme(self, text: str) -> str:
        """Returns the text after ``scheme://``, whose letters may be capital; the text itself if it has no scheme."""
        start = f"{self.scheme}://"
        return text[len(start) :] if text[: len(start)].lower() == start else text

    def spelled(self, key: str) -> str:
        """Returns the text that a user types for a key."""
        return f"{self.scheme}://{key}"

    def absolute(self, location: Location) -> Location:
        return location if location.is_absolute else Location(self, posixpath.join(os.getcwd(), location.key))

    def resolve(self, location: Location) -> Location:
        return location

    def local_path(self, location: Location) -> str | None:
        return None

    def broken_link(self, location: Location) -> str:
        return ""

    # ------------------------------------------------------------------------------------------------------------- inputs

    @abstractmethod
    def status(self, location: Location) -> Status:
        """See :meth:`Location.status`."""

    @abstractmethod
    def is_folder(self, location: Location) -> bool: ...

    @abstractmethod
    def list_names(self, location: Location) -> list[str]:
        """Names directly in a folder, in any order. OSError when it cannot be listed."""

    @abstractmethod
    def opened(self, location: Location) -> Input:
        """The file, opened for reading. FormatError when it is absent or no regular file."""

    def open(
        self, location: Location, expected: Status | None = None, polite: bool = False, damaged: list[Damage] | None = None
    ) -> Input:
        """See :meth:`Location.open`.

        ``polite``: released pages leave the page cache too. ``damaged``: collects files of which mapped pages turn out to
        be gone.
        """
        self.check_expected(location, expected)
        return self.opened(location)

    def opened_ahead(self, location: Location, expected: Status | None, ahead: Ahead) -> Input:
        """Opens a file whose blocks ``ahead`` fetches and holds. Its requests are pinned to the ``expected`` version.

        Asked of a store that :attr:`reads_ahead`, for each input of a run.
        """
        raise RecipeError(
            f"{printable(location)}: the store {self.scheme}:// says reads_ahead and lacks opened_ahead; add the method"
        )

    def read_heads(self, locations: Iterable[Location]) -> None:
        """Says that the headers of these files are read next, so that a remote store can ask for all at once."""
        return

    def will_need(self, location: Location, ranges: Iterable[tuple[int, int]]) -> None:
        """Says that these (offset, bytes) of a file are read next, so that a disk can read all at once."""
        return

    def check_expected(self, location: Location, expected: Status | None) -> None:
        """ChangedError when a file is no longer what was expected of it."""
        if expected is None:
            return
        try:
            same = self.status(location) == expected
        except FormatError as error:
            raise ChangedError(f"{printable(location)} is gone since it was planned; run the command again") from error
        if not same:
            raise ChangedError(f"{printable(location)} changed since it was planned; run the command again")

    def is_file(self, location: Location) -> bool:
        try:
            self.status(location)
        except FormatError:
            return False
        return True

    def exists(self, location: Location) -> bool:
        return self.is_folder(location) or self.is_file(location)

    def lexists(self, location: Location) -> bool:
        return self.exists(location)

    def stream(self, location: Location) -> BinaryIO:
        self.status(location)
        return io.BufferedReader(InputStream(self.open(location)))

    def glob(self, location: Location) -> list[Location]:
        """Returns the files and folders that match a pattern, part by part: ``*`` stays within a folder."""
        parts = location.parts
        plain = next((n for n, part in enumerate(parts) if MAGIC.search(part)), len(parts))
        found = [location._at(posixpath.join(*parts[:plain]) if plain else ".")]
        for part in parts[plain:]:
            if MAGIC.search(part) is None:
                found = [each / part for each in found]
                continue
            inside = [child for each in found if each.is_folder() for child in each.children()]
            hidden = part.startswith(".")
            found = [c for c in inside if fnmatch.fnmatchcase(c.name, part) and (hidden or not c.name.startswith("."))]
        return [each for each in found if each.exists()]

    # ------------------------------------------------------------------------------------------------------------ outputs

    def check_writable(self, location: Location, overwrite: bool) -> None:
        """See :meth:`Location.check_writable`. Asked before a merge is planned, and again when its output is made."""
        raise self._lacks("check_writable", location)

    def stage(self, location: Location, overwrite: bool = False) -> Staging:
        """See :meth:`Location.stage`. Asked once in each run, by the process that plans it."""
        raise self._lacks("stage", location)

    def needed_disk_bytes(self, sizes: Sequence[int]) -> int:
        """Returns what an output of files of these sizes needs on this machine's disk, or on the disk it is written to."""
        return sum(sizes)

    def is_always_folder(self, location: Location) -> bool:
        """Whether an output of that name is a folder, whatever the name looks like."""
        return False

    def made_at(self, location: Location) -> Location:
        """Returns the place beside which an output is made: itself, unless it is made on this machine and then sent."""
        return location

    def output_buffers(self, largest: int) -> tuple[int, int]:
        """Returns the memory that outputs in the making hold: bytes for the run, and for each worker.

        ``largest``: bytes of the largest file.
        """
        return 0, 0

    def reopen(self, location: Location, size: int) -> Output:
        """See :meth:`Location.reopen`. Asked in worker processes, so not of a store of :attr:`one_process`."""
        raise self._lacks("reopen", location)

    def write_whole(self, location: Location, data: bytes, overwrite: bool) -> None:
        """See :meth:`Location.write_whole`. Asked for saved plans, statistics, extras and reports."""
        raise self._lacks("write_whole", location)

    def make_folder(self, location: Location) -> None:
        """See :meth:`Location.make_folder`. Asked for the folder of a sweep's outputs, and of inputs that are converted."""
        raise self._lacks("make_folder", location)

    def remove_files(self, location: Location, names: Collection[str]) -> None:
        """See :meth:`Location.remove_files`. Asked for outputs of a sweep that are not kept."""
        raise self._lacks("remove_files", location)

    def sweep(self, location: Location) -> None:
        """See :meth:`Location.sweep`. Asked before a merge is planned. Does nothing if killed runs leave nothing."""
        return

    def replace_small(self, location: Location, data: bytes) -> None:
        """See :meth:`Location.replace_small`. Asked where several machines make one output."""
        raise self._lacks("replace_small", location)

    def create_small(self, location: Location, data: bytes, durable: bool = True) -> bool:
        """See :meth:`Location.create_small`. Asked where several machines make one output."""
        raise self._lacks("create_small", location)

    def join(self, location: Location, key: str) -> Joint:
        """See :meth:`Location.join`. Asked where several machines make one output."""
        raise RecipeError(
            f"{printable(location)}: several machines cannot write to the store {self.scheme}:// together; let them write "
            "to a folder that all of them see, or to s3://, or merge on one machine"
        )

    def free_bytes(self, location: Location) -> int | None:
        """See :meth:`Location.free_bytes`. Asked while a merge is planned, and after a write that found no room."""
        return None

    def _lacks(self, method: str, location: Location) -> RecipeError:
        """Returns the error of a store without this method: it is read-only, or it is incomplete."""
        if type(self).stage is Store.stage:
            return RecipeError(
                f"{printable(location)}: the store {self.scheme}:// can be read only; write to another place"
            )
        return RecipeError(
            f"{printable(location)}: the store {self.scheme}:// has stage and lacks {method}, so it takes no outputs; "
            "add the method, or write to another place"
        )
