"""The command line. Heavy imports stay inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pysolve import __version__
from pysolve.errors import PysolveError

app = typer.Typer(
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
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


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
    with _failing_plainly():
        from pysolve.demo import run

        run(data, out, seed=seed, epochs=epochs)


@contextmanager
def _failing_plainly() -> Iterator[None]:
    """One red line and exit status 2 for what the user can mend, 130 for Ctrl-C; bugs keep their trace."""
    try:
        yield
    except (PysolveError, ImportError, OSError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True, highlight=False).print(
            f"Error: {message}", style="red", markup=False, soft_wrap=True
        )
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
