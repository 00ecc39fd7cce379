"""One layer of a walk: the correlations of its kept inputs with what it is to make, and its fits.

Two things make the target of a layer better than y. Where its branch is added to a shortcut, it compensates
what the shortcut has lost, so that the error which a stream has gathered is repaired at every sum, and what
branches right behind it added that are gone:

    y + (s − ŝ) + g     s: the original shortcut, ŝ: the compressed one, g: what went.

And where only the positive part of the result is read, any result below zero is as good as another: there
the fitted value itself, cut off at zero, is the target of the next of a few fits. From fit to fit the bound
½ E[(z − ẑ)² where z > 0, max(ẑ, 0)² elsewhere] of the error behind the ReLU never rises (z: wanted at its
input, ẑ: fitted); the matrix of the least squares stays, only its right side changes. So it is with all that
is flat below or above a bound, such as ReLU6 above six.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from pysolve.correlations import Array, Correlations, group_columns
from pysolve.nn import layer_matrix as rows
from pysolve.nn.gathering.sums import room
from pysolve.nn.graph.branches import Layer, Read, read_as, read_by
from pysolve.nn.ranks import ALONE, Ranks, summed
from pysolve.nn.refit.lookahead import is_linear
from pysolve.nn.refit.walk import Walk

# New (h, d) weight and (h,) bias (None: it needs none) of a layer, from its name, the correlations of its
# kept inputs and outputs (None: no rows of the two networks belong together), and whether it can have a bias.
Fit = Callable[[str, Correlations | None, bool], tuple[Array, Array | None]]

# Inputs, targets and, where they are known, shortcuts and weights.
_Rows = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

# Numbers of a layer's inputs and targets that are kept for its further fits.
_KEPT = 2**24
# A norm's factor below this share of its largest one silences the channel: nothing can be corrected there.
_SILENT = 1e-3


@dataclass(frozen=True)
class Sampling:
    """How many rows to fit on, as a multiple of a layer's inputs, chosen at random by a seed.

    ``passes`` are further fits of a layer that a ReLU follows, with moved targets.
    """

    # ResNet-20 at half of its MACs, divergence on test images: 0.197 with 60, 0.192 with 200, 0.191 with 400.
    rows_per_input: int = 200
    passes: int = 1
    seed: int = 0


SAMPLING = Sampling()


class Reads:
    """Products of the tensors that several layers read, made once.

    ``outputs`` are how many outputs all layers have that read a tensor in one way.
    """

    def __init__(self, layers: Iterable[Layer], nodes: Sequence[Node]) -> None:
        self.made: dict[Read, Correlations] = {}
        self.outputs: Counter[Read] = Counter()
        for layer, node in zip(layers, nodes, strict=True):
            self.outputs[read_as(layer, node)] += rows.channels(layer.module)[1]

    def forget(self, nodes: Sequence[Node]) -> None:
        """Free what belongs to tensors that nothing reads any more."""
        for key in [one for one in self.made if one[0] in nodes]:
            del self.made[key]


@dataclass(frozen=True, eq=False)
class Task:
    """One layer to refit: its kept inputs and outputs, where it stands, and what it is to make besides.

    ``row_weights``: of its rows, one tensor a batch in the shape of its outputs with one channel.
    ``finite``: without rows that are no numbers in the compressed network; ``told`` is called before.
    """

    walk: Walk
    node: Node
    layer: Layer
    inputs: Tensor
    outputs: Tensor
    sampling: Sampling
    reads: Reads
    routed: Collection[Node] = ()
    ranks: Ranks = ALONE
    went: Sequence[Tensor] | None = None
    row_weights: Sequence[Tensor] | None = None
    finite: bool = False
    told: Callable[[], object] = lambda: None

    @property
    def shortcut(self) -> Node | None:
        """What the layer's branch is added to, if that is known already."""
        shortcut = self.layer.shortcut
        if shortcut is None or shortcut not in self.walk.original or shortcut in self.routed:
            return None
        same = self.walk.original[shortcut][0].shape == self.walk.original[self.node][0].shape
        return shortcut if same else None


