"""Weights of a layer that share few values, and go on sharing them while they are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pysolve.forms import Codebook
from pysolve.nn.layers.masking import check_own_weight, make_ordinary, mask_of
from pysolve.nn.layers.snapping import Shared, Snapped, looked_up
from pysolve.nn.running import as_array, as_tensor, find_layer

TRAINED = ("values", "both")

Sharing = Shared | Snapped


def share_weights(
    model: nn.Module, books: Mapping[str, Codebook], *, trained: str = "values", keep_zeros: bool = False
) -> None:
    """Give layers' weights few values that training keeps shared, in place.

    A first value of zero stays zero. Layers whose weights share values already get other ones. A value's
    gradient is the sum of those of its weights, maybe thousands: Adam and its like take it as it comes, plain
    gradient descent needs a lower rate.

    Parameters
    ----------
    model : nn.Module
    books : {layer: Codebook}
        Of the weights' shapes; values are rounded to their precision.
    trained : "values" or "both"
        ``values``: codes stay. A layer's parameter becomes its k values, so make the optimiser afterwards.
        ``both``: the parameter is the weight as it was, of which the nearest values are in use, and values
        are another one; codes are at first those of the codebooks, whatever is the nearest.
    keep_zeros : bool
        With ``both``: weights of code 0 stay zero, so values must begin with one.

    Raises
    ------
    ValueError
        Before anything is changed: when a codebook does not fit; when a layer's weight is masked, computed
        from other values, or shared with another layer.
    """
    if trained not in TRAINED:
        raise ValueError(f"trained must be one of {', '.join(TRAINED)}, got {trained!r}.")
    for name, book in books.items():
        _check_book(name, find_layer(model, name), book, zero=keep_zeros and trained == "both")

    def share(layer: nn.Module, book: Codebook) -> None:
        if trained == "values":
            _share(layer, book)
        else:
            _snap(layer, book, keep_zeros)

    _change(model, books, share)


def ternary_weights(
    model: nn.Module, layers: Iterable[str] | Mapping[str, float], *, threshold: float = 0.05
) -> None:
    """Make layers' weights ternary, to be trained, in place: zero and two values, both learnt.

    As ``Snapped`` has it, with a threshold. At first both values are the means of the weights for which they
    stand; then these, and the weights below, are trained.

    Parameters
    ----------
    model : nn.Module
    layers : iterable of str, or {layer: threshold}
    threshold : float
        Of all layers without one of their own: the share of a layer's largest weight from which on it is not
        zero. The paper has 0.05; ResNet-20 on CIFAR-10 was better by two points of accuracy with 0.1.

    Raises
    ------
    ValueError
        As ``share_weights``, or when a threshold is not within 0 and 1.
    """
    if isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names, got the string {layers!r}: pass [{layers!r}].")
    shares = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, threshold)
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"the threshold of {name} must be within 0 and 1, got {share}.")
    _change(model, shares, _make_ternary)


def shared_of(model: nn.Module) -> dict[str, Sharing]:
    """What makes a network's weights share their values, by the layers' first names."""
    found = {name: sharing_of(layer) for name, layer in model.named_modules()}
    return {name: one for name, one in found.items() if one is not None}


def sharing_of(layer: nn.Module) -> Sharing | None:
    """What makes a layer's weights share their values, if something does."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain: Any = layer.parametrizations
    return next((one for one in chain.weight if isinstance(one, Sharing)), None)


def codebooks_of(model: nn.Module) -> dict[str, Codebook]:
    """The codes and values that are in use, by the layers' first names; of half precision in float32."""
    books = {}
    for name, sharing in shared_of(model).items():
        chain: Any = find_layer(model, name).parametrizations
        codes, values = sharing.in_use(chain.weight.original)
        books[name] = Codebook(np.array(as_array(codes)), np.array(as_array(values)))
    return books


def remove_sharing(model: nn.Module) -> None:
    """Make weights that share values ordinary ones again, exactly those in use; in place."""
    for layer in list(model.modules()):
        _remove(layer)


def unshared(model: nn.Module) -> nn.Module:
    """The network if no weights share values by parametrisation, else a copy in which they are ordinary."""
    if not shared_of(model):
        return model
    plain = copy.deepcopy(model)
    remove_sharing(plain)
    return plain


def _change(model: nn.Module, given: Mapping[str, Any], change: Callable[[nn.Module, Any], None]) -> None:
    """Change layers once each, after all of them are checked."""
    first: dict[nn.Module, tuple[str, Any]] = {}
    for name, how in given.items():
        layer = find_layer(model, name)
        if mask_of(layer) is not None:
            raise ValueError(f"{name} is masked: remove its mask first; shared values have their own zero.")
        if sharing_of(layer) is None:
            check_own_weight(model, name, layer)
        earlier, same = first.setdefault(layer, (name, how))
        if same != how:
            raise ValueError(f"{earlier} and {name} are one layer, but got different values to share.")
    for layer, (_, how) in first.items():
        _remove(layer)
        weight: Any = layer.weight
        change(layer, how)
        # Parametrising may have changed its shape.
        weight.grad = None


def _remove(layer: nn.Module) -> None:
    if sharing_of(layer) is not None:
        make_ordinary(layer)
        weight: Any = layer.weight
        weight.grad = None


def _check_book(name: str, layer: nn.Module, book: Codebook, *, zero: bool) -> None:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != book.shape:
        wanted = None if not isinstance(weight, Tensor) else tuple(weight.shape)
        raise ValueError(f"the codebook of {name} must have its weight's shape {wanted}, got {book.shape}.")
    if zero and book.centroids[0] != 0:
        raise ValueError(f"keep_zeros needs a first value of zero, {name} has {book.centroids[0]:.4g}.")


def _share(layer: nn.Module, book: Codebook) -> None:
    weight: Any = layer.weight
    codes = as_tensor(book.codes).to(weight.device, copy=True)
    zero = bool(book.centroids[0] == 0)
    parametrize.register_parametrization(
        layer, "weight", Shared(codes, len(book.centroids), zero=zero), unsafe=True
    )
    with torch.no_grad():
        # The same parameter, which is (k,) now: torch has put means in place.
        weight.set_(as_tensor(book.centroids).to(weight, copy=True))


def _snap(layer: nn.Module, book: Codebook, keep_zeros: bool) -> None:
    weight: Any = layer.weight
    codes = as_tensor(book.codes).to(weight.device)
    values = as_tensor(book.centroids).to(weight, copy=True)
    fixed = codes == 0 if keep_zeros else None
    sharing = Snapped(values, zero=bool(book.centroids[0] == 0), fixed=fixed)
    with torch.no_grad():
        # Rounding may have been to other values than the nearest.
        others = sharing.codes_of(weight) != codes
        weight.copy_(torch.where(others, looked_up(codes, values), weight))
    _register(layer, sharing)


def _make_ternary(layer: nn.Module, threshold: float) -> None:
    weight: Any = layer.weight
    sharing = Snapped(weight.detach().new_zeros(3), zero=True, threshold=threshold)
    codes = sharing.codes_of(weight)
    with torch.no_grad():
        sharing.centroids.copy_(Shared(codes, 3).right_inverse(weight))
        sharing.centroids[0] = 0.0
    _register(layer, sharing)


def _register(layer: nn.Module, sharing: Snapped) -> None:
    weight: Any = layer.weight
    sharing.centroids.requires_grad_(weight.requires_grad)
    parametrize.register_parametrization(layer, "weight", sharing)
