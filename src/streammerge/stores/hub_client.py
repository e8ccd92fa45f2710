"""The client of the Hugging Face hub, ``huggingface_hub`` (the extra ``streammerge[hub]``), and its errors as ours.

It is imported when the hub is asked first. It knows the token (``HF_TOKEN``, ``hf auth login``), the address
(``HF_ENDPOINT``) and the settings for proxies.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from streammerge.errors import RecipeError, StoreError, printable
from streammerge.stores.remote import Passing, Unresolved
from streammerge.stores.repositories import MAIN, Repository, is_offline
from streammerge.version import __version__

LIBRARY = {"library_name": "streammerge", "library_version": __version__}


_MOST_WAIT_SECONDS = 60.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class NotThere(RecipeError):
    """The hub has no such model, or no such revision of it."""


def is_installed() -> bool:
    """Whether the client is installed."""
    from importlib.util import find_spec

    return find_spec("huggingface_hub") is not None


def api() -> Any:
    """Returns the client. RecipeError if it is not installed, StoreError if the environment forbids to ask the hub."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise RecipeError(
            "the hub needs the package huggingface_hub; install it with `pip install 'streammerge[hub]'`"
        ) from error
    return HfApi(endpoint=endpoint(), **LIBRARY)


def endpoint() -> str:
    """Returns the address of the hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def asked_wait(headers: Mapping[str, str]) -> float:
    """Returns how many seconds a busy server asks to wait, up to a minute; 0 if it does not say."""
    found = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    said = headers.get("Retry-After", "") or (found[1] if found else "")
    return min(float(said), _MOST_WAIT_SECONDS) if said.isdigit() else 0.0


@contextmanager
def failures(repository: Repository, writes: bool = False) -> Iterator[None]:
    """Turns errors of the client into ours, with the hub's own reasons told apart. ``writes``: whether it is written to."""
    if is_offline():
        raise StoreError(
            f"hf://{printable(repository)} is not in the hub's cache, and HF_HUB_OFFLINE forbids to ask the hub"
        )
    try:
        from huggingface_hub import errors, get_token
    except ImportError:
        api()
        raise
    name = printable(repository.name)
    transport = errors.HfHubHTTPError.__mro__[1]  # the base of all errors of the client's transport
    try:
        yield
    except errors.GatedRepoError as error:
        raise RecipeError(
            f"{name} is gated: accept its terms at {endpoint()}/{name}, and log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotThere(f"{name} has no revision {printable(repository.revision or MAIN)} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        if get_token():
            why = "or it is private and your token may not see it"
        else:
            why = "or it is private: log in with `hf auth login`, or set HF_TOKEN"
        raise NotThere(f"{endpoint()} has no model {name}, {why}") from error
    except errors.HfHubHTTPError as error:
        code, said = error.response.status_code, printable(str(error).strip().partition("\n")[0])
        if code in _BUSY:
            raise Passing(f"status {code}", asked_wait(error.response.headers)) from error
        if code in (401, 403) and writes:
            raise RecipeError(
                f"{endpoint()} does not let you write {name}: log in with `hf auth login`, or set HF_TOKEN to a token that "
                "may write there"
            ) from error
        if code == 412:
            raise StoreError(f"{name} got another commit on the hub meanwhile; run the command again") from error
        if code in (401, 403):
            raise StoreError(f"{name} may not be read with this token ({said})") from error
        raise StoreError(f"{name} cannot be {'written' if writes else 'read'} on the hub ({said})") from error
    except errors.OfflineModeIsEnabled as error:
        raise StoreError(f"hf://{printable(repository)} is not in the hub's cache, and the client is offline") from error
    except errors.HFValidationError as error:
        raise RecipeError(f"{name} is no name of a model on the hub") from error
    except RuntimeError as error:  # of a file that was not sent; the cause says why
        if error.__cause__ is None:
            raise
        with failures(repository, writes):
            raise error.__cause__ from None
    except transport as error:
        said = printable(str(error) or type(error).__name__)
        raise (Unresolved if _is_unresolved(error) else Passing)(said) from error


def _is_unresolved(error: BaseException | None) -> bool:
    """Whether the cause of an error is that the name of the host is not known."""
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None
