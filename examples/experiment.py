"""Shared by all experiments: a command line, networks that are trained once, data, tables, axes."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import Signature, signature
from pathlib import Path
from tempfile import TemporaryDirectory

# Two BLAS threads on two busy cores wait for each other: solves then take up to ten times as long. Import
# this module first: NumPy's BLAS looks at the environment when it is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import pysolve as ps
from pysolve.cli import demo
from pysolve.cli.datasets import Dataset
from pysolve.cli.options import Option
from pysolve.compressed import Compressed
from pysolve.nn.evaluate import accuracy
from pysolve.tables import Table, as_markdown
from pysolve.training.fit import fit

DATA = Path(os.environ.get("PYSOLVE_DATA", "data"))
OPTIONS = {
    "data": Option(Path, "Folder with the images."),
    "out": Option(Path, "Folder for the weights and the pictures."),
    "seed": Option(int, "Of the initial weights and the shuffling.", 0),
    "threads": Option(int, "Of torch; more than one wait for each other on a busy machine.", least=1),
    "retrain": Option(bool, "Train even if there are weights.", False),
    "ternary": Option(float, "Seconds of training; 0: no ternary networks.", 300.0),
    "quick": Option(bool, "Few images and sizes, one epoch.", False),
}
# Options of every experiment; the others belong to those that take them.
COMMON = ("data", "out", "seed", "threads", "quick")
# Per cent misclassified that an axis names: of a part of it, and of all of it.
TICKS = (95, 90, 80, 70, 50, 30, 20, 10, 5, 4, 3, 2, 1.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5)
FEW_TICKS = (90, 50, 20, 10, 5, 2, 1, 0.5)

console = Console(highlight=False)


def script(
    run: Callable[..., None],
    read: Callable[[Path], Dataset],
    *,
    out: str,
    data: str = "mnist",
    few: int | None = None,
    threads: int = 1,
) -> typer.Typer:
    """Make an experiment a command with options, errors of one line, and the time it took.

    Parameters
    ----------
    run : callable
        Takes the images, and options by their names.
    read : callable
        From the folder of the data to the images.
    out, data : str
        Folders: below results/, and below the one of all data.
    few : int, optional
        Images of both splits with --quick; all by default.
    threads : int
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    defaults = {"data": DATA / data, "out": Path("results", out), "threads": threads}
    taken = signature(run).parameters

    def main(**given: object) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            with demo.threads(given["threads"]):
                dataset = read(given["data"])
                dataset = first_images(dataset, few) if given["quick"] and few else dataset
                given["out"].mkdir(parents=True, exist_ok=True)
                run(dataset, **{name: value for name, value in given.items() if name in taken})
        except (ps.PysolveError, OSError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error
        minutes = (time.perf_counter() - start) / 60, (time.process_time() - cpu) / 60
        typer.echo(f"{minutes[0]:.1f} minutes in all, {minutes[1]:.1f} of one processor.")

    options = {name: one for name, one in OPTIONS.items() if name in COMMON or name in taken}
    main.__signature__ = Signature(
        [one.parameter(name, defaults.get(name, one.default)) for name, one in options.items()]
    )
    app.command(help=run.__globals__["__doc__"])(main)
    return app


def kept(
    make: Callable[[], nn.Module],
    dataset: Dataset,
    path: Path,
    recipe: Mapping[str, object],
    seed: int = 0,
    *,
    train: Callable[..., object] | None = None,
    retrain: bool = False,
) -> nn.Module:
    """The network from ``path`` if this recipe made it from these data, else trained and written there.

    Parameters
    ----------
    make : callable
        A network with random weights, which ``seed`` decides.
    dataset : Dataset
    path : Path
    recipe : {argument: value}
        Of ``train``.
    seed : int
    train : callable
        Trains a network in place on a dataset; ``fitted`` by default.
    retrain : bool
        Train in any case.
    """
    text = json.dumps({"data": dataset.name, "images": len(dataset.x_train), "seed": seed, **recipe})
    model = seeded(make, seed)
    if not retrain and recipe_of(path) == text:
        model.load_state_dict(load_file(path))
        typer.echo(f"Loaded {path}")
        return model
    (train or fitted)(model, dataset, seed=seed, **recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(model.state_dict(), part, metadata={"recipe": text})
    os.replace(part, path)
    typer.echo(f"Trained {type(model).__name__} and wrote {path}")
    return model


def recipe_of(path: Path) -> str | None:
    """How the weights in a file were made; None when it is absent, damaged or from elsewhere."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("recipe")
    except (OSError, SafetensorError):
        return None


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A new network whose random weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def fitted(model: nn.Module, dataset: Dataset, **recipe: object) -> None:
    """Train in place with labels, by ``fit``."""
    fit(model, dataset.x_train, dataset.y_train, **recipe)


def adam(
    model: nn.Module, dataset: Dataset, *, epochs: int, batch_size: int, lr: float, seed: int = 0
) -> None:
    """Train in place with labels, by Adam at a constant rate."""
    x, y = torch.from_numpy(dataset.x_train), torch.from_numpy(dataset.y_train)
    optimizer, random = torch.optim.Adam(model.parameters(), lr=lr), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=random).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


class Shifted:
    """Labelled images in batches, always in another order, mirrored or not, and shifted by up to 4 pixels."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        self.x = pad(torch.from_numpy(dataset.x_train), (4, 4, 4, 4))
        self.y, self.batch_size = torch.from_numpy(dataset.y_train), batch_size
        self.random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.y) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y), generator=self.random)
        for rows in order[: len(self) * self.batch_size].split(self.batch_size):
            down, right, mirrored = torch.randint(9, (3, len(rows)), generator=self.random)
            size = self.x.shape[-1] - 8
            columns = torch.arange(size).expand(len(rows), -1)
            columns = torch.where(mirrored[:, None] % 2 == 0, columns, size - 1 - columns) + right[:, None]
            lines = torch.arange(size) + down[:, None]
            x = self.x[rows[:, None, None], :, lines[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
            # As gathered, the colours are innermost, which convolutions on CPUs are fastest with.
            yield x, self.y[rows]


def augmented(
    model: nn.Module, dataset: Dataset, *, epochs: int, batch_size: int, lr: float, seed: int = 0
) -> None:
    """Train in place with labels, on images that are mirrored and shifted, by momentum on one cycle."""
    model.to(memory_format=torch.channels_last)
    ps.finetune(
        model,
        Shifted(dataset, batch_size, seed),
        loss=partial(cross_entropy, label_smoothing=0.05),
        epochs=epochs,
        optimizer="sgd",
        lr=lr,
        weight_decay=5e-4,
    )
    model.to(memory_format=torch.contiguous_format)


def first_images(dataset: Dataset, n: int) -> Dataset:
    """The first images of both splits."""
    parts = {name: getattr(dataset, name)[:n] for name in ("x_train", "y_train", "x_test", "y_test")}
    return replace(dataset, **parts)


def unlabelled(dataset: Dataset, n: int | None = None, batch_size: int = 250) -> tuple[Tensor, ...]:
    """The first training images, in batches."""
    return torch.from_numpy(dataset.x_train[:n]).split(batch_size)


def labelled(dataset: Dataset, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """All training images with their labels, in batches."""
    parts = (torch.from_numpy(a).split(batch_size) for a in (dataset.x_train, dataset.y_train))
    return [*zip(*parts, strict=True)]


def loader(dataset: Dataset, batch_size: int = 256) -> DataLoader:
    """Labelled training images, shuffled, a whole batch looked up at once."""
    images = TensorDataset(torch.from_numpy(dataset.x_train), torch.from_numpy(dataset.y_train))
    return DataLoader(images, sampler=BatchSampler(RandomSampler(images), batch_size, False), batch_size=None)


def score(model: nn.Module, dataset: Dataset) -> float:
    """Accuracy in per cent of the test images."""
    return accuracy(model, dataset.x_test, dataset.y_test)


def file_bytes(what: nn.Module | Compressed, coding: str = "auto") -> int:
    """Bytes on disk, as torch or as pysolve writes it."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "network")
        if isinstance(what, Compressed):
            ps.save(what, path, coding=coding)
        else:
            torch.save(what.state_dict(), path)
        return path.stat().st_size


def measured(stored: nn.Module | Compressed, network: nn.Module, dataset: Dataset) -> tuple[str, str]:
    """Kilobytes of the file, and accuracy in per cent of the test images."""
    return f"{file_bytes(stored) / 1e3:,.1f}", f"{score(network, dataset):.2f}"


def show(part: Table | RenderableType) -> None:
    """Print a table in Markdown, one for terminals, or lines that are not to be folded."""
    if isinstance(part, Table):
        typer.echo("\n".join([f"**{part.title}**", "", *as_markdown(part), ""]))
    elif isinstance(part, str):
        typer.echo(part)
    else:
        console.print(part)


def terminal_table(
    title: str, columns: Sequence[str], caption: str | None = None, words: Sequence[str] = ("",)
) -> RichTable:
    """An empty table without a frame; columns but those of words are aligned to the right."""
    table = RichTable(title=title, caption=caption, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right")
    return table


def errors(score: float) -> float:
    """Per cent misclassified; 0 has no place on a logarithmic axis."""
    return max(100 - score, 0.01)


def error_axis(ax: Axes, limits: tuple[float, float] | None = None) -> None:
    """Accuracies upwards, logarithmic in per cent misclassified, between the fewest and the most errors."""
    ax.set(yscale="log", ylabel="test accuracy (%)")
    low, high = limits or ax.get_ylim()
    ticks = [tick for tick in (TICKS if limits is None else FEW_TICKS) if low <= tick <= high]
    ax.set_yticks(ticks, [f"{100 - tick:g}" for tick in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(high, low)


def dense_line(ax: Axes, score: float, label: str) -> None:
    """The original network's accuracy, dashed, on an axis of errors."""
    ax.axhline(errors(score), color="0.35", linewidth=1, linestyle=(0, (4, 3)), label=label)
