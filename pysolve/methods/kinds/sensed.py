"""What errors at layers' outputs mean to the network's, on samples of a study."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from torch import Tensor

from pysolve.correlations import Array
from pysolve.methods.study import Study
from pysolve.nn.batches.samples import samples_in, take
from pysolve.nn.layer_matrix import Layer, channels
from pysolve.nn.running import Batch
from pysolve.nn.sensitivity import sensitivities

# Samples that sensitivities are taken on, in batches of so many.
_SENSED, TOGETHER = 128, 64
# Outputs of which what errors mean takes a matrix of at most 2 GiB.
_WIDE = 16384


def metrics_of(
    study: Study,
    layers: Mapping[str, Layer],
    *,
    alike: float,
    directions: int,
    gates: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Array]:
    """Of each layer what an error means to the network, and ``alike`` times the error itself.

    Without the second part, which counts all outputs alike, errors go where the first order sees none. None
    of layers with very many outputs, heads mostly, whose outputs are the network's and count alike.
    """
    few = {name: layer for name, layer in layers.items() if channels(layer)[1] <= _WIDE}
    narrow = {name: weight for name, weight in gates.items() if len(weight) <= _WIDE}
    found = sensitivities(study.model, few, sensed(study), probes=directions, gates=narrow)
    return {name: S + alike * np.eye(len(S)) for name, S in found.items()}


def sensed(study: Study) -> list[Batch]:
    """Samples that sensitivities are taken on."""
    samples = study.first_kept(_SENSED)
    return [take(b, i, i + TOGETHER) for b in samples for i in range(0, samples_in(b), TOGETHER)]
