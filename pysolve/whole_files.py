"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file to fill, which takes the place of ``path`` once it is complete and on the disk.

    Where filling it fails, an existing file is as it was, and nothing of the new one is left.

    Raises
    ------
    OSError
        ``path`` is in no folder, is one itself, or cannot be written.
    """
    path = Path(path)
    check_writable(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as empty:
            mode = os.fstat(empty.fileno()).st_mode
        yield part
        # Some libraries make files that their owner alone may read; ours are as open as any other.
        part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """OSError where a file cannot be written because of what is at its place."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}.")
    # A device in the place of the file would be replaced, too.
    if path.exists() and not path.is_file():
        raise IsADirectoryError(f"{path} cannot be written: what is there is no file.")
