"""What object stores say when they refuse: told at once, in one sentence, with what to do."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import use_s3
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.stores import remote
from streammerge.stores.refusals import of_answer, of_error

BODY = "<?xml version='1.0'?>\n<Error>\n  <Code>{}</Code><Message>{}</Message><Region>eu-west-1</Region>\n</Error>"


class Refusing:
    """A server that gives one answer to each request but for files that it has. ``asked`` counts requests."""

    def __init__(self) -> None:
        self.status, self.body, self.asked, self.ranges = 200, b"", 0, True
        self.files: dict[str, bytes] = {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Refusing]:
    pytest.importorskip("obstore")
    made = Refusing()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            made.asked += 1
            self.rfile.read(int(self.headers.get("content-length") or 0))
            status, data, headers = made.status, made.body, {}
            if self.path in made.files and self.command in ("GET", "HEAD"):
                status, data, asked = 200, made.files[self.path], self.headers.get("range")
                headers = {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
                if asked and made.ranges:
                    start, stop = (int(each) for each in asked.removeprefix("bytes=").split("-"))
                    headers["Content-Range"] = f"bytes {start}-{min(stop, len(data) - 1)}/{len(data)}"
                    status, data = 206, data[start : stop + 1]
            headed = self.command == "HEAD"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if status == 200 or not headed else 0))
            self.end_headers()
            self.wfile.write(b"" if headed else data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    use_s3(f"http://127.0.0.1:{running.server_port}", monkeypatch)
    yield made
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("to_output", [False, True])
@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (400, "ExpiredToken", "get new credentials"),
        (403, "SignatureDoesNotMatch", "look at AWS_SECRET_ACCESS_KEY"),
        (403, "InvalidAccessKeyId", "look at AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", "ask for the right to list, read and write"),
        (400, "AuthorizationHeaderMalformed", "set AWS_REGION=eu-west-1"),
        (301, "PermanentRedirect", "set AWS_REGION"),
        (403, "InvalidObjectState", "restore it first"),
        (404, "NoSuchBucket", "correct the name, or create it first"),
    ],
)
def test_a_lasting_refusal_is_told_at_once(
    status: int, code: str, advice: str, to_output: bool, server: Refusing, tmp_path: Path
) -> None:
    """The answer to a HEAD request has no words, so the same is asked in another way."""
    server.status, server.body = status, BODY.format(code, "Its words.").encode()
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    there, out = "s3://bucket/x.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(sm.StoreError) as caught:
        if to_output:
            sm.merge([tmp_path / "a.safetensors"], there)
        else:
            sm.merge([there, tmp_path / "a.safetensors"], out)
    assert advice in str(caught.value)
    assert "s3://bucket/" in str(caught.value)
    assert status == 301 or f"{code} (Its words)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.asked <= 6
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_does_not_pass_in_time_has_its_own_advice(server: Refusing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    server.status, server.body = 403, BODY.format("RequestTimeTooSkewed", "Too large.").encode()
    with pytest.raises(sm.StoreError, match=r"failed 8 times \(RequestTimeTooSkewed .*\); set the clock of this machine$"):
        sm.inspect("s3://bucket/x.safetensors")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_may_pass(status: int) -> None:
    assert not of_answer(status, "").lasting
    assert not of_error("s3", f"Generic S3 error - Server returned non-2xx status code: {status} Busy: ").lasting


@pytest.mark.parametrize(
    ("scheme", "text", "said"),
    [
        ("s3", "Error performing PUT http://169.254.169.254/latest/api/token", "AWS_SKIP_SIGNATURE=true"),
        ("gs", "Error performing GET http://169.254.169.254/computeMetadata", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs", "error sending request for http://metadata.google.internal/", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az", "Generic MicrosoftAzure error: Account must be specified", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("s3", 'Encountered object with invalid path: Path "in/x//" contained empty path segment', "rename that object"),
    ],
)
def test_what_the_client_says_itself(scheme: str, text: str, said: str) -> None:
    found = of_error(scheme, text)
    assert found.lasting
    assert said in str(found)


def test_settings_that_cannot_be_used_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    use_s3("127.0.0.1:9000", monkeypatch)
    with pytest.raises(sm.RecipeError, match=r"AWS_ENDPOINT_URL is 127\.0\.0\.1:9000; write an address like https://host"):
        sm.inspect("s3://bucket/x")
    use_s3("http://127.0.0.1:9000", monkeypatch)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(sm.RecipeError, match=r"AWS_PROFILE is absent, and the files .* have no such profile; correct it"):
        sm.inspect("s3://bucket/x")


def test_a_bucket_is_no_name_for_an_output(s3: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    for spelled in (s3, f"{s3}/"):
        with pytest.raises(sm.RecipeError, match=f"is not a name for an output; write {s3}/name$"):
            sm.merge([tmp_path / "a.safetensors"], spelled)


def test_a_file_may_be_read_where_nothing_may_be_listed(server: Refusing, tmp_path: Path) -> None:
    for number in range(2):
        save_file({"w": torch.full((300,), float(number))}, tmp_path / f"{number}.safetensors")
    server.status, server.body = 403, BODY.format("AccessDenied", "Access Denied").encode()
    server.files["/bucket/a/0.safetensors"] = (tmp_path / "0.safetensors").read_bytes()
    sm.merge(["s3://bucket/a/0.safetensors", tmp_path / "1.safetensors"], tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], torch.full((300,), 0.5))
    with pytest.raises(sm.StoreError, match=r"s3://bucket/b/1.safetensors may not be .*AccessDenied.*; correct the name"):
        sm.inspect("s3://bucket/b/1.safetensors")


def test_what_may_be_read_is_known_for_one_store_and_one_set_of_credentials(
    server: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a file that may be read, a denial means that there is no file. It says nothing to others."""
    from streammerge.stores.s3 import S3

    class Other(S3):
        scheme = "other"

    server.status, server.body = 403, BODY.format("AccessDenied", "Access Denied").encode()
    server.files["/bucket/a/0.safetensors"] = b"12345"
    here, there = S3(), Other()
    assert here.look(here.parse("s3://bucket/a/0.safetensors")).size == 5  # type: ignore[union-attr]
    assert here.look(here.parse("s3://bucket/a/1.safetensors")) is None
    assert not here.is_folder(here.parse("s3://bucket/a/1.safetensors"))
    for store, name in (
        (here, "bucket/b/1.safetensors"),
        (there, "bucket/a/1.safetensors"),
        (S3(), "bucket/a/1.safetensors"),
    ):
        with pytest.raises(sm.StoreError, match="may not be used with these credentials"):
            store.look(store.parse(f"{store.scheme}://{name}"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    with pytest.raises(sm.StoreError, match="may not be used with these credentials"):
        here.look(here.parse("s3://bucket/a/1.safetensors"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    assert here.look(here.parse("s3://bucket/a/1.safetensors")) is None


def test_a_server_without_ranges_is_told(server: Refusing, monkeypatch: pytest.MonkeyPatch) -> None:
    server.ranges, server.files = False, {"/a/x.safetensors": bytes(1000)}
    address = os.environ["AWS_ENDPOINT_URL"]
    with pytest.raises(sm.StoreError, match=r"the server sends whole files, and no ranges of them; download the file$"):
        sm.inspect(f"{address}/a/x.safetensors")
    server.status = 403
    with pytest.raises(sm.StoreError, match=r"y.safetensors is refused by the server; use a signed address, or download"):
        sm.inspect(f"{address}/y.safetensors")


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    for text in ("https://user:secret@host/x.safetensors", "http://secret@host/x.safetensors?a=b"):
        with pytest.raises(sm.RecipeError, match="with a name or password before the host is not read") as caught:
            sm.inspect(text)
        assert "secret" not in str(caught.value)
        assert "://host" in str(caught.value)
