"""The command line. Heavy imports stay inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from inspect import Signature
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from pysolve import __version__
from pysolve.cli.blame import blaming
from pysolve.cli.options import Value, parameters
from pysolve.errors import PysolveError, PysolveWarning

Run = Callable[..., None]
_INPUTS = ("network", "data", "weights")
_OUTPUTS = (
    *("study", "memory", "distill", "ignore", "test", "out", "overwrite"),
    *("state_dict", "latency", "limit", "device", "seed", "as_json", "quiet"),
)
_REFITTED = ("refit", "layout", *_OUTPUTS)
_SWEPT = (
    "study",
    "memory",
    "checkpoint",
    "test",
    "target",
    "out",
    "overwrite",
    "select",
    "widths",
    "round_to",
    "head_dims",
    "ignore",
    "latency",
    "limit",
    "device",
    "seed",
    "as_json",
    "quiet",
)


def _named(error: Exception) -> str:
    """The file of an error of the system, and what is wrong with it; "" for others."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return ""


class _Plain(TyperGroup):
    """One red line and exit status 2 for what the user can mend, 130 for Ctrl-C; bugs keep their trace."""

    def invoke(self, ctx: Any) -> object:
        try:
            with warnings.catch_warnings():
                # The report that is printed has them.
                warnings.simplefilter("ignore", PysolveWarning)
                return super().invoke(ctx)
        except (PysolveError, ImportError, OSError, ValueError, TypeError, RuntimeError) as error:
            # Typer's own ways to end a command are RuntimeErrors; it is silent where a pager was left.
            if ctx.params["debug"] or isinstance(error, (typer.Exit, typer.Abort, BrokenPipeError)):
                raise
            message = " ".join((_named(error) or str(error)).split())
            Console(stderr=True, highlight=False).print(
                f"Error: {message}", style="red", markup=False, soft_wrap=True
            )
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Plain,
    help="Make trained neural networks smaller without retraining them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the ``pysolve`` command."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pysolve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say on the way what reports have as notes.")
    ] = False,
) -> None:
    """Options in front of a command."""
    if verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("pysolve").setLevel(logging.INFO)


def command(*names: str, **defaults: object) -> Callable[[Run], Run]:
    """Make a function a command with these options of the table, in this order; ``defaults`` override its."""

    def made(run: Run) -> Run:
        # These run code of the user's.
        run = blaming(run) if "network" in names else run
        run.__signature__ = Signature(parameters(run.__name__, names, defaults))  # type: ignore[attr-defined]
        return app.command()(run)

    return made


@command(
    *_INPUTS,
    *("target", "dry_run", "select", "widths", "round_to", "head_dims", "refit"),
    *_OUTPUTS,
    "pretrained",
    data=None,
    out="compressed",
)
def compress(**given: Value) -> None:
    """Make a network smaller, without labels and without training; write it with a report."""
    _write("compress", given)


@command(*_INPUTS, "method", "amount", "target", "pattern", "scope", *_REFITTED, data=None, out="pruned")
def prune(**given: Value) -> None:
    """Prune single weights or channels by any method, without training; write the network with a report."""
    _write("prune", given)


@command(
    *_INPUTS,
    "target",
    "rank",
    "energy",
    "prune",
    "method",
    "structure",
    "unseen",
    *_REFITTED,
    data=None,
    out="factored",
)
def low_rank(**given: Value) -> None:
    """Factor layers into two smaller ones, without training; write the network with a report."""
    if given["rank"] is None and given["energy"] is None:
        given["target"] = given["target"] or ["params=0.25"]
    _write("low_rank", given)


@command(
    *_INPUTS, "scheme", "bits", "target", "group", "method", "layout", *_OUTPUTS, data=None, out="quantized"
)
def quantize(**given: Value) -> None:
    """Store the weights of a network in few bits; write it with a report."""
    _write("quantize", given)


@command(*_INPUTS, "bytes", "target", "zeros", "bits", "layout", *_OUTPUTS, data=None, out="deep")
def deep_compress(**given: Value) -> None:
    """Make a network's file as small as asked: fewer channels, zeros, few values, coded; write it."""
    if (size := given.pop("bytes")) is not None:
        given["target"] = [f"bytes={size}", *(given["target"] or ())]
    _write("deep_compress", given)


def _write(verb: str, given: dict[str, Value]) -> None:
    from pysolve.cli.commands import write_compressed

    write_compressed(verb, given)


@command(*_INPUTS, *_SWEPT, data=None, out="swept")
def sweep(**given: Value) -> None:
    """Try many sizes after one pass over the data, and show what each costs."""
    from pysolve.cli.commands import write_sweep

    write_sweep(given)


@command(
    *_INPUTS,
    *("ignore", "memory", "checkpoint", "out", "overwrite", "limit", "device", "quiet"),
    out="study.safetensors",
)
def study(**given: Value) -> None:
    """Gather once what any verb needs of a network, in one file, for --study."""
    from pysolve.cli.commands import write_study

    write_study(given)


@command("data", "out", "seed", "epochs", out="demo")
def demo(**given: Value) -> None:
    """Train a small network, compress it, and show what that costs and saves."""
    from pysolve.cli.demo import run

    run(**given)


@command(*_INPUTS, "ignore", "expect", "limit", "device", "as_json")
def inspect(**given: Value) -> None:
    """Show what of a network can shrink, and what cannot and why, before any work."""
    from pysolve.cli.commands import show_sites

    show_sites(**given)


@command("file", "as_json")
def report(**given: Value) -> None:
    """Show a saved report again."""
    from pysolve.cli.commands import show_report

    show_report(**given)


@command(*_INPUTS, "compressed", "batch", "device", "as_json")
def evaluate(**given: Value) -> None:
    """Show a network's accuracy on labelled data, its size, and how long it takes."""
    from pysolve.cli.commands import evaluate_network

    evaluate_network(**given)


@command("file", "lam", "relative", "method", "group_size", "out", "overwrite", "as_json")
def solve(**given: Value) -> None:
    """Solve a reconstruction problem given by its correlation matrices, to a certified gap."""
    from pysolve.cli.solving import solve_file

    solve_file(**given)
