"""Weights of a layer that share few values, and go on sharing them while they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize

from pysolve.forms import Codebook
from pysolve.nn.layers import masking
from pysolve.nn.layers.base import Context, weight_of
from pysolve.nn.layers.masking import below, parametrizations
from pysolve.nn.running import as_array, as_tensor, check_model, find_layer

TRAINED = ("values", "both")
# Up to so many bounds, counting those below each weight is quicker than searching for it.
_FEW = 64
T = TypeVar("T")


class Shared(nn.Module):
    """The parametrisation  c ↦ w,  w_i = c[codes_i].

    A value's gradient is the sum of those of its weights.

    Parameters
    ----------
    codes : uint8 tensor
        Of the weight's shape; never changed by training.
    k : int
        How many values there are.
    zero : bool
        Code 0 stands for zero, whatever c_0 is, which gets no gradient.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, k: int, *, zero: bool = False) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.k, self.zero = k, zero

    def forward(self, centroids: Tensor) -> Tensor:
        """The weight in use."""
        return _looked_up(*self.in_use(centroids))

    def in_use(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values."""
        return self.codes, _with_zero(centroids, self.zero)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The values nearest to a weight that is put in place: its means over codes."""
        counts = torch.bincount(self.codes.flatten(), minlength=self.k).clamp(min=1)
        return (_sums(self.codes, weight.detach(), self.k) / counts).to(weight)


class Snapped(nn.Module):
    """The parametrisation  v ↦ w  by the nearest one of a few values: weights v and values are trained.

    A value's gradient is the sum of those of the weights that have it at the time. That of w reaches v as if
    the two were the same; so v goes on changing, and its code with it.

    Parameters
    ----------
    centroids : (k,) tensor
        The values, at most 256.
    zero : bool
        The first of them is zero, and stays so.
    threshold : float, optional
        For three values 0, n, p: trained ternary quantisation. In use is p where v > t max|v|, n where
        v < −t max|v|, and else 0; gradients reach v times p and −n where it is not 0.
    fixed : bool tensor, optional
        Of the weight's shape: true where the code is always 0.

    References
    ----------
    C. Zhu, S. Han, H. Mao, W. J. Dally, Trained ternary quantization, 2017.
    """

    fixed: Tensor | None

    def __init__(
        self,
        centroids: Tensor,
        *,
        zero: bool = False,
        threshold: float | None = None,
        fixed: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.centroids = nn.Parameter(centroids)
        self.zero, self.threshold = zero, threshold
        self.register_buffer("fixed", fixed)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use."""
        codes, values = self.in_use(weight)
        slopes = None
        if self.threshold is not None:
            slopes = values.detach() * values.new_tensor([0.0, -1.0, 1.0])
            slopes[0] = 1.0
        return _looked_up(codes, values, weight, slopes)

    @torch.no_grad()
    def codes_of(self, weight: Tensor) -> Tensor:
        """uint8 numbers of the values in use."""
        if self.threshold is None:
            codes = _nearest(weight, _with_zero(self.centroids, self.zero))
        else:
            bound = self.threshold * (weight.abs().max() if weight.numel() else weight.new_zeros(()))
            codes = (weight < -bound).byte() + 2 * (weight > bound).byte()
        return codes if self.fixed is None else codes.masked_fill_(self.fixed, 0)

    def in_use(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values."""
        return self.codes_of(weight), _with_zero(self.centroids, self.zero)


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

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> found = ps.quantize_layer(model[0].weight, bits=3)
    >>> ps.share_weights(model, {"0": found.form})
    >>> [tuple(parameter.shape) for parameter in model[0].parameters()]
    [(64,), (8,)]
    """
    check_model("model", model)
    if trained not in TRAINED:
        raise ValueError(f"trained must be one of {', '.join(TRAINED)}, got {trained!r}.")
    if not isinstance(books, Mapping):
        raise TypeError(f"books must be a mapping of layers to codebooks, got {type(books).__name__}.")
    for name, book in books.items():
        _check_book(name, find_layer(model, name), book, zero=keep_zeros and trained == "both")
    _change(model, books, _share if trained == "values" else partial(_snap, keep_zeros=keep_zeros))


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

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> ps.ternary_weights(model, ["0"], threshold=0.5)
    >>> len(model[0].weight.unique())
    3
    """
    check_model("model", model)
    if isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names, got the string {layers!r}: pass [{layers!r}].")
    shares = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, threshold)
    for name, share in shares.items():
        if not isinstance(share, Real):
            raise TypeError(f"the threshold of {name} must be a number, got {type(share).__name__}.")
        if not 0 <= float(share) < 1:
            raise ValueError(f"the threshold of {name} must be within 0 and 1, got {share}.")
    _change(model, shares, _make_ternary)


def shared_of(model: nn.Module) -> dict[str, Sharing]:
    """The parametrisations by which weights share values, by the layers' first names."""
    layers = model.named_modules()
    return {name: one for name, layer in layers if (one := sharing_of(layer)) is not None}


def sharing_of(layer: nn.Module) -> Sharing | None:
    """The parametrisation by which a layer's weights share values, if there is one."""
    return next((one for one in parametrizations(layer) if isinstance(one, Sharing)), None)


def codebooks_of(model: nn.Module) -> dict[str, Codebook]:
    """The codes and values that are in use, by the layers' first names; of half precision in float32.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> ps.ternary_weights(model, ["0"])
    >>> ps.codebooks_of(model)["0"].codes.shape
    (64, 16)
    """
    check_model("model", model)
    books = {}
    for name, sharing in shared_of(model).items():
        codes, values = sharing.in_use(below(find_layer(model, name)))
        books[name] = Codebook(np.array(as_array(codes)), np.array(as_array(values)))
    return books


def remove_sharing(model: nn.Module) -> None:
    """Make weights that share values ordinary ones again, exactly those in use; in place.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> ps.ternary_weights(model, ["0"])
    >>> ps.remove_sharing(model)
    >>> model[0].weight.shape, ps.codebooks_of(model)
    (torch.Size([64, 16]), {})
    """
    check_model("model", model)
    for layer in list(model.modules()):
        _remove(layer)


def unshared(model: nn.Module) -> nn.Module:
    """The network if no weights share values by parametrisation, else a copy in which they are ordinary."""
    return masking.changed_copy(model, remove_sharing) if shared_of(model) else model


def _change(model: nn.Module, given: Mapping[str, T], change: Callable[[nn.Module, T], None]) -> None:
    """Change layers once each, after all of them are checked."""
    first: dict[nn.Module, tuple[str, T]] = {}
    for name, how in given.items():
        layer = find_layer(model, name)
        if masking.mask_of(layer) is not None:
            raise ValueError(f"{name} is masked: remove its mask first; shared values have their own zero.")
        if sharing_of(layer) is None:
            masking.check_own_weight(model, name, layer)
        earlier, same = first.setdefault(layer, (name, how))
        if same != how:
            raise ValueError(f"{earlier} and {name} are one layer, but got different values to share.")
    for layer, (_, how) in first.items():
        _remove(layer)
        weight = weight_of(layer)
        change(layer, how)
        # Parametrising may have changed its shape.
        weight.grad = None


def _remove(layer: nn.Module) -> None:
    if sharing_of(layer) is not None:
        masking.make_ordinary(layer)
        weight_of(layer).grad = None


def _check_book(name: str, layer: nn.Module, book: Codebook, *, zero: bool) -> None:
    if not isinstance(book, Codebook):
        raise TypeError(
            f"books must give {name} a Codebook, as quantize_layer(W).form is, got {type(book).__name__}."
        )
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != book.shape:
        wanted = None if not isinstance(weight, Tensor) else tuple(weight.shape)
        raise ValueError(f"the codebook of {name} must have its weight's shape {wanted}, got {book.shape}.")
    if zero and book.centroids[0] != 0:
        raise ValueError(f"keep_zeros needs a first value of zero, {name} has {book.centroids[0]:.4g}.")


def _share(layer: nn.Module, book: Codebook) -> None:
    weight, zero = weight_of(layer), bool(book.centroids[0] == 0)
    codes = as_tensor(book.codes).to(weight.device, copy=True)
    sharing = Shared(codes, len(book.centroids), zero=zero)
    parametrize.register_parametrization(layer, "weight", sharing, unsafe=True)
    with torch.no_grad():
        # The same parameter, which is (k,) now: torch has put means in place.
        weight.set_(as_tensor(book.centroids).to(weight, copy=True))  # type: ignore[call-overload]


def _snap(layer: nn.Module, book: Codebook, *, keep_zeros: bool) -> None:
    weight = weight_of(layer)
    codes = as_tensor(book.codes).to(weight.device)
    values = as_tensor(book.centroids).to(weight, copy=True)
    fixed = codes == 0 if keep_zeros else None
    sharing = Snapped(values, zero=bool(book.centroids[0] == 0), fixed=fixed)
    with torch.no_grad():
        # Rounding may have been to other values than the nearest.
        others = sharing.codes_of(weight) != codes
        weight.copy_(torch.where(others, _looked_up(codes, values), weight))
    _register(layer, sharing)


def _make_ternary(layer: nn.Module, threshold: float) -> None:
    weight = weight_of(layer)
    sharing = Snapped(weight.detach().new_zeros(3), zero=True, threshold=threshold)
    codes = sharing.codes_of(weight)
    with torch.no_grad():
        sharing.centroids.copy_(Shared(codes, 3).right_inverse(weight))
        sharing.centroids[0] = 0.0
    _register(layer, sharing)


def _register(layer: nn.Module, sharing: Snapped) -> None:
    sharing.centroids.requires_grad_(weight_of(layer).requires_grad)
    parametrize.register_parametrization(layer, "weight", sharing)


def _with_zero(values: Tensor, zero: bool) -> Tensor:
    """The values, of which the first is zero whatever an optimiser made of it."""
    return pad(values[1:], (1, 0)) if zero else values


def _nearest(weight: Tensor, values: Tensor) -> Tensor:
    """Numbers of the nearest values."""
    ordered, order = values.sort(stable=True)
    bounds = (ordered[1:] + ordered[:-1]) / 2
    if len(bounds) >= _FEW:
        places = torch.bucketize(weight, bounds)
    else:
        places = torch.zeros_like(weight, dtype=torch.uint8)
        for bound in bounds:
            places += weight > bound
    return _taken(order.byte(), places)


class _LookUp(torch.autograd.Function):
    """Values by their codes; gradients to the values, and straight through to the weight below."""

    @staticmethod
    def forward(
        ctx: Context, codes: Tensor, values: Tensor, weight: Tensor | None, slopes: Tensor | None
    ) -> Tensor:
        ctx.codes, ctx.slopes, ctx.k = codes, slopes, len(values)
        return _taken(values, codes)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        below = sums = None
        if ctx.needs_input_grad[1]:
            sums = _sums(ctx.codes, gradient, ctx.k).to(gradient)
        if ctx.needs_input_grad[2]:
            below = gradient if ctx.slopes is None else gradient * _taken(ctx.slopes, ctx.codes)
        return None, sums, below, None


def _looked_up(
    codes: Tensor, values: Tensor, weight: Tensor | None = None, slopes: Tensor | None = None
) -> Tensor:
    return _LookUp.apply(codes, values, weight, slopes)  # type: ignore[no-any-return, no-untyped-call]


def _taken(values: Tensor, codes: Tensor) -> Tensor:
    # Selecting by int32 takes a third of the time of values[codes].
    return values.index_select(0, codes.flatten().int()).view(codes.shape)


def _sums(codes: Tensor, numbers: Tensor, k: int) -> Tensor:
    """Sums of the numbers of each code."""
    # In single precision, sums of half a million numbers are good for three digits; MPS has no double.
    wide = numbers.float() if numbers.device.type == "mps" else numbers.double()
    return torch.bincount(codes.flatten(), wide.flatten(), k)
