"""What object stores have in common: ``s3://bucket/key``, ``gs://bucket/key``, ``az://container/key``.

The client is ``obstore`` (the extra ``streammerge[remote]``), imported when the first request is made. Credentials, region
and endpoint come from the variables that the stores' own tools read (``AWS_...``, ``GOOGLE_...``, ``AZURE_...``), for S3
also from the profiles in ``~/.aws``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

from streammerge.errors import ChangedError, RecipeError, StoreError, printable
from streammerge.stores.base import Joint, Location, Staging, Status
from streammerge.stores.buffers import Buffers
from streammerge.stores.parts import PART_BYTES, SENDERS, Part, Upload, buffer_bytes
from streammerge.stores.refusals import PASSING_CODES, of_error
from streammerge.stores.remembering import forget
from streammerge.stores.remote import Entries, Passing, RemoteStore, Unresolved, persistently
from streammerge.stores.space import exists_already
from streammerge.stores.staged import Item, ObjectStaging, Taken, half_published, home_of, owner_of, runs

CONNECT_SECONDS, READ_SECONDS, REQUEST_SECONDS = 10.0, 20.0, 180.0
"""The longest waits for a connection, for the next bytes of an answer, and for a whole request."""
CLIENT_TRIES, _CLIENT_SECONDS = 3, 60
"""How often the client itself repeats a request, and for how long. We repeat it after that, and when a body is wrong."""
_ROOT = "."


class ObjectStore(RemoteStore):
    """A store of ``obstore``. The first part of a key is the bucket, the container or the host."""

    private = True

    def __init__(self) -> None:
        self._clients: dict[tuple[object, ...], Any] = {}
        self._readable: dict[tuple[object, ...], set[str]] = {}
        """Folders in which a client has found a file, by what the client is known by."""
        self._lock = threading.Lock()

    def parse(self, text: str) -> Location:
        key = self.without_scheme(text).strip("/")
        if not key or ".." in key.split("/"):
            raise RecipeError(f"{printable(text)} names no file or folder; write {self.scheme}://{self.root_word}/name")
        return Location(self, key, text)

    # ------------------------------------------------------------------------------------------------------------ clients

    root_word: ClassVar[str] = "bucket"
    tagged_by: ClassVar[str] = "e_tag"
    """What an object that is replaced on condition is known by: ``e_tag``, or ``version`` where tags are no condition."""

    @abstractmethod
    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        """Returns a client for a bucket. ``module``: ``obstore.store``. ``common``: options of every client."""

    def settings(self) -> Mapping[str, str]:
        """Returns the variables of the environment by which a client is made. Another value makes another client."""
        return {}

    def allows_http(self) -> bool:
        """Whether the user's settings name an address without TLS."""
        return False

    def unsafe(self) -> bool:
        return self.allows_http()

    def _key(self, root: str) -> tuple[object, ...]:
        """Returns what the client for a bucket is known by. Another process and other settings have another client."""
        return root, os.getpid(), READ_SECONDS, *self.settings().items()

    def client(self, root: str) -> Any:
        """Returns the client for a bucket, made once."""
        key = self._key(root)
        with self._lock:
            found = self._clients.get(key)
            if found is None:
                imported()
                import obstore.store as module

                options = {
                    "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                    "read_timeout": timedelta(seconds=READ_SECONDS),
                    "timeout": timedelta(seconds=REQUEST_SECONDS),
                }
                common: dict[str, Any] = {
                    "client_options": {**options, **({"allow_http": True} if self.allows_http() else {})},
                    "retry_config": {
                        "max_retries": CLIENT_TRIES,
                        "retry_timeout": timedelta(seconds=_CLIENT_SECONDS),
                    },
                }
                try:
                    found = self._clients[key] = self.made_client(root, module, common)
                except RecipeError:
                    raise
                except Exception as error:  # the client raises errors of many kinds for settings that it cannot use
                    named, said = printable(root.partition("?")[0]), of_error(self.scheme, str(error))
                    text = said if said.lasting else _first_line(error)
                    raise StoreError(f"{self.scheme}://{named} cannot be used: {text}") from error
            return found

    def refused(self, location: Location, said: str, wordless: bool = False) -> StoreError:
        """Returns the error of a request that the credentials do not allow. ``said``: why, unless it is ``wordless``."""
        kind = Wordless if wordless else Denied
        return kind(f"{printable(location)} may not be used with these credentials: {said}")

    def split(self, location: Location) -> tuple[Any, str]:
        """Returns the client of a location, and the name in its bucket, "" for the bucket itself."""
        root, _, name = location.key.partition("/")
        return self.client(root), name

    # ------------------------------------------------------------------------------------------------------------- reading

    def look(self, location: Location) -> Status | None:
        client, name = self.split(location)
        if not name:
            return None
        obs = imported()

        def ask() -> Status | None:
            try:
                with failures(location):
                    return self.status_of(location, obs.head(client, name))
            except FileNotFoundError:
                return None
            except Wordless:  # the answer to a HEAD request has no body that could say why
                with failures(location):
                    return self.status_of(location, obs.get(client, name, options={"range": (0, 1)}).meta)

        try:
            found = persistently(ask, f"looking at {printable(location)}")
        except Denied:
            if self._beside_readable(location):
                return None
            raise
        if found is not None:
            self._readable_folders(location).add(location.parent.key)
        return found

    def _beside_readable(self, location: Location) -> bool:
        """Whether a file of the same folder may be read. Where nothing may be listed, S3 denies what is absent there."""
        return location.parent.key in self._readable_folders(location)

    def _readable_folders(self, location: Location) -> set[str]:
        """Returns the folders in which the client of this location has found a file."""
        return self._readable.setdefault(self._key(location.key.partition("/")[0]), set())

    def is_folder(self, location: Location) -> bool:
        """Where files may be read and not listed, what is a file is no folder."""
        try:
            return super().is_folder(location) or ("/" not in location.key and self._bucket_is_there(location))
        except Denied:
            if "/" in location.key and (self.is_file(location) or self._beside_readable(location)):
                return False
            raise

    def _bucket_is_there(self, location: Location) -> bool:
        try:
            self._entries(location)
        except StoreError:
            return False
        return True

    def list_names(self, location: Location) -> list[str]:
        return super().list_names(location) if any(self._entries(location)) or not self.is_folder(location) else []

    def entries(self, location: Location) -> Entries:
        client, name = self.split(location)
        obs = imported()

        def ask() -> Entries:
            with failures(location):
                found = obs.list_with_delimiter(client, name or None)
            files = {}
            for meta in found["objects"]:
                own = meta["path"].rpartition("/")[2]
                if own and meta["path"] != name:
                    files[own] = self.status_of(location / own, meta)
            folders = {prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]}
            return Entries(files, frozenset(folders - {""}))

        return persistently(ask, f"listing {printable(location)}")

    def fetched(self, location: Location, status: Status, start: int, stop: int, buffers: Buffers | None = None) -> Any:
        client, name = self.split(location)
        options: dict[str, Any] = {"range": (start, stop)}
        tag = str(status.version)
        if tag.startswith('"'):  # a weak tag cannot be asked for
            options["if_match"] = tag
        try:
            with failures(location):
                answer = imported().get(client, name, options=options)
                if self.status_of(location, answer.meta) != status:
                    raise changed_meanwhile(location)
                return answer.bytes()
        except FileNotFoundError as error:
            raise ChangedError(f"{printable(location)} is gone since it was planned; run the command again") from error

    # ------------------------------------------------------------------------------------------------------------- writing

    sends_parts = True
    resumes = False

    def put(self, location: Location, data: bytes, only: str | None = None) -> str:
        """See :class:`streammerge.stores.staged.Objects`."""
        client, name = self.split(location)
        obs = imported()
        import obstore.exceptions as said

        mode: Any = "overwrite" if only is None else {self.tagged_by: only} if only else "create"

        def ask() -> str:
            try:
                with failures(location, changes=False):
                    made = obs.put(client, name, data, mode=mode, use_multipart=False)
            except (said.AlreadyExistsError, said.PreconditionError) as error:
                raise Taken from error
            except FileNotFoundError as error:
                raise StoreError(f"{printable(location)} cannot be written: {_first_line(error)}") from error
            return str(made[self.tagged_by] or "")

        forget()
        return persistently(ask, f"writing {printable(location)}")

    def get(self, location: Location) -> tuple[bytes, Item]:
        """See :class:`streammerge.stores.staged.Objects`."""
        client, name = self.split(location)
        obs = imported()

        def ask() -> tuple[bytes, Item]:
            with failures(location):
                answer = obs.get(client, name)
                return bytes(answer.bytes()), self._item(location, answer.meta)

        return persistently(ask, f"reading {printable(location)}")

    def _item(self, location: Location, meta: Any) -> Item:
        return Item(location, meta["size"], meta[self.tagged_by] or "", meta["last_modified"].timestamp())

    def delete(self, locations: Iterable[Location]) -> None:
        """See :class:`streammerge.stores.staged.Objects`."""
        obs = imported()

        def ask(location: Location) -> None:
            client, name = self.split(location)
            with contextlib.suppress(FileNotFoundError), failures(location):
                obs.delete(client, name)

        for each in locations:
            persistently(functools.partial(ask, each), f"removing {printable(each)}")
        forget()

    def items(self, folder: Location) -> list[Item]:
        """See :class:`streammerge.stores.staged.Objects`."""
        client, name = self.split(folder)
        obs = imported()

        def ask() -> list[Item]:
            root = folder.key.partition("/")[0]
            with failures(folder):
                return [
                    self._item(Location(self, f"{root}/{meta['path']}"), meta)
                    for rows in obs.list(client, name or None)
                    for meta in rows
                    if not name or meta["path"].startswith(f"{name}/")
                ]

        return persistently(ask, f"listing {printable(folder)}")

    def join(self, location: Location, key: str) -> Joint:
        from streammerge.stores.joint_objects import copied_joint_of  # here, because most outputs are made by one machine

        return copied_joint_of(location, key)

    def create_small(self, location: Location, data: bytes, durable: bool = True) -> bool:
        from streammerge.stores.joint_objects import create_small

        return create_small(self, location, data)

    def replace_small(self, location: Location, data: bytes) -> None:
        self.put(location, data)

    def upload(self, location: Location) -> Upload:
        """See :class:`streammerge.stores.staged.Objects`."""
        return InOrder(self, location)

    def upload_again(self, location: Location, identifier: str) -> tuple[Upload, dict[int, Part]] | None:
        """See :class:`streammerge.stores.staged.Objects`."""
        return None

    def abort_uploads(self, out: Location, as_folder: bool) -> None:
        """See :class:`streammerge.stores.staged.Objects`. The client aborts its uploads itself."""

    def uploads_below(self, place: Location) -> list[Location]:
        """See :class:`streammerge.stores.staged.Objects`. The client cannot list them."""
        return []

    def copy(self, source: Location, status: Status, target: Location) -> bool:
        """See :class:`streammerge.stores.staged.Objects`."""
        client, name = self.split(source)
        if source.key.partition("/")[0] != target.key.partition("/")[0]:
            return False
        obs = imported()

        def ask() -> None:
            with failures(target):
                obs.copy(client, name, target.key.partition("/")[2])

        persistently(ask, f"copying {printable(source)}")
        return True

    def check_writable(self, location: Location, overwrite: bool) -> None:
        if "/" not in location.key:
            raise RecipeError(
                f"{printable(location)} is not a name for an output; write {self.scheme}://{printable(location.key)}/name"
            )
        if not overwrite and self.exists(location) and not half_published(self, location):
            raise exists_already(location)

    def stage(self, location: Location, overwrite: bool = False) -> Staging:
        return ObjectStaging(self, location, overwrite, lasting=False)

    def needed_disk_bytes(self, sizes: Sequence[int]) -> int:
        return 0

    def output_buffers(self, largest: int) -> tuple[int, int]:
        return buffer_bytes(largest)

    def write_whole(self, location: Location, data: bytes, overwrite: bool) -> None:
        try:
            self.put(location, data, None if overwrite else "")
        except Taken as error:
            if self.get(location)[0] != data:  # equal if the answer to our own request was lost
                raise exists_already(location) from error

    def make_folder(self, location: Location) -> None:
        """Does nothing: a folder is there while something is in it."""

    def sweep(self, location: Location) -> None:
        """Removes the lock of a run that ended before it had begun to write, or after it had published."""
        home = home_of(location)
        if "/" not in location.key:
            return
        found = self.items(home)
        begun = any(item.location.parent.name != home.name for item in found)
        if not found or (begun and half_published(self, location) is not None):
            return
        for item in found:
            if item.location == home / "lock":
                with contextlib.suppress(FileNotFoundError):
                    if runs(owner_of(self.get(item.location)[0]), item, self):
                        return
        self.delete([item.location for item in found])

    def status_of(self, location: Location, meta: Any) -> Status:
        """Returns the status that an answer tells. The tag is the version, the time where there is no tag."""
        tag = meta["e_tag"] or ""
        if tag and not tag.startswith(('"', "W/")):  # as listings of Azure have it
            tag = f'"{tag}"'
        return Status((self.scheme, location.key), meta["size"], tag or meta["last_modified"].isoformat())


