"""Commands that store a network in few bits. Heavy imports stay inside them, as in ``cli``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pysolve.cli import options
from pysolve.cli.app import app

Bits = Annotated[
    int | None,
    typer.Option(min=1, max=8, help="Of a code; with a target, the most.", show_default="by scheme"),
]
Retrain = Annotated[
    str,
    typer.Option(help="Train the shared values to give the original's outputs: 60s, 2m, or 5e for epochs."),
]
Layout = Annotated[str, typer.Option(help="How layers of shared values run: dense, auto, csr or shared.")]


@app.command()
def quantize(
    network: options.Network,
    data: options.Data,
    weights: options.Weights = None,
    scheme: Annotated[str, typer.Option(help="int8-dynamic, int8, codebook or ternary.")] = "int8-dynamic",
    bits: Bits = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Of a codebook, instead: bytes = share or number, what the file may take."),
    ] = None,
    group: Annotated[
        int | None, typer.Option(min=1, help="Of int8: so many inputs share a scale.", show_default="all")
    ] = None,
    method: Annotated[
        str, typer.Option(help="Errors make up for each other, feedback, or do not, nearest.")
    ] = "feedback",
    retrain: Retrain = "0",
    layout: Layout = "dense",
    test: options.Test = None,
    out: options.Out = Path("quantized"),
    ignore: options.Ignore = None,
    state_dict: options.StateDict = False,
    samples: options.Limit = 2000,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Store the weights of a network in few bits; write it with a report."""
    from pysolve.cli.commands import Job, duration_of, shrink_to, targets_of

    shrink_to(
        Job(network, data, weights, test, out, device, samples, json, quiet),
        "quantize",
        "quantized",
        state_dict=state_dict,
        scheme=scheme,
        bits=bits,
        target=targets_of(target) if target else None,
        group=group,
        method=method,
        retrain=duration_of(retrain),
        layout=layout,
        ignore=ignore or (),
        seed=seed,
    )


@app.command()
def deep_compress(
    network: options.Network,
    data: options.Data,
    weights: options.Weights = None,
    target_bytes: Annotated[
        float | None, typer.Option("--bytes", help="What the file may take, a number or a share.")
    ] = None,
    target_params: Annotated[
        float | None,
        typer.Option("--params", help="Parameters after channels went, a number or a share; 1: all stay."),
    ] = None,
    zeros: Annotated[float | None, typer.Option(help="Share of the weights pruned before the rest.")] = None,
    bits: Bits = None,
    retrain: Retrain = "0",
    layout: Layout = "dense",
    test: options.Test = None,
    out: options.Out = Path("deep"),
    ignore: options.Ignore = None,
    state_dict: options.StateDict = False,
    samples: options.Limit = 2000,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a network's file as small as asked: fewer channels, zeros, few values, coded; write it."""
    from pysolve.cli.commands import Job, duration_of, number_of, shrink_to
    from pysolve.errors import PysolveError

    if all(value is None for value in (target_bytes, target_params, zeros, bits)):
        raise PysolveError("give --bytes, --params, --zeros or --bits, to say how small the file is to be.")
    shrink_to(
        Job(network, data, weights, test, out, device, samples, json, quiet),
        "deep_compress",
        "compressed deeply",
        state_dict=state_dict,
        target_bytes=None if target_bytes is None else number_of(target_bytes),
        target_params=None if target_params is None else number_of(target_params),
        zeros=zeros,
        bits=bits,
        retrain=duration_of(retrain),
        layout=layout,
        ignore=ignore or (),
        seed=seed,
    )
