"""The command line. Heavy imports stay inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pysolve.cli import compress as cli_compress
from pysolve.cli import options
from pysolve.cli import quantize as cli_quantize
from pysolve.cli.app import app

__all__ = ["app", "cli_compress", "cli_quantize", "main"]


def main() -> None:
    """Entry point of the ``pysolve`` command."""
    app()


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
    from pysolve.cli.demo import run

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
    from pysolve.cli.commands import show_sites

    show_sites(network, data, weights, ignore or (), device, json)


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
    from pysolve.cli.commands import evaluate_network

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
    from pysolve.cli.commands import solve_file

    solve_file(file, lam, relative, method, group_size, out, json)
