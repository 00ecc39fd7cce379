"""Where a command writes to, made sure of before any work."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pysolve.errors import DataError
from pysolve.whole_files import check_writable, replacing

# All that commands write into folders, and which of it are folders.
FOLDERS = ("pretrained", "networks")
RESULTS = (
    *("network.safetensors", "plan.json", "report.json", "report.md", "report.html"),
    *("state_dict.safetensors", *FOLDERS, "sweep.json", "pareto.png"),
)


@contextmanager
def folder(path: Path, names: Sequence[str], *, overwrite: bool = False) -> Iterator[None]:
    """A folder that can take files of these names, made before any work, and removed if nothing comes of it.

    Results of an earlier command there are refused, or with ``overwrite`` removed once the new ones are
    written: no folder holds some of both.

    Raises
    ------
    DataError
        No file can be written there, or it holds results already.
    """
    made = [place for place in (path, *path.parents) if not place.exists()]
    known = [name for name in dict.fromkeys((*names, *RESULTS)) if (path / name).exists()]
    if known and not overwrite:
        raise DataError(f"--out {path} holds {known[0]} already: give another folder, or --overwrite.")
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in names:
                if name not in FOLDERS:
                    check_writable(path / name)
            tempfile.TemporaryFile(dir=path).close()
        except FileExistsError:
            raise DataError(f"--out {path} is a file: give the name of a folder.") from None
        except NotADirectoryError:
            raise DataError(f"--out {path} is below a file: give the name of a folder.") from None
        except OSError as error:
            raise DataError(f"nothing can be written to --out {path}: {error.strerror or error}") from error
        yield
        for name in known:
            if name not in names:
                _remove(path / name)
    except BaseException:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that is there already, and one that cannot be written."""
    check_writable(path)
    if path.exists() and not overwrite:
        raise DataError(f"--out {path} is there already: give another name, or --overwrite.")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file or none."""
    content = content if isinstance(content, bytes) else f"{content}\n".encode()
    with replacing(path, len(content)) as part:
        part.write_bytes(content)
