"""A character decoder against its peers at equal MACs: magnitudes, torch-pruning, a plain rotation, pysolve.

python bench/language.py DIR [--share .7 .5] [--windows 192]

DIR as in ``examples/compress_llm.py``, whose windows and loss these are. Nothing is trained.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pysolve as ps
from pysolve.nn.evaluate import macs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import compress_llm as llm

Batches = list[dict[str, Tensor]]


def by_magnitude(model: nn.Module, batches: Batches, share: float) -> nn.Module:
    """Neurons and heads whose weights, of all layers that make them, have the least norm; no refit."""
    layers = dict(model.named_modules())
    sites = [
        site
        for site in ps.find_sites(model, batches[0])
        if site.pinned is None and llm.kind(site) != "stream"
    ]
    scores: dict[str | ps.Site, object] = {}
    for site in sites:
        weights = [(name, layers[name].weight.detach().double()) for name in site.writers]
        scores[site] = sum(
            weight[torch.from_numpy(site.rows_of(name, len(weight)))].square().sum((1, 2)).numpy()
            for name, weight in weights
        )
    small = ps.compress(
        model,
        batches,
        target={"macs": share},
        sites=sites,
        select=scores,
        refit="none",
        progress=False,
        latency=False,
    )
    return small.model


def by_torch_pruning(
    model: nn.Module, batches: Batches, share: float, *, everywhere: bool = True
) -> nn.Module:
    """Group norms of neurons; finding the groups of heads and of the stream took over 8 minutes."""
    import torch_pruning as tp

    def at(ratio: float) -> nn.Module:
        small = copy.deepcopy(model)
        roots = [one for layer in small.model.layers for one in (layer.mlp.gate_proj, layer.mlp.up_proj)]
        others = [one for one in small.modules() if isinstance(one, nn.Linear) and one not in roots]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            pruner = tp.pruner.MetaPruner(
                small,
                batches[0]["input_ids"][:1],
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                global_pruning=everywhere,
                pruning_ratio=ratio,
                max_pruning_ratio=0.99,
                ignored_layers=[*others, small.model.embed_tokens],
                root_module_types=[nn.Linear],
                output_transform=lambda output: output.logits,
            )
        pruner.step()
        return small

    return _at_share(model, batches, share, at)


def by_plain_rotation(model: nn.Module, batches: Batches, share: float) -> nn.Module:
    """The stream in the principal axes of its normed values' variance, the last of them cut off; no refit."""
    whole = model.config.hidden_size
    seen = torch.zeros(whole, whole, dtype=torch.float64)

    def gather(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        values = (output / norm.weight).detach().flatten(0, -2).double()
        seen.add_(values.T @ values)

    norms = [
        norm
        for layer in model.model.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    hooks = [norm.register_forward_hook(gather) for norm in (*norms, model.model.norm)]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    axes = torch.linalg.eigh(seen)[1].flip(1)

    def at(ratio: float) -> nn.Module:
        width = round((1 - ratio) * whole / 8) * 8
        return _rotated(model, axes[:, :width])

    return _at_share(model, batches, share, at)


@torch.no_grad()
def _rotated(model: nn.Module, axes: Tensor) -> nn.Module:
    """The network with its stream in some axes: a smaller one of the same class."""
    whole, width = axes.shape
    config = copy.deepcopy(model.config)
    config.hidden_size, config.tie_word_embeddings = width, False
    config.rms_norm_eps *= whole / width
    small = type(model)(config).eval()
    old, new = model.state_dict(), small.state_dict()
    for name in new:
        weight, (before, _, _) = old[name].double(), name.rpartition(".weight")
        if before.endswith("norm"):
            new[name][:] = (whole / width) ** 0.5
            continue
        if before.endswith(("o_proj", "down_proj")):
            new[name][:] = axes.T @ weight
            continue
        parent = before.rpartition(".")[0].rpartition(".")[0]
        norm = {"lm_head": "model.norm", "model.embed_tokens": None}.get(
            before, f"{parent}.{'post_attention_layernorm' if '.mlp.' in before else 'input_layernorm'}"
        )
        gain = 1.0 if norm is None else old[f"{norm}.weight"].double()
        new[name][:] = (weight * gain) @ axes
    return small


def by_pysolve(model: nn.Module, batches: Batches, share: float) -> nn.Module:
    return ps.compress(model, batches, target={"macs": share}, progress=False, latency=False).model


def _at_share(
    model: nn.Module, batches: Batches, share: float, at: Callable[[float], nn.Module]
) -> nn.Module:
    """What a ratio makes that has at most a share of the MACs, by bisection."""
    one = {"input_ids": batches[0]["input_ids"][:1]}
    most, low, high, best = share * macs(model, one), 0.0, 1.0, None
    for _ in range(12):
        middle = (low + high) / 2
        try:
            found = at(middle)
            fits = macs(found, one) <= most
        except (RuntimeError, ValueError):
            fits, found = False, None
            high = middle
            continue
        if fits:
            best, high = found, middle
        else:
            low = middle
    if best is None:
        raise RuntimeError("out of reach")
    return best


PEERS = {
    "magnitudes of neurons and heads, no refit": by_magnitude,
    "torch-pruning, group norms of neurons": by_torch_pruning,
    "torch-pruning, the same in each layer": partial(by_torch_pruning, everywhere=False),
    "the stream in axes of variance, no refit": by_plain_rotation,
    "pysolve.compress": by_pysolve,
}


def main(
    data: Path,
    share: Annotated[list[float] | None, typer.Option(help="Of the MACs.")] = None,
    count: Annotated[int, typer.Option("--windows", help="Of text to calibrate on.")] = 192,
    only: Annotated[str, typer.Option(help="Peers whose name has this in it.")] = "",
) -> None:
    """Loss above the dense one of each peer."""
    model, (train, test) = llm.decoder(data / "shakespeare_llama"), llm.texts(data)
    batches, dense = llm.windows(train, count), llm.loss(model, test)
    one = {"input_ids": batches[0]["input_ids"][:1]}
    table = Table("MACs", "", "above", "MACs left", "parameters", "CPU s", title=f"loss {dense:.4f}")
    for target in share or [0.7, 0.5]:
        for name, peer in PEERS.items():
            if only not in name:
                continue
            start = time.process_time()
            small = peer(model, batches, target)
            seconds = time.process_time() - start
            count_of = [sum(one.numel() for one in net.parameters()) for net in (small, model)]
            table.add_row(
                f"{target:.0%}",
                name,
                f"{llm.loss(small, test) - dense:+.4f}",
                f"{macs(small, one) / macs(model, one):.1%}",
                f"{count_of[0] / count_of[1]:.1%}",
                f"{seconds:.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
