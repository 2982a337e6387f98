"""What datasets are published in: archives that are found, or their extracted folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Archive:
    """A folder of a dataset, and the file that it is published in."""

    # What it is called once it is extracted, without its parents.
    folder: str
    # The file; None where there is none that can be read as it is.
    file: str | None = None
    url: str | None = None
    # Bytes of the file, and its sha256; None where nobody told.
    size: int | None = None
    checksum: str | None = None

    @property
    def can_be_fetched(self) -> bool:
        """Whether it takes no person: what arrives can be compared with what was published."""
        return self.file is not None and self.url is not None and self.checksum is not None

    @property
    def title(self) -> str:
        """What a user looks for."""
        return self.file or f"{self.folder}/"

    def find(self, place: Path) -> Path | None:
        """The folder in `place`, or `place` where it is that folder, else the file in it."""
        if place.absolute().name == self.folder and place.is_dir():
            return place
        if (place / self.folder).is_dir():
            return place / self.folder
        file = place / self.file if self.file else None
        return file if file is not None and file.is_file() else None