def fitted(task: Task, fit: Fit, intercept: bool) -> tuple[Array, Array | None]:
    """Weight and bias of a layer by least squares, and again with targets that a ReLU leaves free.

    What went counts where it is linear in what the layer reads.
    """
    task = _weighed(task)
    if task.went:
        what = _summed(task, _samples(task, shortcuts=False, alone=True))
        task = task if what is not None and _is_finite(what) and is_linear(what) else replace(task, went=None)
    seen = task.ranks.counts(sum(rows.positions(task.layer.module, y) for y in task.walk.original[task.node]))
    # Rows that values choose need not be the same ones in the two networks.
    if not any(seen) or task.node in task.routed:
        return fit(task.layer.name, None, intercept)
    moving = task.layer.flat is not None and task.shortcut is task.layer.shortcut
    samples, correlations = _known(task, moving=moving)
    if not _is_finite(correlations):
        task.told()
        task = replace(task, finite=True)
        samples, correlations = _known(task, moving=moving)
    if correlations is None:
        return fit(task.layer.name, None, intercept)
    M, bias = fit(task.layer.name, correlations, intercept)
    for _ in range(task.sampling.passes if moving else 0):
        rows_again = _samples(task) if samples is None else samples
        moved = _moved(task, rows_again, correlations, M, bias)
        M, bias = fit(task.layer.name, moved, intercept)
    return M, bias


def _known(task: Task, *, moving: bool) -> tuple[list[_Rows] | None, Correlations | None]:
    """Rows, where they are kept for further fits, and their correlations; None where there are no rows."""
    if _is_cheaper_crossed(task):
        return None, _crossed(task)
    task.walk.fill(task.node)
    # Windows of a convolution take longer to form than to multiply.
    few = moving and max(task.ranks.counts(_numbers(task))) <= _KEPT
    samples = [*_samples(task)] if few else None
    return samples, _summed(task, _samples(task, shortcuts=False) if samples is None else samples)


def _is_finite(found: Correlations | None) -> bool:
    """Whether rows were summed, and all of them are numbers."""
    return found is not None and bool(np.isfinite(np.trace(found.xx)) and np.isfinite(found.yy).all())


def _finite(task: Task, *parts: Tensor) -> Tensor | slice:
    """The rows to count: all, or those that are numbers."""
    if not task.finite:
        return slice(None)
    return torch.stack([part.isfinite().all(1) for part in parts]).all(0)


def _numbers(task: Task) -> int:
    """Numbers of inputs and targets that a layer is fitted on."""
    layer = task.layer.module
    taken = sum(rows.positions(layer, y) if chosen is None else len(chosen) for y, chosen in _chosen(task))
    width = len(task.inputs) * rows.taps(layer) + 2 * len(task.outputs)
    return taken * width


def _summed(task: Task, samples: Iterable[_Rows]) -> Correlations | None:
    """Correlations from the products of inputs with targets."""
    inputs = len(task.inputs) * rows.taps(task.layer.module)
    return _over_all(task, (((x, y), weights) for x, y, _, weights in samples), inputs, len(task.outputs))


def _over_all(
    task: Task, blocks: Iterable[tuple[tuple[Tensor, ...], Tensor | None]], inputs: int, outputs: int
) -> Correlations | None:
    """Correlations of blocks of rows, with their weights, of all processes; None of no rows."""
    return summed(blocks, inputs, outputs, task.layer.module.weight.device, task.ranks)


def _weighed(task: Task) -> Task:
    """The task with weights of mean 1 over the rows to fit on, or without where they are not of its rows."""
    if task.row_weights is None:
        return task
    sums = np.zeros(3)
    for weights, (y, chosen) in zip(task.row_weights, _chosen(task), strict=True):
        of_rows = weights.shape == y.narrow(channel_dim(task.layer), 0, 1).shape
        used = weights.flatten() if chosen is None or not of_rows else weights.flatten()[chosen]
        sums += used.sum(dtype=torch.float64).item(), used.numel(), not of_rows
    task.ranks.add_up(sums)
    total, count, others = sums.tolist()
    able = not others and math.isfinite(total) and total > 0
    return replace(task, row_weights=[w * (count / total) for w in task.row_weights] if able else None)


def _is_cheaper_crossed(task: Task) -> bool:
    """Whether products with the original's inputs are less work than those with the targets."""
    taps = rows.taps(task.layer.module)
    inputs, kept = taps * rows.channels(task.layer.module)[0], taps * len(task.inputs)
    own = kept * kept / 2
    same = not task.walk.differs(read_by(task.node))
    crossed = inputs * inputs / 2 if same else own + inputs * kept
    outputs = task.reads.outputs[read_as(task.layer, task.node)]
    return task.shortcut is None and task.went is None and crossed <= own + outputs * kept


