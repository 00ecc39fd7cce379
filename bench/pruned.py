"""Ways to prune a trained network: every method of pysolve's, and the peers'."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pruners import contenders
from subjects import Subject, layers_of
from torch import nn
from torch.nn.utils import prune as peer

import pysolve as ps
from pysolve.compressed import Compressed
from pysolve.nn.evaluate import parameters
from pysolve.nn.graph.sites import find_sites

# From a trained network and a share, of the weights removed or of the parameters left, to another one.
Run = Callable[[Subject, float], nn.Module | Compressed]


@dataclass(frozen=True)
class Way:
    """One method as it is called: what it is named in tables, and how it runs."""

    name: str
    run: Run


def of_weights() -> list[Way]:
    """Single weights: the share removed."""
    found = []
    for method, scope in (
        *((method, scope) for method in ("magnitude", "std") for scope in ("local", "global")),
        ("random", "local"),
        ("wanda", "local"),
        ("wanda", "global"),
    ):
        for refit in ("none", "sequential"):
            name = f"{method}, {scope}{', refitted' * (refit != 'none')}"
            found.append(Way(name, partial(zeroed, method=method, scope=scope, refit=refit)))
    found += [
        Way(f"obs, {scope}", partial(zeroed, method="obs", scope=scope)) for scope in ("local", "global")
    ]
    peers = {"l1_unstructured, per layer": by_layer, "global_unstructured, L1": over_all, "random": at_random}
    return found + [Way(f"torch {name}", run) for name, run in peers.items()]


def of_patterns() -> list[Way]:
    """2:4, which no peer here offers; the share is always one half."""
    found = []
    for method in ("magnitude", "wanda"):
        for refit in ("none", "sequential"):
            name = f"{method}, 2:4{', refitted' * (refit != 'none')}"
            found.append(Way(name, partial(patterned, method=method, refit=refit)))
    return [*found, Way("obs, 2:4", partial(patterned, method="obs"))]


def of_channels(subject: Subject) -> list[Way]:
    """Whole channels: the share of the parameters left."""
    found = []
    for method in ("ln", "activation", "nisp"):
        for refit in ("none", "sequential"):
            name = f"{method}{', refitted' * (refit != 'none')}"
            found.append(Way(name, partial(narrowed, method=method, refit=refit)))
    found += [Way(method, partial(narrowed, method=method)) for method in ("elimination", "lasso")]
    found.append(Way("torch ln_structured", masked_channels))
    for name, run in contenders(subject).items():
        found.append(Way(name, lambda subject, share, run=run: run(subject, {"params": share})))
    return found


def zeroed(subject: Subject, share: float, **how: str) -> Compressed:
    return ps.prune(subject.model, subject.calibration, amount=share, layout="dense", progress=False, **how)


def patterned(subject: Subject, share: float, **how: str) -> Compressed:
    return ps.prune(subject.model, subject.calibration, pattern="2:4", layout="dense", progress=False, **how)


def narrowed(subject: Subject, share: float, **how: str) -> Compressed:
    return ps.prune(subject.model, subject.calibration, target={"params": share}, progress=False, **how)


def by_layer(subject: Subject, share: float) -> nn.Module:
    model = copy.deepcopy(subject.model)
    for layer in layers_of(model):
        peer.l1_unstructured(layer, "weight", amount=share)
    return model


def over_all(subject: Subject, share: float) -> nn.Module:
    model = copy.deepcopy(subject.model)
    weights = [(layer, "weight") for layer in layers_of(model)]
    peer.global_unstructured(weights, pruning_method=peer.L1Unstructured, amount=share)
    return model


def at_random(subject: Subject, share: float) -> nn.Module:
    model = copy.deepcopy(subject.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers_of(model):
            peer.random_unstructured(layer, "weight", amount=share)
    return model


def masked_channels(subject: Subject, share: float) -> nn.Module:
    """Channels masked, of every layer but the last as large a share as would leave the parameters wanted.

    Nothing is really removed.
    """
    sites = [site for site in find_sites(subject.model, subject.example) if site.pinned is None]
    for amount in np.arange(0.0, 1.0, 0.005):
        kept = [max(1, site.channels - round(amount * site.channels)) for site in sites]
        steps = (ps.Collapse(site, np.arange(k)) for site, k in zip(sites, kept, strict=True))
        if parameters(ps.apply(subject.model, ps.Plan(tuple(steps)))) <= share * parameters(subject.model):
            break
    model = copy.deepcopy(subject.model)
    for layer in layers_of(model)[:-1]:
        peer.ln_structured(layer, "weight", amount=float(amount), n=2, dim=0)
    return model


def make_permanent(model: nn.Module) -> None:
    """Remove a peer's masks in place, leaving zeros: a network that has them cannot be copied."""
    for layer in layers_of(model):
        if peer.is_pruned(layer):
            peer.remove(layer, "weight")
