"""Every verb on small networks of many architectures, transformers' and plain ones: what works, what not.

python bench/zoo.py [--only gpt2,vit,…] [--verbs compress,low_rank,…] [--out zoo.jsonl] [--seconds 120]
python bench/zoo.py --summary [--out zoo.jsonl]

Random weights, 8 batches of 4 samples, nothing is downloaded. Each call runs in a process of its own, within
a time and a memory limit, and adds one JSON line to the file; calls that have a line are not run again.
A call ends in one of these ways:

worked: the network is smaller as asked, and every oracle agrees.
nothing: there was nothing to do, and pysolve said so.
refused: an error of pysolve's own that says what to do.
raw: any other exception.
wrong: an oracle disagrees: the original was touched, the cut network is not the masked one, the saved file
gives other outputs, the report's parameters are not those of the tensors, or a target is missed in silence.
slow: killed at a limit.

MACs have a column of their own: half of what torch's counter says for one sample, within 1 %.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

# Threads of libraries count when these are loaded.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import oracles
import torch
import typer
from architectures import architectures, built

import pysolve as ps
from pysolve.compressed import Compressed
from pysolve.tables import Table, as_markdown

# Parameters that compress and low_rank leave; weights that stay when single ones are pruned.
LEFT, KEPT = 0.9, 0.5
VERDICTS = ("worked", "nothing", "refused", "raw", "wrong", "slow")
MEMORY = 8 << 30

Verb = Callable[[Any, list[Any]], Compressed]
VERBS: dict[str, Verb] = {
    "compress": lambda model, batches: ps.compress(model, batches, target={"params": LEFT}, progress=False),
    "low_rank": lambda model, batches: ps.low_rank(
        model, batches, target={"params": LEFT}, layout="factored", progress=False
    ),
    "magnitude": lambda model, batches: ps.prune(
        model, batches, amount=1 - KEPT, layout="dense", progress=False
    ),
    "obs": lambda model, batches: ps.prune(
        model, batches, method="obs", amount=1 - KEPT, layout="dense", progress=False
    ),
    "int8": lambda model, batches: ps.quantize(model, batches, scheme="int8", progress=False),
    "codebook": lambda model, batches: ps.quantize(model, batches, scheme="codebook", progress=False),
    "channels": lambda model, batches: ps.prune(
        model, batches, method="activation", target={"params": LEFT}, progress=False
    ),
    "both": lambda model, batches: ps.low_rank(
        model, batches, target={"params": LEFT}, prune=True, layout="factored", progress=False
    ),
    "deep_compress": lambda model, batches: ps.deep_compress(
        model, batches, target={"bytes": 0.2}, progress=False
    ),
}
DEFAULT = ("compress", "low_rank", "magnitude", "obs", "int8", "codebook")
TARGETS = dict.fromkeys(("compress", "low_rank", "channels", "both"), LEFT)
# How pysolve says that there is nothing to do.
NOTHING = re.compile(r"(no (layer|weight|channel|site)|nothing|there (is|are) (no|nothing))\b", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """How one call ended.

    Parameters
    ----------
    architecture, family, verb : str
    verdict : str
    detail : str
        The error's first line, what is wrong, or what was left alone.
    where : str
        File and line of the innermost frame of pysolve and of the innermost of all.
    macs : str
        How far the report's MACs are from torch's count; "" within tolerance.
    left : float
        Parameters of the result as a share of the original's.
    seconds : float
    """

    architecture: str
    family: str
    verb: str
    verdict: str
    detail: str = ""
    where: str = ""
    macs: str = ""
    left: float = 1.0
    seconds: float = 0.0


def main(
    only: Annotated[
        str, typer.Option(help="Parts of architectures' or families' names; all by default.")
    ] = "",
    verbs: Annotated[str, typer.Option(help=f"Of {', '.join(VERBS)}.")] = ",".join(DEFAULT),
    out: Annotated[Path, typer.Option(help="File of one JSON line a call.")] = Path("results/zoo.jsonl"),
    seconds: Annotated[float, typer.Option(help="Limit of one call.")] = 120.0,
    summary: Annotated[bool, typer.Option("--summary", help="Only print the file.")] = False,
) -> None:
    """Run what has no line in the file yet, and print the table."""
    parts, chosen = [part.lower() for part in only.split(",")], verbs.split(",")
    names = {
        name: family
        for name, (family, _) in architectures().items()
        if any(part in f"{name}, {family}".lower() for part in parts)
    }
    unknown = [verb for verb in chosen if verb not in VERBS]
    if unknown or not names:
        raise typer.BadParameter(f"there is no {', '.join(unknown) or only}.")
    done = read(out)
    if not summary:
        warm()
        known = {(row.architecture, row.verb) for row in done}
        for verb in chosen:
            for name, family in names.items():
                if (name, verb) not in known:
                    done.append(row := limited(name, family, verb, seconds))
                    append(out, row)
    rows = [row for row in done if row.architecture in names and row.verb in chosen]
    for table in (overview(rows, chosen), failures(rows)):
        print(f"**{table.title}**", "", *as_markdown(table), "", sep="\n")


def warm() -> None:
    """Load what every call needs before processes are forked."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("perceptron", "GPT2LMHeadModel"):
        model, batches = built(name)
        ps.inspect(model, batches[0])


