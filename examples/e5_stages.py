"""Deep compression of one network: the published stages, and ours without labels, by bytes and accuracy."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from e5_published import ANS, HUFFMAN, WAY, Entry, Published, as_published, packed_bytes
from experiment import dense_line, error_axis, errors, file_bytes, score, unlabelled
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.report import drawing
from pysolve.tables import Table

# Unlabelled images, and how many times smaller than the tensors files are to be.
COUNT = 2000
SMALLER = (40, 100, 200)
ZEROS, TARGET = "ours, nothing trained: as many zeros and bits", "ours, nothing trained: so many bytes"
CODERS = ((HUFFMAN, "huffman"), (ANS, "ans"))
HEAD = (
    "way",
    "stage",
    "published: times smaller",
    "ours",
    "bytes",
    "bits a weight",
    "published: accuracy",
    "ours",
    "seconds",
)


def all_stages(
    model: nn.Module,
    dataset: Dataset,
    published: Published,
    *,
    smaller: Sequence[float] = SMALLER,
    count: int = COUNT,
    epochs: int,
) -> list[Entry]:
    """The network as it is, and after every stage of every way."""
    found = [Entry("", "as trained", nbytes(model), score(model, dataset), 0.0)]
    found += as_published(model, dataset, published, epochs)
    images = unlabelled(dataset, count)
    found += by_zeros(model, dataset, images, published)
    for times in smaller:
        found += by_bytes(model, dataset, images, times)
    return found


def by_zeros(
    model: nn.Module, dataset: Dataset, images: Sequence[Tensor], published: Published
) -> Iterator[Entry]:
    """As many zeros and as many bits as published, in the metric of what layers read."""
    sizes = {name: model.get_submodule(name).weight.numel() for name in published.kept}
    kept = sum(share * sizes[name] for name, share in published.kept.items()) / sum(sizes.values())
    options = {"zeros": 1 - kept, "bits": published.bits, "progress": False}
    result = ps.deep_compress(model, images, evaluate=partial(score, dataset=dataset), **options)
    stages = {stage.name: stage for stage in result.report.stages}
    sparse, shared = stages["sparse"], stages["shared"]
    yield Entry(ZEROS, "pruned", sparse.bytes, sparse.score, sparse.seconds)
    # The stage's own bytes are those of codes without gaps, one for every zero.
    yield Entry(ZEROS, "shared", packed_bytes(result.model, published), shared.score, shared.seconds)
    for name, coding in CODERS:
        yield Entry(ZEROS, name, file_bytes(result, coding), stages["coded"].score, 0.0)


def by_bytes(model: nn.Module, dataset: Dataset, images: Sequence[Tensor], times: float) -> Iterator[Entry]:
    """Channels, zeros and bits under one number of bytes."""
    start = time.perf_counter()
    result = ps.deep_compress(model, images, target={"bytes": 1 / times}, progress=False)
    seconds = time.perf_counter() - start
    right = score(result.model, dataset)
    for (name, coding), taken in zip(CODERS, (0.0, seconds), strict=True):
        yield Entry(TARGET, f"1/{times:g}, {name}", file_bytes(result, coding), right, taken)


def stages_table(title: str, model: nn.Module, found: Sequence[Entry], published: Published) -> Table:
    """A row for every stage; published | ours."""
    whole, weights, rows = found[0].bytes, parameters(model), []
    for one in found:
        stated = published.rates.get(one.stage) if one.way == WAY else None
        scores = {"as trained": published.scores[0], HUFFMAN: published.scores[1]}
        known = scores.get(one.stage) if one.way in ("", WAY) else None
        rows.append(
            (
                one.way,
                one.stage,
                "" if stated is None else f"{stated:g}{' (weights)' * (one.stage == 'pruned')}",
                f"{whole / one.bytes:.1f}",
                f"{one.bytes:,}",
                f"{8 * one.bytes / weights:.2f}",
                "" if known is None else f"{known:.2f}",
                f"{one.accuracy:.2f}",
                f"{one.seconds:.1f}" if one.seconds else "",
            )
        )
    return Table(title, HEAD, tuple(rows), words=(0, 1))


def draw(networks: Mapping[str, tuple[Sequence[Entry], Published]], path: Path) -> None:
    """Accuracy against bytes, a panel for each network."""
    figure = Figure(figsize=(6.4 * len(networks), 4.6), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for ax, (title, (found, published)) in zip(panels, networks.items(), strict=True):
        draw_network(ax, found, published)
        ax.set_title(title)
    drawing.finish(panels[-1], path)


def draw_network(ax: Axes, found: Sequence[Entry], published: Published) -> None:
    """One curve for each way; files are those of the shorter code."""
    dense = found[0]
    dense_line(ax, dense.accuracy, f"dense, {dense.accuracy:.2f} %")
    for way, (color, marker) in zip((WAY, ZEROS, TARGET), drawing.styles(), strict=False):
        shown = [one for one in found if one.way == way and not one.stage.endswith(HUFFMAN)]
        wrong = [errors(one.accuracy) for one in shown]
        sizes = [one.bytes / 1e3 for one in shown]
        ax.plot(sizes, wrong, color=color, marker=marker, markersize=5, linewidth=1.8, label=way)
    size, wrong = dense.bytes / published.rates[HUFFMAN] / 1e3, errors(published.scores[1])
    ax.plot(size, wrong, "*", color="0.2", markersize=11, linestyle="none", label="published")
    ax.set(xlabel="kB")
    drawing.log_axis(ax.xaxis)
    error_axis(ax)
    ax.minorticks_off()
    drawing.finish(ax)
