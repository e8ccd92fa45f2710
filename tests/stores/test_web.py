"""Web servers: read without a listing, by addresses with a query too, which is told to nobody."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import pytest
from conftest import trained
from safetensors.torch import save_file

import streammerge as sm
from stores.test_objects import written
from streammerge.stores import web as room
from streammerge.stores.locations import parse, without_queries
from streammerge.stores.registry import store_of
from streammerge.stores.web import Web

SECRET = "S3CRET/+x"
QUERY = "?X-Amz-Expires=60&X-Amz-Signature=S3CRET%2F%2Bx"


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    yield
    for scheme in ("http", "https"):
        store = store_of(scheme)
        assert isinstance(store, Web)
        store._addresses.clear()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server of the files in the test's folder, which answers ranged requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address, _, query = self.path.partition("?")
            path = tmp_path / unquote(address).lstrip("/")
            if "signed" in path.name and (self.command == "HEAD" or parse_qs(query).get("X-Amz-Signature") != [SECRET]):
                self.send_error(403)
                return
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            tag, size = hashlib.md5(data).hexdigest(), len(data)
            asked = self.headers.get("Range")
            if asked:
                start, stop = asked.removeprefix("bytes=").split("-")
                data = data[int(start) : int(stop) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{int(start) + len(data) - 1}/{size}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.send_header("ETag", f'"{tag}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    pytest.importorskip("obstore")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_web_server_is_read_without_a_listing(web: str, tmp_path: Path) -> None:
    made = [written(tmp_path, number) for number in (1, 2)]
    made[0]["folder"].rename(tmp_path / "földer 1")
    index = sm.inspect(f"{web}/{quote('földer 1')}/model.safetensors.index.json")
    assert index.keys() == sm.inspect(made[1]["folder"]).keys()
    sm.merge([f"{web}/1.safetensors", f"{web}/2.pth"], tmp_path / "remote.safetensors")
    sm.merge([made[0]["safetensors"], made[1]["pth"]], tmp_path / "local.safetensors")
    assert sm.diff(tmp_path / "remote.safetensors", tmp_path / "local.safetensors").equal
    with pytest.raises(sm.RecipeError, match="does not exist"):
        sm.inspect(f"{web}/absent.pth")
    with pytest.raises(sm.RecipeError, match="can be read only"):
        sm.merge(f"{web}/2.pth", f"{web}/3.pth")


@pytest.fixture
def signed(web: str, tmp_path: Path) -> list[str]:
    """Two signed addresses."""
    for number in (1, 2):
        save_file(trained(number), tmp_path / f"signed-{number}.safetensors")
    return [f"{web}/signed-{number}.safetensors{QUERY}" for number in (1, 2)]


@pytest.mark.parametrize("executor", [pytest.param("threads", marks=pytest.mark.slow), "processes"])
def test_signed_addresses_are_read_and_told_to_nobody(signed: list[str], tmp_path: Path, executor: str) -> None:
    out = tmp_path / "out" / "x.safetensors"
    out.parent.mkdir()
    command = [sys.executable, "-m", "streammerge"]
    for rest in (["plan", *signed, "--format", "yaml"], ["merge", *signed, "-o", str(out), "--executor", executor]):
        ran = subprocess.run([*command, *rest], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert "signed-1.safetensors" in ran.stdout + ran.stderr
        assert "S3CRET" not in ran.stdout + ran.stderr
    assert b"S3CRET" not in out.read_bytes()
    sm.merge([tmp_path / f"signed-{number}.safetensors" for number in (1, 2)], tmp_path / "local.safetensors")
    assert sm.diff(out, tmp_path / "local.safetensors").equal


def test_a_recipe_may_have_a_signed_address(signed: list[str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"merge_method: linear\nmodels:\n- model: {signed[0]}\n- model: {signed[1]}\n")
    plan = sm.plan(recipe=tmp_path / "r.yaml", out=tmp_path / "out.safetensors")
    assert "S3CRET" not in repr(plan.recipe)
    assert "S3CRET" not in str(plan)


@pytest.mark.parametrize("query", ["?X-Amz-Signature=S3CRETbad", "?sig=S3CRET"])
def test_a_refused_address_is_one_sentence_without_its_secret(web: str, signed: list[str], query: str) -> None:
    with pytest.raises(sm.StoreError, match=r"signed-1\.safetensors is refused: its signed address") as caught:
        sm.inspect(f"{web}/signed-1.safetensors{query}")
    assert "\n" not in str(caught.value)
    assert "S3CRET" not in "".join(traceback.format_exception(caught.value))


def test_a_new_signature_is_the_same_file(web: str, tmp_path: Path) -> None:
    save_file(trained(1), tmp_path / "1.safetensors")
    first = parse(f"{web}/1.safetensors?file=a&sig=1&Expires=5").status()
    assert parse(f"{web}/1.safetensors?Expires=7&sig=2&file=a").status() == first
    with pytest.raises(sm.RecipeError, match="differ only in what follows the question mark"):
        parse(f"{web}/1.safetensors?file=b")


def test_a_location_takes_its_query_to_another_process(signed: list[str]) -> None:
    location = parse(signed[0])
    data = pickle.dumps(location)
    size = location.size
    store = location.store
    assert isinstance(store, Web)
    store._addresses.clear()
    again = pickle.loads(data)
    assert again == location
    assert again.size == size
    assert QUERY not in repr(again)


def test_a_signature_may_count_for_the_whole_folder(web: str, signed: list[str]) -> None:
    beside = parse(signed[0]).parent / "signed-2.safetensors"
    assert beside.is_file(), "the query of the only address in the folder"
    assert not (parse(signed[0]).parent / "other-signed").exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://h/a?x=1", "https://h/a"),
        ("https://h/a?x=1+2 + 0.5*https://h/b?y", "https://h/a + 0.5*https://h/b"),
        ("https://h/a?x=1+https://h/b?y=1+0.5*s3://c/d", "https://h/a+https://h/b+0.5*s3://c/d"),
        ("what?", "what?"),
        ("s3://a/b?c", "s3://a/b?c"),
    ],
)
def test_texts_lose_their_queries(text: str, wanted: str) -> None:
    assert without_queries(text) == wanted


def test_what_signs_is_not_what_is_meant() -> None:
    assert room._what("h/a?Signature=1&Expires=2&Key-Pair-Id=3&sv=1&X-Goog-Date=1&b=2&a=1") == room._what("h/a?a=1&b=2")
    assert room._what("h/a?sig=1") == ""


@pytest.mark.parametrize(
    ("page", "meant"),
    [
        ("huggingface.co/org/name", "hf://org/name"),
        ("huggingface.co/org/name/", "hf://org/name"),
        ("hf.co/org/name/tree/main", "hf://org/name@main"),
        ("huggingface.co/org/name/tree/v1/sub/folder", "hf://org/name@v1/sub/folder"),
        ("huggingface.co/org/name/blob/main/model.safetensors", "hf://org/name@main/model.safetensors"),
        ("hub.example:80/org/name", "hf://org/name"),
    ],
)
def test_a_page_of_the_hub_is_told(page: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:80")
    with pytest.raises(sm.RecipeError, match=f"is a page of the hub; write {meant}$"):
        parse(f"https://{page}")


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/org/name/resolve/main/model.safetensors",
        "https://huggingface.co/datasets/org/name/resolve/main/x.pth",
        "https://example.org/org/name",
    ],
)
def test_files_and_other_hosts_are_no_pages(text: str) -> None:
    assert str(parse(text)) == text