def limited(name: str, family: str, verb: str, seconds: float) -> Row:
    """One call in a process of its own, which is killed when it takes too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender, name, family, verb))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(seconds) else None
        detail = f"killed after {seconds:.0f} s"
    except EOFError:
        row, detail = None, "the process died: out of memory?"
    if row is None:
        process.kill()
        row = Row(name, family, verb, "slow", detail)
    process.join()
    return Row(**{**asdict(row), "seconds": round(time.perf_counter() - start, 1)})


def run(sender: Connection, name: str, family: str, verb: str) -> None:
    """Build a network, call a verb, judge the result, and send the row."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sender.send(judged(name, family, verb))


def judged(name: str, family: str, verb: str) -> Row:
    model, batches = built(name)
    before = oracles.snapshot(model, batches[0])
    try:
        result = VERBS[verb](model, batches)
    except MemoryError:
        return Row(name, family, verb, "slow", "out of memory")
    except Exception as error:
        verdict, detail = named(error)
        bad = [*oracles.touched(model, before, batches[0])]
        if bad:
            verdict, detail = "wrong", "; ".join([*bad, f"after {detail}"])
        return Row(name, family, verb, verdict, detail, frames(error))
    try:
        bad = [*oracles.mistakes(model, before, result, batches[0], TARGETS.get(verb))]
        counts = oracles.macs(model, result, batches[0]) if verb in TARGETS else ""
    except Exception as error:
        _, detail = named(error)
        return Row(name, family, verb, "wrong", f"while it was judged: {detail}", frames(error))
    report = result.report
    if bad:
        verdict, detail = "wrong", "; ".join(bad)
    else:
        verdict = "worked" if oracles.changed(model, result) else "nothing"
        detail = "; ".join((*report.notes, *report.warnings))
    return Row(name, family, verb, verdict, detail, "", counts, round(report.share("params"), 4))


def named(error: Exception) -> tuple[str, str]:
    """Verdict on an exception, and its type and first line."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    # Written there, not come from a function of NumPy's or torch's that a line of pysolve calls.
    meant = "/pysolve/" in last.filename and (last.line or "").startswith("raise ")
    own = isinstance(error, ps.PysolveError) or (isinstance(error, ValueError | TypeError) and meant)
    verdict = "raw" if not own else "nothing" if NOTHING.match(text) else "refused"
    return verdict, f"{type(error).__name__}: {text}"


def frames(error: Exception) -> str:
    """Where an exception comes from, in pysolve and at all."""
    found = [
        f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    own = [place[place.index("/pysolve/") + 1 :] for place in found if "/pysolve/" in place]
    return " < ".join(dict.fromkeys([*own[-1:], *found[-1:]]))


def read(path: Path) -> list[Row]:
    """The rows of a file; the last of each call."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return [*{(row.architecture, row.verb): row for row in rows}.values()]


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def overview(rows: Sequence[Row], verbs: Sequence[str]) -> Table:
    """How many calls of each verb ended how."""
    lines = []
    for verb in (*verbs, "all"):
        own = [row for row in rows if verb in (row.verb, "all")]
        counts = Counter(row.verdict for row in own)
        counted = [
            row for row in own if row.verb in TARGETS and row.verdict in ("worked", "nothing", "wrong")
        ]
        right = f"{sum(not row.macs for row in counted)}/{len(counted)}" if counted else ""
        share = f"{counts['worked'] / max(1, len(own)):.0%}"
        lines.append((verb, str(len(own)), *(str(counts[one]) for one in VERDICTS), share, right))
    return Table("Calls", ("verb", "calls", *VERDICTS, "worked", "MACs agree"), tuple(lines))


def failures(rows: Sequence[Row]) -> Table:
    """The calls that did not work, or whose MACs are wrong."""
    lines = [
        (
            row.verb,
            row.architecture,
            row.verdict,
            (row.detail[:90] if row.verdict != "worked" else f"MACs {row.macs}"),
        )
        for row in rows
        if row.verdict != "worked" or row.macs
    ]
    return Table("Others", ("verb", "architecture", "verdict", "detail"), tuple(lines), words=(0, 1, 2, 3))


if __name__ == "__main__":
    typer.run(main)
