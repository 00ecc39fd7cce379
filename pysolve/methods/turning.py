"""Equal networks in the place of the one that was studied: their layers, values and correlations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pysolve.correlations import Array, Correlations, Indices
from pysolve.methods.study import Study
from pysolve.methods.weights import weight_name
from pysolve.nn.batches.samples import take
from pysolve.nn.gathering.gathered import own_outputs
from pysolve.nn.gathering.memory import Bound
from pysolve.nn.graph.branches import Layer, find_layers
from pysolve.nn.graph.export import Graph
from pysolve.nn.layer_matrix import LAYERS, channels
from pysolve.nn.outputs import tensors_of
from pysolve.nn.running import Batch, evaluating, forward
from pysolve.nn.threads import all_blas_threads

# Share of the memory left for correlations that are turned, and would be made again for every size.
_KEPT = 0.25
# Samples on which a turned network must equal the original, and to what share of its outputs.
_PROBED = 4
_EXACT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


def apart(study: Study, network: nn.Module) -> float | None:
    """‖difference‖ / ‖outputs‖ of an equal network and the study's; None where it is rounding alone."""
    found = _difference(study.model, network, take(study.held[0], 0, _PROBED))
    return None if found <= _EXACT.get(next(network.parameters()).dtype, 1e-5) else found


def study_of(study: Study, network: nn.Module, graph: Graph) -> Study:
    """The study of another network of the same layers."""
    seen = {layer.name: layer for layer in find_layers(graph, network).values()}
    others = dict[str, Layer]()
    for name, layer in study.layers.items():
        module = network.get_submodule(name)
        if name not in seen and isinstance(module, LAYERS):
            others[name] = replace(layer, module=module)
    state = network.state_dict(keep_vars=True)
    weights = {name: state[weight_name(network, name)] for name in study.weights}
    return replace(study, model=network, graph=graph, layers={**others, **seen}, weights=weights)


def put(values: Tensor, places: Indices, new: Array) -> Tensor:
    """Values with others at some flat places."""
    index = torch.as_tensor(places, device=values.device)
    return values.double().put(index, torch.as_tensor(new, device=values.device))


def along(values: Tensor, dim: int, places: Indices, matrix: Array) -> Tensor:
    """Values with some places along a dimension multiplied by a matrix."""
    index = torch.as_tensor(places, device=values.device)
    values = values.double()
    part = values.index_select(dim, index).movedim(dim, 0)
    new = torch.tensordot(torch.as_tensor(matrix, device=values.device), part, 1)
    return values.index_copy(dim, index, new.movedim(0, dim))


class Turned(Mapping[str, Correlations]):
    """Correlations of a turned network's layers, made when asked for; kept where memory allows.

    ``read``: from a reader and its number of inputs to the matrix that turns these; ``writers``: layers of
    other outputs.
    """

    def __init__(
        self,
        known: Mapping[str, Correlations],
        readers: Collection[str],
        read: Callable[[str, int], Array],
        writers: Collection[str],
        layers: Mapping[str, Layer],
        *,
        bound: Bound | None,
    ) -> None:
        self.known, self.readers, self.read, self.writers = known, readers, read, writers
        self.layers = layers
        # Writers' inputs stay as they are.
        needed = 0
        for name in {*readers, *writers} & {*known}:
            inputs, outputs = channels(layers[name].module)
            needed += 8 * inputs * (outputs + inputs * (name in readers))
        self.keep = bound is None or needed <= _KEPT * bound.left()
        self.made: dict[str, Correlations] = {}
        self.moments: dict[int, tuple[Array, Array]] = {}

    def __getitem__(self, name: str) -> Correlations:
        if name in self.made:
            return self.made[name]
        found = self.known[name]
        if name in self.readers:
            T = self.read(name, len(found.xx))
            found = replace(found, xx=self._moments(T, found.xx), x_sum=T @ found.x_sum)
        if name in self.readers or name in self.writers:
            found = own_outputs(found, self.layers[name].module)
        if self.keep:
            self.made[name] = found
        return found

    def __contains__(self, name: object) -> bool:
        # That of Mapping makes what it is asked for.
        return name in self.known

    def _moments(self, T: Array, xx: Array) -> Array:
        """Those of what several layers read, made once."""
        before, after = self.moments.get(id(xx), (None, xx))
        if before is not xx:
            with all_blas_threads(2.0 * len(xx) ** 3):
                after = T @ xx @ T.T
            after = (after + after.T) / 2
            if self.keep:
                # With the array itself, so that no other one gets its number.
                self.moments[id(xx)] = xx, after
        return after

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


def _difference(original: nn.Module, other: nn.Module, batch: Batch) -> float:
    """‖difference‖ / ‖outputs‖ of two networks, the largest of all outputs."""
    with evaluating(original, other):
        pairs = zip(*(tensors_of(forward(one, batch)) for one in (original, other)), strict=True)
        return max(_norm(_real(a) - _real(b)) / max(_norm(_real(a)), 1e-30) for a, b in pairs)


def _real(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.double()


def _norm(value: Tensor) -> float:
    """‖value‖; of logits of all words without a copy in double precision."""
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))
