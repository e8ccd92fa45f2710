"""Outputs of the hub: each large file is made on this machine, sent, and removed; one commit at the end makes all visible.

The hub wants the SHA-256 of a file before its first byte, so a file is made on the disk first. While one is sent, nothing
else is written, so the disk holds one file at a time, and what other workers had in hand of the next. What was sent is
recorded beside the journal, and a next run does not send it again. Files are sent over plain HTTP, not by the client's Xet
library, whose memory has no bound.
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streammerge.errors import StoreError, printable
from streammerge.stores.base import Location, Output
from streammerge.stores.commit import LocalStaging, make_subfolders
from streammerge.stores.hub_client import NotThere, api, endpoint, failures
from streammerge.stores.local import LOCAL
from streammerge.stores.parts import SmallOutput, add_span
from streammerge.stores.remembering import forget
from streammerge.stores.remote import persistently
from streammerge.stores.repositories import MAIN, Repository, hub_home

CLIENT_BYTES = 24 << 20
"""What the client holds while a file is sent, and the small files."""
MADE_IN = "streammerge"
_SENT = ".sent"
_SAMPLE_BYTES = 512
_READ_BYTES = 1 << 20
_POLL_SECONDS = 0.2
_BESIDE = ("README", "LICENSE", "NOTICE")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".index.json")


def made_at(target: Repository) -> Location:
    """Returns the place on this machine beside which an output is made."""
    name = str(target).replace("/", "--")
    return LOCAL.parse(hub_home()) / MADE_IN / name


def is_beside(path: str) -> bool:
    """Whether a file of a repository is no part of a model: hidden, a card, or a licence."""
    return path.startswith((".", *_BESIDE))


@dataclass(frozen=True, slots=True)
class Sent:
    """A large file that the hub has. ``sample``: its first bytes, as hexadecimal digits."""

    name: str
    size: int
    sha256: str
    sample: str


class _Stopped(Exception):
    """Raised to end the sending of a file, because the run is stopping."""


class _Reader(io.RawIOBase):
    """A file that is sent. ``stopped``: tells that it is not wanted any more."""

    def __init__(self, path: Path, stopped: threading.Event) -> None:
        self._file, self._stopped = path.open("rb", buffering=0), stopped

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._stopped.is_set():
            raise _Stopped
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


class Shard(Output):
    """A file of an output. It is sent when all its bytes are there, or when the output is published."""

    in_parts = True

    def __init__(self, name: str, location: Location, size: int, staging: HubStaging, sent: Sent | None) -> None:
        self.name, self.location, self.size, self._staging, self.sent = name, location, size, staging, sent
        self.kept = sent is not None
        self.path = staging.path_of(name)
        self.plain = False
        """Whether the hub wants it as a part of the commit, and not as a large file."""
        self._fd = -1
        self._spans: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._whole = False

    def halted_by(self, halt: Callable[[], object]) -> None:
        self._staging.halt = halt

    def holds(self, offset: int, nbytes: int) -> bool:
        return self.sent is not None

    def preset(self, literals: Iterable[tuple[int, bytes]]) -> None:
        for offset, data in literals:
            self.write_full(data, offset)

    def write_full(self, data: Any, offset: int) -> None:
        view = memoryview(data).cast("B")
        self.check_range(offset, len(view))
        if self.sent is not None or self._whole:
            return  # it has the same bytes
        self._staging.wait_for_room()
        with self._lock:
            if self._whole:
                return
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                os.truncate(self._fd, self.size)
            fd = self._fd
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)
        with self._lock:
            whole = self._covered(offset, offset + len(view)) and not self._whole
            self._whole = self._whole or whole
        if whole:
            self._staging.send(self)

    def finish(self) -> None:
        """Sends the file if that was not begun. Bytes that nobody wrote are zero."""
        with self._lock:
            late = self.sent is None and not self._whole
            self._whole = True
            if late and self._fd < 0:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                os.truncate(self._fd, self.size)
        if late:
            self._staging.send(self)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        if self._fd < 0:
            raise StoreError(f"{printable(self.location)} was sent, and cannot be read before it is published")
        return os.preadv(self._fd, [buffer], offset)

    def check(self) -> None:
        self._staging.check()

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                fd, self._fd = self._fd, -1
                os.close(fd)

    def remove(self) -> None:
        """Removes the file from this machine."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _covered(self, begin: int, end: int) -> bool:
        """Adds a span that was written. Returns whether all bytes are there."""
        add_span(self._spans, begin, end)
        return self._spans == [(0, self.size)]


