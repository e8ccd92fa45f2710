"""The Hugging Face hub: ``hf://org/name[@revision][/folder]``.

The client is ``huggingface_hub`` (the extra ``streammerge[hub]``), imported when the hub is asked first. It knows the token
(``HF_TOKEN``, ``hf auth login``), the address (``HF_ENDPOINT``) and the settings for proxies. Files are read by ranges over
plain HTTP, so nothing is downloaded. A file that the hub's cache has is read there.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from streammerge.errors import ChangedError, RecipeError, StoreError, printable
from streammerge.stores.base import Input, Location, Staging, Status
from streammerge.stores.buffers import Buffers
from streammerge.stores.hub_client import LIBRARY, NotThere, api, endpoint, failures
from streammerge.stores.hub_output import CLIENT_BYTES, MADE_IN, HubStaging, is_beside, made_at
from streammerge.stores.local import LOCAL
from streammerge.stores.remembering import recalled
from streammerge.stores.remote import Entries, Passing, RemoteStore, persistently
from streammerge.stores.repositories import MAIN, SCHEME, Repository, hub_home, named_repository, read_name, snapshot
from streammerge.stores.space import exists_already

if TYPE_CHECKING:
    from streammerge.stores.ahead import Ahead

_SECONDS = 20.0
"""The longest wait for a connection, and for the next bytes of an answer."""
_ASKING_SECONDS = 10.0
_MOST_WHOLE_BYTES = 32 << 20
"""A file up to this size is read whole if the server does not answer ranges."""
_MOST_LINKS = 4096
_EXPIRED = (400, 401, 403, 404, 410)
_LEAST_ID = 40


@dataclass(slots=True)
class _Link:
    """Where the bytes of one file are fetched.

    ``signed``: on another host, by an address that expires. ``tag``: the entity tag of the first answer from there.
    """

    url: str
    signed: bool
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Tree:
    """The files of a repository at one commit: path -> (bytes, identity of the content)."""

    files: dict[str, tuple[int, str]]
    folders: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        parts = (path.split("/")[:-1] for path in self.files)
        object.__setattr__(
            self, "folders", frozenset("/".join(each[:n]) for each in parts for n in range(1, len(each) + 1))
        )


class Hub(RemoteStore):
    """Models on the hub. A key is ``org/name@revision/path``."""

    scheme: ClassVar[str] = SCHEME
    modules = ("huggingface_hub.file_download", "huggingface_hub.errors")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._links: OrderedDict[tuple[str, str], _Link] = OrderedDict()
        self._trees: dict[tuple[str, str, str], Tree] = {}

    def parse(self, text: str) -> Location:
        typed = self.without_scheme(text).strip("/")
        if not typed:
            return Location(self, ".", text)
        found = named_repository(self.spelled(typed))
        if found is None:
            raise RecipeError(f"{printable(text)} names no model of the hub; write hf://org/name[@revision][/folder]")
        return Location(self, str(found), text)

    # -------------------------------------------------------------------------------------------------------- repositories

    def commit(self, name: str, revision: str = "", once: bool = False) -> str:
        """Returns the commit of a revision. Asks the hub unless it is one.

        ``once``: a failure is not waited for. Raises RecipeError if there is none, StoreError if the hub cannot be asked.
        """
        wanted = Repository(name, revision)
        if wanted.is_pinned:
            return revision

        def ask() -> str:
            with failures(wanted):
                sha = api().model_info(name, revision=revision or MAIN, timeout=_ASKING_SECONDS).sha
            if not sha:
                raise StoreError(f"{endpoint()} does not tell the commit of {printable(wanted)}")
            return str(sha)

        try:
            how = ask if once else lambda: persistently(ask, f"asking {endpoint()} for {wanted}")
            return recalled(("commit", endpoint(), name, revision or MAIN), how)
        except Passing as error:
            raise StoreError(f"{endpoint()} cannot be asked for {printable(wanted)} ({error})") from error

    def tree(self, name: str, commit: str) -> Tree:
        """Returns the files of a repository at a commit. Asked once, since it never changes."""
        key = endpoint(), name, commit
        found = self._trees.get(key)
        if found is None:
            wanted = Repository(name, commit)

            def ask() -> Tree:
                with failures(wanted):
                    listed = list(api().list_repo_tree(name, recursive=True, revision=commit))
                return Tree({each.path: _size_and_identity(each) for each in listed if hasattr(each, "blob_id")})

            found = self._trees[key] = persistently(ask, f"listing {wanted}")
        return found

    def is_whole(self, name: str, commit: str, folder: Location) -> bool:
        """Whether a snapshot of the cache holds all files of the commit."""
        return all((folder / path).is_file() for path in self.tree(name, commit).files)

    def _split(self, location: Location) -> tuple[Repository, Tree] | None:
        """Returns the repository of a location at its commit, and its files. None for the root and for organisations."""
        if read_name(location.key) is None:
            return None
        try:
            pinned = self._pinned(location)
            return pinned, self.tree(pinned.name, pinned.revision)
        except NotThere:
            return None

    def _pinned(self, location: Location) -> Repository:
        """Returns the repository of a location at the commit that its revision is now."""
        found = read_name(location.key)
        if found is None:
            raise RecipeError(f"{printable(location)} names no model of the hub; write hf://org/name[@revision][/folder]")
        return found.at(self.commit(found.name, found.revision))

    # ------------------------------------------------------------------------------------------------------------ reading

    def look(self, location: Location) -> Status | None:
        split = self._split(location)
        if split is None or split[0].inner not in split[1].files:
            return None
        return self._status_in(location, split[1].files[split[0].inner])

    def _status_in(self, location: Location, known: tuple[int, str]) -> Status:
        return Status((self.scheme, location.key), *known)

    def entries(self, location: Location) -> Entries:
        split = self._split(location)
        if split is None:
            return Entries({}, frozenset())
        repository, tree = split
        start = f"{repository.inner}/" if repository.inner else ""
        below = {path[len(start) :]: path for path in tree.files if path.startswith(start)}
        files = {
            name: self._status_in(location / name, tree.files[path])
            for name, path in below.items()
            if name and "/" not in name
        }
        return Entries(files, frozenset(name.partition("/")[0] for name in below if "/" in name))

    def opened(self, location: Location) -> Input:
        return self._cached(location, self.status(location)) or super().opened(location)

    def opened_ahead(self, location: Location, expected: Status | None, ahead: Ahead) -> Input:
        status = self.status(location) if expected is None else expected
        return self._cached(location, status) or super().opened_ahead(location, status, ahead)

    def _cached(self, location: Location, status: Status) -> Input | None:
        """Opens the file in the hub's cache. None if it is not there in the size that it has on the hub."""
        repository = self._pinned(location)
        folder = snapshot(repository)
        if folder is None:
            return None
        file = folder / repository.inner
        if not (file.is_file() and file.size == status.size):
            return None
        cached = file.open()
        cached.location = location
        return cached

    def fetched(self, location: Location, status: Status, start: int, stop: int, buffers: Buffers | None = None) -> Any:
        repository = self._pinned(location)
        with failures(repository):
            link = self._link(repository, status)
            return self._range(link, repository, status, start, stop, buffers)

    def _link(self, repository: Repository, status: Status) -> _Link:
        """Returns where the bytes of a file are. Raises ChangedError if the hub has another version of it now."""
        import huggingface_hub

        key = endpoint(), str(repository)
        with self._lock:
            known = self._links.get(key)
            if known is not None:
                self._links.move_to_end(key)
                return known
        url = huggingface_hub.hf_hub_url(
            repository.name, repository.inner, revision=repository.revision, endpoint=endpoint()
        )
        try:
            found = huggingface_hub.get_hf_file_metadata(url, timeout=_ASKING_SECONDS, endpoint=endpoint(), **LIBRARY)
        except huggingface_hub.errors.EntryNotFoundError as error:
            raise ChangedError(f"hf://{repository} is gone since it was planned; run the command again") from error
        same_commit = found.commit_hash in (None, repository.revision)
        if not (same_commit and _may_be(found.etag, status.version) and found.size in (None, status.size)):
            raise _changed(repository)
        made = _Link(found.location, urlsplit(found.location).netloc != urlsplit(endpoint()).netloc)
        with self._lock:
            self._links[key] = made
            while len(self._links) > _MOST_LINKS:
                self._links.popitem(last=False)
        return made

    def _range(
        self, link: _Link, repository: Repository, status: Status, start: int, stop: int, buffers: Buffers | None
    ) -> Any:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {} if link.signed else dict(build_hf_headers(**LIBRARY))
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", link.url, headers=headers, timeout=_SECONDS, follow_redirects=True) as answer:
            if link.signed and answer.status_code in _EXPIRED:
                with self._lock:
                    self._links.pop((endpoint(), str(repository)), None)
                raise Passing(f"its address is refused with status {answer.status_code}")
            if answer.status_code == 416:
                raise _changed(repository)
            if answer.status_code not in (200, 206):
                answer.read()
                hf_raise_for_status(answer)
                raise Passing(f"status {answer.status_code}")
            tag = answer.headers.get("ETag", "")
            if link.tag and tag and link.tag != tag:
                raise _changed(repository)
            link.tag = tag
            if answer.status_code == 206:
                _check_range(answer.headers.get("Content-Range", ""), repository, status, start, stop)
                return _body(answer, stop - start, buffers)
            if status.size > _MOST_WHOLE_BYTES and (start, stop) != (0, status.size):
                raise StoreError(f"hf://{printable(repository)}: the server does not answer requests for ranges")
            return _body(answer, status.size)[start:stop]

    # ------------------------------------------------------------------------------------------------------------ outputs

    keeps_history = True
    sends_parts = True

    def is_always_folder(self, location: Location) -> bool:
        found = read_name(location.key)
        return found is not None and not found.inner

    def made_at(self, location: Location) -> Location:
        return made_at(self._target(location)) if location.key != "." else LOCAL.parse(hub_home()) / MADE_IN

    def _target(self, location: Location) -> Repository:
        """Returns the branch that an output becomes a commit of. RecipeError for what cannot be written."""
        found = read_name(location.key)
        if found is None or found.is_pinned or found.revision.startswith("refs/"):
            raise RecipeError(f"{printable(location)} cannot be written; name a branch: hf://org/name[@branch][/folder]")
        return found.at(found.revision or MAIN)

    def check_writable(self, location: Location, overwrite: bool) -> None:
        self._target(location)
        if not overwrite and (self.is_file(location) or any(not is_beside(path) for path in self._below(location))):
            raise exists_already(location)

    def _below(self, location: Location) -> list[str]:
        """Returns the files of an output that is there, by their paths below it."""
        split = self._split(location)
        if split is None:
            return []
        start = f"{split[0].inner}/" if split[0].inner else ""
        return [path[len(start) :] for path in split[1].files if path.startswith(start)]

    def stage(self, location: Location, overwrite: bool = False) -> Staging:
        target = self._target(location)
        self.check_writable(location, overwrite)
        staging = HubStaging(location, target)
        try:
            staging.parent = self.commit(target.name, target.revision)
            staging.replaced = self._below(location) if overwrite else []
        except BaseException:
            staging.abort(keep=True)
            raise
        return staging

    def needed_disk_bytes(self, sizes: Sequence[int]) -> int:
        return max(sizes, default=0)

    def output_buffers(self, largest: int) -> tuple[int, int]:
        return CLIENT_BYTES, 0


