"""What the hub's own reasons become: one sentence each. The real client against a hub on this machine."""

from __future__ import annotations

import pytest

import streammerge as sm
from loopback_hub import TOKEN, Hub
from stores.hub_models import files


def refused(name: str) -> str:
    with pytest.raises(sm.StreammergeError) as caught:
        sm.inspect(name)
    return str(caught.value)


def test_each_reason_of_the_hub_is_one_sentence(hub: Hub, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/private", files(1), private=True)
    hub.add("org/gated", files(1), gated=True)
    for name in ("hf://org/none", "hf://org/private"):
        assert refused(name).endswith("or it is private: log in with `hf auth login`, or set HF_TOKEN")
    assert "org/gated is gated: accept its terms at" in refused("hf://org/gated")
    assert refused("hf://org/a@nowhere") == "hf://org/a@nowhere: org/a has no revision nowhere on the hub"
    assert refused("org/a@nowhere") == "org/a@nowhere does not exist, and org/a has no revision nowhere on the hub"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refused("hf://org/none").endswith("has no model org/none, or it is private and your token may not see it")
    assert len(sm.inspect("hf://org/private")) == len(sm.inspect("org/gated")) == 5
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "may not be read with this token" in refused("hf://org/a")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert refused("hf://org/a") == "hf://org/a: the hub's cache does not hold it, while HF_HUB_OFFLINE is set"


def test_a_missing_client_is_one_sentence(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from streammerge.stores import hub_client

    monkeypatch.setattr(hub_client, "is_installed", lambda: False)
    words = "the hub is read by the package huggingface_hub; install it with `pip install 'streammerge[hub]'`"
    assert refused("hf://org/a") == f"hf://org/a: {words}"
    assert refused("org/a") == f"org/a does not exist, and {words}"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "900"}, 60),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"Retry-After": "Mon"}, 0),
    ],
)
def test_a_busy_hub_says_how_long_to_wait(headers: dict[str, str], seconds: float) -> None:
    from streammerge.stores.hub_client import asked_wait

    assert asked_wait(headers) == seconds
