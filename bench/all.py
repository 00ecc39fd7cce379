"""Every command that prints figures of the README and of docs/: a list, or all of them, one after the other.

python bench/all.py [--run] [--only TEXT] [--data DIR]

Without --run nothing is computed. With it, what each command prints is kept in bench/measured/, with the
machine and the versions that it was measured with, and docs/measured.md is written anew from all that is
kept; --only takes those that hold the text. They need the extra bench, real images and networks in the folder
that PYSOLVE_DATA or --data names, and an idle machine.
"""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent
MEASURED, PAGE = ROOT / "bench" / "measured", ROOT / "docs" / "measured.md"
DATA = Path(os.environ.get("PYSOLVE_DATA", "data"))
PACKAGES = ("pysolve-compress", "torch", "numpy", "scipy", "transformers", "torch-pruning", "torchao")


@dataclass(frozen=True)
class Bench:
    """A command, the page that quotes it, and about how many minutes two cores take, where that is known."""

    command: str
    page: str
    minutes: float | None = None


# DATA stands for the folder of images and networks.
ALL = (
    Bench("bench/solvers.py --only published", "benchmarks.md"),
    Bench("bench/solvers.py --only published --tol 1e-10", "benchmarks.md"),
    Bench("bench/solvers.py --only packages", "benchmarks.md"),
    Bench("bench/solvers.py --only large --threads 2", "benchmarks.md"),
    Bench("bench/elimination.py", "benchmarks.md"),
    Bench("bench/networks.py compare --data DATA --threads 2 --match 60", "README.md, benchmarks.md"),
    Bench("bench/networks.py depth --data DATA", "benchmarks.md"),
    Bench("bench/latency_target.py --data DATA --runs 2", "benchmarks.md"),
    Bench("bench/lean.py train --data DATA", "benchmarks.md"),
    Bench("bench/lean.py losses --data DATA", "benchmarks.md"),
    Bench("bench/pruning.py methods --data DATA", "README.md, benchmarks.md"),
    Bench("bench/pruning.py sweep", "benchmarks.md", 1),
    Bench("bench/pruning.py surgery --data DATA", "benchmarks.md", 14),
    Bench("bench/lowrank.py networks --data DATA", "README.md, benchmarks.md"),
    Bench("bench/lowrank.py layers", "benchmarks.md"),
    Bench("bench/distill.py match --data DATA", "benchmarks.md", 12),
    Bench("bench/distill.py speed --data DATA", "benchmarks.md"),
    Bench("bench/deep_compression.py --data DATA", "README.md, benchmarks.md"),
    Bench("bench/csr.py --data DATA", "benchmarks.md"),
    Bench("bench/zoo.py", "benchmarks.md"),
    Bench("bench/scale.py gather", "benchmarks.md"),
    Bench("bench/scale.py passes", "benchmarks.md"),
    Bench("bench/scale.py growth", "scale.md"),
    Bench("bench/scale.py processes", "scale.md"),
    Bench("bench/scale.py decoders", "scale.md", 15),
    Bench("bench/cost_model.py", "scale.md"),
    Bench("bench/device.py", "scale.md", 6),
    Bench("bench/language.py DATA", "benchmarks.md"),
    Bench("bench/torch_layers.py attention", "guide.md", 3),
    Bench("bench/torch_layers.py recurrent --data DATA", "guide.md", 7),
    Bench("bench/golden.py compare", "benchmarks.md"),
    Bench("bench/calibration.py counts --data DATA", "guide.md"),
    Bench("bench/calibration.py kinds --data DATA", "guide.md"),
    Bench("bench/calibration.py matching --data DATA", "guide.md"),
    Bench("examples/compress_llm.py DATA", "guide.md, benchmarks.md"),
    Bench("examples/e1_linear_reconstruction.py --data DATA", "benchmarks.md"),
    Bench("examples/e2_pruning.py --data DATA", "benchmarks.md"),
    Bench("examples/e2_quantization.py --data DATA", "benchmarks.md"),
    Bench("examples/e2_lowrank_distill.py --data DATA", "benchmarks.md"),
    Bench("examples/e3_svd_mlp.py --data DATA", "benchmarks.md", 21),
    Bench("examples/e4_efficiency.py --data DATA", "benchmarks.md", 17),
    Bench("examples/e4_quantization.py --data DATA", "benchmarks.md"),
    Bench("examples/e5_deep_compression.py --data DATA", "benchmarks.md", 7),
    Bench("examples/e5_prune_retrain.py --data DATA", "benchmarks.md"),
    Bench("bench/results.py --data DATA", "results.md"),
    Bench("examples/pictures.py docs/images", "plots.md", 1),
)


def main(
    run: Annotated[bool, typer.Option(help="Run them.")] = False,
    only: Annotated[str, typer.Option(help="Those whose command or page holds this.")] = "",
    data: Annotated[Path, typer.Option(help="Folder with the networks and the images.")] = DATA,
) -> None:
    """List the commands, or run them."""
    chosen = [one for one in ALL if only in f"{one.command} {one.page}"]
    for one in chosen:
        about = f"about {one.minutes:g} min" if one.minutes else ""
        typer.echo(f"python {one.command:60} {about:13} {one.page}")
    if not run:
        raise typer.Exit
    failed = [one.command for one in chosen if not done(one, data)]
    PAGE.write_text(page())
    if failed:
        typer.echo("Failed: " + "; ".join(failed), err=True)
        raise typer.Exit(1)


def done(bench: Bench, data: Path) -> bool:
    """Whether the command ran to its end; what it printed is kept then."""
    words = [str(data) if word == "DATA" else word for word in bench.command.split()]
    before, start, printed = machine(), time.perf_counter(), []
    typer.echo(f"\n## python {shlex.join(words)}\n")
    # What goes to stderr, such as progress, is for those who wait.
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            printed.append(line)
            typer.echo(line, nl=False)
    minutes = (time.perf_counter() - start) / 60
    if running.returncode == 0:
        said = f"{datetime.date.today()}, {minutes:.1f} minutes, {before}"
        kept(bench).write_text(f"{said}\n\n{''.join(printed).strip()}\n")
    return running.returncode == 0


def kept(bench: Bench) -> Path:
    """Where the command's output is."""
    return MEASURED / (re.sub(r"[^a-z0-9]+", "-", bench.command.lower()).strip("-") + ".txt")


def page() -> str:
    """All that is kept, as a page of the documentation."""
    said = "Written by `make bench BENCH=--run`, which runs every command that this site quotes figures of."
    parts = ["# What the benches print", said]
    for bench in ALL:
        if kept(bench).exists():
            said, _, output = kept(bench).read_text().partition("\n\n")
            parts += [f"## `python {bench.command}`", f"{said}. Quoted in {bench.page}."]
            parts += [f"```text\n{output.rstrip()}\n```"]
    missing = [f"- `python {bench.command}`" for bench in ALL if not kept(bench).exists()]
    parts += ["## Not run since outputs are kept", "\n".join(missing)] if missing else []
    return "\n\n".join(parts) + "\n"


def processor() -> str:
    """Its model, or else its architecture."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def machine() -> str:
    """Processor, cores, load and versions, in one line."""
    made_with = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            made_with.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            made_with.append(f"no {name}")
    return f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {', '.join(made_with)}"


if __name__ == "__main__":
    typer.run(main)
