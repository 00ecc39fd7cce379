"""What users ask of a network, checked before any work begins."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed import ProcessGroup

from pysolve.compressed import Compressed
from pysolve.errors import PysolveError, check_flags, path_of
from pysolve.forms import Sparse
from pysolve.nn.batches.items import Transform
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import Evaluate, score_of
from pysolve.nn.gathering.memory import Bound
from pysolve.nn.layers.attention import ignored_in_opened, opened
from pysolve.nn.layers.quantized import QuantWeight
from pysolve.nn.layers.runtime import without_sparse
from pysolve.nn.plain import check_plain, plain_network
from pysolve.nn.ranks import Ranks
from pysolve.nn.running import Device, Ignored, checked_device, device_of
from pysolve.nn.state import copy_of
from pysolve.plan import Plan, Site, check_listed
from pysolve.solve.budget import check_targets
from pysolve.training.distill import distill as teach
from pysolve.training.options import BaseOptions

Target = Mapping[str, float]
# For all sites, or by a site or the name of a writer of it.
Values = float | Mapping[str | Site, float]
# Seconds, or options of ``distill`` with seconds or epochs among them.
Length = float | Mapping[str, object]
# Bytes, or words such as "4GiB".
Memory = int | str | None


@dataclass(frozen=True)
class Options:
    """What every verb takes, besides its own arguments; ``options_for`` checks them.

    Parameters
    ----------
    ignore : sequence of str, types or modules
        Layers to leave alone: names, patterns as ``re:…``, types, or the layers themselves.
    divergence : callable
        From the original's and another output to how far they are apart, averaged over samples.
    memory : Bound, optional
        Of all that a call takes beyond the network; by default samples may take half of what is free.
    seed : int
    progress : bool
    evaluate : callable, optional
        From a network to a score.
    score : float, optional
        The original's.
    transform : callable, optional
        From an item of the user's batches to inputs of the network.
    latency : bool
        Whether both networks and their layers are timed.
    checkpoint : Path, optional
        Folder for sums, from which a killed run goes on.
    ranks : Ranks
        Processes that have the other batches.
    device : torch.device, optional
        Where to compute, if not where the network is.
    home : torch.device, optional
        Where the network is, and the result is to be.
    new_biases : bool
        Whether layers may be given a bias that they did not have.
    """

    ignore: Sequence[Ignored] = ()
    divergence: Divergence = kl_divergence
    memory: Bound | None = None
    seed: int = 0
    progress: bool = True
    evaluate: Evaluate | None = None
    score: float | None = None
    transform: Transform | None = None
    latency: bool = True
    checkpoint: Path | None = None
    ranks: Ranks = field(default_factory=Ranks)
    device: torch.device | None = None
    home: torch.device | None = None
    new_biases: bool = True


def options_for(
    network: nn.Module,
    ignore: Sequence[Ignored],
    divergence: Divergence,
    memory: Memory,
    seed: int,
    progress: bool,
    evaluate: Evaluate | None,
    transform: Transform | None = None,
    latency: bool = True,
    process_group: ProcessGroup | None = None,
    device: Device = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Options:
    """Options of a verb, checked; the original is evaluated before any other work.

    Raises
    ------
    LayerNotFoundError
        What is to be ignored matches no layer.
    TypeError, ValueError
        ``memory`` is no positive number, ``seed`` no whole one; ``evaluate`` returns none, or is no function;
        a pattern is no regular expression.
    """
    check_whole("seed", seed, 0, 2**63 - 1)
    check_flags(progress=progress, latency=latency)
    for what, function in (("divergence", divergence), ("evaluate", evaluate)):
        if not (callable(function) or (what == "evaluate" and function is None)):
            raise TypeError(f"{what} must be a function, got {function!r}.")
    # Layers themselves are those of the given network, not of the one that is studied.
    names = sorted(ignored_in_opened(network, ignore))
    bound = None if memory is None else Bound.of(bytes_in(memory), memory)
    folder = None if checkpoint is None else path_of("checkpoint", checkpoint)
    score = None if evaluate is None else score_of(evaluate, network)
    ranks, place, home = Ranks(process_group), checked_device(device), device_of(network)
    return Options(
        names,
        divergence,
        bound,
        int(seed),
        bool(progress) and ranks.rank == 0,
        evaluate,
        score,
        transform,
        latency,
        folder,
        ranks,
        place,
        home,
    )


def prepared(network: nn.Module, options: Options, *, apart: bool = True) -> tuple[nn.Module, Options]:
    """The network as it is studied, on the device, and what is to be ignored of it.

    ``apart``: with a layer for each projection of attention; otherwise these stay as they are, with their
    attention. A copy if it is elsewhere.
    """
    network = opened(network) if apart else network
    own = dict(network.named_modules(remove_duplicate=False))
    options = replace(options, ignore=[name for name in options.ignore if name in own])
    if options.device in (None, options.home):
        return network, options
    return copy_of(network).to(options.device), options


def at_home(network: nn.Module, options: Options) -> nn.Module:
    """The network where the given one is: a copy, if it is elsewhere."""
    if options.device in (None, options.home):
        return network
    return copy_of(network).to(options.home)


def bytes_in(memory: int | str) -> int:
    """A number of bytes, as an integer or in words: "4GiB", "500 MB".

    Raises
    ------
    TypeError, ValueError
        It is none, or not positive.
    """
    if not isinstance(memory, str):
        check_positive("memory", memory)
        return int(memory)
    words = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", memory.lower())
    try:
        count = float(words[1]) if words else 0.0
    except ValueError:
        count = 0.0
    if words is None or not 0 < count < math.inf:
        raise ValueError(f'memory must be bytes, or words such as "4GiB" or "500 MB", got {memory!r}.')
    return int(count * (1024 if words[3] else 1000) ** " kmgt".index(words[2] or " "))


def network_of(
    model: nn.Module | Compressed, *, dense: bool = True
) -> tuple[nn.Module | Compressed, nn.Module]:
    """What is given, without wrappers, and its network; with dense layers in the place of sparse ones.

    Raises
    ------
    TypeError
        What is given is no network.
    PysolveError
        Layers of it are integers; ``plain_network`` refuses it.
    """
    if isinstance(model, Compressed):
        check_plain(model.model)
        network = model.model
    else:
        network = model = plain_network(model)
    whole = [name for name, layer in network.named_modules() if isinstance(layer, QuantWeight)]
    if whole:
        raise PysolveError(
            f"{whole[0] or 'the network'} is a layer of integers, whose weights cannot be changed: call "
            "pysolve.nn.to_dense on the network first."
        )
    if not dense:
        return model, network
    if not isinstance(model, Compressed):
        plain = without_sparse(network)
        return plain, plain
    plans = [_with_values(plan) for plan in (*model.earlier, model.plan)]
    before = replace(model, model=without_sparse(network), plan=plans[-1], earlier=tuple(plans[:-1]))
    return before, before.model


def check_target(target: object, measures: Collection[str] | None = None, why: str = "") -> None:
    """Refuse a target that is no mapping of measures to numbers, or names others than ``measures``."""
    check_targets(target)
    assert isinstance(target, Mapping)
    if measures is not None and not set(target) <= set(measures):
        raise ValueError(f"{why}: the target may name {', '.join(measures)}, got {', '.join(target)}.")


def check_whole(what: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Refuse what is no whole number in a range."""
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or not least <= int(value) <= (most or math.inf):  # type: ignore[call-overload]
        span = f"{least} … {most}" if most else f"at least {least}"
        raise ValueError(f"{what} must be an integer of {span}, got {value!r}.")