class HubStaging(LocalStaging):
    """An output of the hub in the making: a folder on this machine with lock, journal, and the file that is made now.

    ``parent``: the commit that the output becomes a child of. ``replaced``: the files of the output that is there.
    """

    def __init__(self, out: Location, target: Repository) -> None:
        super().__init__(made_at(target), overwrite=True)
        self.out, self._target = out, target
        self.parent = ""
        self.replaced: list[str] = []
        self.halt: Callable[[], object] = lambda: None
        self._published = False
        self._waiting: list[Shard] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._stopped = threading.Event()
        self._earlier: dict[str, Sent] | None = None
        try:
            self._prepare()
        except BaseException:
            self.abort(keep=True)
            raise

    def _prepare(self) -> None:
        """Makes the repository and the branch if they are absent. Raises RecipeError if the user may not write there."""
        name, branch = self._target.name, self._target.revision

        def ask() -> None:
            with failures(self._target, writes=True):
                client = api()
                try:
                    with failures(self._target):
                        client.model_info(name, revision=branch)
                except NotThere:
                    if not client.repo_exists(name):
                        client.create_repo(name, private=True, exist_ok=True)
                        self.notes.append(f"the repository {name} was made; it is private until its settings say otherwise")
                    if branch != MAIN:
                        client.create_branch(name, branch=branch, exist_ok=True)
                from huggingface_hub import CommitOperationAdd

                probe = CommitOperationAdd(self._path_in_repo("streammerge.json"), b"{}")
                client.preupload_lfs_files(name, [probe], revision=branch)  # asks whether the user may write

        persistently(ask, f"asking {endpoint()} to write {printable(self.out)}")
        forget()

    def _path_in_repo(self, name: str) -> str:
        if not self.as_folder:
            return self._target.inner
        return f"{self._target.inner}/{name}" if self._target.inner else name

    def path_of(self, name: str) -> Path:
        return self._content / name

    # -------------------------------------------------------------------------------------------------------------- files

    def create(self, name: str, size: int, keep: bool = False, late: bool = False) -> Output:
        self.place(name)  # checks the name
        if name in self._files:
            old = self._files.pop(name)
            if isinstance(old, Shard):
                old.remove()
        target = self.out / name if self.as_folder else self.out
        made: Output
        if late:
            made = SmallOutput(target, size)
        else:
            make_subfolders(self._content, name)
            made = Shard(name, target, size, self, self._sent_earlier(name, size) if keep else None)
        self._files[name] = made
        return made

    def _sent_earlier(self, name: str, size: int) -> Sent | None:
        """Returns the record of a file that an earlier run has sent, if the hub still has it."""
        if self._earlier is None:
            self._earlier = dict(self._recorded())
        found = self._earlier.get(name)
        if found is None or found.size != size:
            return None
        from huggingface_hub import lfs

        info = _upload_info(found)

        def ask() -> bool:
            with failures(self._target, writes=True):
                headers = api()._build_hf_headers()
                actions, errors, _ = lfs.post_lfs_batch_info(
                    [info], None, "model", self._target.name, endpoint=endpoint(), headers=headers
                )
                return not errors and all(not each.get("actions") for each in actions)

        return found if persistently(ask, f"asking for {printable(name)}") else None

    def _recorded(self) -> Iterator[tuple[str, Sent]]:
        try:
            lines = (self._content / _SENT).read_text().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                said = Sent(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a torn line
            yield said.name, said

    # ------------------------------------------------------------------------------------------------------------ sending

    def wait_for_room(self) -> None:
        """Waits while a file is being sent, so that of the next one the disk holds only what was in hand."""
        with self._changed:
            while self._waiting and self._failed is None:
                self._changed.wait(_POLL_SECONDS)
                self.halt()
        self.check()

    def check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def send(self, shard: Shard) -> None:
        """Sends a file on a thread of its own."""
        with self._changed:
            self._waiting.append(shard)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="streammerge-send", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting or self._failed is not None:
                    self._thread = None
                    return
                shard = self._waiting[0]
            failed = None
            try:
                persistently(lambda shard=shard: self._send(shard), f"sending {printable(shard.location)}")  # type: ignore[misc]
            except BaseException as error:  # noqa: BLE001 - raised by the next write
                failed = error
            with self._changed:
                self._failed = failed
                self._waiting.remove(shard)
                self._changed.notify_all()

    def _send(self, shard: Shard) -> None:
        from huggingface_hub import CommitOperationAdd

        with (
            failures(self._target, writes=True),
            io.BufferedReader(_Reader(shard.path, self._stopped), _READ_BYTES) as reader,
        ):
            operation = CommitOperationAdd(self._path_in_repo(shard.name), reader)
            with _quiet_client():
                api().preupload_lfs_files(self._target.name, [operation], revision=self._target.revision, num_threads=1)
            info = operation.upload_info
            sent = Sent(shard.name, info.size, info.sha256.hex(), info.sample.hex())
            is_sent = operation._is_uploaded
        if not is_sent:
            shard.plain = True
            return
        with (self._content / _SENT).open("a") as record:
            record.write(json.dumps(asdict(sent)) + "\n")
            record.flush()
            os.fsync(record.fileno())
        shard.sent = sent
        shard.remove()

    # ------------------------------------------------------------------------------------------------------------- the end

    @property
    def published(self) -> bool:
        return self._published

    def commit(self, as_folder: bool) -> None:
        """Waits for what is sent, and makes one commit of all files."""
        shards = [file for file in self.outputs.values() if isinstance(file, Shard)]
        for shard in shards:
            shard.finish()
        self.wait_for_room()
        operations = [*self._additions(), *self._deletions()]
        names = {name: file.size for name, file in self.outputs.items()}

        def ask() -> None:
            with failures(self._target, writes=True), _quiet_client():
                if self._is_there(names):
                    return  # an answer was lost
                api().create_commit(
                    self._target.name,
                    operations,
                    commit_message="Merge by streammerge",
                    revision=self._target.revision,
                    parent_commit=self.parent,
                )

        persistently(ask, f"committing {printable(self.out)}")
        self._published = True
        forget()
        self.abort()

    def _additions(self) -> Iterator[Any]:
        from huggingface_hub import CommitOperationAdd

        for name, file in self.outputs.items():
            path = self._path_in_repo(name)
            if isinstance(file, SmallOutput):
                yield CommitOperationAdd(path, io.BytesIO(file.data))
            elif isinstance(file, Shard) and file.sent is None:
                yield CommitOperationAdd(path, io.BytesIO(file.path.read_bytes()))
            elif isinstance(file, Shard) and file.sent is not None:
                made = CommitOperationAdd(path, io.BytesIO())
                made.upload_info = _upload_info(file.sent)  # the hub has it, so that nothing is sent
                yield made

    def _deletions(self) -> Iterator[Any]:
        """Yields the removal of weights of the output that is there, where this one does not replace them."""
        from huggingface_hub import CommitOperationDelete

        for name in self.replaced:
            if name not in self.outputs and name.endswith(_WEIGHTS):
                yield CommitOperationDelete(self._path_in_repo(name))

    def _is_there(self, names: dict[str, int]) -> bool:
        """Whether another commit than the parent has all files of the output: our own request, whose answer was lost."""
        client = api()
        if client.model_info(self._target.name, revision=self._target.revision).sha == self.parent:
            return False
        listed = client.list_repo_tree(self._target.name, recursive=True, revision=self._target.revision)
        found = {each.path: each for each in listed if hasattr(each, "blob_id")}
        for name, file in self.outputs.items():
            there = found.get(self._path_in_repo(name))
            if there is None or there.size != names[name]:
                return False
            if isinstance(file, Shard) and file.sent and (there.lfs is None or there.lfs.sha256 != file.sent.sha256):
                return False
        return True

    def abort(self, keep: bool = False) -> None:
        self._stopped.set()
        thread = self._thread
        if thread is not None:
            thread.join(_POLL_SECONDS * 10)
        for file in self.outputs.values():
            if isinstance(file, Shard):
                file.remove()
        super().abort(keep)


def _upload_info(sent: Sent) -> Any:
    from huggingface_hub.lfs import UploadInfo

    return UploadInfo(size=sent.size, sample=bytes.fromhex(sent.sample), sha256=bytes.fromhex(sent.sha256))


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keeps the client from showing bars, and from warning that files are sent over plain HTTP, which is what is wanted."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub._commit_api")
    shown = not are_progress_bars_disabled()

    def other(record: logging.LogRecord) -> bool:
        return "binary IO buffer" not in record.getMessage()

    logger.addFilter(other)
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.removeFilter(other)
        if shown:
            enable_progress_bars()
