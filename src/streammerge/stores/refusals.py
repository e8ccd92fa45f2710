"""What object stores say when they refuse a request, and what to do about it.

The words are those of S3 and Azure; Google's store has most of them too. The answer to a HEAD request has no words.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from xml.sax.saxutils import unescape

from streammerge.errors import printable

PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
PASSING_CODES = ("RequestTimeout", "SlowDown", "InternalError", "BadDigest", "OperationAborted", "RequestTimeTooSkewed")
_STATUS = r"status code: (\d{3})"
_REGION = "the bucket is in another region; set AWS_REGION{}"
_NO_BUCKET = "correct the name, or create it first"
_NO_RIGHT = "correct the name, ask for the right to list, read and write there, or use other credentials"
_ENDED = "get new credentials, since these have ended"
_ADVICE = {
    "NoSuchBucket": _NO_BUCKET,
    "ContainerNotFound": _NO_BUCKET,
    "ExpiredToken": _ENDED,
    "TokenRefreshRequired": _ENDED,
    "InvalidToken": "look at AWS_SESSION_TOKEN, which does not belong to these keys",
    "InvalidAccessKeyId": "look at AWS_ACCESS_KEY_ID, or AWS_PROFILE",
    "SignatureDoesNotMatch": "look at AWS_SECRET_ACCESS_KEY, which does not belong to this key",
    "AuthenticationFailed": "look at AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "InvalidObjectState": "it is archived; restore it first",
    "AccessDenied": _NO_RIGHT,
    "AuthorizationPermissionMismatch": _NO_RIGHT,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}
_WHOLE = ("the server sends whole files, and no ranges of them", "download the file")
_LASTING = ("InvalidBucketName", "NotSupported")
"""Words in errors of the client that come again each time."""
_NO_KEYS = "no credentials were found; set {}"
_SERVICES = {
    "169.254.169.254": {
        "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for a public bucket",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS to the file of a key, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
        "az": "AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true for a public container",
    },
    "metadata.google.internal": {
        "gs": "GOOGLE_APPLICATION_CREDENTIALS to the file of a key, or GOOGLE_SKIP_SIGNATURE=true for a public bucket"
    },
    "Account must be specified": {"az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"},
}
"""Words of errors where no variable has credentials: mostly the service of the machine that is asked for them then."""


class Refusal(NamedTuple):
    """What a store, or the client, said. ``status``: 0 if there was no answer. ``code``: a word, "" if there is none.

    ``advice``: what to do, "" if nothing is known. ``lasting``: whether the same request is refused again.
    """

    status: int
    code: str
    message: str
    advice: str
    lasting: bool

    def __str__(self) -> str:
        said = f"{self.code} ({self.message.rstrip('.')})" if self.code and self.message else self.code or self.message
        return f"{printable(said, 300)}; {self.advice}" if self.advice else printable(said, 300)

    @property
    def wordless(self) -> bool:
        """Whether the store refuses and does not say why, as in an answer to a HEAD request."""
        return 400 <= self.status < 500 and not self.code and not self.advice


def of_answer(status: int, body: str) -> Refusal:
    """Returns what an answer says. ``body``: XML, or anything else."""
    code, message, region = (_element(name, body) for name in ("Code", "Message", "Region"))
    passing = status in PASSING_STATUS or code in PASSING_CODES
    advice = _ADVICE.get(code, "").format(f"={printable(region)}" if region else "")
    return Refusal(status, code, message, advice, 400 <= status < 500 and not passing)


def of_error(scheme: str, text: str) -> Refusal:
    """Returns what an error of the client says, whose text holds the answer."""
    for service, wanted in _SERVICES.items():
        if service in text:
            return Refusal(0, "", _NO_KEYS.format(wanted.get(scheme, "them")), "", True)
    found = re.search(_STATUS, text)
    said = of_answer(int(found[1]) if found else 0, text)
    if "Encountered object with invalid path" in text:
        what = "an object there has a name with an empty part (//), which the client cannot list"
        return said._replace(message=what, advice="rename that object", lasting=True)
    if "NotPartial" in text or "Range request not supported" in text:
        return said._replace(message=_WHOLE[0], advice=_WHOLE[1], lasting=True)
    if "redirect without LOCATION" in text:
        return said._replace(
            message="the server sends this request to another one", advice=_REGION.format(""), lasting=True
        )
    return said._replace(lasting=True) if any(word in text for word in _LASTING) else said


def _element(name: str, text: str) -> str:
    found = re.search(f"<{name}>([^<]*)</{name}>", text)
    return unescape(found[1]).strip() if found else ""
