"""Refit of the experts that stay: what they add up to, fitted to what all of them did.

Of a mixture  y = Σ_e p_e (W_e h_e + b_e)  over the experts that stay, with p_e the router's weights among
these, the W_e and b_e are one matrix that reads all p_e h_e and p_e of a row, zero where it does not go to
expert e:

    min_{W, b}  ½ E‖t − Σ_e W_e p_e h_e + p_e b_e‖² + ½ ε Σ_i v_i ‖(W, b)_i − (W⁰, b⁰)_i‖²

t is the original mixture's result, and what its shortcut has lost; inputs are the compressed network's. y is
affine in the W_e and b_e, so the network itself tells the p_e h_e: with an identity in the place of one W_e
and zeros for the others, they are its result. That this explains the result is tried out first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from pysolve.correlations import Array, Indices
from pysolve.nn.batches.padding import Masks, mask_of_rows
from pysolve.nn.graph.mixtures import Mixture
from pysolve.nn.ranks import ALONE, Ranks, summed
from pysolve.nn.refit.walk import Walk
from pysolve.solve.least_squares import refit

# Inputs of experts that are fitted jointly: all of small mixtures. Of others, groups of experts in turn.
TOGETHER = 4096
# Share of a result that rounding may leave unexplained, also in half precision.
_UNEXPLAINED = 0.02


@dataclass(frozen=True, eq=False)
class _Parameters:
    """Matrices (experts, h, d) and biases (experts, h) of a mixture."""

    mixture: Mixture
    weight: Tensor
    bias: Tensor | None

    @property
    def widths(self) -> Indices:
        """(experts,) columns of each in a matrix of several."""
        return np.array([len(one) + (self.bias is not None) for one in self.mixture.inputs], dtype=np.intp)

    def only(self, experts: Indices) -> _Parameters:
        """Zeros but for some experts."""
        kept = torch.as_tensor(experts, device=self.weight.device)
        parts = (self.weight, self.bias)
        weight, bias = (
            None if one is None else torch.zeros_like(one).index_copy(0, kept, one[kept]) for one in parts
        )
        assert weight is not None
        return _Parameters(self.mixture, weight, bias)

    def values(self) -> dict[str, Tensor]:
        """By state-dict names."""
        weight = self.weight.mT.contiguous() if self.mixture.turned else self.weight
        found = dict[str, Tensor]()
        for names, one in ((self.mixture.weights, weight), (self.mixture.biases, self.bias)):
            if one is not None:
                found |= zip(names, [one] if len(names) == 1 else one.unbind(), strict=True)
        return found

    def matrix(self, experts: Indices) -> Tensor:
        """(outputs, k) of what stays, of one expert after the other, its bias behind."""
        outputs, parts = torch.as_tensor(self.mixture.outputs, device=self.weight.device), []
        for e in experts.tolist():
            inputs = torch.as_tensor(self.mixture.inputs[e], device=self.weight.device)
            parts.append(self.weight[e][outputs[:, None], inputs])
            parts += [] if self.bias is None else [self.bias[e][outputs, None]]
        return torch.cat(parts, 1)

    def with_matrix(self, experts: Indices, M: Array) -> _Parameters:
        """Other values of some experts."""
        outputs = torch.as_tensor(self.mixture.outputs, device=self.weight.device)
        weight, bias = self.weight.clone(), None if self.bias is None else self.bias.clone()
        ends = np.cumsum(self.widths[experts])[:-1]
        for e, own in zip(experts.tolist(), np.split(M, ends, 1), strict=True):
            inputs = torch.as_tensor(self.mixture.inputs[e], device=self.weight.device)
            new = torch.as_tensor(own).to(weight)
            weight[e][outputs[:, None], inputs] = new[:, : len(inputs)]
            if bias is not None:
                bias[e][outputs] = new[:, len(inputs)]
        return _Parameters(self.mixture, weight, bias)


def refit_experts(
    walk: Walk,
    node: Node,
    mixtures: Sequence[Mixture],
    ranks: Ranks = ALONE,
    masks: Sequence[Masks] = (),
) -> dict[str, Tensor]:
    """New matrices and biases of the mixtures that begin at an operator, each as the first that it can be.

    Parameters
    ----------
    walk : Walk
        Right in front of the operator.
    node : Node
    mixtures : sequence of Mixture
        What matrices and their biases may add up to; where parameters act otherwise, nothing is refitted.
    ranks : Ranks
        Processes that walk with other batches.
    masks : sequence of {shape: mask}
        Of each batch's tokens; rows of padding do not count.
    """
    found = dict[str, Tensor]()
    for mixture in mixtures:
        if mixture.nodes[0] is not node or mixture.weights[0] in found:
            continue
        if all(ranks.all(not walk.batches or _is_sound(walk, mixture))):
            found |= _fitted(walk, mixture, ranks, masks)
    return found


def _fitted(walk: Walk, mixture: Mixture, ranks: Ranks, masks: Sequence[Masks]) -> dict[str, Tensor]:
    now = _now(walk, mixture)
    columns = int(now.widths[mixture.experts].sum())
    groups = np.array_split(mixture.experts, max(1, -(-columns // TOGETHER)))
    targets = _targets(walk, mixture)
    outputs = torch.as_tensor(mixture.outputs, device=now.weight.device)
    for group in filter(len, groups):
        old = now.matrix(group)

        def blocks(
            now: _Parameters = now, group: Indices = group, old: Tensor = old
        ) -> Iterator[tuple[tuple[Tensor, ...], None]]:
            for b in walk.batches:
                z = _inputs(walk, b, now, group)
                z = z.to(torch.promote_types(z.dtype, torch.float32))
                missing = targets[b] - _result(walk, b, now)[:, outputs]
                real = mask_of_rows(masks[b], (len(z),)) if masks else None
                rows = (z, missing + z @ old.to(z).T)
                yield rows if real is None else tuple(part[real] for part in rows), None

        known = summed(blocks(), old.shape[1], old.shape[0], now.weight.device, ranks)
        if known is None or known.vanishes:
            return {}
        prior = np.asarray(old.double().cpu().numpy())
        M, *_ = ranks.first(refit(known, np.arange(len(known.xx)), prior, intercept=False))
        now = now.with_matrix(group, M)
    return now.values()


def _now(walk: Walk, mixture: Mixture) -> _Parameters:
    """Parameters of the compressed network as they are."""
    nodes = {name: node for node, name in walk.graph.parameters.items()}

    def of(names: Sequence[str]) -> Tensor | None:
        found = [walk.values.get(name, cast(Tensor, walk.fixed[nodes[name]])) for name in names]
        return torch.stack(found) if len(found) > 1 else next(iter(found), None)

    weight, bias = of(mixture.weights), of(mixture.biases)
    assert weight is not None
    now = _Parameters(mixture, weight.mT if mixture.turned else weight, bias)
    if len(mixture.weights) == 1:
        return now
    # Layers have the columns of what went until they are fitted.
    every = np.arange(len(mixture.inputs))
    kept = now.matrix(every).double().cpu().numpy()
    return now.only(every[:0]).with_matrix(every, np.asarray(kept))


def _targets(walk: Walk, mixture: Mixture) -> list[Tensor]:
    """Rows that the mixture is to give, batch by batch: the original's, and what its shortcut has lost."""
    ahead, last, shortcut = walk.branch({}), mixture.nodes[-1], mixture.shortcut
    _run(ahead, mixture.nodes)
    found = []
    for b in walk.batches:
        target: Tensor = ahead.original[last][b]
        if shortcut is not None and shortcut in walk.original and walk.differs(shortcut):
            lost = walk.original[shortcut][b] - walk.compressed[shortcut][b]
            if lost.numel() == target.numel() and lost.shape[-1] == target.shape[-1]:
                target = target + lost.reshape(target.shape)
        rows = target.reshape(-1, target.shape[-1])
        found.append(rows[:, torch.as_tensor(mixture.outputs, device=rows.device)])
    return found


