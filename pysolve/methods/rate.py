"""One price of a bit for all weights of a network, found so that its file takes so many bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pysolve.correlations import Indices
from pysolve.errors import PysolveError
from pysolve.forms import Codebook, Integers
from pysolve.methods.goal import Options
from pysolve.methods.kinds.codes import (
    SCHEMES,
    Codes,
    bare_parameters,
    coded_bytes,
    codes_for,
    estimate,
    is_many,
    rounded,
)
from pysolve.methods.menu import Chosen
from pysolve.methods.price import divergences, probe_of_codes
from pysolve.methods.rebuild import Rebuilt, independent, rebuild
from pysolve.methods.studied import studied
from pysolve.methods.study import Study
from pysolve.methods.tasks import left_of, names_of, task_of, tasks_of, values_of
from pysolve.methods.weights import Skipped, reasons, weights_of
from pysolve.nn.evaluate import nbytes
from pysolve.nn.layer_kinds import EMBEDDINGS, WEIGHTED
from pysolve.nn.running import Batch, find_matching
from pysolve.plan import Site

# The share of the file's bytes that may be left unused, walks to come so close, and the share that is near.
_CLOSE, _WALKS, _NEAR = 0.03, 6, 0.05
# Bytes of a file's record and tables, about.
_RECORD = 1000
# Logarithms of the least factors of a price that a search tries, at first and later, and of the greatest; the
# least power of a price by which sizes fall; the factor from the start after which equal sizes are the most.
_NEAREST, _FARTHEST, _FLAT, _TELLING = (0.06, 0.18), 3.4, 0.02, 16.0
# The power of a price by which bytes fall, before anything is known of it.
_POWER = 0.5
# A price at which each weight takes one value, and how many times what is no weight a file may have for that
# to be looked at before all else.
_DEAREST, _SMALL = 1e30, 2
# Calls of a search at least after the first one that gave few enough bytes.
_SINCE = 2


@dataclass(frozen=True, eq=False)
class Subject:
    """A studied network whose weights are to take few bits.

    Parameters
    ----------
    study : Study
    small : {state-dict name: tensor}
        Biases, norms and their statistics, which are rounded to bfloat16.
    kind : Codes
    """

    study: Study
    small: Mapping[str, Tensor]
    kind: Codes


@dataclass(frozen=True, eq=False)
class Coded:
    """A network in few bits.

    Parameters
    ----------
    rebuilt : Rebuilt, optional
        None where only the price is known.
    lam : float, optional
        What a bit cost.
    bytes : int, optional
        What its file was found to take.
    power : float
        Of the price, by which the bytes fall about there.
    """

    rebuilt: Rebuilt | None
    lam: float | None = None
    bytes: int | None = None
    power: float = _POWER


def subject_of(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    options: Options,
    kind: Codes,
    *,
    to_bytes: bool,
    gather: bool = False,
    sites: bool = False,
) -> Subject:
    """Study a network whose weights are to take few bits; for bytes, what errors of each do to its outputs.

    Raises
    ------
    PysolveError
        No weight can take this form.
    """
    # Rows of integers would have no place in a file: each row has its own values.
    integers = SCHEMES[kind.scheme] == "int"
    kinds = WEIGHTED if integers else (*WEIGHTED, *EMBEDDINGS)
    weights, left = weights_of(model, options.ignore, kinds, recurrent=kind.scheme == "codebook")
    if kind.scheme == "int8-dynamic":
        modules = dict(model.named_modules())
        for name in [name for name in weights if type(modules[name]) is not nn.Linear]:
            kind_of = type(modules[name]).__name__
            left.append(Skipped(name, f"a weight of {kind_of}", weights.pop(name).numel()))
    if not weights:
        why = f"no layer for {kind.scheme} has its own weight{reasons(left, options.ignore)}"
        raise PysolveError(f"there is nothing to quantise: {why}.")
    bare = {} if integers else dict(bare_parameters(model, find_matching(model, options.ignore)))
    bare = {name: value for name, value in bare.items() if name not in weights}
    many = {name: value for name, value in bare.items() if is_many(value)}
    own = f"shared values of their own, for they are no layer's weight: {', '.join(many)}"
    found = studied(
        model,
        batches,
        options,
        weights={**weights, **many},
        sites=sites,
        gather=to_bytes or gather,
        left=[one for one in left if one.name not in bare],
        notes=[own] if many else [],
    )
    small = {name: value for name, value in bare.items() if name not in many}
    subject = Subject(found, small, replace(kind, bare=frozenset(many)))
    return priced(replace(subject, kind=codes_for(found, subject.kind))) if to_bytes else subject


def within_bytes(
    subject: Subject,
    target: float,
    measure: Callable[[Rebuilt], int],
    *,
    keep: Mapping[Site, Indices] | None = None,
    start: Coded | None = None,
    rough: bool = False,
) -> Coded:
    """The network in few bits whose file takes at most ``target`` bytes, and few less.

    Errors of weights count by what they do to the network's outputs; a bit costs the same in each.

    Parameters
    ----------
    subject : Subject
    target : float
    measure : callable
        Bytes of the file.
    keep : {Site: (k,) int array}, optional
        Channels that stay of the sites that lose some.
    start : Coded, optional
        What came near the target.
    rough : bool
        Come near the target from either side, in one or two walks without second fits.

    Returns
    -------
    Coded
        With more than ``target`` bytes, those of one value for each weight, where no price makes the file so
        small.
    """
    found, names, channels = dict[int, Coded](), [*subject.study.weights], Chosen(keep or {})

    def size(lam: float) -> float:
        done = start
        if done is None or done.rebuilt is None or done.lam != lam:
            made = rebuild(subject.study, channels | subject.kind.at(lam, names), passes=int(not rough))
            done = Coded(shortened(subject, made), lam, power=power)
        assert done.rebuilt is not None
        bytes = measure(done.rebuilt)
        found[bytes] = replace(done, bytes=bytes)
        return bytes

    guess, power = (None, _POWER) if start is None else (start.lam, start.power)
    if not rough and is_small(subject, target) and (least := size(_DEAREST)) > target:
        return found[int(least)]
    if guess is None:
        tasks = tasks_of(subject.study, channels | subject.kind.at(1.0, names))
        tasks = {name: subject.kind.prepared(task) for name, task in tasks.items()}
        kind = replace(subject.kind, pruned={})

        seen: list[tuple[float, float]] = []

        def about(lam: float) -> float:
            seen.append((lam, sum(estimate(t, kind.at(lam, [n]).fits[n]) for n, t in tasks.items())))
            return seen[-1][1]

        guess = price_for(max(target - beside(subject), 0.2 * target), about) or 1.0
        power = _power(seen)
    if rough:
        first = size(guess)
        if abs(first / target - 1) > _NEAR:
            size(_next(target, [(guess, first)], power))
        return found[min(found, key=lambda bytes: abs(bytes - target))]
    price_for(target, size, guess, steps=_WALKS, close=_CLOSE, power=power)
    if min(found) > target:
        return found[int(size(_DEAREST))]
    return found[max(bytes for bytes in found if bytes <= target)]


def least_bytes(subject: Subject, measure: Callable[[Rebuilt], int], keep: Mapping[Site, Indices]) -> int:
    """Bytes of the file with one value for each weight, and these channels of the sites that lose some."""
    codes = subject.kind.at(_DEAREST, [*subject.study.weights])
    return measure(shortened(subject, rebuild(subject.study, Chosen(keep) | codes)))


def is_small(subject: Subject, target: float) -> bool:
    """Whether so few bytes may be out of reach for what is no weight."""
    return target < _SMALL * beside(subject)


def about_bytes(subject: Subject, rebuilt: Rebuilt) -> int:
    """Bytes of the file of a rebuilt network, about: what entropy coding takes, and the rest."""
    forms = [fit.form for fit in rebuilt.fits.values() if isinstance(fit.form, Codebook | Integers)]
    return int(sum(map(coded_bytes, forms)) + beside(subject))


def shortened(subject: Subject, rebuilt: Rebuilt) -> Rebuilt:
    """With biases, norms and their statistics rounded to bfloat16."""
    new = {name: rounded(rebuilt.values.get(name, value)) for name, value in subject.small.items()}
    return replace(rebuilt, values={**rebuilt.values, **new})


def price_for(
    wanted: float,
    size: Callable[[float], float],
    lam: float = 1e-6,
    *,
    steps: int = 12,
    close: float = 0.02,
    power: float = _POWER,
) -> float | None:
    """The price of a bit at which weights take ``wanted`` bytes or a little less; None where none does.

    Parameters
    ----------
    wanted : float
    size : callable
        Bytes at a price, which fall with it.
    lam : float
        Where to begin.
    steps : int
        Calls of ``size``; up to as many again where few enough bytes were found late or never.
    close : float
        Share of the bytes that may be left.
    power : float
        Of the price, by which the bytes fall where it begins.
    """
    seen: list[tuple[float, float]] = []
    best: tuple[float, float] | None = None
    start, since = lam, 0
    for tries in range(2 * steps):
        since += best is not None
        if tries >= steps and since > _SINCE:
            break
        found = size(lam)
        seen.append((lam, found))
        if found <= wanted:
            # Where no bytes are added any more, codebooks have all their values.
            flat = best is not None and found < (1 + close) * best[1]
            full = since == tries and flat and _TELLING * lam < start
            best = (lam, found)
            if full or found >= (1 - close) * wanted:
                break
        lam = _next((1 - close / 2) * wanted, seen, power)
    return None if best is None else best[0]


def priced(subject: Subject, keep: Mapping[Site, Indices] | None = None) -> Subject:
    """The subject with the divergence of the outputs for a unit of every weight's objective, measured.

    Parameters
    ----------
    subject : Subject
    keep : {Site: (k,) int array}, optional
        Channels that stay: what errors do depends on how many there are.
    """
    study, kind = subject.study, subject.kind
    if study.calibration is None:
        return subject
    base, left = independent(study, Chosen(keep or {})), left_of(study, keep or {})
    where = probe_of_codes(study, len(study.weights), base.values if keep else {})
    state, weights, losses = study.model.state_dict(), [*study.weights], dict[str, float]()

    def values(number: int) -> Mapping[str, Tensor]:
        name = weights[number]
        task = task_of(study, left, name, prior=base.fits.get(name))
        fit = kind.trial(task)
        losses[name] = kind.loss(task, fit)
        return values_of(study, state, left, name, fit)

    names = [[*names_of(study, name)] for name in weights]
    found = {weights[number]: one for number, one in divergences(study, names, values, where)}
    losses = {name: one for part in study.options.ranks.all(losses) for name, one in part.items()}
    return replace(subject, kind=kind.priced(losses, found))


def beside(subject: Subject) -> float:
    """Bytes of a network's file that are no weights in few bits, about."""
    weights = sum(weight.nbytes for weight in subject.study.weights.values())
    # Halves of what is rounded to bfloat16.
    return (nbytes(subject.study.model) - weights) / 2 + _RECORD


