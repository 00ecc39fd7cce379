"""What every compression returns: the smaller network, and what is needed to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pysolve.plan import Plan
from pysolve.report import Report


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


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Data type and shape of every tensor in a network's state dict, by name: ``float32 20x1x5x5``."""
    return {
        name: f"{str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape))}".strip()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def after(before: nn.Module | Compressed, result: Compressed) -> Compressed:
    """The result of a compression that remembers where what it was given came from."""
    if not isinstance(before, Compressed):
        return replace(result, fingerprint=fingerprint(before))
    return replace(result, earlier=(*before.earlier, before.plan), fingerprint=before.fingerprint)
