"""python -m benchmarks.remote: merges from and to a loopback S3, beside obstore that moves the same bytes.

Prints seconds, CPU seconds of the client and of the server, memory, and the bytes on the local disk. Then the ratio of
their rates, by seconds and by CPU seconds of client and server together, which is what a machine without idle CPUs
could reach; each with the start and without it. The start is what a merge of small tensors with torch takes. All run
in turn, each in a process of its own; medians count. Others who use the machine change seconds more than CPU seconds;
``chrt -f 1 python -m benchmarks.remote`` goes before them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.files import Model
from benchmarks.measure import measure

_MOVE = """
import sys
from concurrent.futures import ThreadPoolExecutor
import obstore
from obstore.store import S3Store
store = S3Store("bench", client_options={"allow_http": True, "timeout": "120s"})
names, out = sys.argv[1:-1], sys.argv[-1]
BLOCK, PART = 4 << 20, 8 << 20
sizes = [obstore.head(store, name)["size"] for name in names]
spans = [(name, at, min(at + BLOCK, size)) for name, size in zip(names, sizes) for at in range(0, size, BLOCK)]
def get(span):
    return len(obstore.get_range(store, span[0], start=span[1], end=span[2]))
def put():
    with obstore.open_writer(store, out, buffer_size=PART, max_concurrency=4) as writer:
        data, left = bytes(PART), sizes[0]
        while left:
            writer.write(data[:min(left, PART)])
            left -= min(left, PART)
with ThreadPoolExecutor(17) as pool:
    writing = pool.submit(put)
    total = sum(pool.map(get, spans))
    writing.result()
print(total)
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.9, help="of each input")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--method", default="linear")
    parser.add_argument("--files", type=Path, default=Path(tempfile.gettempdir()) / "streammerge-remote")
    asked = parser.parse_args()
    bucket = asked.files / "bench"
    bucket.mkdir(parents=True, exist_ok=True)
    paths = [Model(asked.gigabytes, number).made(bucket) for number in range(1, asked.models + 1)]
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.s3_server", str(asked.files)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        os.environ.update(
            AWS_ENDPOINT_URL=server.stdout.readline().strip(),
            AWS_REGION="us-east-1",
            AWS_ACCESS_KEY_ID="bench",
            AWS_SECRET_ACCESS_KEY="bench",
            AWS_ALLOW_HTTP="true",
        )
        names = [path.name for path in paths]
        commands = {
            "obstore": [sys.executable, "-c", _MOVE, *names, "moved.bin"],
            "streammerge": _merge(names, asked.memory, asked.method),
            "start": _merge(_small(bucket), asked.memory, asked.method),
        }
        seconds: dict[str, list[float]] = {tool: [] for tool in commands}
        cpu: dict[str, list[float]] = {tool: [] for tool in commands}
        for number in range(asked.rounds):
            for tool, command in commands.items():
                with tempfile.TemporaryDirectory() as scratch:
                    os.environ["TMPDIR"] = scratch
                    disk, before = _Disk(Path(scratch)), _cpu_seconds(server.pid)
                    found = measure(command)
                    served, most = _cpu_seconds(server.pid) - before, disk.stop()
                if found.exit_code:
                    print(found.output)
                    return 1
                seconds[tool].append(found.seconds)
                cpu[tool].append(found.cpu_seconds + served)
                print(
                    f"round {number + 1}: {tool:11} {found.seconds:6.2f} s, CPU {found.cpu_seconds:5.2f} s, "
                    f"of the server {served:5.2f} s, anonymous memory {found.anonymous >> 20} MiB, "
                    f"local disk {most / 2**20:.1f} MiB",
                    flush=True,
                )
                if tool == "streammerge":
                    print("   ", found.output.strip().splitlines()[-1])
                for name in ("merged.safetensors", "moved.bin"):
                    (bucket / name).unlink(missing_ok=True)
        for unit, each in (("seconds", seconds), ("CPU seconds", cpu)):
            mine, alone, start = (statistics.median(each[tool]) for tool in ("streammerge", "obstore", "start"))
            print(
                f"rate of streammerge / rate of obstore alone, by {unit}: {alone / mine:.2f}, "
                f"without the start of {start:.2f}: {alone / (mine - start):.2f}"
            )
        return 0
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(asked.files / ".parts", ignore_errors=True)


def _merge(names: Sequence[str], memory: str, method: str) -> list[str]:
    inputs = [f"s3://bench/{name}" for name in names]
    command = [sys.executable, "-m", "streammerge", "merge", *inputs, "-o", "s3://bench/merged.safetensors"]
    return [*command, "--overwrite", "--no-progress", "--memory", memory, "--method", method]


def _small(bucket: Path) -> list[str]:
    """Makes models of one small tensor. Returns their names. Six of 16 bits, since fewer are merged without torch."""
    names = [f"small-{number}.safetensors" for number in range(6)]
    for name in names:
        save_file({"weight": torch.ones(64, 64).half()}, bucket / name)
    return names


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Disk:
    """Watches how many bytes are in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._most, self._done = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            total = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            self._most = max(self._most, total)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._most


if __name__ == "__main__":
    sys.exit(main())
