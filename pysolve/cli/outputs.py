"""Where a command writes to, made sure of before any work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pysolve.errors import DataError
from pysolve.whole_files import check_writable, replacing


@contextmanager
def folder(path: Path, names: Sequence[str]) -> Iterator[None]:
    """A folder that can take files of these names, made before any work, and removed if nothing comes of it.

    Raises
    ------
    DataError
        No file can be written there.
    """
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in names:
                check_writable(path / name)
            tempfile.TemporaryFile(dir=path).close()
        except FileExistsError:
            raise DataError(f"--out {path} is a file: give the name of a folder.") from None
        except NotADirectoryError:
            raise DataError(f"--out {path} is below a file: give the name of a folder.") from None
        except OSError as error:
            raise DataError(f"nothing can be written to --out {path}: {error.strerror or error}") from error
        yield
    except BaseException:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file or none."""
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
