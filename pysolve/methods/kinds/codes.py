"""Weights in few bits: integers, codebooks at a price of a bit, and parameters that are no layer's weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from pysolve.correlations import AnyArray, Array
from pysolve.forms import Codebook, Integers, QuantForm
from pysolve.layer.layer_fit import LayerFit
from pysolve.layer.quantize_layer import quantize_layer
from pysolve.methods.menu import Chosen, Fit, Task
from pysolve.methods.study import Study
from pysolve.nn.layer_kinds import EMBEDDINGS, WEIGHTED
from pysolve.nn.sensitivity import sensitivities

SCHEMES = {"int8-dynamic": "int", "int8": "int", "codebook": "codebook", "ternary": "ternary"}
# Entries of a parameter from which on a table of values is small beside it.
MANY = 4096
# Error of a weight, as a share of its part of the outputs' energy, that a bit costs when divergence is
# measured; the least sensitivity that counts, as a share of the median; what an output counts at least.
_TRIED, _LEAST, _OUTPUT = 3e-3, 1e-2, 1e-3
# Bytes of a file for each value that a layer shares, and how often it occurs.
_VALUE = 5
# Outputs of a layer that tell what all of its weights take.
_ROWS = 64


@dataclass(frozen=True, eq=False)
class Codes:
    """Weights that take few values.

    Parameters
    ----------
    scheme : "int8-dynamic", "int8", "codebook" or "ternary"
    bits : int, optional
        Of a code; by default 8 for integers, 4 for codebooks.
    group : int, optional
    method : "feedback" or "nearest"
    outputs : {layer: (h,) array}
        What the error of each output counts, 1 in the mean.
    sensitivity : {name: float}
        Divergence of the network's outputs for a unit of a weight's objective.
    bare : collection of str
        Names of parameters that are no layer's weight: without a price they take 256 values.
    pruned : {name: callable}
        How weights are pruned before they take their values.
    """

    scheme: str = "codebook"
    bits: int | None = None
    group: int | None = None
    method: str = "feedback"
    outputs: Mapping[str, Array] = field(default_factory=dict)
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    bare: Collection[str] = ()
    pruned: Mapping[str, Fit] = field(default_factory=dict)

    def choose(self, study: Study) -> Chosen:
        """Every weight in as many bits as asked for; of ternary networks the first and last in 16 values."""
        names = [*study.weights]
        layers = [name for name in names if name not in self.bare]
        edges = {layers[0], layers[-1]} if self.scheme == "ternary" and len(layers) > 2 else set()
        return Chosen(fits={n: partial(self.fit, scheme="codebook" if n in edges else None) for n in names})

    def fit(self, task: Task, *, scheme: str | None = None) -> LayerFit:
        """A layer's weights where bits are given; what is zero stays so."""
        task = self.prepared(task)
        keep, bare = task.weight != 0, task.name in self.bare
        found = quantize_layer(
            task.weight,
            task.correlations,
            bits=8 if bare else self.bits or (8 if SCHEMES[self.scheme] == "int" else 4),
            scheme="codebook" if bare else scheme or SCHEMES[self.scheme],
            mask=None if keep.all() or not keep.any() else keep,
            group=self.group,
            method=self.method,
        )
        if self.scheme == "int8-dynamic" and isinstance(found.form, Integers):
            return replace(found, form=replace(found.form, dynamic=True))
        return found

    def trial(self, task: Task) -> LayerFit:
        """A layer's weights at a price at which little is lost, to measure what that does to the network."""
        W, known = task.weight, task.correlations
        spread = 0.0 if known is None else known.centered().energy / W.size
        # Outputs that never change, and weights that are all zero, cost nothing at any price.
        return self.fit_priced(task, lam=_TRIED * (spread or float(np.square(W).mean()) or 1.0))

    def at(self, lam: float, names: Collection[str]) -> Chosen:
        """Every weight where a bit costs ``lam`` of divergence."""
        return Chosen(fits={name: partial(self.fit_priced, lam=lam) for name in names})

    def fit_priced(self, task: Task, *, lam: float) -> LayerFit:
        """A layer's weights where a bit costs ``lam`` of divergence; what is zero stays so."""
        task = self.prepared(task)
        keep, counts = task.weight != 0, self.outputs.get(task.name)
        return quantize_layer(
            task.weight,
            task.correlations,
            bits=self.bits or 8,
            mask=None if keep.all() else keep,
            lam=lam / self.sensitivity.get(task.name, 1.0),
            outputs=None if task.correlations is None or counts is None else counts[task.outputs],
        )

    def prepared(self, task: Task) -> Task:
        """A task whose weights have been pruned, where they are to be."""
        fit = self.pruned.get(task.name)
        return task if fit is None else replace(task, weight=fit(task).weight)

    def loss(self, task: Task, fit: LayerFit) -> float:
        """The objective that a fit has lost against the task's own weights."""
        change, known = fit.weight - task.weight, task.correlations
        if known is None:
            return 0.5 * float(np.square(change).sum())
        lost = np.einsum("ij,ij->i", change @ known.centered().r_xx, change)
        counts = self.outputs.get(task.name)
        return 0.5 * float(lost.sum() if counts is None else counts[task.outputs] @ lost)

    def priced(self, losses: Mapping[str, float], divergences: Mapping[str, float]) -> Codes:
        """With sensitivities from what every weight's trial lost and did."""
        found = {name: divergences[name] / loss if loss > 0 else 0.0 for name, loss in losses.items()}
        least = _LEAST * float(np.median([value for value in found.values() if value > 0] or [1.0]))
        return replace(self, sensitivity={name: max(one, least) for name, one in found.items()})


