"""``quantize``: the weights of a network in few bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn
from torch.distributed import ProcessGroup

from pysolve.compressed import Compressed
from pysolve.correlations import Indices
from pysolve.errors import PysolveError, one_of
from pysolve.layer.quantize_layer import METHODS
from pysolve.methods.goal import (
    Length,
    Memory,
    Target,
    check_distill,
    check_target,
    check_whole,
    network_of,
    options_for,
    prepared,
)
from pysolve.methods.kinds.codes import SCHEMES, Codes
from pysolve.methods.layout import LaidOut, check_layout, lay_out, plan_of
from pysolve.methods.matching import check_trained, matched_codes
from pysolve.methods.menu import Chosen
from pysolve.methods.rate import Coded, Subject, shortened, subject_of, within_bytes
from pysolve.methods.rebuild import Rebuilt, rebuild
from pysolve.methods.result import assembled, finish
from pysolve.methods.study import Clock, Study
from pysolve.nn.batches.items import Transform
from pysolve.nn.cut.apply import apply
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import Evaluate, nbytes
from pysolve.nn.files.checkpoint import file_bytes
from pysolve.nn.progress import one_bar
from pysolve.nn.running import Batch, Device, Ignored
from pysolve.nn.threads import one_blas_thread
from pysolve.plan import Plan, Site

LAYOUTS = ("dense", "auto", "sparse", "shared")
# Least bytes, and share of a target, left for what layouts and training change; tries to hold it.
FEWEST, _SPARE, _TRIES = 24, 0.01, 4


@one_blas_thread
@one_bar
def quantize(
    model: nn.Module | Compressed,
    batches: Iterable[Batch] | Study | None = None,
    *,
    scheme: str = "int8-dynamic",
    bits: int | None = None,
    target: Target | None = None,
    group: int | None = None,
    method: str = "feedback",
    distill: Length = 0,
    layout: str = "dense",
    ignore: Sequence[Ignored] = (),
    evaluate: Evaluate | None = None,
    divergence: Divergence = kl_divergence,
    memory: Memory = None,
    transform: Transform | None = None,
    latency: bool = True,
    process_group: ProcessGroup | None = None,
    device: Device = None,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Store the weights of a network in few bits.

    With batches, every layer is rounded in the metric of what it reads, errors compensating each other,
    layer after layer on the quantised network's own inputs; without, weight by weight.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed. Weights of its Linear layers and convolutions are quantised, with shared values those of
        embeddings as well. What is zero stays so; sparse layers become dense ones first.
    batches : iterable of batches, optional
        As ``compress`` takes them, unlabelled; needed to distill.
    scheme : "int8-dynamic", "int8", "codebook" or "ternary"
        "int8": integers times a scale for every output. "int8-dynamic": of Linear layers, whose inputs
        are rounded to 8 bits as well when they run; other layers are left alone. "codebook": few values that
        a layer shares. "ternary": two values and zero, but 16 values in the first layer and the last. With
        these two, large parameters that are no layer's weight (positions, attention's and recurrent weights)
        take 256 values, or with a target as many as they are worth; the rest, biases and the statistics of
        norms are rounded to bfloat16.
    bits : int, optional
        Of a code: by default 8 for "int8", 4 for "codebook". With a target, the most.
    target : {"bytes": number}, optional
        "codebook": what the file that ``save`` writes may take, as a number or a share of the original's
        tensors. Sizes of codebooks, zeros and how often each value is taken follow from that: layer by layer,
        the error and what entropy coding takes are minimised together, at one price of a bit for all layers,
        by what errors do to the network's outputs.
    group : int, optional
        "int8": so many consecutive inputs share a scale; all of an output by default.
    method : "feedback" or "nearest"
        "nearest": every weight by itself, as a baseline.
    distill : number of seconds, or {"seconds" or "epochs": number, "trained": …, …}
        Afterwards, train to give the original's outputs on the batches, without labels, with any further
        options of ``distill``. "codebook": the shared values, biases and norms; with ``trained="both"``
        weights may change to other values, too. "ternary": both, from the weights as they were, which become
        zero below a tenth of their layer's largest, as in trained ternary quantisation.
    layout : "dense", "auto", "sparse" or "shared"
        How layers of a codebook run: decoded once; sparse where that is faster and smaller, or in any case,
        as ``prune`` has it; or with their values as parameters that can be trained, decoded in every call.
    ignore : sequence of str, types or modules
        Layers to leave alone: names, patterns as ``re:…``, types, or the layers themselves.
    evaluate : callable, optional
        From a network to a score, for the report.
    divergence : callable
        As in ``compress``.
    seed : int
        Of the choice of rows, and of training.
    progress : bool
        Show progress bars, with the time left, when on a terminal.
    memory, transform, latency, process_group, device
        As ``compress`` has them.

    Returns
    -------
    Compressed
        Its report gives the bits of every layer, and under ``file`` what ``save`` writes.

    Raises
    ------
    PysolveError
        Nothing can be quantised; a target out of reach.
    TypeError, ValueError
        Arguments that make no sense, before any work.

    References
    ----------
    E. Frantar et al., GPTQ, 2023. S. Han et al., Deep compression, 2016. C. Zhu et al., Trained ternary
    quantization, 2017.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> small = ps.quantize(model, batches, scheme="codebook", bits=3, latency=False)
    >>> len(small.model[0].weight.unique())
    8
    """
    before, given = network_of(model)
    how = check_distill(given, distill, ("trained",))
    _check(scheme, bits, target, group, method, how, layout, batches is None)
    options = options_for(
        given, ignore, divergence, memory, seed, progress, evaluate, transform, latency, process_group, device
    )
    network, options = prepared(given, options)
    kind = Codes(scheme, bits, group, method)
    subject = subject_of(network, batches, options, kind, to_bytes=target is not None)
    clock, size = Clock(), None if target is None else in_bytes(target["bytes"], network)
    rebuilt, laid = coded(before, subject, network, size, layout, how)
    clock.stage("quantize")
    return finish(
        before,
        subject.study,
        laid,
        clock,
        target=None if size is None else {"bytes": size},
        samples=rebuilt.samples,
        notes=rebuilt.notes,
        file=True,
    )


