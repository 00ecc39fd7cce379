"""``prune``: every pruning method of the field by one function, one vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from pysolve.compressed import Compressed
from pysolve.layer.masks import PerLayer
from pysolve.methods.channels import METHODS as OF_CHANNELS
from pysolve.methods.channels import prune_channels
from pysolve.methods.goal import checked
from pysolve.methods.selected import Job
from pysolve.methods.single_weights import METHODS as OF_WEIGHTS
from pysolve.methods.single_weights import prune_weights
from pysolve.methods.sparse_layout import LAYOUTS

METHODS = (*OF_WEIGHTS, *OF_CHANNELS)
REFITS = ("none", "bias", "sequential")
# Methods whose choice counts on the refit.
_REFITTING = ("obs", "elimination", "lasso")


def prune(
    model: nn.Module | Compressed,
    batches: Iterable[Any] | None = None,
    *,
    method: str = "magnitude",
    amount: PerLayer | None = None,
    threshold: PerLayer | None = None,
    sensitivity: PerLayer | None = None,
    pattern: str | None = None,
    target: Mapping[str, float] | None = None,
    scope: str = "local",
    norm: float = 2,
    refit: str | None = None,
    layout: str = "auto",
    ignore: Sequence[str] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Prune a network by any method of the field: single weights, or whole channels.

    Single weights become zero, and layers run sparse where that is faster and smaller. Channels are removed,
    so that the network is dense and physically smaller, as with ``compress``.

    Exactly one of ``amount``, ``threshold``, ``sensitivity``, ``pattern`` and ``target`` says how many.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed. Weights of its Linear layers and convolutions are pruned; biases are not. Sparse layers
        become dense ones first, with their zeros.
    batches : iterable of batches, optional
        As ``compress`` takes them, unlabelled; needed for "wanda", "obs" and to refit. Some samples are held
        back: layers are timed and the report's divergence is taken on them.
    method : str
        For weights "magnitude", "random", "std", "wanda" or "obs"; for channels "ln", "activation", "nisp",
        "elimination" or "lasso". A weight is judged by |w|, nothing, |w| / std(w of the layer),
        |w_ij| sqrt(E[x_j²]), or what the layer's outputs lose without it when the others make up for it
        (optimal brain surgeon). A channel by the norm ‖w_c‖ of the weights that write it, by E[x_c], by its
        importance propagated back from the network's outputs, or as ``compress`` selects.
    amount : float or {layer: float}
        Share of the weights, or of the channels, that goes; with a mapping, layers without an entry keep all.
    threshold : float or {layer: float}
        What scores below it goes: |w| for "magnitude", and the channels' scores. One channel stays.
    sensitivity : float or {layer: float}
        |w| below this many standard deviations of the layer's weights goes; for "std".
    pattern : str
        As "2:4": of every 4 consecutive inputs of an output 2 stay.
    target : {"params": float or int}
        Parameters that are not zero, biases and all, in the whole network: a share or a number. For channels
        also "macs" and "bytes", as ``compress`` has them.
    scope : "local" or "global"
        The share of each layer, or of all together, which for "obs" is shared out by each layer's curve of
        error against weights. Channels' scores count as shares of their site's mean.
    norm : float
        n of "ln": 1, 2 or infinity.
    refit : "none", "bias" or "sequential"
        What becomes of the other weights: nothing; biases that restore each output's mean; or least squares,
        layer after layer from the front, on the pruned network's inputs and the original's outputs. Default:
        "sequential" for "obs", "elimination" and "lasso", otherwise "none".
    layout : "auto", "dense", "csr" or "mask"
        "dense": zeros are stored and multiplied. "csr": each Linear and Conv2d becomes a ``SparseLinear``
        or ``SparseConv2d``. "auto": only where that takes fewer bytes and at most nine tenths of the dense
        layer's time; without batches none does. "mask": dense layers whose zeros stay zero in training
        (``remove_masks`` makes them ordinary ones).
    ignore : sequence of str
        Layers to leave alone: names, or patterns as ``re:…``.
    evaluate : callable, optional
        From a network to a score, for the report.
    seed : int
        Of random scores and of the choice of rows.
    progress : bool
        Show progress bars, with the time left, when on a terminal.

    Returns
    -------
    Compressed
        Its report says for each layer how it runs, and why.
    """
    model, _ = checked(model)
    refit = refit or ("sequential" if method in _REFITTING else "none")
    given = {
        "amount": amount,
        "threshold": threshold,
        "sensitivity": sensitivity,
        "pattern": pattern,
        "target": target,
    }
    wanted = {name: value for name, value in given.items() if value is not None}
    _check(method, refit, layout, wanted, batches is None)
    if method in OF_CHANNELS and batches is not None:
        return prune_channels(
            model,
            batches,
            method=method,
            wanted=wanted,
            norm=norm,
            scope=scope,
            refit=refit,
            ignore=ignore,
            evaluate=evaluate,
            seed=seed,
            progress=progress,
        )
    job = Job(method, wanted, scope, refit, seed, progress)
    return prune_weights(model, batches, job, layout=layout, ignore=ignore, evaluate=evaluate)


def _check(method: str, refit: str, layout: str, wanted: Mapping[str, Any], blind: bool) -> None:
    """What can be told to be wrong before any work."""
    for what, given, known in (
        ("method", method, METHODS),
        ("refit", refit, REFITS),
        ("layout", layout, LAYOUTS),
    ):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(known)}.")
    if len(wanted) != 1:
        names = "amount, threshold, sensitivity, pattern and target"
        raise ValueError(f"give exactly one of {names}; got {' and '.join(wanted) or 'none'}.")
    if method in _REFITTING and refit != "sequential":
        raise ValueError(f"method={method!r} refits by itself: leave refit out, got {refit!r}.")
    (what,) = wanted
    if method == "obs" and what not in ("amount", "pattern", "target"):
        raise ValueError(f"obs takes an amount, a pattern or a target, got a {what}.")
    if method in OF_CHANNELS and refit == "bias":
        raise ValueError('refit="bias" is for single weights; channels take "none" or "sequential".')
    if method in OF_CHANNELS and layout not in ("auto", "dense"):
        raise ValueError(f"layout={layout!r} is for single weights; networks without channels are dense.")
    if blind and (refit != "none" or method in ("wanda", *OF_CHANNELS)):
        raise ValueError(f"method={method!r} with refit={refit!r} needs batches: unlabelled inputs.")
