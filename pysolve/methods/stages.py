"""What each stage of several left of a network: its bytes, its distance from the original, its score."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from pysolve.forms import Codebook, Sparse
from pysolve.methods.layout import plan_of
from pysolve.methods.menu import Chosen
from pysolve.methods.rebuild import rebuild
from pysolve.methods.result import distance, later_score
from pysolve.methods.study import Study
from pysolve.nn.cut.apply import apply
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.running import as_array
from pysolve.plan import Plan
from pysolve.report.rows import Stage


@dataclass(frozen=True, eq=False)
class Stages:
    """What the stages left of a network, for the report.

    Parameters
    ----------
    original : nn.Module
    study : Study
    rows : list of Stage
    notes : list of str
    """

    original: nn.Module
    study: Study
    rows: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, name: str, network: nn.Module, size: int, seconds: float) -> None:
        """Write down what a stage left."""
        options = self.study.options
        score, notes = (options.score, ()) if not self.rows else later_score(options, network)
        self.notes.extend(notes)
        lost = distance(self.original, network, self.study.apart, self.study.options.divergence)
        self.rows.append(Stage(name, size, parameters(self.original), lost, seconds, score))

    def rebuilt(
        self,
        name: str,
        study: Study,
        chosen: Chosen,
        seconds: float = 0.0,
        size: Callable[[nn.Module], int] = nbytes,
    ) -> None:
        """Write down what a network is with no more than this chosen."""
        start = time.perf_counter()
        network = apply(study.model, plan_of(study, rebuild(study, chosen), {}))
        self.note(name, network, size(network), seconds + time.perf_counter() - start)


def sparse_bytes(network: nn.Module) -> int:
    """Bytes of its tensors, as entries and gaps where this is less."""
    total = nbytes(network)
    for weight in network.parameters():
        sparse = Sparse.from_dense(as_array(weight))
        # What NumPy has no type for, such as bfloat16, is wider as an array.
        total += min(0, len(sparse.values) * weight.element_size() + sparse.gaps.nbytes - weight.nbytes)
    return total


def packed(study: Study, plan: Plan) -> int:
    """Bytes with codes of equal length and their values, of those that are not zero where this is less."""
    total = nbytes(apply(study.model, plan))
    for form in plan.forms.values():
        weight = form.dense()
        values, codes = np.unique(weight, return_inverse=True)
        book = Codebook(codes.astype(np.uint8).reshape(weight.shape), values)
        sparse = Sparse.from_dense(weight)
        entries = sparse.gaps.nbytes + len(sparse.values) * book.bits // 8 + values.nbytes
        total += min(book.nbytes, entries) - weight.nbytes
    return total
