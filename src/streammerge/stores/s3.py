"""``s3://bucket/key``: Amazon S3 and all that speak its protocol."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streammerge.stores import direct, multipart
from streammerge.stores.base import Joint, Location, Staging, Status
from streammerge.stores.buffers import Buffers
from streammerge.stores.multipart import Refused, Requests
from streammerge.stores.objects import READ_SECONDS, ObjectStore, changed_meanwhile
from streammerge.stores.parts import Part, Upload
from streammerge.stores.profiles import checked_endpoint, chosen_profile, endpoint
from streammerge.stores.remote import RangedInput
from streammerge.stores.staged import ObjectStaging, whole_tag
from streammerge.stores.tags import part_sizes

_OWN_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_PROFILE_KEYS = {
    "access_key_id": ("aws_access_key_id",),
    "secret_access_key": ("aws_secret_access_key",),
    "session_token": ("aws_session_token",),
    "region": ("region",),
}


_MOST_DIGESTED_BYTES, _MOST_DIGESTED = 64 << 20, 10_000
"""The size of a file that is read once more, and how many of them are remembered."""
_MOST_COPY_BYTES, _COPY_BYTES = 5_000_000_000, 1 << 30
"""The most bytes that one request may copy, and those of a part that is copied."""


def _ranges_of(size: int, each: int) -> list[tuple[int, int]]:
    return [(start, min(start + each, size)) for start in range(0, size, each)]


class S3(ObjectStore):
    """Amazon S3 and all that speak its protocol."""

    scheme = "s3"
    resumes = True

    def __init__(self) -> None:
        super().__init__()
        self._digested: dict[tuple[object, ...], list[int] | None] = {}
        self._digesting = threading.Lock()

    def settings(self) -> Mapping[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def allows_http(self) -> bool:
        return endpoint().lower().startswith("http://")

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        config: dict[str, Any] = {}
        if endpoint():
            config["endpoint"] = checked_endpoint()
        if not any(os.environ.get(name) for name in _OWN_CREDENTIALS):
            ours = chosen_profile()
            for key, names in _PROFILE_KEYS.items():
                found = next((ours[name] for name in names if ours.get(name)), None)
                if found:
                    config[key] = found
        return module.S3Store(root, **config, **common)

    def stage(self, location: Location, overwrite: bool = False) -> Staging:
        return ObjectStaging(self, location, overwrite)

    def join(self, location: Location, key: str) -> Joint:
        from streammerge.stores.joint_objects import joint_of  # here, because most outputs are made by one machine

        return joint_of(location, key)

    def sums(self, file: RangedInput, location: Location, status: Status) -> Sequence[int] | None:
        """Where the connection has no TLS, reads a file of moderate size once more, and compares it with its tag.

        TLS protects every byte on its way. Nothing else does: a tag is a digest of the whole file only.
        """
        tag = str(status.version)
        if status.size > _MOST_DIGESTED_BYTES or not self.allows_http() or not part_sizes(tag, status.size):
            return None
        with self._digesting:
            if file.identity not in self._digested:
                if len(self._digested) >= _MOST_DIGESTED:
                    self._digested.clear()
                self._digested[file.identity] = file.read_through(tag)
            return self._digested[file.identity]

    def fetcher(self, location: Location, status: Status) -> Callable[[int, int, Buffers | None], Any]:
        by_client, tag = super().fetcher(location, status), str(status.version)
        if not tag.startswith('"') or not direct.possible():
            return by_client
        root, _, name = location.key.partition("/")
        requests = self.requests(root)

        def fetch(start: int, stop: int, buffers: Buffers | None) -> Any:
            if buffers is None:
                return by_client(start, stop, None)
            buffer = buffers.take(stop - start)
            if direct.read_range(requests, name, start, buffer, tag, READ_SECONDS) != (status.size, tag):
                raise changed_meanwhile(location)
            return buffer

        return fetch

    def requests(self, root: str) -> Requests:
        """Returns the requests that the client lacks, for a bucket."""
        key = ("requests", *self._key(root))
        with self._lock:
            found: Requests | None = self._clients.get(key)
            if found is None:
                found = self._clients[key] = Requests(root)
            return found

    def upload(self, location: Location) -> Upload:
        root, _, name = location.key.partition("/")
        requests = self.requests(root)
        return S3Upload(requests, name, requests.begin(name))

    def upload_again(self, location: Location, identifier: str) -> tuple[Upload, dict[int, Part]] | None:
        root, _, name = location.key.partition("/")
        requests = self.requests(root)
        if not identifier or not any(each.identifier == identifier for each in requests.uploads(name)):
            return None
        found = requests.parts(name, identifier)
        parts = {each.number - 1: Part(each.size, each.tag, each.checksum) for each in found}
        return S3Upload(requests, name, identifier), parts

    def uploads_below(self, place: Location) -> list[Location]:
        root, _, name = place.key.partition("/")
        below = f"{name}/" if name else ""
        found = {each.key for each in self.requests(root).uploads(name) if each.key == name or each.key.startswith(below)}
        return [Location(self, f"{root}/{key}") for key in sorted(found)]

    def abort_uploads(self, out: Location, as_folder: bool) -> None:
        root, _, name = out.key.partition("/")
        requests = self.requests(root)
        for each in list(requests.uploads(f"{name}/" if as_folder else name)):
            if as_folder or each.key == name:
                requests.abort(each.key, each.identifier)

    def copy(self, source: Location, status: Status, target: Location) -> bool:
        root, _, name = target.key.partition("/")
        requests, tag = self.requests(root), str(status.version)
        if status.size <= _MOST_COPY_BYTES:
            requests.copy(name, source.key, tag)
            return True
        upload = requests.begin(name)
        try:
            spans = enumerate(_ranges_of(status.size, _COPY_BYTES), 1)
            parts = [requests.copy_part(name, upload, number, source.key, *span, tag) for number, span in spans]
            requests.complete(name, upload, parts, replaces=True)
        except BaseException:
            requests.abort(name, upload)
            raise
        return True


class S3Upload(Upload):
    """An upload of S3. ``identifier``: its name at the server."""

    def __init__(self, requests: Requests, key: str, identifier: str) -> None:
        self._requests, self._key, self.identifier = requests, key, identifier

    def send(self, number: int, data: memoryview) -> Part:
        made = self._requests.send(self._key, self.identifier, number + 1, data)
        return Part(made.size, made.tag, made.checksum)

    def complete(self, parts: Sequence[Part], replaces: bool) -> None:
        every = [multipart.Part(number, *part) for number, part in enumerate(parts, 1)]
        try:
            self._requests.complete(self._key, self.identifier, every, replaces)
        except Refused:
            if self._requests.tag(self._key) != (whole_tag(parts) or None):  # equal if the first answer was lost
                raise

    def abort(self) -> None:
        self._requests.abort(self._key, self.identifier)
