"""Weights of a whole network in few bits, layer after layer on what those before it leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pysolve.correlations import Array, Correlations
from pysolve.forms import Codebook, QuantForm
from pysolve.layer.quantize_layer import QuantizedLayer
from pysolve.methods.layerwise import Fitted, Material, reconstruct
from pysolve.nn.layer_matrix import weight_like
from pysolve.nn.running import as_array, as_tensor
from pysolve.nn.slicing import TRANSPOSED
from pysolve.plan import Plan

# A layer's new weights from its name, its matrix and, where they are known, its correlations.
FitLayer = Callable[[str, Array, Correlations | None], QuantizedLayer]


@dataclass(frozen=True, eq=False)
class Quantized:
    """New values of a network, and what the report tells of them.

    Parameters
    ----------
    forms : {layer: Codebook or Integers}
        Of the layers' weights, in their shapes.
    values : {state-dict name: array}
        What else changes.
    errors : {layer: float}
    samples : int
        That layers were fitted on.
    lam, bytes : optional
        What a bit cost, and how many bytes the file was found to have, where there were so many to share out.
    """

    forms: Mapping[str, QuantForm]
    values: Mapping[str, npt.NDArray[Any]]
    errors: Mapping[str, float]
    samples: int
    lam: float | None = None
    bytes: int | None = None


def quantized(
    layers: Mapping[str, nn.Module],
    material: Material | None,
    fit: FitLayer,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Quantized:
    """Quantise the layers of a network, front to back; those that no correlations are known of by themselves.

    Parameters
    ----------
    layers : {name: layer}
    material : Material, optional
        None where there are no data.
    fit : callable
    seed : int
        Of the choice of rows.
    progress : bool
    """
    known = {} if material is None else material.layers
    forms: dict[str, QuantForm] = {}
    errors: dict[str, float] = {}
    values: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        if name not in known:
            weight: Any = layer.weight
            found = fit(name, np.asarray(as_array(weight.flatten(1)), np.float64), None)
            errors[name] = found.error
            forms[name] = found.form.with_codes(found.codes.reshape(weight.shape))
            values[weight_name(name)] = as_tensor(forms[name].dense()).to(weight)

    def refit(name: str, W: Array, correlations: Correlations) -> Fitted:
        found, layer = fit(name, W, correlations), known[name].module
        # Of transposed convolutions, the weight's rows are inputs: scales of outputs have no place there.
        if isinstance(found.form, Codebook) or not isinstance(layer, TRANSPOSED):
            codes = weight_like(layer, torch.from_numpy(found.codes))
            forms[name] = found.form.with_codes(codes.numpy())
        return found

    if material is None or not known:
        return Quantized(forms, {}, errors, 0)
    done = reconstruct(material, refit, always=layers.keys(), values=values, seed=seed, progress=progress)
    own = {weight_name(name) for name in forms}
    others = {name: value for name, value in done.values.items() if name not in own}
    # In the network's order.
    forms = {name: forms[name] for name in layers if name in forms}
    return Quantized(forms, others, errors | done.errors, done.samples)


def plan_of(found: Quantized) -> Plan:
    """The new values, quantised weights decoded."""
    weights = {weight_name(name): form.dense() for name, form in found.forms.items()}
    return Plan(values={**found.values, **weights})


def weight_name(layer: str) -> str:
    """What a state dict calls the layer's weight."""
    return f"{layer}.weight".lstrip(".")
