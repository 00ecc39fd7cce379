"""A language model at several sizes: what each kind of unit gives, and all of them together.

python examples/compress_llm.py DIR [--share .7 --share .5] [--windows 192] [--distill SECONDS]

DIR is a folder with ``shakespeare_llama/`` (a character decoder) and ``text/tinyshakespeare.txt``. The
loss is that of the last tenth of the text, in nats a character, which nothing here is fitted to; beside it
that of another text, Python's language reference, of which the model has never seen anything. The last row
of each size is calibrated on text that the model writes itself.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from pydoc_data.topics import topics
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
UNITS = ("neurons", "heads", "stream", "all", "own text")
OTHER = 512


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


def other_text(data: Path) -> Tensor:
    """Windows of Python's language reference, of the characters that the model knows."""
    names = json.loads((data / "shakespeare_llama" / "vocab.json").read_text())
    number = {character: i for i, character in enumerate(names)}
    text = [number[one] for one in "".join(topics.values()) if one in number]
    return torch.tensor(text[: OTHER * LENGTH]).view(-1, LENGTH)


@torch.no_grad()
def own_text(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    """Windows that the model writes, each from a character at random, in batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.randint(0, model.config.vocab_size, (count, 1))
        new = {"do_sample": True, "use_cache": True, "max_new_tokens": LENGTH - 1, "pad_token_id": 0}
        ids = model.generate(start, attention_mask=torch.ones_like(start), eos_token_id=None, **new)
    return [{"input_ids": one} for one in ids.split(BATCH)]


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
    other, batches, own = other_text(data), windows(train, count), own_text(model, count)
    dense = loss(model, test), loss(model, other)
    sites = [site for site in ps.find_sites(model, batches[0]) if site.pinned is None]
    words = "units", "above", "other text", "divergence", "params", "bytes", "ms", "seconds"
    for target in share or [0.7, 0.5]:
        title = f"{target:.0%} of the MACs; loss {dense[0]:.4f} before, of another text {dense[1]:.4f}"
        table = Table(*words, title=title)
        for units in UNITS:
            start = time.perf_counter()
            try:
                small = ps.compress(
                    model,
                    own if units == "own text" else batches,
                    target={"macs": target},
                    sites=[site for site in sites if units in (kind(site), "all", "own text")],
                    distill=distill if units == "all" else 0,
                )
            except ps.PysolveError:
                table.add_row(units, "out of reach")
                continue
            seconds, report = time.perf_counter() - start, small.report
            slow, fast = report.latencies[-1]
            table.add_row(
                units,
                f"{loss(small.model, test) - dense[0]:+.4f}",
                f"{loss(small.model, other) - dense[1]:+.4f}",
                f"{report.divergence:.4f}",
                f"{report.share('params'):.0%}",
                f"{report.share('bytes'):.0%}",
                f"{fast.median / slow.median:.0%}",
                f"{seconds:.0f}",
            )
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
