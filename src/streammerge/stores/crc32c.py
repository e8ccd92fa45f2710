"""CRC-32C by the crc32c package, of which only the extension is loaded.

The package also imports argparse and importlib.metadata, which takes longer than a small conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from typing import Any


def _loaded() -> Callable[..., int]:
    """Returns the function of the extension, or of the package if its extension lies elsewhere."""
    package = find_spec("crc32c")
    extension = PathFinder.find_spec("_crc32c", package.submodule_search_locations) if package else None
    if extension is not None and extension.loader is not None:
        module = module_from_spec(extension)
        extension.loader.exec_module(module)
        if hasattr(module, "crc32c"):
            return module.crc32c  # type: ignore[no-any-return]
    from crc32c import crc32c

    return crc32c


_FUNCTION = _loaded()


def crc32c(data: Any, before: int = 0) -> int:
    """Returns the checksum of all bytes so far, from the checksum ``before`` and a buffer of more bytes."""
    return _FUNCTION(data, before)
