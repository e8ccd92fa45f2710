"""A server on this machine that speaks what ``obstore`` asks of Google Cloud Storage and of Azure Blob Storage.

It knows these requests only, checks no credentials, and keeps everything in memory. Conditions are kept: they are what
locks and commits rely on.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, unescape

AZURE_ACCOUNT = "devstoreaccount1"
_TIME = "Thu, 26 Nov 2026 00:00:00 GMT"


class Held(NamedTuple):
    """An object. ``generation``: a number that no other object ever had."""

    data: bytes
    generation: int

    @property
    def tag(self) -> str:
        return f'"{hashlib.md5(self.data, usedforsecurity=False).hexdigest()[:12]}{self.generation}"'


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that was killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class BucketServer:
    """Objects by ``bucket/key``. ``parts``: those of uploads that are not complete, by upload and then by name.

    ``asked`` has a word for each request, as the services call it.
    """

    def __init__(self, handler: type[_Handler]) -> None:
        self.objects: dict[str, Held] = {}
        self.parts: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.lock, self._count = threading.RLock(), 0
        self._server = _Quiet(("127.0.0.1", 0), type("Handler", (handler,), {"buckets": self}))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def number(self) -> int:
        with self.lock:
            self._count += 1
            return self._count

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """The common part: ranges, conditions on tags, and listings as (names, folders)."""

    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True
    """An answer is one write. Of two, the second would wait until the client has acknowledged the first: 40 ms."""
    buckets: BucketServer

    def parsed(self, word: str) -> tuple[str, dict[str, str], bytes]:
        """Returns the key, the query and the body of a request."""
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.buckets.asked.append(word)
        return urllib.parse.unquote(path).strip("/"), dict(urllib.parse.parse_qsl(query, keep_blank_values=True)), body

    def answer(self, status: int, body: bytes | str = b"", sends: bool = True, **headers: object) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if sends:
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>", self.command != "HEAD")

    def send_object(self, key: str) -> None:
        held = self.buckets.objects.get(key)
        if held is None:
            self.refuse(404, "NoSuchKey")
            return
        if self.headers.get("if-match") not in (None, held.tag):
            self.refuse(412, "ConditionNotMet")
            return
        told = {"ETag": held.tag, "Last_Modified": _TIME, "x_goog_generation": held.generation}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range") or self.headers.get("x-ms-range") or "")
        if asked is None:
            self.answer(200, held.data, self.command == "GET", **told)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(held.data))
        told["Content_Range"] = f"bytes {start}-{stop - 1}/{len(held.data)}"
        self.answer(206, held.data[start:stop], **told)

    def listed(self, bucket: str, query: dict[str, str]) -> tuple[dict[str, Held], list[str]]:
        prefix, found, folders = query.get("prefix", ""), dict[str, Held](), set[str]()
        for key, held in sorted(self.buckets.objects.items()):
            root, _, name = key.partition("/")
            if root != bucket or not name.startswith(prefix):
                continue
            head, slash, _ = name[len(prefix) :].partition("/")
            if slash and query.get("delimiter"):
                folders.add(prefix + head + "/")
            else:
                found[name] = held
        return found, sorted(folders)

    def keep(self, key: str, data: bytes) -> Held:
        held = self.buckets.objects[key] = Held(data, self.buckets.number())
        return held

    def do_HEAD(self) -> None:
        self.do_GET()  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class Google(_Handler):
    """Google Cloud Storage by its XML interface. Conditions are on generations."""

    def do_GET(self) -> None:
        key, query, _ = self.parsed(self.command)
        if "list-type" not in query:
            self.send_object(key)
            return
        found, folders = self.listed(key, query)
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(held.data)}</Size><ETag>{escape(held.tag)}</ETag>"
            "<LastModified>2026-11-26T00:00:00.000Z</LastModified></Contents>"
            for name, held in found.items()
        )
        rows += "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in folders)
        self.answer(200, f"<ListBucketResult>{rows}</ListBucketResult>")

    def do_PUT(self) -> None:
        key, query, body = self.parsed("part" if "partNumber" in self.path else "PUT")
        if "partNumber" in query:
            self.buckets.parts[query["uploadId"]][query["partNumber"]] = body
            self.answer(200, ETag=f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
            return
        source = self.headers.get("x-goog-copy-source")
        wanted = self.headers.get("x-goog-if-generation-match")
        with self.buckets.lock:
            there = self.buckets.objects.get(key)
            fits = wanted is None or int(wanted) == (there.generation if there else 0)
            if source:
                body = self.buckets.objects[urllib.parse.unquote(source).strip("/")].data
            held = self.keep(key, body) if fits else None
        if held is None:
            self.refuse(412, "PreconditionFailed")
        else:
            self.answer(200, ETag=held.tag, x_goog_generation=held.generation)

    def do_POST(self) -> None:
        key, query, body = self.parsed("uploads" if self.path.endswith("?uploads") else "complete")
        if "uploads" in query:
            made = f"u{self.buckets.number()}"
            self.buckets.parts[made] = {}
            self.answer(200, f"<InitiateMultipartUploadResult><UploadId>{made}</UploadId></InitiateMultipartUploadResult>")
            return
        parts = self.buckets.parts.pop(query["uploadId"])
        numbers = re.findall(r"<PartNumber>(\d+)</PartNumber>", body.decode())
        held = self.keep(key, b"".join(parts[number] for number in numbers))
        self.answer(
            200,
            f"<CompleteMultipartUploadResult><ETag>{escape(held.tag)}</ETag></CompleteMultipartUploadResult>",
            x_goog_generation=held.generation,
        )

    def do_DELETE(self) -> None:
        key, query, _ = self.parsed("abort" if "uploadId" in self.path else "DELETE")
        if "uploadId" in query:
            self.buckets.parts.pop(query["uploadId"], None)
            self.answer(204)
        elif self.buckets.objects.pop(key, None) is None:
            self.refuse(404, "NoSuchKey")
        else:
            self.answer(204)


class Azure(_Handler):
    """Azure Blob Storage. Conditions are on tags. A blob's blocks are forgotten when it is written."""

    def parsed(self, word: str) -> tuple[str, dict[str, str], bytes]:
        key, query, body = super().parsed(word)
        return key.removeprefix(f"{AZURE_ACCOUNT}/"), query, body

    def do_GET(self) -> None:
        key, query, _ = self.parsed(self.command)
        if query.get("comp") != "list":
            self.send_object(key)
            return
        found, folders = self.listed(key, query)
        rows = "".join(
            f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{_TIME}</Last-Modified>"
            f"<Content-Length>{len(held.data)}</Content-Length><Content-Type>x</Content-Type>"
            f"<Etag>{escape(held.tag)}</Etag></Properties></Blob>"
            for name, held in found.items()
        )
        rows += "".join(f"<BlobPrefix><Name>{escape(each)}</Name></BlobPrefix>" for each in folders)
        self.answer(200, f"<EnumerationResults><Blobs>{rows}</Blobs><NextMarker/></EnumerationResults>")

    def do_PUT(self) -> None:
        word = re.search(r"comp=(block|blocklist)\b", self.path)
        key, query, body = self.parsed(word[1] if word else "PUT")
        if query.get("comp") == "block":
            self.buckets.parts.setdefault(key, {})[query["blockid"]] = body
            self.answer(201)
            return
        source = self.headers.get("x-ms-copy-source")
        with self.buckets.lock:
            there = self.buckets.objects.get(key)
            if there and self.headers.get("if-none-match") == "*":
                refused, held = (409, "BlobAlreadyExists"), None
            elif self.headers.get("if-match") not in (None, there.tag if there else ""):
                refused, held = (412, "ConditionNotMet"), None
            else:
                blocks = self.buckets.parts.pop(key, {})
                if query.get("comp") == "blocklist":
                    names = re.findall(r"<Uncommitted>(.*?)</Uncommitted>", body.decode())
                    body = b"".join(blocks[unescape(name)] for name in names)
                elif source:
                    path = urllib.parse.unquote(urllib.parse.urlsplit(source).path).strip("/")
                    body = self.buckets.objects[path.removeprefix(f"{AZURE_ACCOUNT}/")].data
                held = self.keep(key, body)
        if held is None:
            self.refuse(*refused)
        else:
            self.answer(202 if source else 201, ETag=held.tag, Last_Modified=_TIME, x_ms_copy_status="success")

    def do_DELETE(self) -> None:
        key, _, _ = self.parsed("DELETE")
        if self.buckets.objects.pop(key, None) is None:
            self.refuse(404, "BlobNotFound")
        else:
            self.answer(202)

    def do_POST(self) -> None:
        """Deletes several blobs, whose requests are the parts of this one."""
        _, _, body = self.parsed("batch")
        answers = ""
        for number, path in enumerate(re.findall(r"^DELETE (\S+) HTTP", body.decode(), re.MULTILINE)):
            key = urllib.parse.unquote(path.partition("?")[0]).strip("/").removeprefix(f"{AZURE_ACCOUNT}/")
            there = self.buckets.objects.pop(key, None)
            status = "202 Accepted" if there else "404 The specified blob does not exist."
            code = "" if there else "x-ms-error-code: BlobNotFound\r\n"
            answers += f"--answers\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
            answers += f"HTTP/1.1 {status}\r\n{code}x-ms-version: 2023-11-03\r\n\r\n\r\n"
        self.answer(202, answers + "--answers--\r\n", Content_Type="multipart/mixed; boundary=answers")


@contextmanager
def bucket_server(handler: type[_Handler]) -> Iterator[BucketServer]:
    server = BucketServer(handler)
    try:
        yield server
    finally:
        server.close()
