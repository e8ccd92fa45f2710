"""A fast S3 server on this machine, for benchmarks: objects are files, ranges go out by ``sendfile``, and parts go to their
places in one file, so that to complete an upload copies no more than its last part.

``python -m benchmarks.s3_server FOLDER PORT``. It knows what streammerge and obstore ask for, checks no signatures, and
makes no digests: the tag of an object is a number.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import socket
import sys
import threading
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import escape, unescape

_BLOCK_BYTES = 1 << 20
_WHOLE = "whole"
_numbers = itertools.count(1)


class Server:
    """One folder as all buckets: the object ``bucket/key`` is the file ``bucket/key``, its parts are in ``.parts``.

    Parts as long as the first that came lie in the file ``whole`` there; each other one is a file of its own.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder, self.parts = folder, folder / ".parts"
        self.parts.mkdir(parents=True, exist_ok=True)
        self._uploads: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._parts: dict[str, dict[int, tuple[str, int, int]]] = {}
        """Of each upload: the file of each part, its place there and its bytes."""
        self._each: dict[str, int] = {}
        self._listening = socket.create_server(("127.0.0.1", port), backlog=256)
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def serve(self) -> None:
        """Answers until the process ends."""
        while True:
            connection, _ = self._listening.accept()
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, contextlib.suppress(OSError):
            while self._one(connection):
                pass

    def _one(self, connection: socket.socket) -> bool:
        """Answers one request. Returns whether there was one."""
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(1 << 16)
            if not data:
                return False
            head += data
        text, _, early = head.partition(b"\r\n\r\n")
        lines = text.decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        path, _, asked = target.partition("?")
        key = urllib.parse.unquote(path).strip("/")
        query = dict(urllib.parse.parse_qsl(asked, keep_blank_values=True))
        length = int(headers.get("content-length", 0))
        if headers.get("expect") == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if method == "PUT":
            self._put(connection, key, query, early, length)
            return True
        body = early
        while len(body) < length:
            body += connection.recv(1 << 16)
        query["body"] = body.decode("utf-8", "replace")
        getattr(self, f"_{method.lower()}")(connection, key, query, headers)
        return True

    def _put(self, connection: socket.socket, key: str, query: dict[str, str], early: bytes, length: int) -> None:
        target, offset = self.folder / key, 0
        if "partNumber" in query:
            number, upload = int(query["partNumber"]), query["uploadId"]
            each = self._each.setdefault(upload, length)
            name, offset = (_WHOLE, (number - 1) * each) if length == each else (f"{number:05d}", 0)
            self._parts[upload][number] = name, offset, length
            target = self.parts / upload / name
        target.parent.mkdir(parents=True, exist_ok=True)
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | (0 if target.name == _WHOLE else os.O_TRUNC), 0o644)
        with open(descriptor, "wb", buffering=0) as file:
            file.seek(offset)
            file.write(early)
            left = length - len(early)
            while left:
                count = connection.recv_into(buffer[: min(left, _BLOCK_BYTES)])
                if not count:
                    raise ConnectionError
                file.write(buffer[:count])
                left -= count
        self._tags[str(target)] = tag = f'"n{next(_numbers)}"'
        _answer(connection, 200, headers={"ETag": tag})

    def _post(self, connection: socket.socket, key: str, query: dict[str, str], headers: dict[str, str]) -> None:
        if "delete" in query:
            gone = re.findall("<Key>(.*?)</Key>", query["body"])
            for name in gone:
                (self.folder / key / unescape(name)).unlink(missing_ok=True)
            rows = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in gone)
            _answer(connection, 200, f"<DeleteResult>{rows}</DeleteResult>")
            return
        if "uploads" in query:
            made = f"u{next(_numbers)}"
            self._uploads[made], self._parts[made] = key, {}
            (self.parts / made).mkdir()
            _answer(connection, 200, f"<R><UploadId>{made}</UploadId></R>")
            return
        folder, target = self.parts / query["uploadId"], self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        self._join(folder, self._parts[query["uploadId"]]).replace(target)
        self._forget(query["uploadId"])
        self._tags[str(target)] = tag = f'"n{next(_numbers)}"'
        _answer(connection, 200, f"<R><ETag>{escape(tag)}</ETag></R>")

    def _join(self, folder: Path, parts: dict[int, tuple[str, int, int]]) -> Path:
        """Joins the parts of an upload in one file, and returns it."""
        end, whole = 0, folder / _WHOLE
        rows = [parts[number] for number in sorted(parts)]
        if any(name != _WHOLE for name, _, _ in rows[:-1]):  # the last part, which is shorter, came first
            whole = folder / "joined"
        with open(os.open(whole, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            for name, offset, nbytes in rows:
                if (folder / name, offset) != (whole, end):
                    file.seek(end)
                    with (folder / name).open("rb") as part:
                        part.seek(offset)
                        file.write(part.read(nbytes))
                end += nbytes
        return whole

    def _forget(self, upload: str) -> None:
        self._uploads.pop(upload, None)
        self._parts.pop(upload, None)
        self._each.pop(upload, None)
        shutil.rmtree(self.parts / upload, ignore_errors=True)

    def _delete(self, connection: socket.socket, key: str, query: dict[str, str], headers: dict[str, str]) -> None:
        if "uploadId" in query:
            self._forget(query["uploadId"])
        else:
            (self.folder / key).unlink(missing_ok=True)
        _answer(connection, 204)

    def _head(self, connection: socket.socket, key: str, query: dict[str, str], headers: dict[str, str]) -> None:
        self._get(connection, key, query, headers, sends=False)

    def _get(
        self, connection: socket.socket, key: str, query: dict[str, str], headers: dict[str, str], sends: bool = True
    ) -> None:
        if "uploads" in query:
            rows = "".join(
                f"<Upload><Key>{escape(name.partition('/')[2])}</Key><UploadId>{made}</UploadId></Upload>"
                for made, name in self._uploads.items()
                if name.partition("/")[2].startswith(query.get("prefix", ""))
            )
            _answer(connection, 200, f"<R><IsTruncated>false</IsTruncated>{rows}</R>")
        elif "list-type" in query:
            self._list(connection, key, query)
        else:
            self._file(connection, self.folder / key, headers, sends)

    def _list(self, connection: socket.socket, bucket: str, query: dict[str, str]) -> None:
        prefix, root = query.get("prefix", ""), self.folder / bucket
        rows, folders = "", set[str]()
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(prefix) or not path.is_file():
                continue
            rest = name[len(prefix) :]
            if query.get("delimiter") and "/" in rest:
                folders.add(prefix + rest.partition("/")[0] + "/")
                continue
            rows += (
                f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{escape(self._tag(path))}</ETag><Size>{path.stat().st_size}</Size></Contents>"
            )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(folders))
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}{common}</ListBucketResult>"
        _answer(connection, 200, body)

    def _tag(self, path: Path) -> str:
        return self._tags.setdefault(str(path), f'"n{next(_numbers)}"')

    def _file(self, connection: socket.socket, path: Path, headers: dict[str, str], sends: bool) -> None:
        if not path.is_file():
            _answer(connection, 404, "<Error><Code>NoSuchKey</Code></Error>", sends=sends)
            return
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        if "range" in headers:
            first, _, last = headers["range"].removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last) + 1 if last else size, size), 206
        told = {
            "ETag": self._tag(path),
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "Content-Range": f"bytes {start}-{stop - 1}/{size}",
        }
        _answer(connection, status, headers=told, length=stop - start)
        if sends:
            with path.open("rb") as file:
                while start < stop:
                    start += os.sendfile(connection.fileno(), file.fileno(), start, stop - start)


_WORDS = {200: "OK", 204: "No Content", 206: "Partial Content", 404: "Not Found"}


def _answer(
    connection: socket.socket,
    status: int,
    body: str = "",
    headers: dict[str, str] | None = None,
    length: int | None = None,
    sends: bool = True,
) -> None:
    data = body.encode()
    lines = [f"HTTP/1.1 {status} {_WORDS[status]}", f"Content-Length: {len(data) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + (data if sends else b""))


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(server.address, flush=True)
    server.serve()
