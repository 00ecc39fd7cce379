"""What is to be quantised, how, and what is known of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from pysolve.compressed import Compressed
from pysolve.correlations import Array, Correlations
from pysolve.errors import PysolveError
from pysolve.forms import Integers
from pysolve.layer.quantize_layer import QuantizedLayer, quantize_layer
from pysolve.methods.layerwise import Material, study_layers, weighted_layers
from pysolve.methods.quantized import Quantized
from pysolve.methods.retraining import Length
from pysolve.methods.worth import Worth, worth_of
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.running import as_array, as_tensor, find_matching
from pysolve.nn.slicing import EMBEDDINGS, WEIGHTED
from pysolve.report.report import Report

SCHEMES = {"int8-dynamic": "int", "int8": "int", "codebook": "codebook", "ternary": "ternary"}
# Bits of a code, unless others are asked for.
BITS = {"int8-dynamic": 8, "int8": 8}
# Entries of a parameter from which on a table of 256 values is small beside it.
_MANY = 4096


def _as_it_is(report: Report) -> Report:
    return report


@dataclass(frozen=True)
class Job:
    """What is asked for, in the words of ``quantize``.

    Parameters
    ----------
    scheme : str
    target : int, optional
        Bytes of the file.
    bits, group, method, retrain, layout, ignore, divergence, seed, progress
    told : callable
        From a report to one as long as that which the file will have.
    """

    scheme: str
    bits: int | None = None
    target: int | None = None
    group: int | None = None
    method: str = "feedback"
    retrain: Length = 0
    layout: str = "dense"
    ignore: tuple[str, ...] = ()
    divergence: Divergence = kl_divergence
    seed: int = 0
    progress: bool = True
    told: Callable[[Report], Report] = _as_it_is

    @property
    def run(self) -> dict[str, Any]:
        """Options of what runs through the data."""
        return {"seed": self.seed, "progress": self.progress}

    def fit(self, edges: Collection[str], name: str, W: Array, known: Correlations | None) -> QuantizedLayer:
        """One layer's weights where there is no target; those that are pruned stay zero."""
        keep = W != 0
        found = quantize_layer(
            W,
            known,
            bits=self.bits or BITS.get(self.scheme, 4),
            scheme="codebook" if name in edges else SCHEMES[self.scheme],
            mask=None if keep.all() or not keep.any() else keep,
            group=self.group,
            method=self.method,
        )
        if self.scheme == "int8-dynamic":
            assert isinstance(found.form, Integers)
            return replace(found, form=replace(found.form, dynamic=True))
        return found


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to quantise, and what is known of it.

    Parameters
    ----------
    before : nn.Module or Compressed
        What was given.
    layers : {name: layer}
        To quantise.
    material : Material, optional
        Where there are data.
    notes : tuple of str
    worth : Worth, optional
        Where there is a target.
    short : {state-dict name: array}
        What is no weight of a layer, in 256 values or in bfloat16.
    begun : Quantized, optional
        What came near the target.
    """

    before: nn.Module | Compressed
    layers: Mapping[str, Any]
    material: Material | None
    notes: tuple[str, ...]
    worth: Worth | None
    short: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    begun: Quantized | None = None

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.before.model if isinstance(self.before, Compressed) else self.before

    def shortened(self, found: Quantized) -> Quantized:
        """With what is no weight of a layer in few bits, too."""
        new = {name: _short(as_tensor(found.values[name])) for name in self.short if name in found.values}
        return replace(found, values={**found.values, **self.short, **new})


def studied(before: nn.Module | Compressed, batches: Iterable[Any] | None, job: Job) -> Subject:
    """What must be known of a network to quantise it as asked."""
    model = before.model if isinstance(before, Compressed) else before
    # Rows of whole numbers would have no place in a file: each row has its own values.
    kinds = WEIGHTED if SCHEMES[job.scheme] == "int" else (*WEIGHTED, *EMBEDDINGS)
    layers, notes = weighted_layers(model, job.ignore, kinds)
    if job.scheme == "int8-dynamic":
        layers = {name: layer for name, layer in layers.items() if type(layer) is nn.Linear}
    if not layers:
        raise PysolveError(f"there is nothing to quantise: no layer for {job.scheme} has its own weight.")
    material = worth = None
    if batches is not None:
        gathered = job.target is not None
        material = study_layers(model, batches, [*layers], gathered=gathered, progress=job.progress)
        notes += material.notes
    if job.target is not None:
        worth = worth_of(model, layers, material, bits=job.bits or 8, divergence=job.divergence)
    state = model.state_dict()
    others = [] if kinds == WEIGHTED else _beside_weights(model, find_matching(model, job.ignore))
    short = {name: _short(state[name]) for name in others}
    if many := [name for name in short if is_many(state[name])]:
        notes.append(f"in 256 values, for they are no layer's weight: {', '.join(many)}")
    return Subject(before, layers, material, tuple(notes), worth, short)


def _beside_weights(model: nn.Module, ignored: Collection[str]) -> Iterator[str]:
    """Names of norms' statistics, and of parameters that are no layer's weight, quantised or left alone."""
    for name, module in model.named_modules():
        if name in ignored or isinstance(module, ParametrizationList):
            continue
        whole = isinstance(module, (*WEIGHTED, *EMBEDDINGS))
        values = {"bias": module._parameters.get("bias")} if whole else module._parameters
        # Of other buffers nothing is known: positions and frequencies need all their digits.
        statistics = {what: module._buffers.get(what) for what in ("running_mean", "running_var")}
        for leaf, value in {**values, **statistics}.items():
            if value is not None and value.is_floating_point() and value.ndim and value.itemsize > 2:
                yield f"{name}.{leaf}".lstrip(".")


def is_many(value: Tensor | npt.NDArray[Any]) -> bool:
    """Whether a parameter that is no layer's weight is worth a table of values."""
    return value.ndim > 1 and math.prod(value.shape) >= _MANY


def _short(value: Tensor) -> npt.NDArray[Any]:
    """The nearest of 256 values where there are many, zeros as they are; else the nearest of bfloat16."""
    if not is_many(value):
        return as_array(value.bfloat16().to(value.dtype))
    W = np.asarray(as_array(value.flatten(1)), np.float64)
    found = quantize_layer(W, bits=8, mask=None if W.all() or not W.any() else W != 0)
    return as_array(as_tensor(found.weight.reshape(value.shape)).to(value.dtype))
