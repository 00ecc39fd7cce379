"""An embedding as a lookup and a linear layer, and heads that share its factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from pysolve.correlations import AnyArray
from pysolve.errors import PysolveError
from pysolve.forms import LowRank
from pysolve.nn.layer_kinds import is_extended
from pysolve.nn.layers.base import HOOKS, check_shape, dense_layer, seen
from pysolve.nn.layers.factored import Factored
from pysolve.nn.running import as_array, as_tensor
from pysolve.nn.state import copy_of

# What code may ask an embedding for.
_ASKED = ("num_embeddings", "embedding_dim", "padding_idx")


class TurnedLinear(nn.Module):
    """y = x W, with the (inputs, outputs) weight of another layer, whose outputs are these inputs."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.nx, self.nf = weight.shape
        self.weight, self.bias = weight, None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def extra_repr(self) -> str:
        return f"nx={self.nx}, nf={self.nf}"


class FactoredEmbedding(Factored):
    """y = outer(inner(i)): takes the place of an Embedding whose weight has low rank.

    ``inner`` is an embedding of r numbers, ``outer`` a Linear without a bias. Some rows may be stored as they
    are, in an embedding of their own, and are then given to the bit.

    Parameters
    ----------
    inner : nn.Embedding
    outer : nn.Linear
    exact : nn.Embedding, optional
        Rows that are stored apart.
    places : (V,) int32 tensor, optional
        Place of each row among those of ``inner``, and behind them those of ``exact``.
    padding_idx : int, optional
        For code that asks for it.
    """

    inner: nn.Embedding
    outer: nn.Linear
    exact: nn.Embedding | None
    places: Tensor | None

    def __init__(
        self,
        inner: nn.Embedding,
        outer: nn.Linear,
        exact: nn.Embedding | None = None,
        places: Tensor | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(inner, outer)
        self.exact = exact
        self.register_buffer("places", places)
        self.padding = padding_idx

    @classmethod
    def of_table(cls, layer: nn.Embedding, form: LowRank) -> FactoredEmbedding:
        """The layer that takes the place of an embedding; PysolveError when its weight has another shape."""
        check_table(layer, form)
        some = form.exact is not None
        inner = _table(layer, form.outer, None if some else layer.padding_idx)
        weight = as_tensor(np.ascontiguousarray(form.inner.T)).to(layer.weight)
        trained = layer.weight.requires_grad
        outer = dense_layer(nn.Linear, weight, None, (form.rank, len(weight)), trained=trained)
        exact = _table(layer, form.exact, None) if form.exact is not None else None
        places = as_tensor(form.places()).to(layer.weight.device) if some else None
        return cls(inner, outer, exact, places, layer.padding_idx).train(layer.training)

    def forward(self, ids: Tensor) -> Tensor:
        if self.exact is None or self.places is None:
            return self.outer(self.inner(ids))  # type: ignore[no-any-return]
        at, known = self.places[ids], len(self.inner.weight)
        low = self.outer(self.inner(at.clamp(max=known - 1)))
        own = self.exact((at - known).clamp(min=0))
        return torch.where((at < known).unsqueeze(-1), low, own)

    def __getattr__(self, name: str) -> Any:
        """Of the attributes of the layer in whose place this is, those that code may ask for."""
        if name not in _ASKED:
            return super().__getattr__(name)
        count = len(self.inner.weight) + (0 if self.exact is None else len(self.exact.weight))
        return {
            "num_embeddings": count,
            "embedding_dim": len(self.outer.weight),
            "padding_idx": vars(self).get("padding"),
        }[name]

    @property
    def rank(self) -> int:
        """Numbers that are looked up."""
        return self.inner.weight.shape[1]

    @property
    def bias(self) -> None:
        """Embeddings have none."""
        return

    @property
    def weight(self) -> Tensor:
        """The weight, multiplied out, for code that asks a layer for it."""
        product = self.inner.weight @ self.outer.weight.T
        if self.exact is None or self.places is None:
            return seen(product)
        return seen(torch.cat([product, self.exact.weight])[self.places])

    def form(self) -> LowRank:
        """The two weights, and the rows apart."""
        return _form(self, as_array(self.inner.weight), as_array(self.outer.weight.T))

    def to_dense(self) -> nn.Embedding:  # type: ignore[override]
        """One embedding with the product as its weight."""
        return _table(self.inner, as_array(self.weight), self.padding_idx).train(self.training)

    def tied(self, layer: nn.Module) -> Factored:
        """What takes the place of a layer that shares the embedding's weight: it shares the factors.

        PysolveError when it is no Linear and no Embedding of torch's own.
        """
        if type(layer) is nn.Embedding:
            inner, exact = _sharing(layer, self.inner), self.exact and _sharing(layer, self.exact)
            other = FactoredEmbedding(inner, self.outer, exact, self.places, layer.padding_idx)
            return other.train(layer.training)
        if type(layer) is not nn.Linear:
            raise PysolveError(f"a {type(layer).__name__} shares the weight, which no factors can serve.")
        return FactoredHead.of(layer, self).train(layer.training)

    def extra_repr(self) -> str:
        apart = "" if self.exact is None else f", exact={len(self.exact.weight)}"
        return f"rank={self.rank}{apart}"


class FactoredHead(Factored):
    """A Linear that shares the factors of an embedding, whose weight was its own.

    ``exact`` makes the outputs of the rows that the embedding stores apart, with their biases.
    """

    exact: nn.Linear | None
    places: Tensor | None

    def __init__(
        self, inner: nn.Module, outer: nn.Module, exact: nn.Linear | None, places: Tensor | None
    ) -> None:
        super().__init__(inner, outer)
        self.exact = exact
        self.register_buffer("places", places)

    @classmethod
    def of(cls, layer: nn.Linear, table: FactoredEmbedding) -> FactoredHead:
        """The head in the place of a layer that shares an embedding's weight."""
        inner, places = TurnedLinear(table.outer.weight), table.places  # type: ignore[arg-type]
        if table.exact is None or places is None:
            return cls(inner, _head(layer, table.inner, None), None, None)
        order, known = places.long().argsort(), len(table.inner.weight)
        outer, exact = (
            _head(layer, part, rows)
            for part, rows in ((table.inner, order[:known]), (table.exact, order[known:]))
        )
        return cls(inner, outer, exact, places)

    def forward(self, x: Tensor) -> Tensor:
        low = self.outer(self.inner(x))
        if self.exact is None or self.places is None:
            return low  # type: ignore[no-any-return]
        return torch.cat([low, self.exact(x)], -1).index_select(-1, self.places)

    def __getattr__(self, name: str) -> Any:
        """Of the attributes of the layer in whose place this is, those that code may ask for."""
        if name == "in_features":
            return self.inner.nx if isinstance(self.inner, TurnedLinear) else self.inner.in_features
        if name == "out_features":
            return len(self.outer.weight) + (0 if self.exact is None else len(self.exact.weight))
        return super().__getattr__(name)

    @property
    def rank(self) -> int:
        """Numbers between the two."""
        return self.outer.weight.shape[1]  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The weight, multiplied out, for code that asks a layer for it."""
        product = self.outer.weight @ self.inner.weight.T
        if self.exact is None or self.places is None:
            return seen(product)
        return seen(torch.cat([product, self.exact.weight])[self.places])

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """Of all outputs."""
        own = self.outer.bias
        if own is None or self.exact is None or self.places is None:
            return own  # type: ignore[no-any-return]
        return torch.cat([own, self.exact.bias])[self.places]

    def form(self) -> LowRank:
        """The two weights, and the rows apart."""
        return _form(self, as_array(self.outer.weight), as_array(self.inner.weight.T))

    def to_dense(self) -> nn.Linear:
        """One layer with the product as its weight."""
        sizes, trained = (self.in_features, self.out_features), self.outer.weight.requires_grad
        weight = self.weight.to(self.outer.weight)
        return dense_layer(nn.Linear, weight, self.bias, sizes, trained=trained).train(self.training)


def table_of(layer: nn.Module) -> nn.Parameter | None:
    """What of a factored embedding all have that share it: the rows of its first factor."""
    part = layer.inner if isinstance(layer, FactoredEmbedding) else None
    part = layer.outer if isinstance(layer, FactoredHead) else part
    return None if part is None else part._parameters.get("weight")


def check_table(layer: nn.Module, form: LowRank) -> None:
    """Refuse an embedding that cannot be factored, and factors of another shape, with a PysolveError."""
    if not isinstance(layer, nn.Embedding):
        raise PysolveError(f"only embeddings are looked up, got {type(layer).__name__}.")
    if layer.max_norm is not None:
        raise PysolveError(f"it rescales its rows to max_norm={layer.max_norm}.")
    check_shape(layer, form)


def _table(layer: nn.Embedding, weight: npt.ArrayLike, padding_idx: int | None) -> nn.Embedding:
    """An embedding with another weight; of a class that extends torch's own, its code stays."""
    values = as_tensor(np.asarray(weight)).to(layer.weight)
    trained = layer.weight.requires_grad
    if is_extended(layer):
        own = copy_of(layer)
        for name in HOOKS:
            getattr(own, name).clear()
        own.weight = nn.Parameter(values, trained)
        own.num_embeddings, own.embedding_dim = values.shape
        own.padding_idx = padding_idx
        return own
    made: nn.Embedding = skip_init(  # type: ignore[no-untyped-call]
        nn.Embedding,
        *values.shape,
        padding_idx=padding_idx,
        scale_grad_by_freq=layer.scale_grad_by_freq,
        sparse=layer.sparse,
        device=values.device,
        dtype=values.dtype,
    )
    made.weight = nn.Parameter(values, trained)
    return made


def _sharing(layer: nn.Embedding, part: nn.Embedding) -> nn.Embedding:
    """An embedding with the weight of another one."""
    made = copy_of(part, {id(part.weight): part.weight})
    made.scale_grad_by_freq, made.sparse = layer.scale_grad_by_freq, layer.sparse
    return made


def _head(layer: nn.Linear, part: nn.Embedding, rows: Tensor | None) -> nn.Linear:
    """A Linear with an embedding's weight, and the biases of some of a layer's outputs."""
    bias = None if layer.bias is None else layer.bias.detach()
    some = bias if bias is None or rows is None else bias[rows.to(bias.device)]
    made = dense_layer(nn.Linear, part.weight.detach(), some, (part.weight.shape[1], len(part.weight)))
    made.weight = part.weight
    if layer.bias is not None and made.bias is not None:
        made.bias.requires_grad_(layer.bias.requires_grad)
    return made


def _form(layer: FactoredEmbedding | FactoredHead, outer: AnyArray, inner: AnyArray) -> LowRank:
    if layer.exact is None or layer.places is None:
        return LowRank(outer, inner)
    rows = np.argsort(as_array(layer.places), kind="stable")[len(outer) :]
    return LowRank(outer, inner, rows, as_array(layer.exact.weight))
