"""Arrays of NumPy's files, as commands take them; without torch."""

from __future__ import annotations

import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from pysolve.correlations import AnyArray
from pysolve.errors import DataError

# How files of arrays, and archives of them, begin.
_BEGINNINGS = (b"\x93NUMPY", b"PK")


def arrays_in(path: Path) -> dict[str, AnyArray]:
    """The arrays of an .npz file by their names, or the only one of an .npy file as ``x``.

    Raises
    ------
    DataError
        There is no such file, or it is another or damaged.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    try:
        with path.open("rb") as file:
            # Of others NumPy says to trust them.
            if not file.peek(6).startswith(_BEGINNINGS):
                raise DataError(f"{path} cannot be read: it is no file of NumPy's, or damaged.")
            content = np.load(file, allow_pickle=False)
            return {"x": content} if isinstance(content, np.ndarray) else dict(content)
    except (ValueError, EOFError, OSError, BadZipFile, zlib.error) as error:
        objects = "allow_pickle" in str(error)
        why = "it holds Python objects: save arrays of numbers alone" if objects else str(error)
        raise DataError(f"{path} cannot be read: {why}") from error
