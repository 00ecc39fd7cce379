"""The results of a sweep, from which one is chosen."""

from __future__ import annotations

from pysolve.compressed import Compressed
from pysolve.report.report import Report, comparison
from pysolve.tables import as_html, as_text


class Sweep(tuple[Compressed, ...]):
    """What ``compress`` makes for each of several targets, in their order; shows as one table.

    ``results[i].model`` is a network, ``results[i].report`` its report; ``save`` writes either of them.
    """

    __slots__ = ()

    @property
    def reports(self) -> list[Report]:
        """The report of each."""
        return [one.report for one in self]

    def __repr__(self) -> str:
        return "\n".join(as_text(comparison(self.reports)))

    def _repr_html_(self) -> str:
        """Shown by notebooks."""
        return as_html(comparison(self.reports))
