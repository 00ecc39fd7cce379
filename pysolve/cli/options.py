"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Network = Annotated[
    str, typer.Argument(metavar="NETWORK", help="package.module:factory, a function that makes the network.")
]
Weights = Annotated[Path | None, typer.Option(help="Its state dict: .safetensors, or .pt read as tensors.")]
Data = Annotated[
    str,
    typer.Option(help=".npy, .npz (x, y), a folder of IDX files, or package.module:function."),
]
Test = Annotated[str | None, typer.Option(help="Labelled data, as --data, to give the accuracy on.")]
Out = Annotated[Path, typer.Option(help="Folder to write to.")]
Ignore = Annotated[
    list[str] | None, typer.Option(help="Layer to leave alone, or re:pattern; may be repeated.")
]
Select = Annotated[str, typer.Option(help="How channels are chosen.")]
Limit = Annotated[int, typer.Option("--samples", min=1, help="Most inputs of an array to use.")]
Rounded = Annotated[int, typer.Option(min=1, help="Widths in multiples of so many channels.")]
StateDict = Annotated[
    bool, typer.Option("--state-dict", help="Write the tensors alone, too, in their new shapes.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ….")]
Seed = Annotated[int, typer.Option(help="Of all random choices.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option(help="Print nothing but errors.")]
Method = Annotated[
    str,
    typer.Option(
        help="Of weights: obs, magnitude, wanda, std, random; of channels: elimination, lasso, ln, "
        "activation, nisp."
    ),
]
Amount = Annotated[float | None, typer.Option(help="Share of them that goes.")]
Left = Annotated[list[str] | None, typer.Option("--target", help="Instead: what may be left.")]
Pattern = Annotated[str | None, typer.Option(help="Instead, of weights: 2:4 and the like.")]
Scope = Annotated[str, typer.Option(help="The share of each layer, local, or of all, global.")]
Refit = Annotated[
    str | None, typer.Option(help="none, bias or sequential.", show_default="what suits the method")
]
Layout = Annotated[str, typer.Option(help="How pruned layers run: auto, dense or csr.")]
