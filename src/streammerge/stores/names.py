"""Names of files within a folder that come from a file's content or from another folder.

Such a name may lead into subfolders and never out of the folder.
"""

from __future__ import annotations

MOST_PARTS = 8
"""The most parts of a name: folders, and the file's own name."""
_MOST_NAME_BYTES = 255


def is_inner(name: str) -> bool:
    """Whether a name is a path below a folder: plain parts with "/" between them.

    No part is empty, "." or "..", and none has a backslash or NUL in it. So the name is not absolute, and no store reads it
    as a way out of the folder.
    """
    parts = name.split("/")
    return len(parts) <= MOST_PARTS and all(map(_is_plain, parts))


def _is_plain(part: str) -> bool:
    if part in ("", ".", "..") or "\\" in part or "\0" in part:
        return False
    return len(part.encode("utf-8", "surrogatepass")) <= _MOST_NAME_BYTES
