"""The demonstration: train a small network, make it smaller in four ways, show accuracy against size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import save as tensors
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset, Images
from pysolve.cli.outputs import folder, write
from pysolve.correlations import Array
from pysolve.nn.evaluate import macs, parameters
from pysolve.nn.running import find_layer
from pysolve.nn.threads import threads
from pysolve.nn.zoo import DigitsNet, LeNet5
from pysolve.report import drawing
from pysolve.report.page import page

Network = DigitsNet | LeNet5
# Results of one way to shrink, from large to small.
Results = Mapping[str, list[ps.Compressed]]


class Common(TypedDict):
    """What all calls are given."""

    evaluate: Callable[[nn.Module], float]
    progress: bool
    latency: bool


WAYS = {
    "magnitudes": "the largest weights stay, no refit",
    "compress": "whole channels go, all layers are refitted",
    "low_rank": "channels and ranks in one budget",
    "deep_compress": "then few bits a weight, entropy-coded",
}
MAGNITUDES = "magnitudes"
NETWORKS = tuple(name for name in WAYS if name != MAGNITUDES)
FILES = ("dense.safetensors", *(f"{name}.safetensors" for name in NETWORKS), "report.html", "demo.png")


@dataclass(frozen=True)
class Setting:
    """Network and training, shares of the parameters to go down to, of the bytes of one of them, threads."""

    network: Callable[[], Network]
    epochs: int
    batch_size: int
    lr: float
    shares: tuple[float, ...]
    coded: float
    threads: int


# More threads bring nothing to batches of 64 tiny images; on a busy machine two took 20 times as long as one.
# Solves of these small layers, by SciPy's BLAS, took four times as long.
DIGITS = Setting(DigitsNet, 12, 64, 5e-3, shares=(0.1, 0.04, 0.015), coded=0.15, threads=1)
MNIST = Setting(LeNet5, 8, 256, 3e-3, shares=(0.1, 0.04, 0.02), coded=0.15, threads=torch.get_num_threads())


def run(data: Path | None, out: Path, *, seed: int = 0, epochs: int | None = None) -> None:
    """Run all steps from data to picture; ``data`` is a folder of MNIST files, None means embedded digits."""
    console = Console(highlight=False)
    dataset, setting = (ps.digits(seed), DIGITS) if data is None else (ps.mnist(data), MNIST)
    with folder(out, FILES, overwrite=True), threads(setting.threads):
        model = train(setting, dataset, seed, epochs or setting.epochs, console)
        start = time.perf_counter()
        found = shrunk(setting, model, dataset)
        console.out(
            f"Made it smaller {sum(map(len, found.values()))} times: {time.perf_counter() - start:.1f} s."
        )
        write(out / FILES[0], tensors(model.state_dict()))
        size = (out / FILES[0]).stat().st_size
        console.print(table(model, dataset, found, size))
        for name in NETWORKS:
            ps.save(found[name][-1], out / f"{name}.safetensors")
        write(out / "report.html", page(found["low_rank"][-1].report, f"{type(model).__name__}, smaller"))
        drawing.save_figure(picture(model, dataset, found, size), out / "demo.png", dpi=150)
    console.out(farewell(model, out))


def batches(images: Images) -> tuple[torch.Tensor, ...]:
    """Images in parts of 256, as views."""
    return torch.from_numpy(images).split(256)  # type: ignore[no-untyped-call, no-any-return]


def train(setting: Setting, dataset: Dataset, seed: int, epochs: int, console: Console) -> Network:
    """Step 1: an ordinary network, trained the ordinary way."""
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = setting.network()
    x, y = dataset.x_train, dataset.y_train
    ps.fit(model, x, y, epochs=epochs, batch_size=setting.batch_size, lr=setting.lr, seed=seed)
    console.out(
        f"Trained {type(model).__name__} on {dataset.name}: {len(x):,} images, {epochs} epochs, "
        f"{time.perf_counter() - start:.1f} s."
    )
    return model


def shrunk(setting: Setting, model: Network, dataset: Dataset) -> Results:
    """Step 2: smaller and smaller in each way, by images without their labels; nothing is trained."""
    images = batches(dataset.x_train[:2000])
    study = ps.study(model, images, progress=False)
    targets = [{"params": share} for share in setting.shares]

    def score(network: nn.Module) -> float:
        return ps.accuracy(network, dataset.x_test, dataset.y_test)

    largest: dict[str | ps.Site, Array] = {site: strengths(model, site) for site in study.free}
    common = Common(evaluate=score, progress=False, latency=False)
    few = [ps.compress(model, study, target=one, **common) for one in targets]
    return {
        MAGNITUDES: [
            ps.compress(model, study, target=one, select=largest, refit="none", **common) for one in targets
        ],
        "compress": few,
        "low_rank": [
            ps.low_rank(model, study, target=one, prune=True, layout="factored", **common)
            for one in targets[1:]
        ],
        "deep_compress": [
            ps.deep_compress(one, images, target={"bytes": setting.coded}, **common) for one in few[1:]
        ],
    }


def strengths(model: Network, site: ps.Site) -> Array:
    """Norms of the weights that make each channel."""
    weight = find_layer(model, site.writers[0]).weight
    assert isinstance(weight, torch.Tensor)
    norms: Array = weight.detach().flatten(1).norm(dim=1).double().numpy()
    return norms


def table(model: Network, dataset: Dataset, found: Results, size: int) -> Table:
    """The original, of ``size`` bytes, and the smallest result of each way."""
    x = torch.from_numpy(dataset.x_test[:1])
    result = Table()
    result.add_column()
    for column in ("accuracy", "parameters", "MACs", "bytes on disk", "left"):
        result.add_column(column, justify="right")
    before = found["compress"][0].report.score_before or 0.0
    rows: list[tuple[str, nn.Module, float, int]] = [("original", model, before, size)]
    for name, results in found.items():
        last = results[-1]
        rows.append((name, last.model, last.report.score_after or 0.0, ps.file_bytes(last)))
    for name, network, score, count in rows:
        numbers = (f"{parameters(network):,}", f"{macs(network, x):,}", f"{count:,}")
        result.add_row(name, f"{score:.2f} %", *numbers, f"{100 * count / size:.1f} %")
    return result


def picture(model: Network, dataset: Dataset, found: Results, size: int) -> Figure:
    """Accuracy against bytes on disk, of each way at each size."""
    ax = drawing.new_axes(7.5, 4.4)
    dense = found["compress"][0].report.score_before or 0.0
    ax.axhline(dense, color=drawing.INK, linewidth=1, linestyle=(0, (4, 3)))
    ax.plot(size, dense, "*", color=drawing.INK, markersize=13, label=f"original, {dense:.2f} %")
    for (name, results), color, marker in zip(
        found.items(), reversed(drawing.COLORS), drawing.MARKERS, strict=False
    ):
        sizes = [ps.file_bytes(one) for one in results]
        scores = [one.report.score_after or 0.0 for one in results]
        (line,) = ax.plot(sizes, scores, label=f"{name}: {WAYS[name]}", linewidth=1.8)
        line.set(color=color, marker=marker, markersize=5.5)
    drawing.log_axis(ax.xaxis)
    ax.set(xlabel="bytes on disk", ylabel="test accuracy (%)", ylim=(0, 104))
    ax.set_title(f"{type(model).__name__} on {dataset.name}, nothing retrained")
    figure = drawing.finish(ax, grid="y", loc="lower right").figure
    assert isinstance(figure, Figure)
    return figure


def farewell(model: Network, out: Path) -> str:
    """What was written, and what to do next."""
    kind = type(model).__name__
    return "\n".join(
        (
            f"Wrote {', '.join(FILES)} to {out}/",
            f"Look at {out / 'demo.png'} and open {out / 'report.html'}.",
            f"Load one: ps.load('{out / 'compress.safetensors'}', pysolve.nn.zoo.{kind}())",
            "Your own: pysolve compress package.module:make --data inputs.npy --target macs=0.5 --out small",
        )
    )
