"""The pruned weights of a whole network: by a score of each, or by what data say of the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pysolve.correlations import Array, Correlations, Mask
from pysolve.layer.masks import count_left, masks
from pysolve.layer.obs import PrunedLayer, obs_prune
from pysolve.layer.row_paths import error_curve, share_weights
from pysolve.methods.layerwise import Material, reconstruct, study_layers
from pysolve.nn.layer_matrix import matrix, weight_like
from pysolve.nn.running import as_array

Weights = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Job:
    """What is asked for, in the words of ``prune``.

    Parameters
    ----------
    method : str
    wanted : {"amount", "threshold", "sensitivity" or "pattern": value}
    scope, refit : str
    seed : int
    progress : bool
    """

    method: str
    wanted: Mapping[str, Any]
    scope: str = "local"
    refit: str = "none"
    seed: int = 0
    progress: bool = True

    def masks(self, weights: Weights, moments: Mapping[str, Array] | None = None) -> dict[str, Mask]:
        """What stays, by a score of each weight."""
        options: Any = {"scope": self.scope, "second_moments": moments, "seed": self.seed}
        return masks(weights, method=self.method, **self.wanted, **options)


@dataclass(frozen=True, eq=False)
class Pruned:
    """New values of a network, and what the report tells of them.

    Parameters
    ----------
    weights : {layer: array}
        With zeros.
    values : {state-dict name: array}
        What else changes.
    batch : one batch, optional
        To measure on.
    errors : {layer: float}
        E‖y − M x − b‖² / E‖y − E[y]‖² of refitted layers, on the pruned network's inputs.
    samples : int
        That they were fitted on.
    notes : tuple of str
    """

    weights: Weights
    values: Weights = field(default_factory=dict)
    batch: Any = None
    errors: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0
    notes: tuple[str, ...] = ()


def by_scores(job: Job, weights: Weights, batch: Any = None) -> Pruned:
    """Weights pruned by a score, without any data."""
    return Pruned(_cut(weights, job.masks(weights)), batch=batch)


def by_data(job: Job, model: nn.Module, weights: Weights, batches: Iterable[Any]) -> Pruned:
    """Weights pruned with what the data say of them, and the others refitted as the job wants it."""
    gathered = job.method == "wanda" or (job.method == "obs" and job.scope == "global")
    material = study_layers(model, batches, [*weights], gathered=gathered, progress=job.progress)
    # As matrices, whose rows are outputs also for transposed convolutions.
    known = {name: as_array(matrix(layer.module)) for name, layer in material.layers.items()}
    others = {name: weight for name, weight in weights.items() if name not in known}
    if job.method == "obs":
        sizes, kept = _sizes(job, known, material), _by_magnitude(job, others)
    else:
        sizes, kept = {}, _scored(job, {**known, **others}, material)
    cut = _cut(others, kept)
    notes = (*material.notes, *([f"{', '.join(others)}: not refitted"] if others else []))
    held = material.calibration.held[0]
    if job.refit == "none":
        whole = {name: _shaped(material, name, M) for name, M in _cut(known, kept).items()}
        return Pruned({**whole, **cut}, batch=held, notes=notes)
    prune = partial(_pruned, job, {name: kept[name] for name in known if name in kept}, sizes)
    done = reconstruct(material, prune, weights=job.refit != "bias", seed=job.seed, progress=job.progress)
    keys = {name: f"{name}.weight".lstrip(".") for name in known}
    new = {name: done.values[key] for name, key in keys.items()}
    rest = {name: value for name, value in done.values.items() if name not in keys.values()}
    return Pruned({**new, **cut}, rest, held, done.errors, done.samples, notes)


def _pruned(
    job: Job,
    kept: dict[str, Mask],
    sizes: Mapping[str, Mapping[str, Any]],
    name: str,
    W: Array,
    correlations: Correlations,
) -> PrunedLayer:
    """One layer's new weights; the mask that is chosen first stays."""
    if name not in kept:
        found = obs_prune(W, correlations, **sizes[name])
        kept[name] = found.mask
        return found
    if job.refit != "bias":
        return obs_prune(W, correlations, mask=kept[name])
    M = np.where(kept[name], W, 0.0)
    bias = correlations.bias(M)
    return PrunedLayer(M, bias, correlations.error(M, bias), mask=kept[name], method="mask", ridge=0.0)


def _sizes(job: Job, known: Weights, material: Material) -> dict[str, dict[str, Any]]:
    """How many weights of each layer ``obs_prune`` is to leave."""
    ((what, value),) = job.wanted.items()
    if what == "amount" and job.scope == "global":
        found = material.correlations
        curves = {name: error_curve(W, found[name]) for name, W in known.items() if name in found}
        left = count_left(value, sum(known[name].size for name in curves))
        counts = {name: {"count": count} for name, count in share_weights(curves, left).items()}
        return {name: counts.get(name, {what: value}) for name in known}
    each = value if isinstance(value, Mapping) else dict.fromkeys(known, value)
    # A layer without an entry keeps all.
    return {name: {what: each.get(name, 0.0)} for name in known}


def _by_magnitude(job: Job, others: Weights) -> dict[str, Mask]:
    """Masks of layers that cannot be refitted."""
    own = {
        what: {name: value[name] for name in others if name in value} if isinstance(value, Mapping) else value
        for what, value in job.wanted.items()
    }
    return replace(job, method="magnitude", wanted=own, scope="local").masks(others) if others else {}


def _scored(job: Job, weights: Weights, material: Material) -> dict[str, Mask]:
    if job.method != "wanda":
        return job.masks(weights)
    moments = {name: np.ones(int(np.prod(weight.shape[1:]))) for name, weight in weights.items()}
    moments |= {name: np.diag(found.r_xx) for name, found in material.correlations.items()}
    return job.masks(weights, moments)


def _cut(weights: Weights, kept: Mapping[str, Mask]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.where(kept[name], weight, 0).astype(weight.dtype) for name, weight in weights.items()}


def _shaped(material: Material, name: str, M: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A layer's matrix as its weight."""
    return as_array(weight_like(material.layers[name].module, torch.from_numpy(M)))
