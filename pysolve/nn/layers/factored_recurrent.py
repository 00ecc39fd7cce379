"""Recurrent layers some of whose weights are products of two smaller ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence

from pysolve.errors import PysolveError
from pysolve.forms import Form, LowRank
from pysolve.nn.layers.base import HOOKS
from pysolve.nn.running import as_array, as_tensor
from pysolve.nn.state import copy_of

_OUTER, _INNER = "_outer", "_inner"


class FactoredRecurrent(nn.RNNBase):
    """A recurrent layer of torch's whose weights may be W = W_outer W_inner, of parameters of these names.

    Called like torch's, with the same results: torch's own kernel runs. The first weight that reads inputs,
    of one direction, is two products one after the other; others are multiplied out in every call, once for
    all steps and samples. Torch's kernels for GPUs copy such weights into one piece each time, and warn once.

    Parameters
    ----------
    factored : list of str
        Names of the weights that are products.
    """

    factored: list[str]

    def forward(self, input: Any, hx: Any = None) -> Any:
        kind, state, whole = _plain(self), {**vars(self)}, [*self._flat_weights_names]
        weights = list[Tensor]()
        if runs_as_two(self, whole[0]) and whole[0] in self.factored:
            outer, inner = self.factors(whole.pop(0))
            input, state["input_size"], weights = _times(input, inner), inner.shape[0], [outer]
        weights += [getattr(self, name) for name in whole]
        # A layer of torch's own for this call alone: the network's may run in several threads.
        return kind.forward(with_weights(kind, state, weights), input, hx)

    def __getattr__(self, name: str) -> Any:
        if name not in vars(self).get("factored", ()):
            return super().__getattr__(name)
        outer, inner = self.factors(name)
        # Under autocast the product has another type.
        return (outer @ inner).to(outer.dtype)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(h, r) and (r, d) factors of a weight that is a product."""
        # They may be parametrised, or attributes of a replica.
        return getattr(self, name + _OUTER), getattr(self, name + _INNER)

    def forms(self) -> dict[str, LowRank]:
        """Factors by the weights' names."""
        return {name: LowRank(*map(as_array, self.factors(name))) for name in self.factored}

    def to_dense(self) -> nn.RNNBase:
        """Torch's layer with the products as its weights."""
        made = _copy(_plain(self), self)
        for name in self.factored:
            trained, product = self.factors(name)[0].requires_grad, getattr(self, name).detach()
            _replace(made, [name + _OUTER, name + _INNER], {name: product}, trained)
        del vars(made)["factored"]
        made._init_flat_weights()
        return made

    def _init_flat_weights(self) -> None:
        """Nothing: weights are made in each call."""

    _update_flat_weights = _init_flat_weights

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}={len(self.factors(name)[1])}" for name in self.factored)
        return f"{super().extra_repr()}, ranks: {ranks}"


class FactoredLSTM(FactoredRecurrent, nn.LSTM):
    """An ``nn.LSTM`` some of whose weights are products."""


class FactoredGRU(FactoredRecurrent, nn.GRU):
    """An ``nn.GRU`` some of whose weights are products."""


class FactoredRNN(FactoredRecurrent, nn.RNN):
    """An ``nn.RNN`` some of whose weights are products."""


_KINDS: Mapping[type[nn.RNNBase], type[FactoredRecurrent]] = {
    nn.LSTM: FactoredLSTM,
    nn.GRU: FactoredGRU,
    nn.RNN: FactoredRNN,
}


def with_factors(layer: nn.RNNBase, leaf: str, form: LowRank) -> FactoredRecurrent:
    """The layer that takes the place of a recurrent one, with one of its weights a product."""
    weight = layer._parameters[leaf]
    assert weight is not None
    made = _copy(_KINDS.get(type(layer), type(layer)), layer)
    assert isinstance(made, FactoredRecurrent)
    made.factored = [
        name for name in layer._flat_weights_names if name in (leaf, *vars(made).get("factored", ()))
    ]
    parts = {leaf + _OUTER: form.outer, leaf + _INNER: form.inner}
    values = {name: as_tensor(part).to(weight) for name, part in parts.items()}
    _replace(made, [leaf], values, weight.requires_grad)
    return made


def with_weights(
    kind: type[nn.RNNBase], state: Mapping[str, object], weights: Sequence[Tensor | None]
) -> nn.RNNBase:
    """A layer of torch's own with the attributes of another, whose kernel takes these weights as they are."""
    made = kind.__new__(kind)
    vars(made).update(state, _flat_weights=[*weights], _flat_weight_refs=[None] * len(weights))
    return made


def runs_as_two(layer: nn.RNNBase, leaf: str) -> bool:
    """Whether a weight's factors multiply one after the other: of that which reads a layer's inputs alone."""
    return leaf == "weight_ih_l0" and not layer.bidirectional


def check_gates(layer: nn.Module, leaf: str, form: Form, shape: Sequence[int]) -> None:
    """Refuse what is no weight of a recurrent layer of torch's own, or factors of another shape."""
    # Factors are not among these names.
    names = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else ()
    own = layer._parameters.get(leaf) if leaf in names else None
    if own is None or own.ndim != 2 or not isinstance(form, LowRank):
        raise PysolveError("only a layer's weight can be sparse, factored or integers.")
    if type(layer) not in (*_KINDS, *_KINDS.values()):
        raise PysolveError(f"what the code of a {type(layer).__name__} does with its weights is not known.")
    if form.exact is not None:
        raise PysolveError("only of embeddings some rows are stored apart.")
    if form.shape != tuple(shape):
        raise PysolveError(f"expected a form of shape {tuple(shape)}, got {form.shape}.")
    if form.rank > min(shape):
        raise PysolveError(f"a weight of shape {form.shape} has a rank of at most {min(shape)}.")


def _times(given: Tensor | PackedSequence, weight: Tensor) -> Tensor | PackedSequence:
    """Inputs of every step times a weight; under autocast in the type that they have."""
    if isinstance(given, PackedSequence):
        return PackedSequence(linear(given.data, weight).to(given.data.dtype), *given[1:])
    return linear(given, weight).to(given.dtype)


def _plain(layer: nn.RNNBase) -> type[nn.RNNBase]:
    return next(kind for kind in _KINDS if isinstance(layer, kind))


def _copy(kind: type[nn.RNNBase], layer: nn.RNNBase) -> nn.RNNBase:
    """A copy of another kind, without the layer's hooks, which what takes its place gets."""
    copied = copy_of(layer)
    for name in HOOKS:
        getattr(copied, name).clear()
    return with_weights(kind, vars(copied), [None] * len(layer._flat_weights_names))


def _replace(layer: nn.RNNBase, names: Sequence[str], values: Mapping[str, Tensor], trained: bool) -> None:
    """Put parameters where others were."""
    new = {name: nn.Parameter(value, trained) for name, value in values.items()}
    own = {**layer._parameters}
    layer._parameters.clear()
    for name, one in own.items():
        layer._parameters.update(new if name == names[0] else {} if name in names else {name: one})
