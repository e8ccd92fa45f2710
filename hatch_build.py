"""Makes the description of the package from README.md, whose links lead to files of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
