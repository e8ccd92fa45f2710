"""The profiles of the AWS command line: which region, address and keys a user has chosen."""

from __future__ import annotations

import configparser
import functools
import os
import urllib.parse
from pathlib import Path

from streammerge.errors import RecipeError, printable


def profile() -> dict[str, str]:
    """Returns the settings of the profile in use, from the files of the AWS command line. Empty if there are none."""
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        try:
            path = Path(os.environ.get(variable) or usual).expanduser()
            status = path.stat()
        except (OSError, RuntimeError):
            continue
        found |= _section(path, section, (status.st_ino, status.st_size, status.st_mtime_ns))
    return found


@functools.lru_cache(maxsize=8)
def _section(path: Path, section: str, version: tuple[int, ...]) -> dict[str, str]:
    """Returns a section of a file. ``version``: another one if the file was written since; it is read once in each, since
    most requests ask."""
    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
        return dict(parser.items(section)) if parser.has_section(section) else {}
    except (OSError, configparser.Error, UnicodeDecodeError):
        return {}


def chosen_profile() -> dict[str, str]:
    """Returns :func:`profile`. Raises RecipeError if the user has named one that is in none of the files."""
    found, name = profile(), os.environ.get("AWS_PROFILE") or ""
    if name and not found:
        raise RecipeError(
            f"AWS_PROFILE is {printable(name)}, and the files of the AWS command line have no such profile; correct it"
        )
    return found


def checked_endpoint() -> str:
    """Returns :func:`endpoint`. Raises RecipeError if it is no address."""
    address = endpoint()
    parsed = urllib.parse.urlsplit(address)
    if parsed.scheme not in ("http", "https") or not parsed.hostname:
        raise RecipeError(f"AWS_ENDPOINT_URL is {printable(address)}; write an address like https://host:port")
    return address


def endpoint() -> str:
    """Returns the address of the S3 service, "" for that of Amazon."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    found = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return (found or profile().get("endpoint_url", "")).rstrip("/")
