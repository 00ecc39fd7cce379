"""The published experiments E1 to E5, measured part by part; docs/results.md shows them: published | ours.

python bench/results.py [--out DIR] [--only TEXT] [--again] [--data DIR]

Each part leaves one JSON file in DIR: its tables, machine, versions, seed, date and seconds. A part whose
file is there is not measured again, so that a run that was stopped goes on where it stood; --again measures
all that are chosen, --only chooses those whose name holds the text. What fails is said, the others go on,
and the status is 1. Images and networks come from the folder that PYSOLVE_DATA or --data names; networks
that are trained, and pictures, are kept in DIR/trained.
"""

import json
import os
import platform
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Annotated

import common
import numpy as np
import scipy
import torch
import typer
from all import DATA, ROOT, processor
from published import EXPERIMENTS, PARTS, Part
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

import pysolve as ps
from pysolve.cli import demo
from pysolve.tables import Table, as_markdown

SEED = 0
MEASURED = ROOT / "bench" / "measured"
PAGE = ROOT / "docs" / "results.md"
INTRODUCTION = """\
# Published experiments

Five publications, measured anew by the examples: what is published beside ours. Accuracies are of test sets,
in per cent. `python bench/results.py --data DIR` measures what is missing in bench/measured, one file a
part, and writes this page. Pictures, and comparisons with other tools, are in [Measured](benchmarks.md).

Machines:
"""


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = MEASURED,
    only: Annotated[str, typer.Option(help="Parts whose name holds this.")] = "",
    again: Annotated[bool, typer.Option(help="Measure parts again that have been measured.")] = False,
    data: common.DataOption = DATA,
) -> None:
    """Measure the parts that are missing, and write the page."""
    chosen = [part for part in PARTS if only in part.name]
    if not chosen:
        raise typer.BadParameter(f"no part holds {only!r}; there are {', '.join(p.name for p in PARTS)}.")
    failed = []
    for part in chosen:
        if (again or not (out / f"{part.name}.json").exists()) and not done(part, data, out):
            failed.append(part.name)
        write(PAGE, page(PARTS, out))
    typer.echo(f"Wrote {PAGE}")
    if failed:
        typer.echo(f"Failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def done(part: Part, data: Path, out: Path) -> bool:
    """Measure a part and keep it; False if it fails, which leaves the file that was there."""
    typer.echo(f"{part.name}: {part.title}")
    work = out / "trained"
    work.mkdir(parents=True, exist_ok=True)
    start, cpu, load = time.perf_counter(), time.process_time(), os.getloadavg()[0]
    try:
        with demo.threads(1):
            torch.manual_seed(SEED)
            shown = [stored(one) for one in part.measure(data, work, SEED)]
    except Exception:
        traceback.print_exc()
        return False
    versions = {
        "python": platform.python_version(),
        "pysolve": ps.__version__,
        **{module.__name__: module.__version__ for module in (torch, np, scipy)},
    }
    content = {
        "part": part.name,
        "shown": shown,
        "machine": f"{processor()}, {os.cpu_count()} cores, one thread of torch",
        "versions": versions,
        "load": round(load, 1),
        "seed": SEED,
        "date": date.today().isoformat(),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    write(out / f"{part.name}.json", json.dumps(content, indent=1, ensure_ascii=False))
    typer.echo(f"{part.name}: {content['seconds']} s")
    return True


def stored(shown: Table | RenderableType) -> dict | str:
    """A table as data, or a text."""
    if isinstance(shown, RichTable):
        columns = [[plain(cell) for cell in column.cells] for column in shown.columns]
        words = tuple(i for i, column in enumerate(shown.columns) if column.justify == "left")
        head = tuple(plain(column.header) for column in shown.columns)
        table = asdict(Table(plain(shown.title), head, tuple(zip(*columns, strict=True)), words))
        return {**table, "caption": plain(shown.caption or "")}
    return {**asdict(shown), "caption": ""} if isinstance(shown, Table) else str(shown)


def plain(text: str) -> str:
    """Without the marks of a terminal."""
    return Text.from_markup(text).plain


def write(path: Path, text: str) -> None:
    """A whole file or none."""
    path.with_suffix(".part").write_text(text)
    os.replace(path.with_suffix(".part"), path)


def page(parts: Sequence[Part], out: Path) -> str:
    """All parts that have been measured, in Markdown; the others as not measured yet."""
    files = {part.name: out / f"{part.name}.json" for part in parts}
    found = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    machines = list(dict.fromkeys(machine(one) for one in found.values()))
    lines = [INTRODUCTION, *(f"{i}. {text}" for i, text in enumerate(machines, 1)), ""]
    for experiment, title in EXPERIMENTS.items():
        lines += [f"## {experiment}. {title}", ""]
        for part in (part for part in parts if part.name.startswith(experiment.lower())):
            lines += [f"### {experiment}: {part.title}", "", *section(part, found.get(part.name), machines)]
    return "\n".join(lines).rstrip() + "\n"


def machine(result: dict) -> str:
    """What a part was measured with, in one line."""
    return f"{result['machine']}; {', '.join(' '.join(pair) for pair in result['versions'].items())}"


def section(part: Part, result: dict | None, machines: Sequence[str]) -> list[str]:
    """Lines of one part: its command, how it was measured, and what it shows."""
    command = f"`python examples/{part.script}`"
    note = f" {part.note}" if part.note else ""
    if result is None:
        return [f"{command}: not measured yet.{note}", ""]
    how = f"seed {result['seed']}, {result['date']}, {result['seconds']:.0f} s"
    used = f"{result['cpu_seconds']:.0f} s of processors, load {result['load']} before"
    lines = [f"{command}, {how} ({used}), machine {machines.index(machine(result)) + 1}.{note}", ""]
    for one in result["shown"]:
        lines += text(one) if isinstance(one, str) else table(one)
    return lines


def text(words: str) -> list[str]:
    """A paragraph; what is laid out in columns is kept so."""
    return ["```text", words.strip("\n"), "```", ""] if "  " in words else [words, ""]


def table(one: dict) -> list[str]:
    """Title, rows and caption."""
    rows = tuple(map(tuple, one["rows"]))
    found = Table(one["title"], tuple(one["head"]), rows, tuple(one["words"]))
    caption = [*one["caption"].splitlines(), ""] if one["caption"] else []
    return [f"**{one['title']}**", "", *as_markdown(found), "", *caption]


if __name__ == "__main__":
    typer.run(main)
