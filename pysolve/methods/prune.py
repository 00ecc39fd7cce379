"""``prune``: every pruning method of the field by one function: single weights or channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.distributed import ProcessGroup

from pysolve.compressed import Compressed
from pysolve.correlations import Array
from pysolve.errors import PysolveError, exactly_one, one_of
from pysolve.layer.masks import PerLayer, count_left
from pysolve.methods.channel_scores import SCORES as OF_CHANNELS
from pysolve.methods.channel_scores import keep_above, keep_by_share, scores_of
from pysolve.methods.compress import made
from pysolve.methods.goal import (
    Length,
    Memory,
    Options,
    Target,
    check_distill,
    check_share,
    check_target,
    network_of,
    options_for,
    prepared,
)
from pysolve.methods.kinds.channels import Channels
from pysolve.methods.kinds.zeros import SCORES as OF_WEIGHTS
from pysolve.methods.kinds.zeros import Zeros
from pysolve.methods.layout import check_layout, lay_out
from pysolve.methods.price import price, probe
from pysolve.methods.rebuild import REFITS, rebuild
from pysolve.methods.result import finish
from pysolve.methods.sizes import by_keep, check_free, within
from pysolve.methods.streams import in_principal_axes
from pysolve.methods.studied import studied
from pysolve.methods.study import Clock, Study
from pysolve.methods.weights import reasons, weights_of
from pysolve.nn.batches.items import Transform
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import Evaluate, parameters
from pysolve.nn.progress import one_bar
from pysolve.nn.running import Batch, Device, Ignored
from pysolve.nn.threads import one_blas_thread
from pysolve.plan import Site

METHODS = (*OF_WEIGHTS, "obs", *OF_CHANNELS, "elimination", "lasso")
LAYOUTS = ("auto", "dense", "sparse", "masked")
SCOPES = ("local", "global")
# Methods whose choice counts on the refit.
_REFITTING = ("obs", "elimination", "lasso")
# What says how many, beside what all take.
_TAKES = {
    "magnitude": ("amount", "threshold", "pattern", "target"),
    "std": ("amount", "sensitivity", "pattern", "target"),
    "ln": ("amount", "threshold", "target"),
    "elimination": ("amount", "target"),
    "lasso": ("amount", "target"),
}


@dataclass(frozen=True, eq=False)
class _Goal:
    """What is asked for, checked.

    Parameters
    ----------
    method : str
    what : str
        Of "amount", "threshold", "sensitivity", "pattern" and "target", the one that is given.
    value : number, mapping or str
    scope, refit, layout : str
    norm : float
    distill : {option: value}
    """

    method: str
    what: str
    value: PerLayer | str | Target
    scope: str
    refit: str
    layout: str
    norm: float
    distill: Mapping[str, object] = field(default_factory=dict)

    @property
    def of_channels(self) -> bool:
        """Whether whole channels are removed."""
        return self.method in METHODS[len(OF_WEIGHTS) + 1 :]

    @property
    def needs_data(self) -> bool:
        """Whether the network must run before anything is chosen or refitted."""
        return self.of_channels or self.refit != "none" or self.method in ("wanda", "obs")


@one_blas_thread
@one_bar
def prune(
    model: nn.Module | Compressed,
    batches: Iterable[Batch] | Study | None = None,
    *,
    method: str = "magnitude",
    amount: PerLayer | None = None,
    threshold: PerLayer | None = None,
    sensitivity: PerLayer | None = None,
    pattern: str | None = None,
    target: Target | None = None,
    scope: str = "local",
    norm: float = 2,
    refit: str | None = None,
    layout: str = "auto",
    distill: Length = 0,
    ignore: Sequence[Ignored] = (),
    evaluate: Evaluate | None = None,
    divergence: Divergence = kl_divergence,
    memory: Memory = None,
    transform: Transform | None = None,
    latency: bool = True,
    process_group: ProcessGroup | None = None,
    device: Device = None,
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
        As ``compress`` takes them, unlabelled; needed for "wanda", "obs", for channels and to refit. Some
        samples are held out: layers are timed and the report's divergence is taken on them.
    method : str
        For weights "magnitude", "random", "std", "wanda" or "obs"; for channels "ln", "activation", "nisp",
        "elimination" or "lasso". A weight is judged by ``|w|``, nothing, ``|w| / std(w)`` of the layer,
        ``|w_ij| sqrt(E[x_j²])``, or what the layer's outputs lose without it when the others compensate
        (optimal brain surgeon). A channel by the norm ‖w_c‖ of the weights that write it, by E[x_c], by its
        importance propagated back from the network's outputs, or as ``compress`` selects.
    amount : float or {layer: float}
        Share of the weights, or of the channels, that goes; with a mapping, layers without an entry keep all.
        One share for all sites leaves streams whole that norms read, unless they are chosen by "elimination".
    threshold : float or {layer: float}
        What scores below it goes: ``|w|`` for "magnitude", and the channels' scores. One channel stays.
    sensitivity : float or {layer: float}
        ``|w|`` below this many standard deviations of the layer's weights goes; for "std".
    pattern : str
        As "2:4": of every 4 consecutive inputs of an output 2 stay.
    target : {"params": float or int}
        Parameters that are not zero, biases and all, in the whole network: a share or a number. For channels
        also "macs", "bytes" and "ms", as ``compress`` has them.
    scope : "local" or "global"
        The share of each layer, or of all together, which for "obs" is shared out by each layer's curve of
        error against weights. Channels' scores count as shares of their site's mean.
    norm : float
        n of "ln": 1, 2 or infinity.
    refit : "none", "bias", "independent" or "sequential"
        What becomes of the other weights: nothing; biases that restore each output's mean; or least squares
        on the original's outputs, each layer on the original's inputs, or layer after layer from the front on
        the pruned network's. Default: "sequential" for "obs", "elimination" and "lasso", otherwise "none".
    layout : "auto", "dense", "sparse" or "masked"
        "dense": zeros are stored and multiplied. "sparse": each Linear and Conv2d becomes a ``SparseLinear``
        or ``SparseConv2d``. "auto": only where that takes fewer bytes and at most nine tenths of the dense
        layer's time; without batches none does. "masked": dense layers whose zeros stay zero in training
        (``remove_masks`` makes them ordinary ones).
    distill : number of seconds, or {"seconds" or "epochs": number, …}
        Label-free matching afterwards, as ``compress`` has it; zeros stay zero.
    ignore : sequence of str, types or modules
        Layers to leave alone: names, patterns as ``re:…``, types, or the layers themselves.
    evaluate : callable, optional
        From a network to a score, for the report.
    seed : int
        Of random scores, of the choice of rows and of distillation.
    progress : bool
        Show progress bars, with the time left, when on a terminal.
    memory, transform, latency, process_group, device
        As ``compress`` has them.

    Returns
    -------
    Compressed
        Its report says for each layer how it runs, and why.

    Raises
    ------
    PysolveError
        No weight or channel can be removed; a target that cannot be reached.
    TypeError, ValueError
        Arguments that make no sense, before any work: unknown words by name.

    References
    ----------
    B. Hassibi, D. Stork, Optimal brain surgeon, 1993 ("obs"). M. Sun et al., Wanda, 2024. R. Yu et al., NISP,
    2018.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> pruned = ps.prune(model, batches, method="obs", amount=0.75, layout="dense", latency=False)
    >>> float((pruned.model[0].weight == 0).float().mean())
    0.75
    """
    before, given = network_of(model)
    told = {"amount": amount, "threshold": threshold, "sensitivity": sensitivity, "pattern": pattern}
    what = exactly_one(**told, target=target)
    value = {**told, "target": target}[what]
    assert value is not None
    refit = refit or ("sequential" if method in _REFITTING else "none")
    goal = _Goal(method, what, value, scope, refit, layout, norm, check_distill(given, distill))
    _check(goal, batches is None)
    # Shares of all channels are of those that the user's own modules have.
    apart = not goal.of_channels or goal.what == "target"
    options = options_for(
        given, ignore, divergence, memory, seed, progress, evaluate, transform, latency, process_group, device
    )
    network, options = prepared(given, options, apart=apart)
    if goal.of_channels:
        assert batches is not None
        return _channels(before, network, batches, goal, options)
    return _weights(before, network, batches, goal, options)