def _body(answer: Any, nbytes: int, buffers: Buffers | None = None) -> memoryview:
    """Returns the body of an answer, in one of ``buffers``. Raises Passing if it has another length."""
    data = buffers.take(nbytes) if buffers and nbytes else memoryview(mmap.mmap(-1, nbytes) if nbytes else bytearray())
    filled = 0
    for part in answer.iter_bytes():
        stop = filled + len(part)
        if stop > nbytes:
            raise Passing(f"more than {nbytes} bytes came")
        data[filled:stop] = part
        filled = stop
    if filled != nbytes:
        raise Passing(f"{filled} bytes came instead of {nbytes}")
    return data


def _check_range(said: str, repository: Repository, status: Status, start: int, stop: int) -> None:
    """Raises ChangedError if an answer is a part of a file of another size, Passing if it is another part."""
    part, _, whole = said.removeprefix("bytes ").partition("/")
    if whole.isdigit() and int(whole) != status.size:
        raise _changed(repository)
    if part and part != f"{start}-{stop - 1}":
        raise Passing(f"bytes {part} came instead of {start}-{stop - 1}")


def _may_be(etag: str | None, identity: object) -> bool:
    """Whether a file with this entity tag can have this identity. Tags of another kind tell nothing."""
    if etag is None or len(etag) != len(str(identity)) or len(etag) < _LEAST_ID:
        return True
    return etag == identity


def _size_and_identity(file: Any) -> tuple[int, str]:
    """Returns the bytes of a file, and the hash of its content: SHA-256 for large files, git's for others."""
    lfs = file.lfs
    return (int(lfs.size), str(lfs.sha256)) if lfs is not None else (int(file.size), str(file.blob_id))


def _changed(repository: Repository) -> ChangedError:
    return ChangedError(f"hf://{printable(repository)} changed since it was planned; run the command again")


HUB = Hub()
