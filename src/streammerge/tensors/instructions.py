"""Chooses the vector instructions of numpy's sorts, in processes of our own.

numpy sorts and partitions with AVX-512 where a processor has it. Those sorts store with an instruction (``vpcompressd`` to
memory) that AMD's Zen 4 runs as microcode. There numpy's AVX2 sorts are faster: a partition of 32,768 integers takes 25 us
instead of 185, a sort 67 us instead of 550. Rows of up to 256 numbers alone are sorted faster with AVX-512. Both give the
same order. numpy reads the choice once, from the environment, when it is imported. So a process must be told before, and a
program that calls this library keeps its own choice.
"""

from __future__ import annotations

import contextlib
import os
import warnings

_VARIABLE = "NPY_DISABLE_CPU_FEATURES"
_AVX_512 = "X86_V4 AVX512_SKX"
"""The same instructions, as numpy calls them from 2.4 on and before."""
_PROCESSOR = "/proc/cpuinfo"
_FIRST_BYTES = 4096
"""Enough for the first processor. Linux makes the text while it is read, and a large machine has a megabyte of it."""


def choose_instructions() -> None:
    """Tells numpy, which is not imported yet, what to do without on this processor. Changes no choice that is there."""
    told = os.environ.get(_VARIABLE)
    if told is None:
        with contextlib.suppress(OSError), open(_PROCESSOR, "rb", buffering=0) as file:
            if stores_slowly(file.read(_FIRST_BYTES)):
                told = os.environ[_VARIABLE] = _AVX_512
    if told == _AVX_512:  # numpy warns about the name that it does not know
        warnings.filterwarnings("ignore", "During parsing environment variable", ImportWarning)


def environment_of_others() -> dict[str, str]:
    """Returns the environment for a program of the user, whose numpy keeps its instructions."""
    return {name: value for name, value in os.environ.items() if (name, value) != (_VARIABLE, _AVX_512)}


def stores_slowly(processors: bytes) -> bool:
    """Whether the first processor is a Zen 4, by the text that Linux has about it: of AMD's family 25 (19h), only Zen 4 has
    AVX-512."""
    fields = dict[bytes, bytes]()
    for line in processors.partition(b"\n\n")[0].splitlines():
        name, _, value = line.partition(b":")
        fields[name.strip()] = value.strip()
    return (
        fields.get(b"vendor_id") == b"AuthenticAMD"
        and fields.get(b"cpu family") == b"25"
        and b"avx512f" in fields.get(b"flags", b"").split()
    )
