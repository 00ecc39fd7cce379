"""Shared by the benchmarks: options, networks by name, and files of rows.

Imported first, it limits the threads of BLAS, as ``experiment`` does.
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated

import subjects
import torch
import typer

import pysolve as ps

DATA = subjects.DATA
# Images that are timed together.
TIMED_BATCH = 100

DataOption = Annotated[Path, typer.Option(help="Folder with the networks and the images.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the JSON files and trained weights.")]
ThreadsOption = Annotated[int, typer.Option(help="Of torch.")]


def found(name: str, data: Path, out: Path) -> subjects.Subject:
    """A trained network and its images, by name; or one line and status 2."""
    if name not in subjects.SUBJECTS:
        raise typer.BadParameter(f"{name}; there are {', '.join(subjects.SUBJECTS)}.")
    try:
        return subjects.SUBJECTS[name](data, out)
    except (ps.PysolveError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def write(path: Path, title: str, threads: int, rows: Sequence[object]) -> None:
    """All rows so far, with the machine they were measured on; a whole file or none."""
    command = " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    machine = {"torch": torch.__version__, "threads": threads, "machine": platform.machine()}
    shown = [asdict(row) if is_dataclass(row) else row for row in rows]
    content = {"title": title, "command": command, **machine, "load": os.getloadavg(), "rows": shown}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)
