"""Makes the description of the package from README.md, whose links lead to files of the repository, and compiles its C."""

from __future__ import annotations

import os
import re
import runpy
from contextlib import suppress
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def description(readme: str, source: str) -> str:
    """Returns the README with links that work anywhere.

    ``source``: the address of the repository; "" if it has none yet. Then links become their text, and pictures are left
    out.
    """

    def absolute(found: re.Match[str]) -> str:
        picture, text, path = found.groups()
        if not source:
            return "" if picture else text
        return f"{picture}[{text}]({source}/{'raw' if picture else 'blob'}/HEAD/{path})"

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(absolute, readme))


class ReadmeHook(MetadataHookInterface):
    """Fills in the readme."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source", "")
        metadata["readme"] = {"content-type": "text/markdown", "text": description(text, source)}


def _platform() -> str:
    """Returns this machine's platform as installers compare it, without what a release of Linux must offer."""
    from packaging.tags import sys_tags  # hatchling needs it too

    return next(tag.platform for tag in sys_tags() if "manylinux" not in tag.platform and "musllinux" not in tag.platform)


class CompiledHook(BuildHookInterface[Any]):
    """Compiles ``arithmetic.c`` and puts the library into the wheel. Without a compiler, the wheel does without it.

    ``STREAMMERGE_COMPILED`` in the environment: 0 leaves it out; 1 makes it an error that it cannot be compiled.
    """

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        wanted = os.environ.get("STREAMMERGE_COMPILED", "")
        if self.target_name != "wheel" or wanted == "0":
            return
        source = Path(self.root, "src", "streammerge", "compiled", "arithmetic.c")
        library = source.with_suffix(".so")
        failed = runpy.run_path(str(source.with_name("build.py")))["compile_library"](source, library)
        if failed:
            with suppress(OSError):
                library.unlink()  # of an earlier version
            if wanted == "1":
                raise RuntimeError(f"{source.name} cannot be compiled: {failed}")
            self.app.display_warning(f"{source.name} is not compiled, so sums take more time: {failed}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"
        build_data["artifacts"].append(f"src/streammerge/compiled/{library.name}")
