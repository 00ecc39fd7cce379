"""How fast files of networks with few values are written and read."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from coded_peers import coded
from torch import nn

import pysolve as ps
from pysolve.compressed import Compressed
from pysolve.nn.evaluate import parameters
from pysolve.nn.zoo import Mlp
from pysolve.tables import Table

# Of 25 million weights, at one of 16 values each.
LARGE = (2500,) * 5
REPEATS = 5


def speeds(small: nn.Module) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Files of 16 values a layer, by both coders: LeNet-5, and a network of random weights."""
    rows = []
    for network, model in (("LeNet-5", small), ("25 million random weights", large())):
        result = coded(model)
        for coding in ("ans", "huffman"):
            rows.append({"network": network, "coding": coding, **timed(result, model, coding)})
            yield "Writing and reading files", rows


def large() -> Mlp:
    """Weights from a normal distribution, rounded to 16 values."""
    torch.manual_seed(0)
    model = Mlp(LARGE)
    with torch.no_grad():
        for layer in model.children():
            layer.weight.copy_(torch.randn_like(layer.weight).mul_(2).round_().clamp_(-8, 7).div_(50))
    return model


def timed(result: Compressed, model: nn.Module, coding: str) -> dict[str, float]:
    """Bytes, and megabytes of float32 weights a second: medians of several calls."""
    megabytes, seconds = 4 * parameters(model) / 1e6, {"save": [], "load": []}
    with TemporaryDirectory() as folder:
        path = Path(folder, "network.safetensors")
        for _ in range(REPEATS):
            for name, call in (
                ("save", partial(ps.save, result, path, coding=coding)),
                ("load", partial(ps.load, path, model)),
            ):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        row = {"megabytes": megabytes, "bytes": path.stat().st_size}
    return row | {f"{name}_megabytes_a_second": megabytes / median(times) for name, times in seconds.items()}


def speed_table(rows: Sequence[dict[str, object]]) -> Table:
    head = ("network", "coding", "MB of float32", "file: kB", "save: MB/s", "load: MB/s")
    lines = []
    for row in rows:
        name, coding, megabytes, size, *rates = row.values()
        lines.append((name, coding, f"{megabytes:,.1f}", f"{size / 1e3:,.1f}", *(f"{r:,.0f}" for r in rates)))
    return Table("Files of 16 values a layer, in megabytes of float32", head, tuple(lines), words=(0, 1))
