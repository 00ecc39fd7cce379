"""A folder of sums: correlations that memory has no room for, and what a killed call goes on from."""

from __future__ import annotations

import json
import re
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor, nn

from pysolve.correlations import Correlations
from pysolve.errors import DataError, PysolveError
from pysolve.nn.files.storage import checksum
from pysolve.nn.files.sums import (
    StoredCorrelations,
    StoredSums,
    open_arrays,
    sums_from,
    sums_to_write,
    write_arrays,
)
from pysolve.nn.gathering.gathered import Gathered
from pysolve.nn.refusal import by_name
from pysolve.nn.running import Batch
from pysolve.whole_files import Json, claimed, replacing

# Sums on the way are put away where that takes at most such a share of the time, every so many seconds.
SHARE, SECONDS = 0.05, 60.0
_RECORD, _PART = "record.json", "part.safetensors"
_FILE = re.compile(r"\d{1,9}\.safetensors")
_OTHER = "Give another folder, or delete this one to begin anew."


class SumsFolder:
    """Correlations of layers, one file for each group of layers that read the same, and sums on the way.

    Parameters
    ----------
    path : Path, optional
        Made where it does not exist; without, a temporary one, which goes with the correlations, or
        where the process is killed before the next one is made.
    identity : mapping
        What the sums are of, for JSON: a folder with another one is refused.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, object]) -> None:
        self.kept = path is not None
        claim = ExitStack()
        self.path = path or claim.enter_context(claimed(Path(tempfile.gettempdir()), "pysolve"))
        self.files: dict[str, Path] = {}
        self.batches: list[int] = []
        self.saved, self.cost = time.monotonic(), 0.0
        if path is None:
            # Folders of temporary files are open to all users; sums of private data are not for them.
            self.path.chmod(0o700)
            weakref.finalize(self, claim.close)
            return
        record = path / _RECORD
        with self._writing():
            path.mkdir(parents=True, exist_ok=True)
            if not record.exists():
                _write_json(record, {"identity": identity})
        found = _read_json(record)
        if found.get("identity") != json.loads(json.dumps(identity)):
            before, now = found.get("identity", {}), dict(identity)
            others = [name for name in now if before.get(name) != json.loads(json.dumps(now[name]))]
            raise PysolveError(f"{path} holds sums of another {' and other '.join(others)}. {_OTHER}")
        with _reading(record):
            self.batches = _numbers(found.get("batches", []))
            for name, file in found.get("files", {}).items():
                if not (isinstance(file, str) and _FILE.fullmatch(file) and (path / file).is_file()):
                    raise ValueError(f"there is no file {file}")
                self.files[name] = path / file

    def has(self, name: str) -> bool:
        """Whether the sums of a layer are complete."""
        return name in self.files

    def verified(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each compared with what it was in an earlier pass.

        Raises
        ------
        DataError
            They are others, or in another order.
        """
        index = -1
        for index, batch in enumerate(batches):
            found = batch_checksum(batch)
            if index == len(self.batches):
                self.batches.append(found)
            if self.batches[index] != found:
                raise DataError(
                    f"batch {index} is not the one that it was in an earlier pass: several passes, and "
                    "checkpoints, need the same batches in the same order: no shuffling, no random transform."
                )
            yield batch
        if index + 1 < len(self.batches):
            raise DataError(f"there are {index + 1} batches, after {len(self.batches)} in an earlier pass.")

    def resume(self, sums: Gathered) -> int:
        """Give sums what was put away of the same layers, if anything was; how many batches that were."""
        path = self.path / _PART
        if not self.kept or not path.exists():
            return 0
        arrays, metadata = open_arrays(path)
        with _reading(path):
            if json.loads(metadata["layers"]) != [*sums.layers]:
                return 0
            batches = _numbers(json.loads(metadata["batches"]))
            sums.resume({name: one.read() for name, one in arrays.items()})
        self.batches = self.batches or batches
        return len(batches)

    def put_away(self, sums: Gathered, batches: int) -> None:
        """Write what is summed after so many batches, unless that was done a short while ago."""
        now = time.monotonic()
        if not self.kept or now - self.saved < max(SECONDS, self.cost / SHARE):
            return
        metadata = {
            "layers": json.dumps([*sums.layers]),
            "batches": json.dumps(self.batches[:batches]),
        }
        with self._writing():
            write_arrays(self.path / _PART, sums.state(), metadata)
        self.saved = time.monotonic()
        self.cost = self.saved - now

    def add(self, name: str, correlations: Mapping[str, Correlations]) -> None:
        """Keep the correlations of the layers that read what the named one reads; none where nothing did."""
        path = (
            self.path / f"{1 + max((int(one.stem) for one in self.files.values()), default=-1)}.safetensors"
        )
        arrays, record = sums_to_write(correlations)
        with self._writing():
            write_arrays(path, arrays, {"correlations": json.dumps(record)})
            self.files[name] = path
            if self.kept:
                record_of_all = _read_json(self.path / _RECORD)
                files = {name: one.name for name, one in self.files.items()}
                _write_json(self.path / _RECORD, {**record_of_all, "files": files, "batches": self.batches})

    def correlations(self, names: Iterable[str]) -> StoredCorrelations:
        """Correlations of those of the layers that any sample has reached."""
        found: dict[str, StoredSums] = {}
        for path in self.files.values():
            arrays, metadata = open_arrays(path)
            with _reading(path):
                found |= sums_from(arrays, json.loads(metadata["correlations"])).stored
        (self.path / _PART).unlink(missing_ok=True)
        return StoredCorrelations({name: found[name] for name in names if name in found}, self)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors of the disk say what could not be written."""
        try:
            yield
        except OSError as error:
            raise PysolveError(
                f"sums cannot be kept in {self.path}: {error}. Make room, or give checkpoint= or TMPDIR "
                "another place, or more memory."
            ) from error


def batch_checksum(batch: Batch) -> int:
    """A number that another batch hardly has."""
    found = 0
    for name, value in by_name(batch).items():
        # Objects tell where they lie, which is another place in another run.
        plain = value is None or isinstance(value, str | int | float | bool)
        what = checksum(value) if isinstance(value, Tensor) else value if plain else type(value).__name__
        found = zlib.crc32(f"{name} {what!r}".encode(), found)
    return found


def network_checksums(model: nn.Module) -> dict[str, int]:
    """A number for every tensor of a network's state, by name."""
    return {name: checksum(one) for name, one in model.state_dict().items() if isinstance(one, Tensor)}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of a file that holds something else say so."""
    try:
        yield
    except DataError:
        raise
    # RuntimeError: JSON that is nested too deeply, and what torch makes of wrong tensors.
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} is damaged: {error}. {_OTHER}") from error


def _numbers(values: object) -> list[int]:
    if not isinstance(values, list) or not all(type(one) is int for one in values):
        raise ValueError("checksums of batches are no numbers")
    return values


def _read_json(path: Path) -> Json:
    """A record whose checksum is right."""
    with _reading(path):
        text = path.read_text()
        found = json.loads(text)["record"]
        if not isinstance(found, dict) or text != _sealed(found):
            raise ValueError("its checksum is wrong")
    return found


def _write_json(path: Path, record: Mapping[str, object]) -> None:
    with replacing(path) as part:
        part.write_text(_sealed(record))


def _sealed(record: Mapping[str, object]) -> str:
    text = json.dumps(record)
    return f'{{"crc32": {zlib.crc32(text.encode())}, "record": {text}}}'
