"""The profiles of the AWS command line: which region, address and keys a user has chosen."""

from __future__ import annotations

import configparser
import os
from pathlib import Path


def profile() -> dict[str, str]:
    """Returns the settings of the profile in use, from the files of the AWS command line. Empty if there are none."""
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(os.environ.get(variable) or usual).expanduser())
            found |= dict(parser.items(section)) if parser.has_section(section) else {}
        except (OSError, configparser.Error, UnicodeDecodeError, RuntimeError):
            continue
    return found


def endpoint() -> str:
    """Returns the address of the S3 service, "" for that of Amazon."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    found = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return (found or profile().get("endpoint_url", "")).rstrip("/")
