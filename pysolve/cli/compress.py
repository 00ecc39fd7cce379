"""Commands that make a network smaller and write it. Heavy imports stay inside them, as in ``cli``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pysolve.cli import options
from pysolve.cli.app import app


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
    from pysolve.cli.commands import Job, duration_of, shrink_to, targets_of

    shrink_to(
        Job(network, data, weights, test, out, device, samples, json, quiet),
        "compress",
        "compressed",
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
    from pysolve.cli.commands import Job, shrink_to, targets_of

    shrink_to(
        Job(network, data, weights, test, out, device, samples, json, quiet),
        "prune",
        "pruned",
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
def low_rank(
    network: options.Network,
    data: options.Data,
    weights: options.Weights = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="params, macs or bytes = share or number; repeatable.  [default: params=0.25]"),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Instead: of every layer where it pays.")] = None,
    energy: Annotated[float | None, typer.Option(help="Instead: share of the outputs' energy kept.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Channels may go as well.")] = False,
    method: Annotated[
        str, typer.Option(help="By a layer's outputs, activation, or weights, svd.")
    ] = "activation",
    structure: Annotated[str, typer.Option(help="Of convolutions: auto, channel or spatial.")] = "auto",
    layout: Annotated[str, typer.Option(help="auto: no layer becomes slower; factored.")] = "auto",
    test: options.Test = None,
    out: options.Out = Path("factored"),
    ignore: options.Ignore = None,
    state_dict: options.StateDict = False,
    samples: options.Limit = 2000,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Factor layers into two smaller ones, without training; write the network with a report."""
    from pysolve.cli.commands import Job, shrink_to, targets_of

    if rank is None and energy is None:
        target = target or ["params=0.25"]
    shrink_to(
        Job(network, data, weights, test, out, device, samples, json, quiet),
        "low_rank",
        "factored",
        state_dict=state_dict,
        target=targets_of(target) if target else None,
        rank=rank,
        energy=energy,
        prune=prune,
        method=method,
        structure=structure,
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
    from pysolve.cli.commands import Job, sweep_to, targets_of

    sweep_to(
        Job(network, data, weights, test, out, device, samples, json, quiet),
        targets=[targets_of([one]) for one in target or ("params=0.5", "params=0.25", "params=0.1")],
        select=select,
        ignore=ignore or (),
        seed=seed,
    )
