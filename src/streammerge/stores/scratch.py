"""Temporary files of a check, which unpacks records and makes no output."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from streammerge.stores.base import Output
from streammerge.stores.local import LOCAL
from streammerge.stores.written_files import OutputFile


@contextmanager
def scratch() -> Iterator[Callable[[int], Output]]:
    """Yields a function that makes a file of a given size, in a temporary folder that is removed when the block ends."""
    with tempfile.TemporaryDirectory(prefix="streammerge-") as folder:
        home, made = LOCAL.parse(folder), list[OutputFile]()

        def create(size: int) -> Output:
            made.append(OutputFile(home / str(len(made)), size))
            return made[-1]

        try:
            yield create
        finally:
            for file in made:
                file.close()
