"""The command line. Heavy imports stay inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from pysolve import __version__, options
from pysolve.errors import PysolveError


class _Plain(TyperGroup):
    """One red line and exit status 2 for what the user can mend, 130 for Ctrl-C; bugs keep their trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (PysolveError, ImportError, OSError, ValueError, TypeError, RuntimeError) as error:
            # Typer's own ways to end a command are RuntimeErrors.
            if ctx.params["debug"] or isinstance(error, (typer.Exit, typer.Abort)):
                raise
            message = " ".join(str(error).split())
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
    add_completion=False,
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
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """What comes before a command."""


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the four MNIST files: train LeNet-5 on them instead of the digits."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write the weights and the picture to.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the split, the initial weights and the shuffling.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="How long to train.", show_default="20 for digits, 8 for MNIST")
    ] = None,
) -> None:
    """Train a small network, compress it, and show what that costs and saves."""
    from pysolve.demo import run

    run(data, out, seed=seed, epochs=epochs)


@app.command()
def inspect(
    network: options.Network,
    data: options.Data,
    weights: options.Weights = None,
    ignore: options.Ignore = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Show what of a network can shrink, and what cannot and why, before any work."""
    from pysolve.commands import show_sites

    show_sites(network, data, weights, ignore or (), device, json)


@app.command()
def compress(
    network: options.Network,
    data: options.Data,
    weights: options.Weights = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="params, macs or bytes = share or number; repeatable.  [default: params=0.25]"),
    ] = None,
    test: options.Test = None,
    out: options.Out = Path("compressed"),
    select: options.Select = "elimination",
    ignore: options.Ignore = None,
    distill: Annotated[
        str, typer.Option(help="Match the original's outputs afterwards: 60s, 2m, or 5e for epochs.")
    ] = "0",
    round_to: options.Rounded = 1,
    state_dict: options.StateDict = False,
    samples: options.Limit = 2000,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a network smaller, without labels and without training; write it with a report."""
    from pysolve.commands import Job, compress_to, duration_of, targets_of

    compress_to(
        Job(network, data, weights, test, out, device, samples, json, quiet),
        state_dict=state_dict,
        target=targets_of(target or ["params=0.25"]),
        select=select,
        ignore=ignore or (),
        distill=duration_of(distill),
        round_to=round_to,
        seed=seed,
    )


@app.command()
def prune(
    network: options.Network,
    data: options.Data,
    weights: options.Weights = None,
    method: options.Method = "obs",
    amount: options.Amount = None,
    target: options.Left = None,
    pattern: options.Pattern = None,
    scope: options.Scope = "local",
    refit: options.Refit = None,
    layout: options.Layout = "auto",
    test: options.Test = None,
    out: options.Out = Path("pruned"),
    ignore: options.Ignore = None,
    state_dict: options.StateDict = False,
    samples: options.Limit = 2000,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune single weights or channels by any method, without training; write the network with a report."""
    from pysolve.commands import Job, prune_to, targets_of

    prune_to(
        Job(network, data, weights, test, out, device, samples, json, quiet),
        state_dict=state_dict,
        method=method,
        amount=amount,
        target=targets_of(target) if target else None,
        pattern=pattern,
        scope=scope,
        refit=refit,
        layout=layout,
        ignore=ignore or (),
        seed=seed,
    )


@app.command()
def sweep(
    network: options.Network,
    data: options.Data,
    test: Annotated[str, typer.Option(help="Labelled data, as --data, to give accuracies on.")],
    weights: options.Weights = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="As in compress, one result for each.  [default: params=0.5, 0.25 and 0.1]"),
    ] = None,
    out: options.Out = Path("compressed"),
    select: options.Select = "elimination",
    ignore: options.Ignore = None,
    samples: options.Limit = 2000,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Try many sizes after one pass over the data, and show what each costs."""
    from pysolve.commands import Job, sweep_to, targets_of

    sweep_to(
        Job(network, data, weights, test, out, device, samples, json, quiet),
        targets=[targets_of([one]) for one in target or ("params=0.5", "params=0.25", "params=0.1")],
        select=select,
        ignore=ignore or (),
        seed=seed,
    )


@app.command()
def evaluate(
    network: options.Network,
    data: options.Data,
    weights: options.Weights = None,
    compressed: Annotated[
        Path | None, typer.Option(help="What compress wrote: the network is made as small first.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples that are timed together.")] = 64,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Show a network's accuracy on labelled data, its size, and how long it takes."""
    from pysolve.commands import evaluate_network

    evaluate_network(network, data, weights, compressed, batch, device, json)


@app.command()
def solve(
    file: Annotated[Path, typer.Argument(help="An .npz file with r_xx (d x d) and r_yx (h x d).")],
    lam: Annotated[float, typer.Option(help="The penalty of the group lasso.")] = 0.1,
    relative: Annotated[
        bool, typer.Option("--relative/--absolute", help="lam as a share of the one that keeps nothing.")
    ] = True,
    method: Annotated[str, typer.Option(help="newton, alternate_minimization, fista or …")] = "newton",
    group_size: Annotated[int, typer.Option(min=1, help="Columns that go together.")] = 1,
    out: Annotated[Path | None, typer.Option(help=".npz file for M, keep and lam.")] = None,
    json: options.Json = False,
) -> None:
    """Solve a reconstruction problem given by its correlation matrices, to a certified gap."""
    from pysolve.commands import solve_file

    solve_file(file, lam, relative, method, group_size, out, json)
