"""Where the images lie that records name: a folder, a zip or a tar; an archive in a folder counts as unpacked there.

So LLaVA's downloads may stay as they are: `coco/train2017/1.jpg` is found in `coco/train2017.zip`, whose members begin
with `train2017/`.
"""

import os
from pathlib import Path

from acformer.data.archives import SUFFIXES, Archive
from acformer.errors import DataError
from acformer.images.stored import StoredImage

Found = Path | StoredImage


class ImageRoot:
    """`root.find(name)` -> the file or the member of an archive.

    Raises:
        DataError: a file that is neither zip nor tar.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.base = os.path.abspath(Path(root).expanduser())
        self.archive = Archive(Path(self.base)) if os.path.isfile(self.base) else None
        self._archives: dict[str, list[Archive]] = {}

    def find(self, name: str) -> Found:
        """What lies under that name, as written, in the folder (links there are the user's own); else `DataError`."""
        path = os.path.normpath(os.path.join(self.base, name))
        if not Path(path).is_relative_to(self.base):
            raise DataError(f"image {name!r} is outside the image folder {self.base}")
        if self.archive is not None:
            found = self.archive.find(os.path.relpath(path, self.base))
        elif os.path.isfile(path):
            return Path(path)
        else:
            found = self._unpacked(path)
        if found is None:
            raise DataError(f"image {name!r} is not in the image folder {self.base}")
        return found

    def _unpacked(self, path: str) -> StoredImage | None:
        """The member of an archive in one of the folders above, as if it had been unpacked there."""
        folder = os.path.dirname(path)
        while Path(folder).is_relative_to(self.base):
            for archive in self._archives_in(folder):
                if found := archive.find(os.path.relpath(path, folder)):
                    return found
            folder = os.path.dirname(folder)
        return None

    def _archives_in(self, folder: str) -> list[Archive]:
        if folder not in self._archives:
            try:
                names = sorted(name for name in os.listdir(folder) if name.endswith(SUFFIXES))
            except (OSError, ValueError):
                names = []
            self._archives[folder] = [Archive(Path(folder) / name) for name in names]
        return self._archives[folder]
