"""Uploads to S3 in parts: begun, sent in any order, completed or aborted, and listed.

A part is protected twice: its CRC-32C is a signed header, which the server compares with what it got; and where the
connection has no TLS, the tag in the answer must be the MD5 of what was sent. An upload is invisible until it is complete.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import http.client
import os
import re
import socket
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from streammerge.errors import StoreError, printable
from streammerge.stores.base import Location
from streammerge.stores.checksums import CRC32C
from streammerge.stores.profiles import checked_endpoint, endpoint
from streammerge.stores.refusals import PASSING_CODES, PASSING_STATUS, of_answer
from streammerge.stores.remote import Passing, persistently
from streammerge.stores.signing import Credentials, credentials, region, signed

TIMEOUT_SECONDS = 60.0
_BLOCK_BYTES = 1 << 20
_MD5 = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Part:
    """A part that the server has. ``checksum``: its CRC-32C in base 64, "" if the server does not tell."""

    number: int
    size: int
    tag: str
    checksum: str = ""


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload that is not complete. ``began``: when it began, as text."""

    key: str
    identifier: str
    began: str


class Answer:
    """The answer to a request."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def tree(self) -> ElementTree.Element:
        try:
            return ElementTree.fromstring(self.body)
        except ElementTree.ParseError as error:
            raise Passing("the answer cannot be read") from error

    def text(self, name: str) -> str:
        """Returns the text of the first element of that name, "" if there is none."""
        return next((each.text or "" for each in self.tree().iter() if _plain(each.tag) == name), "")


def _plain(tag: str) -> str:
    return tag.rpartition("}")[2]


class Requests:
    """Requests about the objects of one bucket. Safe for threads: each has its own connection."""

    def __init__(self, bucket: str) -> None:
        address = checked_endpoint() if endpoint() else f"https://s3.{region()}.amazonaws.com"
        parsed = urllib.parse.urlsplit(address)
        self.secure = parsed.scheme == "https"
        self._host, self._port = parsed.hostname or "", parsed.port
        self._named = parsed.netloc.rpartition("@")[2]
        self._root = f"{parsed.path}/{bucket}"
        self.bucket = bucket
        self._region = region()
        self._credentials: Credentials | None = None
        self._local = threading.local()

    # ------------------------------------------------------------------------------------------------------------ requests

    def ask(
        self,
        method: str,
        key: str,
        query: Mapping[str, str] | None = None,
        body: Any = b"",
        headers: Mapping[str, str] | None = None,
        accepted: tuple[int, ...] = (200, 204, 206),
    ) -> Answer:
        """Sends a request, again if its failure may pass. Raises StoreError for a lasting one."""
        what = f"{method} s3://{printable(self.bucket)}/{printable(key)}"

        def ask() -> Answer:
            answer = self._once(method, key, query or {}, body, headers or {}, accepted, what)
            if answer.body:
                answer.tree()  # one that cannot be read is asked for again
            return answer

        return persistently(ask, what)

    def _once(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        body: Any,
        headers: Mapping[str, str],
        accepted: tuple[int, ...],
        what: str,
    ) -> Answer:
        with self.answered(method, key, query, body, headers) as answered:
            answer = Answer(answered.status, {k.lower(): v for k, v in answered.getheaders()}, answered.read())
        if answer.status in accepted:
            if b"<Error>" in answer.body[:512] and method == "POST":  # completing may fail after the status was sent
                raise Passing(printable(answer.body.decode("utf-8", "replace"), 200))
            return answer
        return self.refuse(answer, what)

    @contextlib.contextmanager
    def answered(
        self, method: str, key: str, query: Mapping[str, str], body: Any, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends a request, and gives the answer, whose body the block reads. Raises Passing if the connection fails."""
        path = f"{self._root}/{key}" if key else self._root
        target, every = signed(
            method,
            self._named,
            path,
            query,
            headers,
            self._signer(),
            self._region,
            datetime.datetime.now(datetime.timezone.utc),
        )
        every.pop("host", None)  # the connection sends it
        every["content-length"] = str(len(body))
        try:
            connection = self._connection()
            connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in every.items():
                connection.putheader(name, value)
            connection.endheaders()
            for start in range(0, len(body), _BLOCK_BYTES):
                connection.send(body[start : start + _BLOCK_BYTES])
            answered = connection.getresponse()
            yield answered
            if answered.will_close:
                self._drop()
        except BaseException as error:
            self._drop()  # else the rest of this answer would be taken for the next one
            if isinstance(error, OSError | http.client.HTTPException) and not isinstance(error, StoreError):
                raise Passing(f"{type(error).__name__}: {error}") from error
            raise

    def _signer(self) -> Credentials | None:
        """Returns the credentials. They are looked up again when they end soon."""
        if self._credentials is None or self._credentials.ends_soon():
            self._credentials = credentials()
        return self._credentials

    def socket(self) -> socket.socket | None:
        """Returns the socket of this thread's connection. None if the server closes it after the present answer."""
        return self._connection().sock

    def refuse(self, answer: Answer, what: str) -> NoReturn:
        """Raises the error of an answer that is none: Passing, or Refused."""
        said = of_answer(answer.status, answer.body.decode("utf-8", "replace"))
        if answer.status in PASSING_STATUS or said.code in PASSING_CODES:
            raise Passing(f"{answer.status} {said._replace(advice='')}".strip(), advice=said.advice)
        raise Refused(f"{what} was refused: {answer.status} {said}".strip(), answer.status, said.code)

    def _connection(self) -> http.client.HTTPConnection:
        kept: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if kept is None:
            kept = self._local.connection = self._connected()
        return kept

    def _connected(self) -> http.client.HTTPConnection:
        if not self.secure:
            return http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_SECONDS)
        context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)
        proxy = urllib.request.getproxies().get("https", "")
        if proxy and not urllib.request.proxy_bypass(self._host):
            through = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            made = http.client.HTTPSConnection(
                through.hostname or "", through.port, timeout=TIMEOUT_SECONDS, context=context
            )
            made.set_tunnel(self._host, self._port or 443)
            return made
        return http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_SECONDS, context=context)

    def _drop(self) -> None:
        kept = getattr(self._local, "connection", None)
        self._local.connection = None
        if kept is not None:
            kept.close()

    # ------------------------------------------------------------------------------------------------------------- uploads

    def begin(self, key: str) -> str:
        """Begins an upload. Returns its identifier."""
        found = self.ask("POST", key, {"uploads": ""}, headers={"x-amz-checksum-algorithm": "CRC32C"}).text("UploadId")
        if not found:
            raise StoreError(f"s3://{printable(self.bucket)} began an upload without an identifier")
        return found

    def send(self, key: str, upload: str, number: int, data: Any) -> Part:
        """Sends a part. Numbers begin at 1."""
        view = memoryview(data).cast("B")
        checksum = base64.b64encode(CRC32C.update(view).to_bytes(4, "big")).decode()
        query = {"partNumber": str(number), "uploadId": upload}
        headers = {"x-amz-checksum-crc32c": checksum}

        def ask() -> Part:
            answer = self._once("PUT", key, query, view, headers, (200,), what)
            tag = answer.headers.get("etag", "").strip('"')
            hidden = "x-amz-server-side-encryption" in answer.headers  # then the tag may be another number
            digested = not self.secure and not hidden and _MD5.fullmatch(tag)
            if digested and tag != hashlib.md5(view, usedforsecurity=False).hexdigest():
                raise Passing("the server got other bytes than were sent")
            return Part(number, len(view), tag, checksum)

        what = f"PUT s3://{printable(self.bucket)}/{printable(key)} part {number}"
        return persistently(ask, what)

    def copy_part(self, key: str, upload: str, number: int, source: str, start: int, stop: int, tag: str) -> Part:
        """Copies a range of another object on the server as a part. ``source``: ``bucket/key``. ``tag``: its version."""
        headers = {
            "x-amz-copy-source": urllib.parse.quote(source, safe="/-._~"),
            "x-amz-copy-source-range": f"bytes={start}-{stop - 1}",
            "x-amz-copy-source-if-match": tag,
        }
        answer = self.ask("PUT", key, {"partNumber": str(number), "uploadId": upload}, headers=headers)
        return Part(number, stop - start, answer.text("ETag").strip('"'), answer.text("ChecksumCRC32C"))

    def copy(self, key: str, source: str, tag: str) -> None:
        """Copies another object on the server, in one request. It has at most 5 GB."""
        headers = {
            "x-amz-copy-source": urllib.parse.quote(source, safe="/-._~"),
            "x-amz-copy-source-if-match": tag,
        }
        self.ask("PUT", key, headers=headers)

    def tag(self, key: str) -> str:
        """Returns the tag of an object, "" if there is none."""
        return self.ask("HEAD", key, accepted=(200, 404)).headers.get("etag", "").strip('"')

    def complete(self, key: str, upload: str, parts: list[Part], replaces: bool) -> None:
        """Completes an upload: the object appears. ``replaces``: whether one of that name may be there."""
        rows = []
        for part in sorted(parts, key=lambda each: each.number):
            checksum = f"<ChecksumCRC32C>{escape(part.checksum)}</ChecksumCRC32C>" if part.checksum else ""
            rows.append(f'<Part><PartNumber>{part.number}</PartNumber><ETag>"{escape(part.tag)}"</ETag>{checksum}</Part>')
        body = f"<CompleteMultipartUpload>{''.join(rows)}</CompleteMultipartUpload>".encode()
        headers = {} if replaces else {"if-none-match": "*"}
        self.ask("POST", key, {"uploadId": upload}, body, headers)

    def abort(self, key: str, upload: str) -> None:
        """Aborts an upload, and frees its parts. Does nothing if it is gone."""
        self.ask("DELETE", key, {"uploadId": upload}, accepted=(200, 204, 404))

    def parts(self, key: str, upload: str) -> list[Part]:
        """Returns the parts that the server has. Empty if the upload is gone."""
        found: list[Part] = []
        after = ""
        while True:
            query = {"uploadId": upload} | ({"part-number-marker": after} if after else {})
            answer = self.ask("GET", key, query, accepted=(200, 404))
            if answer.status == 404:
                return []
            for row in _rows(answer.tree(), "Part"):
                number, size = int(row.get("PartNumber", "0")), int(row.get("Size", "0"))
                found.append(Part(number, size, row.get("ETag", "").strip('"'), row.get("ChecksumCRC32C", "")))
            after = answer.text("NextPartNumberMarker")
            if answer.text("IsTruncated") != "true" or not after:
                return found

    def uploads(self, prefix: str) -> Iterator[Upload]:
        """Yields the uploads that are not complete, of all keys with this beginning."""
        marks: dict[str, str] = {}
        while True:
            answer = self.ask("GET", "", {"uploads": "", "prefix": prefix, **marks})
            for row in _rows(answer.tree(), "Upload"):
                yield Upload(row.get("Key", ""), row.get("UploadId", ""), row.get("Initiated", ""))
            key, identifier = answer.text("NextKeyMarker"), answer.text("NextUploadIdMarker")
            if answer.text("IsTruncated") != "true" or not key:
                return
            marks = {"key-marker": key} | ({"upload-id-marker": identifier} if identifier else {})


class Refused(StoreError):
    """Raised for a request that the server refuses for good. ``status``: that of the answer. ``code``: the word in it."""

    def __init__(self, said: str, status: int, code: str) -> None:
        super().__init__(said)
        self.status, self.code = status, code


def _rows(tree: ElementTree.Element, name: str) -> Iterator[dict[str, str]]:
    for each in tree.iter():
        if _plain(each.tag) == name:
            yield {_plain(field.tag): field.text or "" for field in each}


def requests_of(location: Location) -> tuple[Requests, str]:
    """Returns the requests of a location's bucket, and its key in it."""
    bucket, _, key = location.key.partition("/")
    return Requests(bucket), key
