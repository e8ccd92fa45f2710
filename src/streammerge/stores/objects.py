"""Object stores and web servers: ``s3://bucket/key``, ``gs://bucket/key``, ``az://container/key``, ``https://host/path``.

The client is ``obstore`` (the extra ``streammerge[remote]``), imported when the first request is made. Credentials, region
and endpoint come from the variables that the stores' own tools read (``AWS_...``, ``GOOGLE_...``, ``AZURE_...``), for S3
also from the profiles in ``~/.aws``.
"""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

from streammerge.errors import ChangedError, RecipeError, StoreError, printable
from streammerge.stores.base import Location, Status
from streammerge.stores.remote import Entries, Passing, RemoteStore, persistently

CONNECT_SECONDS, READ_SECONDS, REQUEST_SECONDS = 10.0, 20.0, 180.0
"""The longest waits for a connection, for the next bytes of an answer, and for a whole request."""
_CLIENT_TRIES, _CLIENT_SECONDS = 3, 60
_ROOT = "."


class ObjectStore(RemoteStore):
    """A store of ``obstore``. The first part of a key is the bucket, the container or the host."""

    private = True

    def __init__(self) -> None:
        self._clients: dict[tuple[object, ...], Any] = {}
        self._lock = threading.Lock()

    def parse(self, text: str) -> Location:
        key = self.without_scheme(text).strip("/")
        if not key or ".." in key.split("/"):
            raise RecipeError(f"{printable(text)} names no file or folder; write {self.scheme}://{self.root_word}/name")
        return Location(self, key, text)

    # ------------------------------------------------------------------------------------------------------------ clients

    root_word: ClassVar[str] = "bucket"

    @abstractmethod
    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        """Returns a client for a bucket. ``module``: ``obstore.store``. ``common``: options of every client."""

    def settings(self) -> Mapping[str, str]:
        """Returns the variables of the environment by which a client is made. Another value makes another client."""
        return {}

    def allows_http(self) -> bool:
        """Whether the user's settings name an address without TLS."""
        return False

    def client(self, root: str) -> Any:
        """Returns the client for a bucket, made once."""
        key = (root, os.getpid(), *self.settings().items())
        with self._lock:
            found = self._clients.get(key)
            if found is None:
                imported()
                import obstore.store as module

                options = {
                    "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                    "read_timeout": timedelta(seconds=READ_SECONDS),
                    "timeout": timedelta(seconds=REQUEST_SECONDS),
                }
                common: dict[str, Any] = {
                    "client_options": {**options, **({"allow_http": True} if self.allows_http() else {})},
                    "retry_config": {
                        "max_retries": _CLIENT_TRIES,
                        "retry_timeout": timedelta(seconds=_CLIENT_SECONDS),
                    },
                }
                try:
                    found = self._clients[key] = self.made_client(root, module, common)
                except Exception as error:  # the client raises errors of many kinds for settings that it cannot use
                    raise StoreError(f"{self.scheme}://{printable(root)} cannot be used: {_first_line(error)}") from error
            return found

    def split(self, location: Location) -> tuple[Any, str]:
        """Returns the client of a location, and the name in its bucket, "" for the bucket itself."""
        root, _, name = location.key.partition("/")
        return self.client(root), name

    # ------------------------------------------------------------------------------------------------------------- reading

    def look(self, location: Location) -> Status | None:
        client, name = self.split(location)
        if not name:
            return None
        obs = imported()

        def ask() -> Status | None:
            try:
                with failures(location):
                    return self.status_of(location, obs.head(client, name))
            except FileNotFoundError:
                return None

        return persistently(ask, f"looking at {printable(location)}")

    def is_folder(self, location: Location) -> bool:
        return super().is_folder(location) or ("/" not in location.key and self._bucket_is_there(location))

    def _bucket_is_there(self, location: Location) -> bool:
        try:
            self._entries(location)
        except StoreError:
            return False
        return True

    def list_names(self, location: Location) -> list[str]:
        return super().list_names(location) if any(self._entries(location)) or not self.is_folder(location) else []

    def entries(self, location: Location) -> Entries:
        client, name = self.split(location)
        obs = imported()

        def ask() -> Entries:
            with failures(location):
                found = obs.list_with_delimiter(client, name or None)
            files = {}
            for meta in found["objects"]:
                own = meta["path"].rpartition("/")[2]
                if own and meta["path"] != name:
                    files[own] = self.status_of(location / own, meta)
            folders = {prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]}
            return Entries(files, frozenset(folders - {""}))

        return persistently(ask, f"listing {printable(location)}")

    def fetched(self, location: Location, status: Status, start: int, stop: int) -> Any:
        client, name = self.split(location)
        options: dict[str, Any] = {"range": (start, stop)}
        tag = str(status.version)
        if tag.startswith('"'):  # a weak tag cannot be asked for
            options["if_match"] = tag
        try:
            with failures(location):
                answer = imported().get(client, name, options=options)
                if self.status_of(location, answer.meta) != status:
                    raise _changed(location)
                return answer.bytes()
        except FileNotFoundError as error:
            raise ChangedError(f"{printable(location)} is gone since it was planned; run the command again") from error

    def status_of(self, location: Location, meta: Any) -> Status:
        """Returns the status that an answer tells. The tag is the version, the time where there is no tag."""
        return Status((self.scheme, location.key), meta["size"], meta["e_tag"] or meta["last_modified"].isoformat())


