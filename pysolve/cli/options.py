"""Every argument and option of the command line, in one table: its type, help and default."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any

import typer

# A parsed argument: str, int, float, bool, Path, list of str, or None.
Value = Any


@dataclass(frozen=True)
class Option:
    """One option of a command, of values of a ``kind`` between ``least`` and ``most``.

    The default is ``...`` where it must be given, None where the called function has one of its own, and
    ``shown`` in other words. It is typed by its ``flag``, or two, if not by its name; an argument has none.
    """

    kind: object
    help: str
    default: object = None
    flag: str = ""
    shown: str | None = None
    least: int | None = None
    most: int | None = None
    argument: bool = False

    def parameter(self, name: str, default: object) -> Parameter:
        """The option as a parameter of a function that typer makes a command of."""
        if self.argument:
            info = typer.Argument(default, metavar=name.upper(), help=self.help)
        else:
            word = name.replace("_", "-")
            # What is on can be turned off.
            flag = self.flag or (f"--{word}/--no-{word}" if default is True else f"--{word}")
            info = typer.Option(
                default,
                *flag.split(","),
                help=self.help,
                show_default=self.shown or default is not False,
                min=self.least,
                max=self.most,
            )
        return Parameter(name, Parameter.KEYWORD_ONLY, default=info, annotation=self.kind)


# By name, as the called functions have it; "command.name" where one command has an option of its own.
OPTIONS = {
    "network": Option(str, "package.module:factory, a function that makes the network.", ..., argument=True),
    "data": Option(str, ".npy, .npz (x, y), a folder of IDX files, or package.module:function.", ...),
    "weights": Option(Path, "Its state dict: .safetensors, or .pt read as tensors."),
    "test": Option(str, "Labelled data, as --data, to give the accuracy on; or a function of the network."),
    "target": Option(
        list[str], "params, macs, bytes or ms = share or number; may be repeated.", shown="params=0.25"
    ),
    "low_rank.target": Option(list[str], "params, macs or bytes = share or number; may be repeated."),
    "prune.target": Option(
        list[str], "Instead: params, of channels also macs, bytes or ms = share or number; may be repeated."
    ),
    "quantize.target": Option(list[str], "Of a codebook, instead: bytes = share or number, of the file."),
    "sweep.target": Option(
        list[str],
        "As in compress; may be repeated, one result for each.",
        ["params=0.5", "params=0.25", "params=0.1"],
    ),
    "deep_compress.target": Option(
        list[str], "bytes or params = share or number; params=1 keeps all channels; may be repeated."
    ),
    "bytes": Option(str, "Short for --target bytes=…: size of the file, a number or a share."),
    "amount": Option(float, "Share of the weights or channels that is removed."),
    "pattern": Option(str, "Instead, of weights: 2:4 and the like."),
    "rank": Option(int, "Instead: of every layer where it pays.", least=1),
    "energy": Option(float, "Instead: share of the outputs' energy kept."),
    "zeros": Option(float, "Share of the weights pruned before the rest."),
    "bits": Option(int, "Of a code; with a target, the most.", shown="by scheme", least=1, most=8),
    "group": Option(int, "Of int8: so many inputs share a scale.", shown="all", least=1),
    "dry_run": Option(bool, "Write nothing: print what targets would cost.", False),
    "head_dims": Option(bool, "Whether heads may get smaller, in the place of going.", True),
    "expect": Option(bool, "Measure, too, what shares of the MACs would cost: takes all of the data.", False),
    "select": Option(str, "How channels are chosen: elimination, sensitivity, lasso, ….", "elimination"),
    "scheme": Option(str, "int8-dynamic, int8, codebook or ternary.", "int8-dynamic"),
    "scope": Option(str, "The share of each layer, local, or of all, global.", "local"),
    "structure": Option(str, "Of convolutions: auto, channel or spatial.", "auto"),
    "unseen": Option(str, "Rows of embeddings that never occur: exact or approximate.", "exact"),
    "prune.method": Option(
        str,
        "Of weights: obs, magnitude, wanda, std, random; of channels: elimination, lasso, ln, activation, "
        "nisp.",
        "obs",
    ),
    "low_rank.method": Option(str, "By a layer's outputs, activation, or weights, svd.", "activation"),
    "quantize.method": Option(str, "Errors compensate each other, feedback, or do not, nearest.", "feedback"),
    "solve.method": Option(str, "newton, alternate_minimization, fista or …", "newton"),
    "prune": Option(bool, "Remove channels as well.", False),
    "refit": Option(
        str, "Of the weights kept: sequential, independent, bias or none.", shown="what suits the method"
    ),
    "layout": Option(
        str,
        "How layers run: auto, dense, sparse, factored, shared or masked.",
        shown="what suits the method",
    ),
    "distill": Option(str, "Match the original's outputs afterwards: 60s, 2m, or 5e for epochs.", "0"),
    "widths": Option(str, "per_layer, or uniform: one for all repeated layers.", "per_layer"),
    "round_to": Option(int, "Widths in multiples of so many channels.", 1, least=1),
    "ignore": Option(list[str], "Layer to leave alone, or re:pattern; may be repeated."),
    "study": Option(Path, "A file that pysolve study wrote, instead of --data."),
    "memory": Option(str, "What it may take beyond the network: bytes, or 4GiB and the like."),
    "checkpoint": Option(Path, "Folder for sums, from which a killed command goes on."),
    "out": Option(Path, "Folder to write to.", ...),
    "study.out": Option(Path, "File to write to.", ...),
    "solve.out": Option(Path, ".npz file for M, keep and lam."),
    "overwrite": Option(bool, "Replace what an earlier command wrote to --out.", False),
    "state_dict": Option(bool, "Write the tensors alone, too, in their new shapes.", False),
    "pretrained": Option(
        bool, "Write a folder that transformers opens, too: pretrained/.", False, "--save-pretrained"
    ),
    "latency": Option(bool, "Time both networks and their layers.", True),
    "limit": Option(int, "Most inputs of an array to use.", 2000, "--samples", least=1),
    "device": Option(str, "Where to compute: cpu, cuda, cuda:1, ….", "cpu"),
    "seed": Option(int, "Of all random choices.", 0),
    "as_json": Option(bool, "Print JSON instead of tables.", False, "--json"),
    "quiet": Option(bool, "Print nothing but errors, and what --json asks for.", False, "--quiet,-q"),
    "compressed": Option(Path, "A file or folder that compress wrote: the network is made as small first."),
    "batch": Option(int, "Samples that are timed together.", 64, least=1),
    "file": Option(Path, "An .npz file with r_xx (d x d) and r_yx (h x d).", ..., argument=True),
    "report.file": Option(Path, "report.json, sweep.json, or the folder of one.", ..., argument=True),
    "lam": Option(float, "The penalty of the group lasso.", 0.1),
    "relative": Option(bool, "lam as a share of the one that keeps nothing.", True, "--relative/--absolute"),
    "group_size": Option(int, "Columns that are kept or removed together.", 1, least=1),
    "demo.data": Option(
        Path, "Folder with the four MNIST files: train LeNet-5 on them instead of the digits."
    ),
    "epochs": Option(int, "How long to train.", shown="12 for digits, 8 for MNIST", least=1),
}


def parameters(command: str, names: tuple[str, ...], defaults: dict[str, object]) -> list[Parameter]:
    """Parameters of a command from the table, with defaults of its own."""
    options = {name: OPTIONS.get(f"{command}.{name}") or OPTIONS[name] for name in names}
    return [one.parameter(name, defaults.get(name, one.default)) for name, one in options.items()]