def changed_meanwhile(location: Location) -> ChangedError:
    return ChangedError(f"{printable(location)} changed since it was planned; run the command again")


@contextmanager
def failures(location: Location, changes: bool = True) -> Iterator[None]:
    """Turns errors of the client into ours. FileNotFoundError stays as it is.

    ``changes``: whether a failed condition means that the file changed; otherwise that error stays as it is.
    """
    import obstore.exceptions as known

    try:
        yield
    except (known.AlreadyExistsError, known.PreconditionError) as error:
        if not changes:
            raise
        raise changed_meanwhile(location) from error
    except known.BaseError as error:
        if "dns error" in str(error):
            raise Unresolved("the address of the host is not known") from _told(error)
        store: Any = location.store
        said = of_error(store.scheme, str(error))
        known_words = said.code or said.advice
        text = str(said) if known_words else _first_line(error)
        denied = isinstance(error, known.PermissionDeniedError | known.UnauthenticatedError) or said.status in (401, 403)
        if denied and said.code not in PASSING_CODES:
            raise store.refused(location, text, said.wordless) from _told(error)
        if said.lasting:
            kind = Wordless if said.wordless else StoreError
            raise kind(f"{printable(location)} cannot be used: {text}") from _told(error)
        text = str(said._replace(advice="")) if known_words else text
        raise Passing(text, advice=said.advice) from _told(error)


