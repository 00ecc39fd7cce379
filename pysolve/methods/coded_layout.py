"""How quantised layers run: decoded once, sparse, or as whole numbers; and the network made so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from pysolve.compressed import Compressed
from pysolve.forms import Codebook, Integers
from pysolve.methods.account import account
from pysolve.methods.quantized import Quantized, weight_name
from pysolve.methods.selected import Pruned
from pysolve.methods.sparse_layout import laid_out as sparse_or_dense
from pysolve.methods.worth import coded_bits
from pysolve.nn.apply import apply
from pysolve.nn.calibration import take
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import nbytes
from pysolve.nn.files.checkpoint import file_bytes
from pysolve.nn.layers.sharing import share_weights
from pysolve.plan import Plan
from pysolve.report.report import Report
from pysolve.report.rows import LayerReport

# As long as others are.
_SCORE, _BYTES = 98.765, 98_765
LAYOUTS = ("dense", "auto", "csr", "shared")


def laid_out(
    original: nn.Module,
    found: Quantized,
    layout: str,
    *,
    against: nn.Module | None = None,
    batch: Any = None,
    divergence: Divergence = kl_divergence,
    seed: int = 0,
) -> Compressed:
    """The network with quantised weights, and a report.

    Parameters
    ----------
    original : nn.Module
    found : Quantized
    layout : str
        Of ``LAYOUTS``, as ``quantize`` has it.
    against : nn.Module, optional
        What the report compares with, by default the original.
    batch : one batch, optional
        Held back: layers are timed and the network is measured on it.
    divergence, seed
        As ``quantize`` has them.
    """
    books = {name: form for name, form in found.forms.items() if isinstance(form, Codebook)}
    if len(books) < len(found.forms):
        return _as_integers(original, found, against or original, batch, divergence, seed)
    weights = {name: form.dense() for name, form in books.items()}
    pruned = Pruned(weights, found.values, batch, found.errors, found.samples)
    runs = "dense" if layout == "shared" else layout
    result = sparse_or_dense(original, pruned, runs, against=against, divergence=divergence, seed=seed)
    if layout == "shared":
        share_weights(result.model, books)
    lines = tuple(_line(line, books[line.name], layout) for line in result.report.layers)
    return replace(result, report=replace(result.report, layers=lines))


def in_bytes(target: float, original: nn.Module) -> int:
    """A number of bytes, or a share of the original's tensors: one at least."""
    return max(1, int(target if target > 1 else target * nbytes(original)))


def with_file(result: Compressed, original: nn.Module) -> Compressed:
    """The result with the sizes of the original's tensors and of the file that ``save`` writes."""
    report = result.report
    before = {**report.before, "file": nbytes(original)}
    after = {**report.after, "file": file_bytes(result)}
    return replace(result, report=replace(report, before=before, after=after))


def as_long(report: Report, scores: bool) -> Report:
    """The report as long as it will be with a file's bytes, and with scores if some are to come."""
    before, after = {**report.before, "file": _BYTES}, {**report.after, "file": _BYTES}
    report = replace(report, before=before, after=after)
    return replace(report, score_before=_SCORE, score_after=_SCORE) if scores else report


def _line(line: LayerReport, book: Codebook, layout: str) -> LayerReport:
    bits = coded_bits(book.codes) / max(1, book.codes.size)
    runs = "shared" if layout == "shared" else line.layout
    why = f"{len(book.centroids)} values" + (f"; {line.why}" if layout == "auto" else "")
    return replace(line, bits=bits, layout=runs, why=why)


def _as_integers(
    original: nn.Module, found: Quantized, against: nn.Module, batch: Any, divergence: Divergence, seed: int
) -> Compressed:
    """The network with layers of whole numbers, where its layers have such a form."""
    able = {name for name in found.forms if type(original.get_submodule(name)) in (nn.Linear, nn.Conv2d)}
    forms = {n: form for n, form in found.forms.items() if n in able and n and isinstance(form, Integers)}
    others = {weight_name(name): form.dense() for name, form in found.forms.items() if name not in forms}
    plan = Plan(values={**found.values, **others}, forms={weight_name(n): form for n, form in forms.items()})
    smaller = apply(original, plan, probe=None if batch is None else take(batch, 0, 16))
    held = [] if batch is None else [batch]
    report = account(against, smaller, held, divergence=divergence, seed=seed)
    lines = tuple(_integer_line(name, form, name in forms, found) for name, form in found.forms.items())
    return Compressed(smaller, plan, replace(report, layers=lines, samples=found.samples))


def _integer_line(name: str, form: Any, kept: bool, found: Quantized) -> LayerReport:
    bits, share = coded_bits(form.codes) / max(1, form.codes.size), np.count_nonzero(form.codes)
    runs = ("int8, dynamic" if form.dynamic else "int8") if kept else "dense"
    why = f"{form.bits} bits" if kept else "this kind of layer has no form of whole numbers"
    density = share / max(1, form.codes.size)
    return LayerReport(name, density, runs, why, error=found.errors.get(name), bits=bits)
