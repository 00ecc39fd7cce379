"""Which channels of one site to keep: its readers' correlations as one selection problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from pysolve.correlations import Array, Correlations, group_columns
from pysolve.plan import Indices, Site
from pysolve.solve.elimination import elimination_path
from pysolve.solve.least_squares import least_squares
from pysolve.solve.problem import Problem
from pysolve.solve.scaling import schur
from pysolve.solve.selection import select_channels

# Share of the harmless error that a curve starts from; below, float32 forward passes measure noise.
FLOOR = 1e-9


@dataclass(frozen=True, eq=False)
class Choice:
    """What to keep of a site at every size.

    Parameters
    ----------
    site : Site
    keep : callable
        From k to the (k,) channels that stay, ascending.
    error : (channels + 1,) array
        Error of the refitted readers with k channels, as a share of their outputs' energy: the mean over
        readers of E‖y − M x‖² / E‖y‖².
    method : str
        Of ``select_channels``, or "scores".
    """

    site: Site
    keep: Callable[[int], Indices]
    error: Array
    method: str = "elimination"


def site_problem(
    site: Site,
    correlations: Mapping[str, Correlations],
    widths: Mapping[str, int],
    *,
    normalised: bool = True,
) -> tuple[Problem, list[float]]:
    """The joint problem of a site's readers, each centred, with outputs of unit energy.

    Inputs of a reader that are not the site's stay free to take over: they are minimised out. A reader whose
    channels have fewer inputs than another's is filled up with inputs that are always zero.

    Parameters
    ----------
    site : Site
    correlations : {reader: Correlations}
    widths : {reader: int}
        Input channels of each reader.
    normalised : bool
        Outputs of unit energy, so that every reader counts alike; otherwise as they are.

    Returns
    -------
    Problem, list of float
        And of each reader the energy that is left of its outputs without the site.
    """
    readers = [_reader(site, correlations[name], name, widths[name], normalised) for name in site.readers]
    size = max(len(R) for R, _, _ in readers) // site.channels
    xx, yx = zip(*(_filled(R, C, site.channels, size) for R, C, _ in readers), strict=True)
    return Problem(xx, yx, size, np.ones(site.channels)), [left for _, _, left in readers]


def reader_columns(site: Site, correlations: Correlations, reader: str, width: int) -> Indices:
    """(channels, c·taps) columns of a reader's correlations that belong to each channel of a site."""
    taps = len(correlations.xx) // width
    table = site.columns_of(reader, width)
    return (table[:, :, None] * taps + np.arange(taps)).reshape(site.channels, -1)


def choose(
    site: Site, problem: Problem, left: Sequence[float], method: str | Array = "elimination"
) -> Choice:
    """Selection at every size, by elimination or any other method of ``select_channels``, or by scores.

    Only elimination knows a path; the error of other methods is taken at a few sizes and interpolated.

    Parameters
    ----------
    site : Site
    problem, left
        Of ``site_problem``.
    method : str, or (channels,) array
        An array's largest stay.
    """
    readers = len(problem.xx)
    if isinstance(method, np.ndarray):
        order = np.argsort(-method, kind="stable")
        return _sampled(site, problem, left, lambda k: np.sort(order[:k]), "scores")
    if method == "elimination":
        path = elimination_path(problem, r_yy=left if readers > 1 else left[0])
        return Choice(site, path.keep, np.maximum(2 * path.error / readers, FLOOR))
    K = site.channels
    select = cache(lambda k: select_channels(problem, k=k, method=method) if 0 < k < K else np.arange(k))
    return _sampled(site, problem, left, select, method)


def _sampled(
    site: Site, problem: Problem, left: Sequence[float], keep: Callable[[int], Indices], method: str
) -> Choice:
    """A choice whose error is taken at a few sizes."""
    K = site.channels
    sizes = np.unique([0, *np.geomspace(1, K, 9).round().astype(int)])
    error = np.minimum.accumulate([max(_error(problem, left, keep(int(k))), FLOOR) for k in sizes])
    return Choice(site, keep, np.exp(np.interp(np.arange(K + 1), sizes, np.log(error))), method)


def harm_curve(error: Array, sizes: Sequence[int], harms: Sequence[float]) -> Array:
    """What keeping k of K channels does to the network, for every k, from measurements at a few sizes.

    Harm is taken for a power of the error between neighbouring measurements, log-linear, and for the same
    power beyond the outer ones; nothing is lost with all channels, and none may be left.

    Parameters
    ----------
    error : (K + 1,) array
        Positive; what is lost with 0 … K channels.
    sizes, harms : sequences
        Where it was measured, and what was found.

    Returns
    -------
    (K + 1,) array
        Never rises with k.
    """
    at, error = np.asarray(sizes, dtype=np.intp), np.log(error)
    if not len(at):
        return np.array([np.inf, *[0.0] * (len(error) - 1)])
    order = np.argsort(error[at], kind="stable")
    x, y = error[at][order], np.maximum.accumulate(np.log(np.maximum(harms, FLOOR))[order])
    curve = np.interp(error, x, y)
    curve = np.where(error < x[0], y[0] + _power(x[:2], y[:2]) * (error - x[0]), curve)
    curve = np.where(error > x[-1], y[-1] + _power(x[-2:], y[-2:]) * (error - x[-1]), curve)
    harm = np.maximum.accumulate(np.exp(curve)[::-1])[::-1]
    harm[0], harm[-1] = np.inf, 0.0
    return np.asarray(harm)


def _power(x: Array, y: Array) -> float:
    """Slope between two points of a log-log curve, held to what makes sense; 1 when there is but one."""
    return float(np.clip((y[-1] - y[0]) / (x[-1] - x[0]), 0.5, 3.0)) if x[-1] > x[0] else 1.0


def _reader(
    site: Site, correlations: Correlations, name: str, width: int, normalised: bool
) -> tuple[Array, Array, float]:
    """R and C of one reader on the site's columns, channel after channel, and the energy left without."""
    own = correlations.centered()
    p = reader_columns(site, correlations, name, width).ravel()
    u = np.setdiff1d(np.arange(len(own.xx)), p)
    R, C, left = own.r_xx, own.r_yx, float(np.trace(own.r_yy))
    energy = (left if normalised else 0.0) or 1.0
    if len(u):
        explained = C[:, u]
        R, C, _, base = schur(R, C, p, u)
        left = max(0.0, left - float(np.vdot(base, explained)))
    else:
        R, C = R[np.ix_(p, p)], C[:, p]
    return R, C / np.sqrt(energy), left / energy


def _filled(R: Array, C: Array, channels: int, size: int) -> tuple[Array, Array]:
    own = len(R) // channels
    if own == size:
        return R, C
    place = (np.arange(channels)[:, None] * size + np.arange(own)).ravel()
    wide_R, wide_C = np.zeros((channels * size,) * 2), np.zeros((len(C), channels * size))
    wide_R[np.ix_(place, place)] = R
    wide_C[:, place] = C
    return wide_R, wide_C


def _error(problem: Problem, left: Sequence[float], keep: Indices) -> float:
    """Mean over readers of E‖y − M x‖² / E‖y‖², refitted on the groups kept."""
    columns = group_columns(keep, problem.group_size)
    gains = [np.vdot(least_squares(R, C, columns), C) for R, C in zip(problem.xx, problem.yx, strict=True)]
    return float(np.mean(np.subtract(left, gains)))
