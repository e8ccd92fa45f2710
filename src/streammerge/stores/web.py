"""Web servers: ``https://host/path``, and ``http://`` for those without TLS. They can be read only, and must answer ranges.

An address may have a query, as signed addresses have. What follows the question mark is taken for a secret: this process
and its workers know it, and it stands in no name, message, plan or receipt.
"""

from __future__ import annotations

import os
import re
import threading
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from streammerge.errors import RecipeError, StoreError, printable
from streammerge.stores.base import Joint, Location, Staging, Status
from streammerge.stores.objects import ObjectStore, Wordless, failures, imported
from streammerge.stores.remote import Entries, persistently
from streammerge.stores.repositories import read_name

_SIGNING = ("x-amz-", "x-goog-", "x-oss-", "x-cos-", "x-ms-")
_SIGNING_NAMES = frozenset(
    (
        *("signature", "expires", "key-pair-id", "policy", "awsaccesskeyid", "googleaccessid", "token", "download_token"),
        *("sv", "ss", "srt", "sr", "sp", "st", "se", "sip", "spr", "sig", "skoid", "sktid", "skt", "ske", "sks", "skv"),
    )
)
"""Parameters that say who may read, and not what is read. A new signature of the same address is the same file."""


_PAGE = r"([^/]+/[^/]+)/?(?:(?:tree|blob)/([^/]+)(?:/(.*))?)?"
"""The path of a page of the hub: a model, or a folder or file of one revision of it."""


def _hubs() -> tuple[str, ...]:
    """Returns the hosts of the hub's pages."""
    own = os.environ.get("HF_ENDPOINT", "").partition("://")[2].rstrip("/")
    return ("huggingface.co", "hf.co", "www.huggingface.co", *([own] if own else []))


class Forbidden(StoreError):
    """Raised for a signed address that the server refuses."""


class WebLocation(Location):
    """A file of a web server. Pickled with the query of its address, which its text does not show."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        store = self.store
        assert isinstance(store, Web)
        return _opened, (store, self.key, self._text, store.address(self))


def _opened(store: Web, key: str, text: str, address: str) -> WebLocation:
    if address:
        store.remember(key, address)
    return WebLocation(store, key, text)


class Web(ObjectStore):
    """Files of a web server. It must answer ranged requests. Folders cannot be listed."""

    scheme = "https"
    root_word = "host"
    private = False

    def __init__(self) -> None:
        super().__init__()
        self._addresses: dict[str, str] = {}
        self._known = threading.Lock()

    def parse(self, text: str) -> Location:
        address, mark, _ = text.partition("?")
        _, at, host = self.without_scheme(address).partition("/")[0].rpartition("@")
        if at:  # else it would stand in messages, plans and receipts
            raise RecipeError(
                f"{self.scheme}://{printable(host)}: an address with a name or password before the host is not read; "
                "use a signed address, or download the file"
            )
        self._refuse_page(self.without_scheme(address))
        key = unquote(super().parse(address).key)
        if mark:
            self.remember(key, self.without_scheme(text))
        return WebLocation(self, key, address)

    def _refuse_page(self, address: str) -> None:
        """Raises RecipeError for a page of the hub, which people copy from the browser."""
        host, _, path = address.partition("/")
        found = re.fullmatch(_PAGE, path) if host in _hubs() else None
        if found is not None and read_name(found[1]) is not None:
            inner = found[3].rstrip("/") if found[3] else ""
            name = found[1] + (f"@{found[2]}" if found[2] else "") + (f"/{inner}" if inner else "")
            raise RecipeError(f"{self.scheme}://{printable(address)} is a page of the hub; write hf://{printable(name)}")

    def remember(self, key: str, address: str) -> None:
        """Keeps the address with a query by which a file is asked for. A newly signed one replaces it.

        Raises RecipeError if the query names another file.
        """
        with self._known:
            before = self._addresses.get(key)
            if before is not None and _what(before) != _what(address):
                raise RecipeError(
                    f"{printable(self.spelled(key))}: two addresses differ only in what follows the question mark, so they "
                    "cannot be told apart; download one of the files"
                )
            self._addresses[key] = address

    def address(self, location: Location) -> str:
        """Returns the address with its query, without the scheme; "" for one without a query."""
        with self._known:
            return self._addresses.get(location.key, "")

    def _query_beside(self, location: Location) -> str:
        """Returns the query of an address in the same folder: a signature may count for all that is in it."""
        folder = location.key.rpartition("/")[0]
        with self._known:
            queries = {each.partition("?")[2] for key, each in self._addresses.items() if key.rpartition("/")[0] == folder}
        return queries.pop() if len(queries) == 1 else ""

    def split(self, location: Location) -> tuple[Any, str]:
        if address := self.address(location):
            return self.client(address), ""
        root, _, name = location.key.partition("/")
        query = self._query_beside(location)
        return self.client(f"{root}?{query}" if query else root), name

    def spelled(self, key: str) -> str:
        return f"{self.scheme}://{quote(key, safe='/:@+~,=!*()')}"

    def made_client(self, root: str, module: Any, common: dict[str, Any]) -> Any:
        return module.HTTPStore(f"{self.scheme}://{root}", **common)

    def look(self, location: Location) -> Status | None:
        address = self.address(location)
        if not address and not self._query_beside(location):
            return super().look(location)
        client, name = self.split(location)

        def ask() -> Status | None:
            try:  # by a range, since an address is signed for one method
                with failures(location):
                    answer = imported().get(client, name, options={"range": (0, 1)})
                    return self.status_of(location, answer.meta)
            except FileNotFoundError:
                return None

        try:
            return persistently(ask, f"looking at {printable(location)}")
        except Forbidden:
            if address:
                raise
            return None  # a signature may count for its own file only

    def status_of(self, location: Location, meta: Any) -> Status:
        found = super().status_of(location, meta)
        what = _what(self.address(location))
        return found._replace(place=(*found.place, what)) if what else found

    def refused(self, location: Location, said: str, wordless: bool = False) -> StoreError:
        if not self.address(location) and not self._query_beside(location):
            kind = Wordless if wordless else StoreError
            return kind(f"{printable(location)} is refused by the server; use a signed address, or download the file")
        return Forbidden(
            f"{printable(location)} is refused: its signed address is not valid, or no longer; get a new one, and run the "
            "same command with it"
        )

    def entries(self, location: Location) -> Entries:
        return Entries({}, frozenset())

    def check_writable(self, location: Location, overwrite: bool) -> None:
        raise RecipeError(f"{printable(location)}: a web server can be read only; write to another place")

    def stage(self, location: Location, overwrite: bool = False) -> Staging:
        raise RecipeError(f"{printable(location)}: a web server can be read only; write to another place")

    def join(self, location: Location, key: str) -> Joint:
        raise RecipeError(f"{printable(location)}: a web server can be read only; write to another place")

    def write_whole(self, location: Location, data: bytes, overwrite: bool) -> None:
        self.check_writable(location, overwrite)

    def sweep(self, location: Location) -> None:
        """Does nothing."""


class PlainWeb(Web):
    """Files of a web server without TLS, such as one on this machine."""

    scheme = "http"

    def allows_http(self) -> bool:
        return True


def _what(address: str) -> str:
    """Returns the part of an address's query that says which file is meant, in a fixed order."""
    asked = parse_qsl(address.partition("?")[2], keep_blank_values=True)
    kept = [
        (name, value)
        for name, value in asked
        if name.lower() not in _SIGNING_NAMES and not name.lower().startswith(_SIGNING)
    ]
    return repr(sorted(kept)) if kept else ""
