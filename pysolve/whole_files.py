"""Files and folders that are written whole or not at all; errors of the disk are of one kind."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from pysolve.errors import PysolveError, WriteError

# An object of a file's JSON; who reads it checks it.
Json: TypeAlias = dict[str, Any]
# What is being written lies in a folder of this name, beside what it is to replace.
_PART = re.compile(r".+\.[0-9a-f]{8}\.part")
_NEW, _OLD, _LOCK = "new", "old", "pysolve.lock"
# Characters of a name, so that with an ending it is not too long.
_LONGEST = 60
# As libraries in Rust tell the system's errors.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def replacing(path: str | os.PathLike[str], size: int | None = None) -> Iterator[Path]:
    """An empty file to fill, which takes the place of ``path`` once it is complete and on the disk.

    Where ``path`` is a link, that of what it leads to.
    Where filling it fails, an existing file is as it was, and nothing of the new one is left; of a process
    that was killed meanwhile, the next call for the same folder removes it.

    Parameters
    ----------
    path : str or path
    size : int, optional
        Bytes that the file needs, for the error's text.

    Raises
    ------
    WriteError
        ``path`` is in no folder, is one itself, or cannot be written.
    """
    path = _linked(path)
    check_writable(path)
    with _part_of(path, size) as part:
        new = part / _NEW
        with open(new, "xb") as empty:
            mode = os.fstat(empty.fileno()).st_mode
        yield new
        # Some libraries make files that their owner alone may read; ours are as open as any other.
        new.chmod(mode)
        _flush(new)
        os.replace(new, path)
        _flush(path.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str], size: int | None = None) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``path``; as ``replacing``.

    Two renames: a process that is killed between them leaves no folder, until the next call puts it there.
    """
    path = _linked(path)
    _check_folder(path)
    with _part_of(path, size) as part:
        new = part / _NEW
        new.mkdir()
        yield new
        for place, _, files in os.walk(new):
            for name in (*files, "."):
                _flush(Path(place, name))
        _exchange(new, path, part)
        _flush(path.parent)


def check_writable(path: Path) -> None:
    """WriteError where a file cannot be written because of what is at its place."""
    _check_folder(path)
    # A device in the place of the file would be replaced, too.
    if os.path.exists(path) and not os.path.isfile(path):
        raise WriteError(f"{path} cannot be written: what is there is no file.")


def unwritten(path: Path, error: Exception, needed: str) -> WriteError:
    """What became of a file that needs so many bytes, for an error that ``from_system`` knows."""
    number = from_system(error)
    why = os.strerror(number) if number else str(error).rstrip(".")
    if not path.parent.is_dir():
        why = f"{why}, there is no folder {path.parent}"
    with suppress(OSError):
        needed += f", and {shutil.disk_usage(path.parent).free:,} are free there"
    found = WriteError(
        f"{path} cannot be written: {why}. It needs {needed}. Make room, or give another place."
    )
    found.errno = number or None
    return found


def from_system(error: BaseException) -> int | None:
    """The number of the system's error that is behind one of any library, or 0; None for other errors."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = _OS_ERROR.search(str(error))
    return None if told is None else int(told[1])


def crc32_of(file: BinaryIO, size: int) -> int:
    """CRC-32 of the next ``size`` bytes of a file, or of those that there are."""
    found = 0
    while block := file.read(min(size, 1 << 22)):
        found, size = zlib.crc32(block, found), size - len(block)
    return found


@contextmanager
def claimed(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in ``parent`` that is removed afterwards, or by a later call where this process dies."""
    remove_leftovers(parent)
    part, lock = _locked(parent, name)
    try:
        yield part
    finally:
        with lock, suppress(OSError):
            _remove(part)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that died have left in a folder of what they were writing."""
    with suppress(OSError):
        for part in [one for one in os.scandir(folder) if _PART.fullmatch(one.name)]:
            # A lock that holds no name is somebody else's.
            with suppress(OSError, ValueError):
                if part.is_dir(follow_symlinks=False):
                    _remove_dead(Path(part.path))


@contextmanager
def _part_of(path: Path, size: int | None) -> Iterator[Path]:
    """A folder for what is to replace ``path``; errors of the system as WriteError."""
    written = 0
    try:
        with claimed(path.parent, path.name) as part:
            try:
                yield part
            except Exception:
                files = [one for one in part.rglob("*") if one.is_file() and one.name != _LOCK]
                written = sum(one.stat().st_size for one in files)
                raise
    except PysolveError:
        raise
    except Exception as error:
        if from_system(error) is None:
            raise
        needed = f"{size:,} bytes" if size is not None else f"more than {written:,} bytes"
        raise unwritten(path, error, needed) from error


def _linked(path: str | os.PathLike[str]) -> Path:
    """Where a link leads: it stays, and what it stands for is replaced."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def _check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise WriteError(f"{path} cannot be written: there is no folder {path.parent}.")


def _exchange(new: Path, path: Path, part: Path) -> None:
    """Put a folder in the place of another, which goes into ``part``."""
    for number in range(100):
        old = part / f"{_OLD}{number}"
        with suppress(FileNotFoundError):
            os.replace(path, old)
        try:
            os.replace(new, path)
            return
        except BaseException as error:
            if old.exists() and not path.exists():
                os.replace(old, path)
            # Another process put its own there meanwhile.
            if not (isinstance(error, OSError) and path.exists()):
                raise
    raise WriteError(f"{path} cannot be written: other processes replace it all the time.")


def _locked(parent: Path, name: str) -> tuple[Path, BinaryIO]:
    """A new folder and a file in it, open and locked as long as the process lives."""
    while True:
        part = parent / f"{name[:_LONGEST]}.{secrets.token_hex(4)}.part"
        part.mkdir()
        # Until it is locked, others may take it for that of a dead process, and remove it.
        with suppress(FileNotFoundError):
            lock = open(part / _LOCK, "ab", buffering=0)  # noqa: SIM115
            try:
                if _take(lock, without=True) and os.path.samestat(
                    os.fstat(lock.fileno()), os.stat(part / _LOCK)
                ):
                    lock.write(name.encode())
                    return part, lock
            except BaseException:
                with lock, suppress(OSError):
                    _remove(part)
                raise
            lock.close()


def _take(lock: BinaryIO, *, without: bool) -> bool:
    """Whether a file is locked now by this call; ``without`` where the system, or the disk, has no locks."""
    try:
        system = import_module("fcntl")
        system.flock(lock, system.LOCK_EX | system.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError):
        return without
    return True


def _remove_dead(part: Path) -> None:
    """Remove a folder whose lock nobody holds."""
    if not (part / _LOCK).exists() and any(part.iterdir()):
        return
    with open(part / _LOCK, "ab+") as lock:
        if not _take(lock, without=False):
            return
        lock.seek(0)
        target = part.with_name(lock.read().decode() or part.name)
        # Killed between two renames: the new folder is complete.
        if (part / _NEW).exists() and (part / f"{_OLD}0").exists() and not target.exists():
            os.replace(part / _NEW, target)
        _remove(part)


def _remove(part: Path) -> None:
    """Remove a folder of ours, the lock last: what is left can be removed later."""
    for one in part.iterdir():
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
        elif one.name != _LOCK:
            one.unlink()
    (part / _LOCK).unlink()
    part.rmdir()


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    # Windows opens no folders, and flushes files that are open for writing.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
