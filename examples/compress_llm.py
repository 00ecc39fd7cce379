"""A language model at several sizes: what each kind of unit gives, and all of them together.

python examples/compress_llm.py DIR [--share .7 .5] [--windows 192] [--distill SECONDS]

DIR is a folder with ``shakespeare_llama/`` (a character decoder) and ``text/tinyshakespeare.txt``. The
loss is that of the last tenth of the text, in nats a character, which nothing here is fitted to.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import pysolve as ps

LENGTH, BATCH = 128, 8
UNITS = ("neurons", "heads", "stream", "all")


def decoder(folder: Path) -> nn.Module:
    """The trained decoder, without a cache, which would only be kept."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder)
    config.use_cache = False
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    return model.eval()


def texts(data: Path) -> tuple[Tensor, Tensor]:
    """Characters as numbers: nine tenths to calibrate on, and the last tenth in windows."""
    text = (data / "text" / "tinyshakespeare.txt").read_text()
    names = json.loads((data / "shakespeare_llama" / "vocab.json").read_text())
    number = {character: i for i, character in enumerate(names)}
    ids = torch.tensor([number[character] for character in text])
    start = int(0.9 * len(ids))
    rest = ids[start:]
    return ids[:start], rest[: len(rest) // LENGTH * LENGTH].view(-1, LENGTH)


def windows(ids: Tensor, count: int) -> list[dict[str, Tensor]]:
    """Windows of the text at random places, in batches."""
    random = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(ids) - LENGTH, (count,), generator=random)
    return [{"input_ids": one} for one in torch.stack([ids[i : i + LENGTH] for i in starts]).split(BATCH)]


@torch.no_grad()
def loss(model: nn.Module, test: Tensor) -> float:
    """Mean over all characters but the first of each window."""
    total = 0.0
    for ids in test.split(64):
        logits = model(input_ids=ids).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / (len(test) * (LENGTH - 1))


def kind(site: ps.Site) -> str:
    """Which kind of unit a site's channels are."""
    if site.norms:
        return "stream"
    return "heads" if "self_attn" in site.readers[0] else "neurons"


def main(
    data: Path,
    share: Annotated[list[float] | None, typer.Option(help="Of the MACs.")] = None,
    count: Annotated[int, typer.Option("--windows", help="Of text to calibrate on.")] = 192,
    distill: Annotated[float, typer.Option(help="Seconds of label-free matching of the last row.")] = 0,
) -> None:
    """Compress by each kind of unit and by all of them."""
    missing = [one for one in ("shakespeare_llama", "text/tinyshakespeare.txt") if not (data / one).exists()]
    if missing:
        raise typer.BadParameter(f"{data} has no {missing[0]}")
    model, (train, test) = decoder(data / "shakespeare_llama"), texts(data)
    batches, dense = windows(train, count), loss(model, test)
    sites = [site for site in ps.find_sites(model, batches[0]) if site.pinned is None]
    table = Table(
        "MACs", "units", "loss", "above", "divergence", "parameters", "seconds", title=f"loss {dense:.4f}"
    )
    for target in share or [0.7, 0.5]:
        for units in UNITS:
            start = time.perf_counter()
            try:
                small = ps.compress(
                    model,
                    batches,
                    target={"macs": target},
                    sites=[site for site in sites if units in (kind(site), "all")],
                    distill=distill if units == "all" else 0,
                    latency=False,
                )
            except ps.PysolveError:
                table.add_row(f"{target:.0%}", units, "out of reach")
                continue
            found, report = loss(small.model, test), small.report
            table.add_row(
                f"{target:.0%}",
                units,
                f"{found:.4f}",
                f"{found - dense:+.4f}",
                f"{report.divergence:.4f}",
                f"{report.after['params'] / report.before['params']:.0%}",
                f"{time.perf_counter() - start:.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