def _result(walk: Walk, b: int, parameters: _Parameters) -> Tensor:
    """(n, h) rows of the compressed mixture with some parameters."""
    ahead = walk.onward(b, parameters.values())
    _run(ahead, parameters.mixture.nodes)
    found: Tensor = ahead.original[parameters.mixture.nodes[-1]][0]
    return found.reshape(-1, found.shape[-1])


def _run(walk: Walk, nodes: Sequence[Node]) -> None:
    for node in nodes:
        walk.run_original(node)
        # Shows what is written in place.
        walk.run_compressed(node)


def _inputs(walk: Walk, b: int, now: _Parameters, experts: Indices) -> Tensor:
    """(n, k) of all rows what each of some experts multiplies: p_e h_e, and with biases p_e."""
    mixture, nothing, home = now.mixture, now.only(experts[:0]), now.weight.device
    # As many columns at once as there are outputs that tell them; a bias has none in the matrices.
    bias = [] if now.bias is None else [np.full(1, -1)]
    columns = torch.as_tensor(np.concatenate([np.concatenate([mixture.inputs[e], *bias]) for e in experts]))
    of = torch.as_tensor(np.repeat(experts, now.widths[experts]))
    base, found = _result(walk, b, nothing), list[Tensor]()
    for e, column in zip(
        *(torch.split(one.to(home), now.weight.shape[1]) for one in (of, columns)), strict=True
    ):
        probe, place, inner = now.only(experts[:0]), torch.arange(len(e), device=home), column >= 0
        probe.weight[e[inner], place[inner], column[inner]] = 1
        if probe.bias is not None:
            probe.bias[e[~inner], place[~inner]] = 1
        found.append((_result(walk, b, probe) - base)[:, : len(e)])
    return torch.cat(found, 1)


def _is_sound(walk: Walk, mixture: Mixture) -> bool:
    """Whether the mixture's result is what its matrices and biases make of their inputs."""
    now, nothing = _now(walk, mixture), mixture.experts[:0]
    every, outputs = mixture.experts, torch.as_tensor(mixture.outputs)
    z = _inputs(walk, 0, now, every)
    made = _result(walk, 0, now.only(every)) - _result(walk, 0, now.only(nothing))
    made = made[:, outputs.to(made.device)].double()
    apart = (made - z.double() @ now.matrix(every).double().T).norm()
    return bool(apart <= _UNEXPLAINED * made.norm())