def _crossed(task: Task) -> Correlations | None:
    """Correlations from the products of the two networks' inputs, shared with other layers."""
    layer, key = task.layer, (*read_as(task.layer, task.node), task.finite, *task.inputs.tolist())
    if key not in task.reads.made:
        found = _inputs_of_both(task)
        if found is None:
            return None
        task.reads.made[key] = found
    made = task.reads.made[key]
    kept = task.outputs.cpu()
    M = np.asarray(rows.matrix(layer.module).double().cpu()[kept].numpy())
    bias = layer.module.bias
    b = np.zeros(len(M)) if bias is None else np.asarray(bias.detach().double().cpu()[kept].numpy())
    mean = M @ made.y_sum
    yy = np.vecdot(M @ made.yy, M) + b * (2 * mean + made.count * b)
    return replace(made, yx=M @ made.yx + np.outer(b, made.x_sum), yy=yy, y_sum=mean + made.count * b)


def _inputs_of_both(task: Task) -> Correlations | None:
    """Correlations of the compressed network's kept inputs with all of the original's."""
    read, layer = read_by(task.node), task.layer
    same = not task.walk.differs(read)
    taps = rows.taps(layer.module)
    columns = group_columns(task.inputs.cpu(), taps)
    width = taps * rows.channels(layer.module)[0]
    before = 0 if same else len(columns)
    found = _over_all(task, _rows_of_both(task), before + width, 0)
    if found is None:
        return None
    kept, own = columns if same else np.arange(before), np.arange(before, before + width)
    yx, yy = found.xx[np.ix_(own, kept)], found.xx[np.ix_(own, own)]
    return replace(found.restrict(kept), yx=yx, yy=yy, y_sum=found.x_sum[own])


def _rows_of_both(task: Task) -> Iterator[tuple[tuple[Tensor], Tensor | None]]:
    """Rows of the compressed network's kept inputs, and behind them the original's where these differ."""
    read, layer = read_by(task.node), task.layer
    same = not task.walk.differs(read)
    for b, (y, chosen) in enumerate(_chosen(task)):
        original, other = task.walk.original_value(read, b), task.walk.value(read, b)
        dim = channel_dim(layer)
        kept = other if len(task.inputs) == other.shape[dim] else other.index_select(dim, task.inputs)
        both = original if same else torch.cat([kept, original], dim)
        limit = room(both.shape[dim] * rows.taps(layer.module))
        weights = None if task.row_weights is None else task.row_weights[b]
        for x, own in rows.blocks(layer.module, both, y if weights is None else weights, chosen, limit=limit):
            some = _finite(task, x)
            yield (x[some],), None if weights is None else own[some]


def _chosen(task: Task) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The layer's original outputs, and the rows of them to fit on; always the same."""
    layer, outputs = task.layer, task.walk.original[task.node]
    own = [rows.positions(layer.module, y) for y in outputs]
    of_all = task.ranks.all(own)
    total = sum(map(sum, of_all))
    share = task.sampling.rows_per_input * len(task.inputs) * rows.taps(layer.module) / max(1, total)
    random, given = torch.Generator().manual_seed(task.sampling.seed), iter(outputs)
    for turn in zip_longest(*of_all):
        for rank, count in enumerate(turn):
            chosen = None if count is None else rows.choice(count, share, random)
            if rank == task.ranks.rank and count is not None:
                yield next(given), chosen


