"""The weights of a NeMo archive that are a folder of torch.distributed.checkpoint, read where they lie in it."""

from __future__ import annotations

from collections.abc import Mapping

from streammerge.formats import archive, dcp
from streammerge.formats.base import Container
from streammerge.formats.dcp_metadata import Place
from streammerge.stores.base import Location


def read(path: Location, places: Mapping[str, archive.Window]) -> Container:
    """Returns the container of the folder. ``places``: of its files in the archive, by name. Raises FormatError."""
    return dcp.read_home(_Home(path, places))


class _Home(dcp.Home):
    """The folder of weights in an archive."""

    def __init__(self, path: Location, places: Mapping[str, archive.Window]) -> None:
        super().__init__(path)
        self.places = places

    def names(self) -> list[str]:
        return list(self.places)

    def place(self, name: str) -> Place | None:
        found = self.places.get(name)
        return None if found is None else (self.folder, *found)