def codes_for(study: Study, kind: Codes) -> Codes:
    """Codes of outputs that count by what they do to the network's; without data, by weights' own energy."""
    if study.calibration is None:
        energy = {name: float(np.square(study.matrix(name)).sum()) for name in study.weights}
        return replace(kind, sensitivity={name: 1.0 / (whole or 1.0) for name, whole in energy.items()})
    known = {
        n: study.layers[n].module for n in study.weights if n in study.correlations and n in study.layers
    }
    # One batch tells which outputs matter.
    metrics = sensitivities(study.model, known, study.options.ranks.first(study.calibration.kept[:1]))
    return replace(kind, outputs={name: np.maximum(np.diag(S), _OUTPUT) for name, S in metrics.items()})


def bare_parameters(model: nn.Module, ignored: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are no layer's weight, and norms' statistics, quantised or left alone.

    Those that several modules share stay as they are.
    """
    owners = Counter(id(value) for module in model.modules() for value in module._parameters.values())
    for name, module in model.named_modules():
        if name in ignored or isinstance(module, ParametrizationList):
            continue
        whole = isinstance(module, (*WEIGHTED, *EMBEDDINGS))
        values = {"bias": module._parameters.get("bias")} if whole else module._parameters
        # Of other buffers nothing is known: positions and frequencies need all their digits.
        statistics = {what: module._buffers.get(what) for what in ("running_mean", "running_var")}
        for leaf, value in {**values, **statistics}.items():
            if value is None or owners[id(value)] > 1:
                continue
            if value.is_floating_point() and value.ndim and value.itemsize > 2:
                yield f"{name}.{leaf}".lstrip("."), value


def is_many(value: Tensor | AnyArray) -> bool:
    """Whether a bare parameter is worth a table of values."""
    return value.ndim > 1 and math.prod(value.shape) >= MANY


def rounded(value: Tensor) -> Tensor:
    """The nearest numbers of bfloat16, in the type of the value."""
    return value.detach().bfloat16().to(value.dtype)


def coded_bits(codes: AnyArray) -> float:
    """What entropy coding takes for integers."""
    _, counts = np.unique(codes, return_counts=True)
    return float(counts @ (np.log2(max(1, codes.size)) - np.log2(counts)))


def coded_bytes(form: QuantForm, times: float = 1.0) -> float:
    """Of a file for a weight so many times as long, about."""
    values = len(form.centroids) if isinstance(form, Codebook) else form.scales.size
    return coded_bits(form.codes) * times / 8 + _VALUE * values


def estimate(task: Task, fit: Fit, *, rows: int = _ROWS) -> float:
    """Bytes of a weight, coded, about: from some of its outputs."""
    h = len(task.weight)
    some = np.arange(0, h, max(1, h // rows)) if task.correlations is not None else np.arange(h)
    part = replace(task, weight=task.weight[some], outputs=task.outputs[some])
    if task.correlations is not None:
        part = replace(part, correlations=task.correlations.of_outputs(some))
    found = fit(part)
    assert isinstance(found.form, Codebook | Integers)
    return coded_bytes(found.form, h / len(some))
