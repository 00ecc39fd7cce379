"""Commands that make a network smaller and write it. Heavy imports stay inside them."""

from __future__ import annotations

from pysolve.cli.app import command
from pysolve.cli.options import Value

_INPUTS = ("network", "data", "weights")
_OUTPUTS = (
    *("distill", "ignore", "test", "out"),
    *("state_dict", "limit", "device", "seed", "as_json", "quiet"),
)
_REFITTED = ("refit", "layout", *_OUTPUTS)


@command(*_INPUTS, "target", "select", "round_to", "refit", *_OUTPUTS, out="compressed")
def compress(**given: Value) -> None:
    """Make a network smaller, without labels and without training; write it with a report."""
    from pysolve.cli.commands import write_compressed

    write_compressed("compress", given)


@command(*_INPUTS, "method", "amount", "target", "pattern", "scope", *_REFITTED, out="pruned")
def prune(**given: Value) -> None:
    """Prune single weights or channels by any method, without training; write the network with a report."""
    from pysolve.cli.commands import write_compressed

    write_compressed("prune", given)


@command(*_INPUTS, "target", "rank", "energy", "prune", "method", "structure", *_REFITTED, out="factored")
def low_rank(**given: Value) -> None:
    """Factor layers into two smaller ones, without training; write the network with a report."""
    from pysolve.cli.commands import write_compressed

    if given["rank"] is None and given["energy"] is None:
        given["target"] = given["target"] or ["params=0.25"]
    write_compressed("low_rank", given)


@command(*_INPUTS, "scheme", "bits", "target", "group", "method", "layout", *_OUTPUTS, out="quantized")
def quantize(**given: Value) -> None:
    """Store the weights of a network in few bits; write it with a report."""
    from pysolve.cli.commands import write_compressed

    write_compressed("quantize", given)


@command(*_INPUTS, "bytes", "target", "zeros", "bits", "layout", *_OUTPUTS, out="deep")
def deep_compress(**given: Value) -> None:
    """Make a network's file as small as asked: fewer channels, zeros, few values, coded; write it."""
    from pysolve.cli.commands import write_compressed

    if (size := given.pop("bytes")) is not None:
        given["target"] = [f"bytes={size}", *(given["target"] or ())]
    write_compressed("deep_compress", given)


_SWEPT = ("test", "target", "out", "select", "ignore", "limit", "device", "seed", "as_json", "quiet")


@command(*_INPUTS, *_SWEPT, out="compressed")
def sweep(**given: Value) -> None:
    """Try many sizes after one pass over the data, and show what each costs."""
    from pysolve.cli.commands import write_sweep

    write_sweep(given)