def _weights(
    before: nn.Module | Compressed,
    network: nn.Module,
    batches: Iterable[Batch] | None,
    goal: _Goal,
    options: Options,
) -> Compressed:
    """Single weights become zero, others are refitted, layers run sparse where that is faster and smaller."""
    # Matching the original would fill the zeros of recurrent layers, which no mask holds.
    weights, left = weights_of(network, options.ignore, recurrent=not goal.distill)
    if not weights:
        why = f"no Linear layer or convolution has its own weight{reasons(left, options.ignore)}"
        raise PysolveError(f"there is nothing to prune: {why}.")
    wanted = {goal.what: goal.value}
    if goal.what == "target":
        wanted = {"amount": _amount(network, [w.numel() for w in weights.values()], goal)}
    _check_names(wanted, weights)
    zeros = Zeros(goal.method, scope=goal.scope, seed=options.seed, **wanted)  # type: ignore[arg-type]
    gather = goal.method == "wanda" or (goal.method == "obs" and goal.scope == "global")
    found = studied(
        network,
        batches,
        options,
        weights=weights,
        gather=gather,
        trace=goal.needs_data or bool(goal.distill),
        left=left,
    )
    clock = Clock()
    chosen = zeros.choose(found)
    rebuilt = rebuild(found, chosen, goal.refit)
    clock.stage("refit")
    apart = [name for name in weights if not found.fits(name)] if goal.needs_data else []
    laid = lay_out(found, rebuilt, goal.layout)
    clock.stage("apply")
    dense = [line.name for line in laid.lines if line.layout == "dense"] if goal.distill else []
    return finish(
        before,
        found,
        laid,
        clock,
        target=goal.value if goal.what == "target" else None,  # type: ignore[arg-type]
        samples=rebuilt.samples,
        notes=(*rebuilt.notes, *([f"{', '.join(apart)}: not refitted"] if apart else [])),
        distill=goal.distill,
        zeros=dense,
    )


