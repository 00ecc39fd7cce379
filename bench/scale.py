"""Gathering beside the machine's matrix products, and verbs in passes of the network over the same batches.

python bench/scale.py gather [--threads 2] [--out DIR]
python bench/scale.py passes [--threads 2] [--samples 1024] [--only bert_compress,…] [--out DIR]
python bench/scale.py decoders [--threads 2] [--only 125m,350m,slice] [--out DIR]
python bench/scale.py growth [--threads 2] [--out DIR]
python bench/scale.py processes [--rows 262144] [--out DIR]

gather: useful operations, two for each different number of Σ x xᵀ and each row, as a share of the rate of
float32 products of the same size in the same run. passes: seconds of a verb over those of one pass of the
network over the same batches without gradients, the mean of one before and one after; random weights.
decoders: seconds, and memory beyond what the process had, of decoders and a slice of wide blocks to 70 % of
their MACs within a bound. growth: seconds against tokens, depth and width, each doubled twice, and exponents.
processes: seconds of gathering the same rows by one process and by two with gloo, one thread each.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from common import OutOption, ThreadsOption, write
from decoder import SHAPES, Shape, decoder, tokens
from torch import Tensor, nn

import pysolve as ps
from pysolve.nn.gathering.gather import gather_reached
from pysolve.nn.gathering.memory import in_bytes, resident
from pysolve.nn.zoo import ResNet
from pysolve.report.report import Report

app = typer.Typer(add_completion=False, help=__doc__)
# Inputs of a layer, and rows that it is given.
LINEAR = {576: 32768, 1536: 32768, 4608: 24576}
# Input channels of a 3 × 3 convolution with as many columns, its images, and their height and width.
CONVOLUTIONS = {576: (64, 128, 16), 1152: (128, 128, 14), 4608: (512, 384, 8)}
BATCH, WORDS, LENGTH = 32, 30522, 32


def least(run: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rate_of(d: int) -> float:
    """Operations a second of float32 products of d × d results."""
    rows = torch.randn(2048, d)
    return 2 * 2048 * d * d / least(lambda: rows.T @ rows)


def gathered(layer: nn.Module, x: Tensor, rows: int, d: int) -> float:
    """Useful operations a second of gathering, the layer's own call aside."""
    model = nn.Sequential(layer).eval()

    def gather() -> None:
        gather_reached(model, x.split(max(1, len(x) // 8)), ["0"], progress=False, full=False)

    def call() -> None:
        with torch.no_grad():
            for part in x.split(max(1, len(x) // 8)):
                model(part)

    return rows * d * d / (least(gather, 2) - least(call, 2))


@app.command()
def gather(threads: ThreadsOption = 2, out: OutOption = Path("scale")) -> None:
    """Gathering beside float32 products of its size."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = []
    for d, rows in LINEAR.items():
        found.append(("Linear", d, rows, gathered(nn.Linear(d, 64), torch.randn(rows, d), rows, d)))
    for d, (channels, images, size) in CONVOLUTIONS.items():
        x = torch.randn(images, channels, size, size).relu()
        rows = images * size * size
        found.append(("3 × 3", d, rows, gathered(nn.Conv2d(channels, 64, 3, padding=1), x, rows, d)))
    for kind, d, rows, rate in found:
        typer.echo(
            f"{kind:8}{d:6} inputs, {rows:6} rows: {rate / 1e9:6.1f} GFLOP/s, {rate / rate_of(d):4.0%}"
        )
    write(
        out / "gather.json",
        "gathering",
        threads,
        [dict(zip(("kind", "d", "rows", "rate"), one, strict=True)) for one in found],
    )


def bert(layers: int = 6, width: int = 384, inner: int = 1536, heads: int = 12) -> nn.Module:
    """A BERT of MiniLM's shape for classification."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = BertConfig(vocab_size=WORDS, intermediate_size=inner, num_labels=4, **sizes)
    model: nn.Module = BertForSequenceClassification(config)
    return model.eval()


def sentences(count: int) -> list[dict[str, Tensor]]:
    """Batches of random words."""
    words = torch.randint(0, WORDS, (count, LENGTH))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in words.split(BATCH)]


def images(count: int) -> list[Tensor]:
    return list(torch.randn(count, 3, 32, 32).split(BATCH))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], Callable[..., Any]]] = {
    "bert_compress": (bert, sentences, lambda m, b: ps.compress(m, b, target={"macs": 0.6}, progress=False)),
    "bert_low_rank": (
        bert,
        sentences,
        lambda m, b: ps.low_rank(m, b, target={"macs": 0.6}, prune=True, progress=False),
    ),
    "resnet20_compress": (
        lambda: ResNet(20).eval(),
        images,
        lambda m, b: ps.compress(m, b, target={"macs": 0.5}, progress=False),
    ),
}


@app.command()
def passes(
    threads: ThreadsOption = 2,
    samples: Annotated[int, typer.Option(help="To calibrate on.")] = 1024,
    only: Annotated[str, typer.Option(help="Names of cases, with commas.")] = "",
    out: OutOption = Path("scale"),
) -> None:
    """Verbs in passes of the network over the same batches."""
    torch.set_num_threads(threads)
    rows = []
    for name in only.split(",") if only else CASES:
        make, data, verb = CASES[name]
        torch.manual_seed(0)
        model, batches = make(), data(samples)
        # What torch loads at its first export would count for the first call.
        ps.inspect(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(2, 2))
        one_pass(model, batches)
        before, start = one_pass(model, batches), time.perf_counter()
        report: Report = verb(model, batches).report
        seconds, after = time.perf_counter() - start, one_pass(model, batches)
        own = (before + after) / 2
        stages = {stage: round(spent, 2) for stage, spent in report.seconds.items()}
        rows.append(
            {"case": name, "pass": own, "seconds": seconds, "passes": seconds / own, "stages": stages}
        )
        typer.echo(f"{name}: {seconds:.1f} s, {seconds / own:.1f} passes of {own:.2f} s; {stages}")
        write(out / "passes.json", "passes", threads, rows)


class Wide(nn.Module):
    """A residual block of a perceptron."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def wide() -> nn.Module:
    """Four blocks of 1,152 → 4,608 → 1,152."""
    torch.manual_seed(0)
    return nn.Sequential(*(Wide(1152, 4608) for _ in range(4)), nn.Linear(1152, 100)).eval()


# Network, batches, and the bound on memory.
BOUNDED: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]], str]] = {
    "slice": (wide, lambda: list(torch.randn(1536, 1152).split(128)), "1GiB"),
    "125m": (lambda: decoder(SHAPES["125m"]), lambda: tokens(SHAPES["125m"], 64, 512), "8GiB"),
    "350m": (lambda: decoder(SHAPES["350m"]), lambda: tokens(SHAPES["350m"], 64, 512), "10GiB"),
}


@app.command()
def decoders(
    threads: ThreadsOption = 2,
    only: Annotated[str, typer.Option(help="Names of cases, with commas.")] = "",
    out: OutOption = Path("scale"),
) -> None:
    """Large networks to 70 % of their MACs within a bound on memory, each in a process of its own."""
    rows: list[dict[str, object]] = []
    for name in only.split(",") if only else BOUNDED:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            rows.append(pool.submit(bounded, name, threads).result())
        typer.echo(str(rows[-1]))
        write(out / "decoders.json", "decoders", threads, rows)


def bounded(name: str, threads: int) -> dict[str, object]:
    """One case: seconds, and the most memory beyond what the process had before."""
    torch.set_num_threads(threads)
    make, data, memory = BOUNDED[name]
    model, batches = make(), data()
    one_pass(model, batches[:1])
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    options = {"latency": False, "progress": False}
    report = ps.compress(model, batches, target={"macs": 0.7}, memory=memory, **options).report  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {
        "case": name,
        "params": sum(one.numel() for one in model.parameters()),
        "memory": memory,
        "taken": in_bytes(peak - before),
        "seconds": round(seconds, 1),
        "stages": {stage: round(spent, 1) for stage, spent in report.seconds.items()},
        "macs": report.after["macs"] / report.before["macs"],
        "notes": report.notes,
    }


@app.command()
def processes(rows: Annotated[int, typer.Option()] = 262144, out: OutOption = Path("scale")) -> None:
    """Gathering by one process, and by two that share the batches."""
    found = {size: min(spawned(size, rows) for _ in range(2)) for size in (1, 2)}
    for size, seconds in found.items():
        typer.echo(
            f"{size} process{'es' * (size > 1):2} {seconds:6.1f} s, {found[1] / seconds:.2f} times as fast"
        )
    write(out / "processes.json", "processes", 1, [{"rows": rows, "seconds": found}])


def spawned(size: int, rows: int) -> float:
    """Seconds of the slowest of so many processes."""
    pool = ProcessPoolExecutor(size, mp_context=get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, pool:
        meeting = f"file://{folder}/group"
        every = [pool.submit(gather_share, rank, size, rows, meeting) for rank in range(size)]
        return max(one.result() for one in every)


def gather_share(rank: int, size: int, rows: int, meeting: str) -> float:
    """Seconds of gathering one process's share of the batches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    model = nn.Sequential(nn.Linear(512, 1536), nn.ReLU(), nn.Linear(1536, 512)).eval()
    torch.manual_seed(1 + rank)
    batches = [torch.randn(2048, 512) for _ in range(rows // 2048 // size)]
    dist.barrier()
    found = ps.study(model, batches, process_group=dist.group.WORLD, progress=False)
    dist.destroy_process_group()
    return found.seconds["gather"]


@app.command()
def growth(threads: ThreadsOption = 2, out: OutOption = Path("scale")) -> None:
    """Seconds of compress against tokens, width and depth."""
    torch.set_num_threads(threads)
    small = Shape(3, 192, 768, 4, words=500)
    ways: dict[str, list[tuple[Shape, int]]] = {
        "tokens": [(small, n) for n in (64, 128, 256)],
        "depth": [(replace(small, layers=n), 64) for n in (3, 6, 12)],
        "width": [(replace(small, width=n, inner=4 * n), 64) for n in (192, 384, 768)],
    }
    rows = []
    for way, cases in ways.items():
        seconds = []
        for shape, sequences in cases:
            model, batches = decoder(shape), tokens(shape, sequences, 128)
            options = {"latency": False, "progress": False}
            start = time.perf_counter()
            ps.compress(model, batches, target={"macs": 0.7}, **options)  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - start)
        exponent = math.log2(seconds[2] / seconds[0]) / 2
        rows.append({"way": way, "seconds": seconds, "exponent": exponent})
        typer.echo(f"{way}: {', '.join(f'{one:.1f}' for one in seconds)} s, exponent {exponent:.2f}")
        write(out / "growth.json", "growth", threads, rows)


def one_pass(model: nn.Module, batches: list[Any]) -> float:
    """Seconds of the network alone over the batches."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    app()