def check_pattern(what: str, name: object) -> None:
    """Refuse a pattern ``re:…`` that is no regular expression."""
    try:
        re.compile(name[3:] if isinstance(name, str) and name.startswith("re:") else "")
    except re.error as error:
        raise ValueError(f"{name!r} in {what} is no regular expression: {error}.") from error


def _float(value: Real | np.number) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_positive(what: str, value: object) -> None:
    """Refuse what is no positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, Real | np.number):
        raise TypeError(f"{what} must be a number, got {type(value).__name__}.")
    if not 0 < _float(value) < math.inf:
        raise ValueError(f"{what} must be positive and finite, got {value}.")


def check_share(what: str, value: object) -> None:
    """Refuse what is no share in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, Real | np.number) or not 0 <= _float(value) < 1:
        raise ValueError(f"{what} must be in [0, 1), got {value!r}.")


def check_keep(keep: Values | None, lam: Values | None) -> None:
    """Refuse shares, numbers and penalties that make no sense, for all sites or by name."""
    for what, values in (("keep", keep), ("lam", lam)):
        for name, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            if value is None:
                continue
            full = f"{what} of {_shown(name)}" if name else what
            if what == "lam" or not name or isinstance(value, bool) or value != 0:
                check_positive(full, value)
            if what == "keep" and float(value) > 1 and float(value) != int(value):
                raise ValueError(f"{full} must be a share in (0, 1] or an integer, got {value}.")