def _channels(
    before: nn.Module | Compressed,
    network: nn.Module,
    batches: Iterable[Batch],
    goal: _Goal,
    options: Options,
) -> Compressed:
    """Whole channels, physically, through the same steps as ``compress``."""
    found = studied(network, batches, options, sites=True)
    check_free(found)
    found = in_principal_axes(found) if goal.method == "elimination" and goal.refit != "none" else found
    clock = Clock()
    scores = scores_of(found, goal.method, goal.norm) if goal.method in OF_CHANNELS else None
    kind = Channels(goal.method if scores is None else scores)
    menus, target = kind.menus(found), None
    if goal.what == "target":
        target, where = _as_target(goal.value), probe(found, menus)
        sized = within(found, price(found, menus, where), target, where)
    else:
        sized = by_keep(found, menus, _kept(found, goal, scores))
        whole = [site.name for site in found.free if site.norms and site not in sized.keep]
        said = f"{', '.join(whole)}: all channels stay, for norms read them; name them, or give a target"
        sized = replace(sized, notes=(*sized.notes, *([said] if whole else [])))
    clock.stage("measure")
    return made(before, found, sized, clock, target, goal.refit, goal.distill)


def _kept(
    found: Study, goal: _Goal, scores: Mapping[Site, Array] | None
) -> float | Mapping[str | Site, float]:
    """How many channels, or which share of them, every site keeps.

    Of a stream through norms, whose channels matter for all that reads it, scores take some only where told.
    """
    value = goal.value
    if scores is not None and not isinstance(value, Mapping):
        scores = {site: one for site, one in scores.items() if not site.norms}
    if goal.what == "threshold" and scores is not None:
        return keep_above(scores, value)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {name: 1.0 - float(share) for name, share in value.items()}
    if goal.scope == "global" and scores is not None:
        return keep_by_share(scores, float(value))
    if scores is not None:
        return dict.fromkeys(scores, 1.0 - float(value))
    return 1.0 - float(value)