class Denied(StoreError):
    """Raised where the credentials do not allow a request."""


class Wordless(Denied):
    """Raised for a refusal without a reason. Another request for the same may tell it."""


_QUERY = re.compile(r"(https?://[^\s?\"']*)\?[^\s\"')]*")


def _first_line(error: BaseException) -> str:
    """Returns what an error says, without the queries of addresses, which may be secrets."""
    return printable(_QUERY.sub(r"\1", str(error).partition("\n")[0]).strip(), 400)


def _told(error: BaseException) -> BaseException | None:
    """Returns the error as a cause that may be printed. None if it has the query of an address."""
    return None if _QUERY.search(str(error)) else error


def imported() -> Any:
    """Returns the module ``obstore``. RecipeError if it is not installed."""
    try:
        import obstore
    except ImportError as error:
        raise RecipeError(
            "object stores and web addresses need the package obstore; install it with `pip install 'streammerge[remote]'`"
        ) from error
    return obstore


class InOrder(Upload):
    """An upload by a client that takes the parts in their order only. A part that comes early waits in memory.

    A next run cannot go on with it.
    """

    identifier = ""
    in_order = True

    def __init__(self, store: ObjectStore, location: Location) -> None:
        self._location = location
        client, name = store.split(location)
        with failures(location):
            self._writer = imported().open_writer(client, name, buffer_size=PART_BYTES, max_concurrency=SENDERS)
        self._early: dict[int, bytes] = {}
        self._next, self._lock = 0, threading.Lock()

    def send(self, number: int, data: memoryview) -> Part:
        with self._lock:
            if number != self._next:
                self._early[number] = bytes(data)
                return Part(len(data), "")
            self._write(bytes(data))
            self._next += 1
            while self._next in self._early:
                self._write(self._early.pop(self._next))
                self._next += 1
        return Part(len(data), "")

    def _write(self, data: bytes) -> None:
        """Gives bytes to the client, which keeps them until they are sent. So they are a copy of the part's buffer."""
        try:
            with failures(self._location):
                self._writer.write(data)
        except Passing as error:
            raise StoreError(f"writing {printable(self._location)} failed ({error}); run it again") from error

    def complete(self, parts: Sequence[Part], replaces: bool) -> None:
        try:
            with failures(self._location):
                self._writer.close()
        except Passing as error:
            raise StoreError(f"writing {printable(self._location)} failed ({error}); run it again") from error

    def abort(self) -> None:
        with contextlib.suppress(Exception):
            self._writer.__exit__(RuntimeError, RuntimeError("the output is given up"), None)
