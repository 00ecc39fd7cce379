"""Files of images as the tests write them."""

import gzip
import io
import struct

import numpy as np
from PIL import Image

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array):
    """The bytes of an IDX file."""
    array = np.asarray(array)
    head = bytes([0, 0, CODES[array.dtype.str[1:]], array.ndim]) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder, *, dot="-", packed=True, images=6):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        for kind, values in (
            ("images", rng.integers(0, 256, (images, 4, 3), dtype=np.uint8)),
            ("labels", rng.integers(0, 10, images, dtype=np.uint8)),
        ):
            name = f"{part}-{kind}{dot}idx{values.ndim}-ubyte"
            path, content = folder / (name + ".gz" * packed), idx(values)
            path.write_bytes(gzip.compress(content) if packed else content)


def jpegs(n=5, size=(8, 6), mode="RGB"):
    """n smooth random images, as JPEG files of high quality."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(n):
        small = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize(size, Image.Resampling.BILINEAR).convert(mode).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return files


def write_jpegs(path, files=None, **changes):
    files = jpegs() if files is None else files
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.arange(len(files), dtype=np.uint8) % 10,
    } | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path
