"""Merges from and to a server behind a proxy that makes faults: the right bytes or one clear error, no wrong output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import use_s3
from safetensors.torch import save_file

import streammerge as sm
from fault_proxy import FaultProxy
from streammerge.stores import multipart, objects, remote
from streammerge.stores.locations import parse


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.005)
    monkeypatch.setattr(remote, "_MOST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(objects, "READ_SECONDS", 0.7)
    monkeypatch.setattr(objects, "CLIENT_TRIES", 0)
    monkeypatch.setattr(multipart, "TIMEOUT_SECONDS", 0.7)


def models(folder: Path) -> list[Path]:
    made = []
    for number in (1, 2):
        make = torch.Generator().manual_seed(number)
        tensors = {f"layer.{n}": torch.randn(300, 211, generator=make) for n in range(12)}
        tensors |= {"norm": torch.randn(211, generator=make), "long": torch.randn(2_500_000, generator=make).bfloat16()}
        made.append(folder / f"{number}.{'pth' if number == 2 else 'safetensors'}")
        torch.save(tensors, made[-1]) if number == 2 else save_file(tensors, made[-1])
    return made


@pytest.fixture
def proxied(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultProxy]]:
    proxy = FaultProxy(s3_server, share=0.0)
    use_s3(proxy.address, monkeypatch)
    yield s3, proxy
    proxy.close()


def run(bucket: str, proxy: FaultProxy, folder: Path, wanted: int) -> Counter[str]:
    """Merges again and again until there were so many faults. Each output is the right one, or absent."""
    paths = models(folder)
    expected = folder / "expected.safetensors"
    sm.merge(paths, expected)
    inputs = [f"{bucket}/in/{path.name}" for path in paths]
    for path, name in zip(paths, inputs, strict=True):
        parse(name).write_whole(path.read_bytes(), overwrite=False)
    ends: Counter[str] = Counter()
    every = tuple(proxy.faults)
    proxy._share = 0.25
    number = 0
    while sum(proxy.made.values()) < wanted:
        number += 1
        proxy.faults = every if number % 4 == 0 else tuple(set(every) - {"tag"})  # another tag ends a run
        out = parse(f"{bucket}/out-{number}.safetensors")
        try:
            sm.merge(inputs, out)
            ends["made"] += 1
        except sm.StreammergeError as error:
            assert "\n" not in str(error)
            ends[type(error).__name__] += 1
        share, proxy._share = proxy._share, 0.0
        if out.exists():
            assert out.read(0, out.size) == expected.read_bytes()
        else:  # what is left is continued
            sm.merge(inputs, out)
            assert out.read(0, out.size) == expected.read_bytes()
        proxy._share = share
    proxy._share = 0.0
    assert list(multipart.Requests(bucket.removeprefix("s3://")).uploads("")) == []
    return ends


def test_a_hundred_faults(proxied: tuple[str, FaultProxy], tmp_path: Path) -> None:
    ends = run(*proxied, tmp_path, 60)
    assert ends["made"] >= 1, ends
    assert len(proxied[1].made) >= 5


@pytest.mark.slow
def test_a_thousand_faults(proxied: tuple[str, FaultProxy], tmp_path: Path) -> None:
    ends = run(*proxied, tmp_path, 1000)
    assert ends["made"] >= 5, ends
    assert len(proxied[1].made) >= 9


@pytest.mark.parametrize("fault", ["drop", "reset", "503", "500", "short", "long", "wrong", "stall"])
def test_a_fault_that_passes_costs_time_only(
    fault: str, proxied: tuple[str, FaultProxy], s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = proxied
    (path, _), there = models(tmp_path), parse(f"{bucket}/a.safetensors")
    there.write_whole(path.read_bytes(), overwrite=False)
    proxy._share, proxy.faults, proxy._most = 0.5, (fault,), 4
    sm.convert(there, tmp_path / "read.safetensors")
    assert sm.diff(path, tmp_path / "read.safetensors").equal
    assert proxy.made[fault]


def test_another_tag_is_a_change_and_not_believed(proxied: tuple[str, FaultProxy], tmp_path: Path) -> None:
    bucket, proxy = proxied
    (path, _), there = models(tmp_path), parse(f"{bucket}/a.safetensors")
    there.write_whole(path.read_bytes(), overwrite=False)
    plan = sm.plan([there, there])
    proxy._share, proxy.faults = 1.0, ("tag",)
    with pytest.raises(sm.ChangedError):
        there.open(plan.identities[there])
    with pytest.raises(sm.StreammergeError):
        sm.merge([there, there], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
