"""Claims of machines on units: who gets one, and when another may take it over."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streammerge.stores import claims, lock
from streammerge.stores.base import Joint
from streammerge.stores.claims import Claims, Fence, LeaseLost
from streammerge.stores.locations import parse

LEASE_SECONDS = 0.6


@pytest.fixture
def joint(tmp_path: Path) -> Joint:
    return parse(tmp_path / "out.safetensors").join("key")


@pytest.fixture
def two(joint: Joint) -> Iterator[tuple[Claims, Claims]]:
    with Claims(joint, LEASE_SECONDS) as one, Claims(joint, LEASE_SECONDS) as other:
        yield one, other


def machine_file(claims_: Claims, joint: Joint) -> Path:
    return Path((joint.home / claims.MACHINES / claims_.name).key)


def elsewhere(claims_: Claims, joint: Joint) -> None:
    """Lets a machine's file say that it is another host."""
    claims_._stop.set()
    owner = lock.this_run()._replace(host="node7", boot="other", namespace="pid:[9]", pid=4)
    machine_file(claims_, joint).write_text(json.dumps({"beat": 1, **owner._asdict()}))


def test_one_machine_gets_a_unit(two: tuple[Claims, Claims]) -> None:
    one, other = two
    assert one.take("0")
    assert not other.take("0")
    assert other.take("1")
    assert one.owners() == {"0": ["0.0"], "1": ["1.0"]}
    assert not other.dead("0.0")
    assert not one.dead("0.0"), "a machine is not dead for itself"


def test_many_threads_and_one_claim(joint: Joint) -> None:
    with Claims(joint, LEASE_SECONDS) as one:
        got: list[bool] = []
        threads = [threading.Thread(target=lambda: got.append(one.take("5"))) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(got) == [False] * 15 + [True]


def test_a_machine_that_has_ended_is_followed_at_once(joint: Joint) -> None:
    with Claims(joint, 100.0) as one:
        one.take("0")
    with Claims(joint, 100.0) as other:
        before = other.owners()["0"]
        assert other.dead(before[-1])
        assert other.take("0", before)
        assert other.owners()["0"][-1] == "0.1"
        assert not other.take("0", before), "the last claim counts"


def _claim_and_die(out: str) -> None:
    one = Claims(parse(out).join("key"), 100.0)
    one.__enter__()
    one.take("0")
    os._exit(9)


def test_a_killed_process_of_this_machine_is_followed_at_once(joint: Joint) -> None:
    process = multiprocessing.get_context("fork").Process(target=_claim_and_die, args=(str(joint.out),))
    process.start()
    process.join()
    with Claims(joint, 100.0) as other:
        assert other.dead("0.0")
        assert other.wait_until_dead("0.0")
        assert "process" in other.describe("0.0")


def test_another_host_is_dead_after_a_lease_without_a_sign(joint: Joint, two: tuple[Claims, Claims]) -> None:
    one, other = two
    one.take("0")
    elsewhere(one, joint)
    began = time.monotonic()
    assert not other.dead("0.0")
    while not other.dead("0.0"):
        time.sleep(0.02)
    assert LEASE_SECONDS <= time.monotonic() - began < 50 * LEASE_SECONDS
    assert "node7" in other.describe("0.0")


def test_another_host_that_shows_that_it_lives_is_alive(joint: Joint, two: tuple[Claims, Claims]) -> None:
    one, other = two
    one.take("0")
    elsewhere(one, joint)
    file = machine_file(one, joint)
    deadline = time.monotonic() + 2 * LEASE_SECONDS
    while time.monotonic() < deadline:
        file.write_bytes(file.read_bytes() + b" ")
        assert not other.dead("0.0")
        time.sleep(LEASE_SECONDS / 10)
    file.write_bytes(b"{")  # half written by a crash
    assert not other.dead("0.0")


def test_a_machine_that_lives_may_write_for_longer_than_a_lease(joint: Joint) -> None:
    lease = 5 * LEASE_SECONDS  # on a busy machine a thread may wait for longer than a short one
    with Claims(joint, lease) as one:
        deadline = time.monotonic() + 1.2 * lease
        while time.monotonic() < deadline:
            one.fence.check()
            time.sleep(lease / 100)
    with pytest.raises(LeaseLost):
        one.fence.check()


def test_a_machine_that_was_stopped_writes_nothing_more(joint: Joint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even after its thread has run again: others may have taken over meanwhile."""
    with Claims(joint, LEASE_SECONDS) as one:
        now = claims._clock
        monkeypatch.setattr(claims, "_clock", lambda: now() + LEASE_SECONDS)
        with pytest.raises(LeaseLost):
            one.fence.check()
        time.sleep(LEASE_SECONDS / 2)
        with pytest.raises(LeaseLost):
            one.fence.check()


def test_a_fence_reaches_other_processes() -> None:
    fence = Fence(shared=True)
    fence.move(claims._clock() + 100)
    copy = pickle.loads(pickle.dumps(fence))
    copy.check()
    fence.move(claims._clock() - 1)
    with pytest.raises(LeaseLost):
        copy.check()
    fence.close()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(Fence(shared=False)))


def test_receipts(joint: Joint) -> None:
    assert list(claims.finished(joint.home)) == []
    with Claims(joint, LEASE_SECONDS) as one:
        assert not one.is_finished("3")
        claims.finish(joint.home, "3", b"first")
        claims.finish(joint.home, "3", b"again")
        assert one.is_finished("3")
    assert list(claims.finished(joint.home)) == [("3", b"again")]
