"""Signatures of S3 requests (AWS Signature Version 4), and the credentials that they need.

``obstore`` signs its own requests. It has no request for the parts of an upload, so these are signed here. Credentials
come from the same places: variables, profiles, web identity, containers, and the service of the machine.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import os
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from streammerge.errors import StoreError, printable
from streammerge.stores.profiles import profile

UNSIGNED = "UNSIGNED-PAYLOAD"
"""In place of the hash of a body. Bodies are protected by their own checksum, which is a signed header."""
_SAFE = "-._~"
_SPARE_SECONDS = 300
_TIMEOUT_SECONDS = 5
_METADATA = "http://169.254.169.254"
_CONTAINER = "http://169.254.170.2"


@dataclass(frozen=True, slots=True)
class Credentials:
    """``until``: when they end, in seconds since 1970; None if they do not."""

    key: str
    secret: str
    token: str = ""
    until: float | None = None

    def ends_soon(self) -> bool:
        return self.until is not None and self.until <= _now().timestamp() + _SPARE_SECONDS


def signed(
    method: str,
    host: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    credentials: Credentials | None,
    region: str,
    now: datetime.datetime,
    payload: str = UNSIGNED,
) -> tuple[str, dict[str, str]]:
    """Returns the path with its query as it is sent, and all headers.

    ``path``: as text, not quoted. ``headers``: those of the request, all of which are signed. Without credentials nothing
    is signed.
    """
    quoted = urllib.parse.quote(path, safe="/" + _SAFE)
    asked = "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in sorted(query.items()))
    target = f"{quoted}?{asked}" if asked else quoted
    if credentials is None:
        return target, dict(headers)
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    every = {**{name.lower(): value.strip() for name, value in headers.items()}, "host": host}
    every |= {"x-amz-date": stamp, "x-amz-content-sha256": payload}
    if credentials.token:
        every["x-amz-security-token"] = credentials.token
    names = ";".join(sorted(every))
    lines = "".join(f"{name}:{every[name]}\n" for name in sorted(every))
    request = "\n".join([method, quoted, asked, lines, names, payload])
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{credentials.secret}".encode()
    for part in (stamp[:8], region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    every["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return target, every


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe=_SAFE)


_kept: dict[tuple[str, ...], Credentials | None] = {}
_lock = threading.Lock()


def credentials() -> Credentials | None:
    """Returns the credentials of this process, None where requests are not signed. Raises StoreError if there are none."""
    names = [name for name in os.environ if name.startswith("AWS_")]
    settings = tuple(f"{name}={os.environ[name]}" for name in sorted(names))
    with _lock:
        if settings in _kept:
            known = _kept[settings]
            if known is None or not known.ends_soon():
                return known
        found = _kept[settings] = _found()
        return found


def _found() -> Credentials | None:
    variables = os.environ
    if variables.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        return None
    if variables.get("AWS_ACCESS_KEY_ID") and variables.get("AWS_SECRET_ACCESS_KEY"):
        token = variables.get("AWS_SESSION_TOKEN") or variables.get("AWS_TOKEN") or ""
        return Credentials(variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"], token)
    ours = profile()
    if ours.get("aws_access_key_id") and ours.get("aws_secret_access_key"):
        return Credentials(ours["aws_access_key_id"], ours["aws_secret_access_key"], ours.get("aws_session_token", ""))
    try:
        if variables.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
            return _of_web_identity()
        return _of_service()
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"no credentials for s3:// were found ({printable(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE"
        ) from error


def _of_service() -> Credentials:
    """Asks the service of a container, or of the machine."""
    variables = os.environ
    address = variables.get("AWS_CONTAINER_CREDENTIALS_FULL_URI", "")
    if variables.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        address = _CONTAINER + variables["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"]
    if address:
        headers = {}
        if variables.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
            headers["Authorization"] = Path(variables["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"]).read_text().strip()
        elif variables.get("AWS_CONTAINER_AUTHORIZATION_TOKEN"):
            headers["Authorization"] = variables["AWS_CONTAINER_AUTHORIZATION_TOKEN"]
        return _of_json(_asked(address, headers))
    service = variables.get("AWS_METADATA_ENDPOINT") or _METADATA
    lasting = {"X-aws-ec2-metadata-token-ttl-seconds": "600"}
    token = {"X-aws-ec2-metadata-token": _asked(f"{service}/latest/api/token", lasting, "PUT").decode()}
    roles = f"{service}/latest/meta-data/iam/security-credentials/"
    return _of_json(_asked(roles + _asked(roles, token).decode().split()[0], token))


def _of_json(text: bytes) -> Credentials:
    said = json.loads(text)
    return Credentials(said["AccessKeyId"], said["SecretAccessKey"], said["Token"], _until(said["Expiration"]))


def _of_web_identity() -> Credentials:
    """Asks for credentials with the token of a web identity, as on Kubernetes."""
    variables = os.environ
    asked = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleArn": variables["AWS_ROLE_ARN"],
        "RoleSessionName": variables.get("AWS_ROLE_SESSION_NAME") or "streammerge",
        "WebIdentityToken": Path(variables["AWS_WEB_IDENTITY_TOKEN_FILE"]).read_text().strip(),
    }
    service = variables.get("AWS_ENDPOINT_URL_STS") or f"https://sts.{region()}.amazonaws.com"
    tree = ElementTree.fromstring(_asked(f"{service}/?{urllib.parse.urlencode(asked)}", {}, "POST"))
    said = {each.tag.rpartition("}")[2]: each.text or "" for each in tree.iter()}
    return Credentials(said["AccessKeyId"], said["SecretAccessKey"], said["SessionToken"], _until(said["Expiration"]))


def _asked(address: str, headers: Mapping[str, str], method: str = "GET") -> bytes:
    request = urllib.request.Request(address, headers=dict(headers), method=method)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
        return bytes(answer.read())


def region() -> str:
    """Returns the region of requests."""
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or profile().get("region")
    return named or "us-east-1"


def _until(text: str) -> float:
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
