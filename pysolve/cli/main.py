"""The command line. Heavy imports stay inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

from pysolve.cli import compress as _  # noqa: F401  (registers its commands)
from pysolve.cli.app import app, command
from pysolve.cli.options import Value

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the ``pysolve`` command."""
    app()


@command("data", "out", "seed", "epochs", out="demo")
def demo(**given: Value) -> None:
    """Train a small network, compress it, and show what that costs and saves."""
    from pysolve.cli.demo import run

    run(**given)


@command("network", "data", "weights", "ignore", "device", "as_json")
def inspect(**given: Value) -> None:
    """Show what of a network can shrink, and what cannot and why, before any work."""
    from pysolve.cli.commands import show_sites

    show_sites(**given)


@command("network", "data", "weights", "compressed", "batch", "device", "as_json")
def evaluate(**given: Value) -> None:
    """Show a network's accuracy on labelled data, its size, and how long it takes."""
    from pysolve.cli.commands import evaluate_network

    evaluate_network(**given)


@command("file", "lam", "relative", "method", "group_size", "out", "as_json")
def solve(**given: Value) -> None:
    """Solve a reconstruction problem given by its correlation matrices, to a certified gap."""
    from pysolve.cli.commands import solve_file

    solve_file(**given)
