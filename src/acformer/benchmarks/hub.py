"""A benchmark's files by the name of a Hugging Face data set: of `lmms-lab/POPE` the parquet files are downloaded."""

import re
from pathlib import Path

from acformer.benchmarks.records import Folder
from acformer.errors import DataError, translated

NAME = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(@(?P<part>[\w./-]+))?")


def open_folder(root: Path, *, images: bool = False) -> Folder:
    """The folder (or file) `root`, or a data set of the hub.

    Args:
        root: a path, or `OWNER/NAME` where there is no such path; `OWNER/NAME@PART` are the parquet files with PART
            in their paths, as a split: `lmms-lab/VQAv2@validation`, `lmms-lab/MMBench@en/dev`.
        images: whether those that lie in tables will be asked for.

    Raises:
        DataError: neither a path nor a data set, or one without such files.
    """
    name = None if root.exists() else NAME.fullmatch(root.as_posix())
    if name is None or (root.parent.is_dir() and root.parent != Path()):  # a misspelt path is not asked of the hub
        return Folder(root, images=images)
    pattern = f"*{name['part'] or ''}*.parquet"
    from huggingface_hub import snapshot_download

    unknown = f"{root}: there is no such file or folder, and no data set of that name can be had from the hub"
    with translated(unknown, DataError):
        found = snapshot_download(name["repo"], repo_type="dataset", allow_patterns=pattern)
    folder = Folder(Path(found), images=images, only=pattern)
    if not folder.files:
        raise DataError(f"{root}: the data set has no file {pattern}")
    return folder
