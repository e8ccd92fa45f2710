"""CRC-32C by the extension of the crc32c package, without the rest of the package."""

from __future__ import annotations

import subprocess
import sys

import crc32c as package
import pytest

from streammerge.stores import crc32c

_TEXT = b"123456789"


def test_the_sum_is_that_of_the_standard_and_goes_on() -> None:
    assert crc32c.crc32c(_TEXT) == 0xE3069283  # the check value of RFC 3720
    assert crc32c.crc32c(memoryview(_TEXT)[4:], crc32c.crc32c(_TEXT[:4])) == 0xE3069283


def test_the_package_itself_is_not_imported() -> None:
    code = "import sys; from streammerge.stores.crc32c import crc32c; crc32c(b''); print('crc32c' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize("found", [None, "empty"])
def test_another_layout_of_the_package_is_imported_as_it_is(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        class loader:
            @staticmethod
            def create_module(spec: object) -> None: ...
            @staticmethod
            def exec_module(module: object) -> None: ...

        name, submodule_search_locations, has_location, origin, parent, cached = "_crc32c", None, False, None, "", None

    monkeypatch.setattr(crc32c.PathFinder, "find_spec", lambda *_: Empty if found else None)
    assert crc32c._loaded() is package.crc32c