def coded(
    before: nn.Module | Compressed,
    subject: Subject,
    teacher: nn.Module,
    size: int | None,
    layout: str,
    distill: Mapping[str, object],
    *,
    keep: Mapping[Site, Indices] | None = None,
    start: Coded | None = None,
) -> tuple[Rebuilt, LaidOut]:
    """A network in few bits, trained on where asked for, as its layers are to run.

    Parameters
    ----------
    before : nn.Module or Compressed
        What was given.
    subject : Subject
    teacher : nn.Module
        What it is trained towards.
    size : int, optional
        What its file may take.
    layout : str
    distill : {option: value}
    keep : {Site: (k,) int array}, optional
        Channels that stay of the sites that lose some.
    start : Coded, optional
        What came near the size.

    Raises
    ------
    PysolveError
        The file does not get so small.
    """
    # Layouts and training may change what the file takes.
    loose = bool(distill) or layout != "dense"
    aim, taken = aim_of(size or 0, loose), 0
    for _ in range(_TRIES):
        if size is None:
            chosen = Chosen(keep or {}) | subject.kind.choose(subject.study)
            done = Coded(shortened(subject, rebuild(subject.study, chosen)))
        else:
            done = within_bytes(subject, aim, partial(file_of, before, subject), keep=keep, start=start)
            assert done.bytes is not None
            if done.bytes > aim and taken:
                break
            if done.bytes > aim:
                raise out_of_reach(done.bytes, size, teacher, loose)
        start, rebuilt = done, done.rebuilt
        assert rebuilt is not None
        if distill:
            rebuilt = matched_codes(subject, rebuilt, teacher, distill)
        laid = lay_out(subject.study, rebuilt, layout)
        if size is None:
            return rebuilt, laid
        taken = file_bytes(assembled(before, laid.plan, laid.model))
        if taken <= size:
            return rebuilt, laid
        aim -= taken - aim_of(size, loose)
    raise PysolveError(
        f"the file has {taken:,} bytes where {size:,} are wanted, as its layers run or after training: "
        'give a larger target, layout="dense", or no trained="both".'
    )


def in_bytes(target: float, original: nn.Module) -> int:
    """A number of bytes, or a share of the original's tensors: one at least."""
    return max(1, int(target if target > 1 else target * nbytes(original)))


def aim_of(size: int, loose: bool) -> float:
    """Bytes to aim at: with some to spare where layouts or training change what the file takes."""
    return size - max(_SPARE * size, FEWEST) if loose else size


def out_of_reach(least: int, size: int, original: nn.Module, loose: bool) -> PysolveError:
    """What to say where the smallest file takes ``least`` bytes."""
    needed = max(least + FEWEST, math.ceil(least / (1 - _SPARE))) if loose else least
    share = 100 * size / nbytes(original)
    return PysolveError(
        f"the file still has {needed:,} bytes where {size:,} are wanted, {share:.3g} % of the original's: "
        "what is no weight, and layers that are left alone, count too. Give a larger target, or a smaller "
        "network."
    )


def file_of(before: nn.Module | Compressed, subject: Subject, rebuilt: Rebuilt, *, cut: bool = False) -> int:
    """Bytes of the file of a rebuilt network, its layers dense; ``cut``: channels went a stage before."""
    plan = plan_of(subject.study, rebuilt)
    model = apply(subject.study.model, plan)
    if cut:
        before, plan = assembled(before, Plan(plan.steps), model), replace(plan, steps=())
    return file_bytes(assembled(before, plan, model))


def _check(
    scheme: str,
    bits: int | None,
    target: Target | None,
    group: int | None,
    method: str,
    distill: Mapping[str, object],
    layout: str,
    blind: bool,
) -> None:
    """What can be told to be wrong before any work."""
    one_of("scheme", scheme, SCHEMES)
    one_of("method", method, METHODS)
    integers = SCHEMES[scheme] == "int"
    check_layout(layout, ("dense",) if integers else LAYOUTS, f"scheme={scheme!r}")
    if scheme in ("int8-dynamic", "ternary") and bits is not None and not (integers and bits == 8):
        raise ValueError(f"bits are for int8 and codebook, got {bits} for {scheme}.")
    if bits is not None:
        check_whole("bits", bits, 1 + integers, 8)
    if group is not None:
        check_whole("group", group)
    if target is not None:
        check_target(target, ("bytes",), "the file of a quantised network has a size")
        if scheme != "codebook" or method != "feedback":
            raise ValueError(
                f'a target needs scheme="codebook" and method="feedback", got {scheme}, {method}.'
            )
    if group is not None and scheme != "int8":
        raise ValueError(f"groups of inputs are for int8, got {scheme!r}.")
    if distill and integers:
        raise ValueError(f"distill is for codebook and ternary, got {scheme!r}.")
    if distill and blind:
        raise ValueError("distill needs batches: unlabelled inputs.")
    if distill:
        check_trained(distill)
