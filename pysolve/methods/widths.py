"""Channels of a network that is to take few bytes: as many as leave its outputs closest to the original's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from pysolve.compressed import Compressed
from pysolve.correlations import Indices
from pysolve.errors import PysolveError
from pysolve.methods.kinds.channels import Channels
from pysolve.methods.layout import plan_of
from pysolve.methods.menu import Menu
from pysolve.methods.price import Probe, price, probe
from pysolve.methods.quantize import FEWEST, aim_of, file_of, out_of_reach
from pysolve.methods.rate import Coded, Subject, about_bytes, is_small, least_bytes, within_bytes
from pysolve.methods.result import distance
from pysolve.methods.sizes import Sized, sized, within
from pysolve.methods.study import Study
from pysolve.nn.cut.apply import apply
from pysolve.nn.divergence import or_infinite
from pysolve.nn.evaluate import parameters
from pysolve.plan import Site

# Bits a weight at which the search for a width begins, the factor between widths, and how many are tried.
_BITS, _WIDER, _WIDTHS = 2.0, 1.6, 5
# Samples at most, beside the selection set, that tell which width is best.
_SAMPLES = 4096
# Share of the parameters from which on all channels stay.
_WHOLE = 0.9


@dataclass(frozen=True, eq=False)
class Width:
    """A network with channels for a share of its parameters.

    Parameters
    ----------
    share : float
    sized : Sized
    divergence : float
        Of its outputs within about the bytes.
    start : Coded, optional
        What that was measured on.
    seconds : float
    cut : bool
        Whether its channels have been removed already.
    """

    share: float
    sized: Sized
    divergence: float = float("inf")
    start: Coded | None = None
    seconds: float = 0.0
    cut: bool = False

    @property
    def keep(self) -> dict[Site, Indices]:
        """Channels that stay of the sites that lose some."""
        return self.sized.keep


def chosen_width(
    before: nn.Module | Compressed,
    subject: Subject,
    original: nn.Module,
    size: int | None,
    share: float | None,
    *,
    cut: bool,
    loose: bool,
) -> Width | None:
    """Channels for a share of the parameters; without one, for the share that is best within so many bytes.

    ``cut`` and ``loose`` are those of ``file_of`` and ``aim_of``. None where all channels stay.

    Raises
    ------
    PysolveError
        The file is too large whatever stays.
    """
    if not subject.study.free:
        return None
    if size and share is None and is_small(subject, size):
        least = _smallest(before, subject, original, size, cut=cut, loose=loose)
        if least is not None:
            return least
    return _width(subject, size, share)


def _width(subject: Subject, size: int | None, share: float | None) -> Width | None:
    """Channels for a share of the parameters; without one, for the share that is best within the bytes."""
    start, study = time.perf_counter(), subject.study
    menus = Channels().menus(study)
    where = probe(study, menus)
    menus = price(study, menus, where)
    at = partial(_sized, study, menus, where)
    if share is not None:
        return Width(share, at(share), seconds=time.perf_counter() - start)
    assert size is not None
    best = least_divergent(partial(_drafted, subject, size, at), 8 * size / _BITS / parameters(study.model))
    # So few bytes that no width comes near: all channels will tell how many it takes.
    return None if best.start is None else replace(best, seconds=time.perf_counter() - start)


def _smallest(
    before: nn.Module | Compressed,
    subject: Subject,
    original: nn.Module,
    size: int,
    *,
    cut: bool,
    loose: bool,
) -> Width | None:
    """One channel of every site, or all, where the file may be too large with others.

    ``cut`` and ``loose`` are those of ``file_of`` and ``aim_of``.

    Raises
    ------
    PysolveError
        It is too large with either.
    """
    start, study, measure = time.perf_counter(), subject.study, partial(file_of, before, subject, cut=cut)
    menus = Channels().menus(study)
    one, whole = [1] * len(menus), [site.channels for site in study.free]
    widths = [sized(study, menus, sizes, [0.0] * len(menus)) for sizes in (one, whole)]
    # Training before the weights take their values may change what the file takes, too.
    least = [least_bytes(subject, measure, width.keep) + FEWEST * cut for width in widths]
    if min(least) > aim_of(size, loose):
        raise out_of_reach(min(least), size, original, loose)
    if max(least) <= aim_of(size, loose):
        return None
    return Width(0.0, widths[int(np.argmin(least))], seconds=time.perf_counter() - start)


def _sized(study: Study, menus: Sequence[Menu], where: Probe, share: float) -> Sized:
    """Channels for a share of the parameters."""
    if share >= 1:
        return sized(study, menus, [site.channels for site in study.free], [0.0] * len(menus))
    return within(study, menus, {"params": share}, where)


def _drafted(
    subject: Subject, size: int, at: Callable[[float], Sized], share: float, near: Coded | None = None
) -> Width:
    """What channels for a share of the parameters leave within about the bytes."""
    study = subject.study
    try:
        wide = at(share)
    except PysolveError:
        return Width(share, Sized((), ()))
    done = within_bytes(subject, size, partial(about_bytes, subject), keep=wide.keep, start=near, rough=True)
    assert done.rebuilt is not None
    network = apply(study.model, plan_of(study, done.rebuilt))
    assert study.calibration is not None
    # Those of the selection set alone are too few to tell widths apart.
    seen = [*study.first_kept(_SAMPLES), *study.held]
    lost = distance(study.model, network, seen, study.options.divergence)
    return Width(share, wide, or_infinite(lost), replace(done, rebuilt=None))


def least_divergent(width: Callable[[float, Coded | None], Width], start: float) -> Width:
    """The width of least divergence: up, or else down, as long as that gains."""
    best = width(start if start < _WHOLE else 1.0, None)
    tried = {best.share: best.divergence}
    for factor in (_WIDER, 1 / _WIDER):
        share = next(iter(tried))
        while len(tried) < _WIDTHS and tried[share] <= best.divergence:
            share = share * factor if share * factor < _WHOLE else 1.0
            if share in tried:
                break
            new = width(share, best.start)
            tried[share] = new.divergence
            best = new if new.divergence < best.divergence else best
    return best
