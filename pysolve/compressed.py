"""What every compression returns: the smaller network, and what is needed to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pysolve.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from pysolve.report.report import Report


@dataclass(frozen=True, eq=False)
class Compressed:
    """A smaller network, what was done to get there, and what that cost.

    Parameters
    ----------
    model : nn.Module
    plan : Plan
        Applied to the network that was given it makes ``model``, but for what distillation changed.
    report : Report
    earlier : tuple of Plan
        What was done before, first to last, where the network that was given came from a compression itself.
    fingerprint : {state-dict name: str}, optional
        Data types and shapes of the very first network, for ``load`` to know it by.
    """

    model: nn.Module
    plan: Plan
    report: Report
    earlier: tuple[Plan, ...] = ()
    fingerprint: Mapping[str, str] | None = None

    def _repr_html_(self) -> str:
        """Shown by notebooks."""
        return self.report._repr_html_()