def _moved(
    task: Task, samples: Iterable[_Rows], correlations: Correlations, M: Array, bias: Array | None
) -> Correlations:
    """Correlations with targets moved to the fitted values wherever both lie where what follows is flat.

    In the layer's own units a bound is  (bound − shift − ŝ) / gain  of its norm and shortcut.
    """
    # Sums of what moves, in double precision: inputs that hardly vary around a mean far from zero turn the
    # rounding of single precision into weights of thousands.
    gain, shift, active = (part[task.outputs] for part in _norm(task))
    assert task.layer.flat is not None
    low, high = task.layer.flat
    bounds = [(bound, way) for bound, way in ((low, -gain), (high, gain)) if math.isfinite(bound)]
    weight = torch.as_tensor(M).to(gain)
    offset = torch.as_tensor(0.0 if bias is None else bias).to(gain)
    yx = torch.zeros_like(weight, dtype=torch.float64)
    y_sum, squares = yx.new_zeros(2, len(M))
    for x, y, s, weights in samples:
        result, target = torch.addmm(offset, x, weight.T) if offset.ndim else x @ weight.T, y
        for bound, outwards in bounds:
            edge = (bound - (shift if s is None else shift + s)) / gain
            beyond = torch.where(outwards > 0, result.maximum(edge), result.minimum(edge))
            target = torch.where(active & ((y - edge) * outwards >= 0), beyond, target)
        change, square = target.double() - y.double(), target.double().square()
        if weights is not None:
            change, square = change * weights, square * weights
        yx += change.T @ x.double()
        y_sum += change.sum(0)
        squares += square.sum(0)
    yx, y_sum, squares = (one.cpu().contiguous() for one in (yx, y_sum, squares))
    task.ranks.add_up(yx.numpy(), y_sum.numpy(), squares.numpy())
    new_yx, new_sum = correlations.yx + yx.cpu().numpy(), correlations.y_sum + y_sum.cpu().numpy()
    return replace(correlations, yx=new_yx, yy=squares.cpu().numpy(), y_sum=new_sum)


def _samples(task: Task, *, shortcuts: bool = True, alone: bool = False) -> Iterator[_Rows]:
    """Rows of inputs x̂, targets y corrected for the shortcut, shortcuts ŝ, and weights; always the same.

    ``alone``: targets are what went.
    """
    layer, walk, shortcut = task.layer, task.walk, task.shortcut
    dim = channel_dim(layer)
    gain, _, active = _norm(task)
    for b, (y, chosen) in enumerate(_chosen(task)):
        x = walk.value(read_by(task.node), b)
        if len(task.inputs) < x.shape[dim]:
            x = x.index_select(dim, task.inputs)
        target, missing = torch.zeros_like(y) if alone else y, [] if task.went is None else [task.went[b]]
        if shortcut is not None and not alone:
            missing.append(walk.original[shortcut][b] - walk.compressed[shortcut][b])
        for lost in missing:
            if layer.norm is not None:
                lost = lost * along(dim, torch.where(active, 1 / gain, 0.0), y)
            target = target + lost
        if shortcut is not None and shortcuts:
            target = torch.cat([target, walk.compressed[shortcut][b].expand_as(y)], dim)
        if task.row_weights is not None:
            target = torch.cat([target, task.row_weights[b].to(target)], dim)
        for read, wanted in rows.blocks(
            layer.module,
            x,
            target,
            chosen,
            limit=room(rows.channels(layer.module)[0] * rows.taps(layer.module)),
        ):
            weights = None if task.row_weights is None else wanted[:, -1:]
            own, other = wanted[:, : y.shape[dim]], wanted[:, y.shape[dim] :]
            own, beside = own[:, task.outputs], other[:, task.outputs] if shortcut and shortcuts else None
            some = _finite(task, read, own)
            beside, weights = (None if one is None else one[some] for one in (beside, weights))
            yield read[some], own[some], beside, weights


def _norm(task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Gain and shift of the batch norm behind a layer, and which channels it lets through."""
    weight = task.layer.module.weight.detach()
    gain = weight.new_ones(rows.channels(task.layer.module)[1])
    if task.layer.norm is None:
        return gain, torch.zeros_like(gain), gain > 0
    _, scale, offset, mean, variance, _, _, eps, *_ = task.layer.norm.args
    gain = torch.rsqrt(task.walk.fixed[variance] + eps)  # type: ignore[index]
    gain = gain if scale is None else gain * task.walk.fixed[scale]  # type: ignore[index]
    shift = -task.walk.fixed[mean] * gain  # type: ignore[index]
    shift = shift if offset is None else shift + task.walk.fixed[offset]  # type: ignore[index]
    active = gain.abs() > _SILENT * gain.abs().max()
    return torch.where(active, gain, 1.0), shift, active


def channel_dim(layer: Layer) -> int:
    return -1 if layer.module.weight.ndim == 2 else 1


def along(dim: int, values: Tensor, like: Tensor) -> Tensor:
    """A vector shaped to broadcast along one dimension of ``like``."""
    return values if dim == -1 else values.view(-1, *[1] * (like.ndim - 2))