def _changed(location: Location) -> ChangedError:
    return ChangedError(f"{printable(location)} changed since it was planned; run the command again")


@contextmanager
def failures(location: Location) -> Iterator[None]:
    """Turns errors of the client into ours. FileNotFoundError stays as it is."""
    import obstore.exceptions as known

    try:
        yield
    except known.PreconditionError as error:
        raise _changed(location) from error
    except (known.PermissionDeniedError, known.UnauthenticatedError) as error:
        raise StoreError(f"{printable(location)} may not be used with these credentials: {_first_line(error)}") from error
    except known.BaseError as error:
        said = _first_line(error)
        if any(word in str(error) for word in _LASTING):
            raise StoreError(f"{printable(location)} cannot be used: {said}") from error
        raise Passing(said) from error


_LASTING = ("NoSuchBucket", "NotPartial", "InvalidBucketName", "169.254.169.254", "PermanentRedirect", "NotSupported")
"""Words in errors of the client that come again each time."""


def _first_line(error: BaseException) -> str:
    return printable(str(error).partition("\n")[0].strip(), 400)


def imported() -> Any:
    """Returns the module ``obstore``. RecipeError if it is not installed."""
    try:
        import obstore
    except ImportError as error:
        raise RecipeError(
            "object stores and web addresses need the package obstore; install it with `pip install 'streammerge[remote]'`"
        ) from error
    return obstore


class S3(ObjectStore):
    """Amazon S3 and all that speak its protocol."""

    scheme = "s3"

    def settings(self) -> Mapping[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def endpoint(self) -> str:
        """Returns the address of the service, "" for that of Amazon."""
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        found = next((os.environ[name] for name in names if os.environ.get(name)), "")
        return found or profile().get("endpoint_url", "")

    def allows_http(self) -> bool:
        return self.endpoint().lower().startswith("http://")

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        config: dict[str, Any] = {}
        if self.endpoint():
            config["endpoint"] = self.endpoint()
        if not any(os.environ.get(name) for name in _OWN_CREDENTIALS):
            ours = profile()
            for key, names in _PROFILE_KEYS.items():
                found = next((ours[name] for name in names if ours.get(name)), None)
                if found:
                    config[key] = found
        return module.S3Store(root, **config, **common)


_OWN_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_PROFILE_KEYS = {
    "access_key_id": ("aws_access_key_id",),
    "secret_access_key": ("aws_secret_access_key",),
    "session_token": ("aws_session_token",),
    "region": ("region",),
}


def profile() -> dict[str, str]:
    """Returns the settings of the profile in use, from the files of the AWS command line. Empty if there are none."""
    import configparser

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


class GoogleStorage(ObjectStore):
    """Google Cloud Storage."""

    scheme = "gs"

    def settings(self) -> Mapping[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(("GOOGLE_", "STORAGE_EMULATOR"))}

    def allows_http(self) -> bool:
        return bool(os.environ.get("STORAGE_EMULATOR_HOST"))

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        config: dict[str, Any] = {}
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
            config = {"base_url": emulator if "://" in emulator else f"http://{emulator}", "skip_signature": True}
        return module.GCSStore(root, **config, **common)


class Azure(ObjectStore):
    """Azure Blob Storage."""

    scheme = "az"
    root_word = "container"

    def settings(self) -> Mapping[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("AZURE_")}

    def allows_http(self) -> bool:
        named = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT") or ""
        return named.lower().startswith("http://") or bool(os.environ.get("AZURE_STORAGE_USE_EMULATOR"))

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        return module.AzureStore(root, **common)


class Web(ObjectStore):
    """Files of a web server. It must answer ranged requests. Folders cannot be listed."""

    scheme = "https"
    root_word = "host"
    private = False

    def parse(self, text: str) -> Location:
        address, mark, _ = text.partition("?")
        if mark:
            raise RecipeError(
                f"{printable(text)}: addresses with a query (?) are not read; give an address without one, or download it"
            )
        found = super().parse(address)
        return Location(self, unquote(found.key), text)

    def spelled(self, key: str) -> str:
        return f"{self.scheme}://{quote(key, safe='/:@+~,=!*()')}"

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        return module.HTTPStore(f"{self.scheme}://{root}", **common)

    def entries(self, location: Location) -> Entries:
        return Entries({}, frozenset())


class PlainWeb(Web):
    """Files of a web server without TLS, such as one on this machine."""

    scheme = "http"

    def allows_http(self) -> bool:
        return True