def _check(goal: _Goal, blind: bool) -> None:
    """What can be told to be wrong before any work."""
    one_of("method", goal.method, METHODS)
    one_of("refit", goal.refit, REFITS)
    one_of("scope", goal.scope, SCOPES)
    check_layout(goal.layout, ("auto", "dense") if goal.of_channels else LAYOUTS, f"method={goal.method!r}")
    if goal.method in _REFITTING and goal.refit != "sequential":
        raise ValueError(f"method={goal.method!r} refits by itself: leave refit out, got {goal.refit!r}.")
    if goal.what == "target":
        check_target(goal.value, None if goal.of_channels else ("params",), "single weights are zeros")
    takes = _TAKES.get(goal.method, _TAKES["ln"] if goal.of_channels else ("amount", "pattern", "target"))
    if goal.what not in takes:
        raise ValueError(f"method={goal.method!r} takes {' or '.join(takes)}, got {goal.what}.")
    numbers = goal.value if isinstance(goal.value, Mapping) else {"": goal.value}
    for name, number in numbers.items() if goal.what == "amount" else ():
        check_share(f"amount of {name}" if name else "amount", number)
    each = isinstance(goal.value, Mapping)
    if goal.scope == "global" and goal.what != "target" and (goal.what != "amount" or each):
        got = f"{goal.what} for each" if each else goal.what
        raise ValueError(f"scope='global' takes one amount for all together, got {got}.")
    if goal.scope == "global" and goal.method in ("elimination", "lasso") and goal.what == "amount":
        raise ValueError(
            f"method={goal.method!r} has no scores to compare across sites: give scope='local', or a target, "
            "under which sites share out what is removed."
        )
    if blind and (goal.needs_data or goal.distill):
        raise ValueError(
            f"method={goal.method!r} with refit={goal.refit!r} needs batches: unlabelled inputs."
        )


def _check_names(wanted: Mapping[str, object], weights: Mapping[str, object]) -> None:
    """Refuse names of layers that have no weight to prune."""
    for what, value in wanted.items():
        if isinstance(value, Mapping) and (unknown := set(value) - set(weights)):
            raise ValueError(f"{what} names {sorted(unknown)}; layers with weights: {', '.join(weights)}.")


def _as_target(value: object) -> Target:
    assert isinstance(value, Mapping)
    return value


def _amount(model: nn.Module, sizes: Sequence[int], goal: _Goal) -> float:
    """The share of the weights that must be removed for so many parameters to be left."""
    total, target = parameters(model), _as_target(goal.value)
    wanted = target["params"] if target["params"] > 1 else target["params"] * total
    left = int(wanted) - (total - sum(sizes))
    if left < 0:
        raise PysolveError(
            f"{total - sum(sizes):,} of the {total:,} parameters are no weights that can be pruned: a target "
            f"of {target['params']:,} cannot be reached."
        )
    parts = sizes if goal.scope == "local" else [sum(sizes)]
    gone = max(0, sum(sizes) - left)
    # Every layer rounds on its own: a little more must be removed.
    while gone < sum(sizes) and sum(count_left(gone / sum(sizes), part) for part in parts) > left:
        gone += 1
    return gone / max(1, sum(sizes))
