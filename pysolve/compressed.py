"""The result of every compression: the smaller network, its plan and its report."""

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
    """A smaller network, the plan that makes it, and the report.

    Parameters
    ----------
    model : nn.Module
    plan : Plan
        Applied to the given network it makes ``model``, but for the changes of distillation.
    report : Report
    earlier : tuple of Plan
        Earlier plans, first to last, where the given network came from a compression itself.
    fingerprint : {state-dict name: str}, optional
        Data types and shapes of the very first network, for ``load`` to know it by.
    """

    model: nn.Module
    plan: Plan
    report: Report
    earlier: tuple[Plan, ...] = ()
    fingerprint: Mapping[str, str] | None = None

    def __repr__(self) -> str:
        return f"Compressed {type(self.model).__name__}\n{self.report!r}"

    def _repr_html_(self) -> str:
        """Shown by notebooks."""
        return self.report._repr_html_()
