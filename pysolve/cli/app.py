"""The command line itself: its errors, its version, and how functions become commands."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from pysolve import __version__
from pysolve.cli.options import parameters
from pysolve.errors import PysolveError

Run = Callable[..., None]


class _Plain(TyperGroup):
    """One red line and exit status 2 for what the user can mend, 130 for Ctrl-C; bugs keep their trace."""

    def invoke(self, ctx: Any) -> object:
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


def command(*names: str, **defaults: object) -> Callable[[Run], Run]:
    """Make a function a command that takes these options of the table.

    Parameters
    ----------
    names : str
        In the order of ``--help``.
    defaults : value
        Instead of the table's.
    """

    def made(run: Run) -> Run:
        run.__signature__ = Signature(parameters(run.__name__, names, defaults))  # type: ignore[attr-defined]
        return app.command()(run)

    return made


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
) -> None:
    """Options in front of a command."""