def check_sites(sites: Sequence[Site], ignore: Collection[Ignored]) -> None:
    """Refuse what is no list of sites, and layers to ignore besides."""
    check_listed(sites)
    idle = [site.name for site in sites if site.pinned is None and not (site.writers and site.readers)]
    if idle:
        raise ValueError(f"a site needs layers that write its channels, and that read them, got {idle[0]}.")
    if len(ignore):
        raise ValueError("ignore is for sites that are looked for: take what must stay out of sites instead.")


def check_distill(model: nn.Module, distill: Length, extra: Collection[str] = ()) -> dict[str, object]:
    """Options of ``distill``, ``extra`` ones included; {} where nothing is to be trained.

    Raises
    ------
    TypeError, ValueError
        Not exactly one of seconds and epochs; unknown options; a network of which nothing can be trained.
    """
    if not isinstance(distill, Mapping):
        if distill == 0 and not isinstance(distill, bool):
            return {}
        distill = {"seconds": distill}
    options = dict(distill)
    known = {*signature(teach).parameters, *BaseOptions.__annotations__, *extra} - {
        "student",
        "teacher",
        "batches",
        "transform",
    }
    if unknown := options.keys() - known:
        raise ValueError(f"distill has no option {min(unknown)!r}; choose from {', '.join(sorted(known))}.")
    if len({"seconds", "epochs"} & options.keys()) != 1:
        raise ValueError(f"distill must name seconds or epochs, one of them, got {options}.")
    unit = "seconds" if "seconds" in options else "epochs"
    check_positive(f"distill in {unit}", options[unit])
    if unit == "epochs" and options[unit] != int(options[unit]):  # type: ignore[call-overload]
        raise ValueError(f"distill must be an integer number of epochs, got {options[unit]}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "distill trains the parameters that require a gradient, but none does: call "
            "model.requires_grad_(), or leave distill out."
        )
    return options


def plain_target(target: Target | None) -> dict[str, float] | None:
    """A target in Python's own numbers, for the report."""
    if target is None:
        return None
    return {m: float(v) if v <= 1 or v != int(v) else int(v) for m, v in target.items()}


def _with_values(plan: Plan) -> Plan:
    """The plan with dense weights instead of sparse forms, as far as these have the shapes before any cut."""
    if plan.steps:
        return plan
    sparse = {name: form for name, form in plan.forms.items() if isinstance(form, Sparse)}
    forms = {name: form for name, form in plan.forms.items() if name not in sparse}
    return replace(plan, values={**plan.values, **{n: f.dense() for n, f in sparse.items()}}, forms=forms)


def _shown(name: object) -> object:
    return name.name if isinstance(name, Site) else name