def _power(seen: Sequence[tuple[float, float]]) -> float:
    """The power of the price by which bytes fell between the last two calls of a search."""
    if len(seen) < 2 or seen[-1][0] == seen[-2][0]:
        return _POWER
    (lam, size), (other, before) = seen[-1], seen[-2]
    return math.log(max(before, 1.0) / max(size, 1.0)) / math.log(lam / other)


def _next(wanted: float, seen: Sequence[tuple[float, float]], power: float) -> float:
    """A price between those that are known, or beyond them, the farther the more were tried."""
    large, small = ([point for point in seen if (point[1] > wanted) == more] for more in (True, False))
    if large and small:
        # Sizes fall about as a power of the price; the middle where they do not.
        low, high = large[-1], small[-1]
        span = math.log(low[1] / max(high[1], 1e-3))
        bent = span <= 0 or (seen[-1][1] > wanted) == (seen[-2][1] > wanted)
        share = 0.5 if bent else min(0.9, max(0.1, math.log(low[1] / wanted) / span))
        return float(low[0] * (high[0] / low[0]) ** share)
    (lam, size), tries = seen[-1], len(seen)
    power = power if tries < 2 else _power(seen)
    # Much of a file may be of one size at any price.
    step = abs(math.log(max(size, 1.0) / wanted)) / max(power, _FLAT)
    step = max(step, _NEAREST[min(tries - 1, 1)]) * (1 << min(max(tries - 2, 0), 4))
    return float(lam * math.exp(min(step, _FARTHEST) * (1 if large else -1)))
