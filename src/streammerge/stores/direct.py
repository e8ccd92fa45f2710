"""Ranges of S3 objects over connections without TLS, as to a server in the same cluster: read by the kernel into place.

``obstore`` copies what it received once more, into memory that is new each time. That costs twice the CPU time of this.
With TLS its route is the better one: Python's sockets give 16 KiB at a time, and each waits for the interpreter's lock.
"""

from __future__ import annotations

import http.client
import os
import socket
import struct
import urllib.parse
import urllib.request
from typing import NamedTuple

from streammerge.stores.multipart import Answer, Requests
from streammerge.stores.profiles import endpoint
from streammerge.stores.remote import Passing


class Range(NamedTuple):
    """What an answer tells beside the bytes. ``size``: of the whole object. ``tag``: as it is sent, with its quotes."""

    size: int
    tag: str


def possible() -> bool:
    """Whether requests to the S3 service go over a plain connection to the address that is set, by paths."""
    address = endpoint()
    if not address.lower().startswith("http://"):
        return False
    if os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("1", "true"):
        return False
    host = urllib.parse.urlsplit(address).hostname or ""
    return not urllib.request.getproxies().get("http") or bool(urllib.request.proxy_bypass(host))


def read_range(requests: Requests, key: str, start: int, buffer: memoryview, tag: str, seconds: float) -> Range | None:
    """Fills the buffer from an object. Returns None if the object is gone, or has another tag now.

    ``tag``: the one that it must have, "" for any. ``seconds``: the longest wait for the next bytes. Raises Passing for
    what may pass, StoreError for what does not.
    """
    headers = {"range": f"bytes={start}-{start + len(buffer) - 1}"} | ({"if-match": tag} if tag else {})
    with requests.answered("GET", key, {}, b"", headers) as answer:
        if answer.status in (404, 412):
            answer.read()
            return None
        if answer.status == 206 and answer.length == len(buffer):
            _fill(answer, requests.socket(), buffer, seconds)
        else:
            said = Answer(answer.status, {}, answer.read(_MOST_ERROR_BYTES))
            if answer.status < 400:
                raise Passing(f"{answer.status} came with {answer.length} bytes instead of 206 with {len(buffer)}")
            requests.refuse(said, f"GET s3://{requests.bucket}/{key}")
    span, _, size = answer.headers.get("content-range", "").removeprefix("bytes ").partition("/")
    if span != f"{start}-{start + len(buffer) - 1}" or not size.isdigit():
        raise Passing(f"the bytes {span or '?'} came instead of those asked for")
    return Range(int(size), answer.headers.get("etag", ""))


_MOST_ERROR_BYTES = 64 << 10


def _fill(answer: http.client.HTTPResponse, connection: socket.socket | None, buffer: memoryview, seconds: float) -> None:
    """Reads a body into the buffer. What came with the head is in Python's buffer; the kernel puts the rest into place."""
    done = min(len(answer.peek()), len(buffer)) if connection else len(buffer)
    if answer.readinto(buffer[:done]) != done:
        raise Passing("the connection was closed early")
    if connection is None:
        return
    before = connection.gettimeout()
    connection.settimeout(None)  # else Python polls, and each part that has come is a call
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
    while done < len(buffer):
        count = connection.recv_into(buffer[done:], len(buffer) - done, socket.MSG_WAITALL)
        if not count:
            raise Passing(f"{done} bytes came instead of {len(buffer)}")
        done += count
    connection.settimeout(before)
    answer.close()
