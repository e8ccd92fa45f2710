"""Signatures of requests, against those of botocore; credentials from the places of the AWS tools."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from streammerge.errors import StoreError
from streammerge.stores import signing
from streammerge.stores.signing import Credentials, credentials, signed

EMPTY = hashlib.sha256(b"").hexdigest()
NOW = datetime.datetime(2026, 11, 26, 19, 0, 1, tzinfo=datetime.timezone.utc)


@pytest.mark.parametrize("token", ["", "a/token+with=signs"])
@pytest.mark.parametrize(
    ("method", "path", "query", "headers"),
    [
        ("GET", "/bucket", {"uploads": "", "prefix": "a b/ü+~*'()!"}, {}),
        ("PUT", "/bucket/a b/ü+x~'(1)!*.bin", {"partNumber": "3", "uploadId": "x/y+z=="}, {"x-amz-checksum-crc32c": "a=="}),
        ("POST", "/bucket/k", {"uploadId": "1"}, {"If-None-Match": "*", "Content-Type": "text/plain"}),
        ("DELETE", "/", {}, {}),
    ],
)
def test_signatures_are_those_of_botocore(
    token: str, method: str, path: str, query: dict[str, str], headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    auth = pytest.importorskip("botocore.auth", reason="botocore comes with moto, which the extra dev has")
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials as Theirs

    monkeypatch.setattr(auth, "get_current_datetime", lambda remove_tzinfo=True: NOW.replace(tzinfo=None), raising=False)
    target, ours = signed(
        method, "s3.example:9000", path, query, headers, Credentials("AK", "secret", token), "eu-north-1", NOW, EMPTY
    )
    url = f"https://s3.example:9000{urllib.parse.quote(path, safe='/-._~')}"
    request = AWSRequest(method=method, url=url, params=query, headers=headers)
    signer = auth.S3SigV4Auth(Theirs("AK", "secret", token or None), "s3", "eu-north-1")
    signer.add_auth(request)
    if request.headers["X-Amz-Date"] != NOW.strftime("%Y%m%dT%H%M%SZ"):
        pytest.skip("this release of botocore takes its time from elsewhere")
    assert ours["authorization"] == request.headers["Authorization"]
    assert target.startswith(urllib.parse.quote(path, safe="/-._~"))


def test_without_credentials_nothing_is_signed() -> None:
    target, headers = signed("GET", "host", "/b/k", {"a": "1"}, {"x": "y"}, None, "r", NOW)
    assert (target, headers) == ("/b/k?a=1", {"x": "y"})


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(signing, "_kept", {})


def test_variables_come_first_then_the_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = P\naws_secret_access_key = Q\n")
    assert credentials() == Credentials("P", "Q")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "B")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "C")
    assert credentials() == Credentials("A", "B", "C")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert credentials() is None


@pytest.fixture
def service() -> Iterator[str]:
    """A machine's service of credentials, and that of web identities."""
    said = {"AccessKeyId": "A", "SecretAccessKey": "B", "Token": "C", "Expiration": "2999-01-01T00:00:00Z"}
    xml = "<r xmlns='x'><Credentials>" + "".join(f"<{name}>{text}</{name}>" for name, text in said.items())
    xml = xml.replace("Token>", "SessionToken>") + "</Credentials></r>"
    answers = {
        "/latest/api/token": "t",
        "/latest/meta-data/iam/security-credentials/": "role",
        "/latest/meta-data/iam/security-credentials/role": json.dumps(said),
        "/container": json.dumps(said),
        "/": xml,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers[self.path.partition("?")[0]].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_POST = do_GET

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_services_of_machines_containers_and_identities_are_asked(
    service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", service)
    for name, value in (
        ("AWS_REGION", "r"),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{service}/container"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token")),
    ):
        monkeypatch.setenv(name, value)
        (tmp_path / "token").write_text("t")
        monkeypatch.setenv("AWS_ROLE_ARN", "arn")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", service)
        found = credentials()
        assert found is not None
        assert (found.key, found.secret, found.token) == ("A", "B", "C")
        assert found.until is not None
        assert credentials() is found


def test_no_credentials_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"no credentials for s3:// were found .* set AWS_ACCESS_KEY_ID"):
        credentials()
