"""Torch's own attention and recurrent layers, trained here in a minute or two: what compress makes of them.

python bench/torch_layers.py attention
python bench/torch_layers.py recurrent --data DIR

attention: a ViT of nn.TransformerEncoder on scikit-learn's digits, test accuracy at shares of its MACs, with
attention taken apart and left whole. recurrent: character models on DIR/text/tinyshakespeare.txt, test loss
at half of the MACs, with their gates refitted, as they are, and with 30 s of matching; and with ranks at
shares of the parameters, beside the nearest weights of the same ranks. One thread.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pysolve as ps
from pysolve.methods import rebuild
from pysolve.nn.cost.profile import latencies

app = typer.Typer(add_completion=False, help=__doc__)
DATA = Path(os.environ.get("PYSOLVE_DATA", "data"))
TRAINED, EPOCHS, STEPS, LENGTH = 1200, 60, 1500, 64
QUIET: dict[str, Any] = {"latency": False, "progress": False}


class ViT(nn.Module):
    """Of patches of 2 × 2 pixels, width 64, 4 layers and heads."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True, activation="gelu")
        self.patch, self.places = nn.Conv2d(1, 64, 2, 2), nn.Parameter(torch.randn(16, 64) * 0.02)
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(64), enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x[:, None]).flatten(2).mT + self.places
        made: Tensor = self.head(self.encoder(tokens).mean(1))
        return made


class Characters(nn.Module):
    """128 hidden units that predict the next of some characters."""

    def __init__(self, kind: type[nn.RNNBase], count: int, layers: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(count, 64), nn.Linear(128, count)
        self.units = kind(64, 128, layers, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.head(self.units(self.table(ids))[0])
        return made


@app.command()
def attention() -> None:
    """A ViT of torch's encoder layers on digits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(one) for one in load_digits(return_X_y=True))
    order = torch.randperm(len(images))
    x, y = (images.float() / 16).view(-1, 8, 8)[order], labels[order]
    model, steps = ViT(), EPOCHS * -(-TRAINED // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for some in torch.randperm(TRAINED).split(64):
            _step(cross_entropy(model(x[some]), y[some]), optimizer)
            schedule.step()

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((network(x[TRAINED:]).argmax(-1) == y[TRAINED:]).double().mean())

    typer.echo(f"{len(y) - TRAINED} test images, the original {accuracy(model.eval()):.2f} %")
    batches = [*x[:TRAINED].split(100)]
    ways: dict[str, dict[str, Any]] = {
        "all": {},
        "whole heads": {"head_dims": False},
        "attention whole": {"ignore": [nn.MultiheadAttention]},
    }
    for share in (0.5, 0.25, 0.15):
        for name, how in ways.items():
            try:
                small = ps.compress(model, batches, target={"macs": share}, **how, **QUIET)
                found = f"{accuracy(small.model):.2f} %, divergence {small.report.divergence:.2g}"
            except ps.PysolveError as error:
                found = str(error).partition(", what")[0]
            typer.echo(f"{share:.0%} of the MACs, {name:15} {found}")


@app.command()
def recurrent(data: Annotated[Path, typer.Option()] = DATA) -> None:
    """Character models of recurrent layers."""
    torch.set_num_threads(1)
    text = (data / "text" / "tinyshakespeare.txt").read_text()
    known = sorted(set(text))
    ids = torch.tensor([known.index(one) for one in text])
    train, test = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :][: 400 * LENGTH + 1]

    def texts(count: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(train) - LENGTH - 1, (count,), generator=generator)
        return torch.stack([train[i : i + LENGTH + 1] for i in starts])

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            return float(cross_entropy(network(test[:-1].view(-1, LENGTH)).flatten(0, 1), test[1:]))

    for name, kind, layers in (("LSTM", nn.LSTM, 1), ("LSTM of two layers", nn.LSTM, 2), ("GRU", nn.GRU, 1)):
        torch.manual_seed(0)
        model, random = Characters(kind, len(known), layers), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(STEPS):
            some = texts(32, random)
            _step(cross_entropy(model(some[:, :-1]).flatten(0, 1), some[:, 1:].flatten()), optimizer)
        before = loss(model.eval())
        batches, target = [texts(32, random)[:, :-1] for _ in range(16)], {"macs": 0.5}
        fitted = ps.compress(model, batches, target=target, **QUIET)
        with patch.object(rebuild, "_gates_refitted", lambda *given: {}):
            plain = ps.compress(model, batches, target=target, **QUIET)
        matched = ps.compress(model, batches, target=target, distill=30, **QUIET)
        lost = [loss(one.model) - before for one in (fitted, plain, matched)]
        told = "refitted +{:.3f}, as they are +{:.3f}, matched +{:.3f}".format(*lost)
        typer.echo(f"{name}: loss {before:.3f}, {told}")
        for share in (0.6, 0.4):
            low = ps.low_rank(model, batches, target={"params": share}, **QUIET)
            ranks = {one.removesuffix(".weight"): form.rank for one, form in low.plan.forms.items()}
            nearest = ps.low_rank(model, rank=ranks, **QUIET)
            both = ps.low_rank(model, batches, target={"params": share}, prune=True, **QUIET)
            lost = [loss(one.model) - before for one in (low, nearest, both)]
            told = "ranks +{:.4f}, nearest weights +{:.4f}, with channels +{:.4f}".format(*lost)
            typer.echo(f"{name} at {share:.0%} of the parameters: {told}; {ranks}")
            shapes = {"a character": (1, 1), "a text": (1, LENGTH), "64 texts": (64, LENGTH)}
            times = {
                one: latencies((model, low.model), test[: n * t].view(n, t)) for one, (n, t) in shapes.items()
            }
            slower = [f"{one} {two.median / old.median:.2f}" for one, (old, two) in times.items()]
            macs = low.report.after["macs"] / low.report.before["macs"]
            typer.echo(f"    MACs {macs:.0%}; times as long: {', '.join(slower)}")


def _step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    app()
