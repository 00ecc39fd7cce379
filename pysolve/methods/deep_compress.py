"""``deep_compress``: channels, zeros and bits under one number of bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn
from torch.distributed import ProcessGroup

from pysolve.compressed import Compressed
from pysolve.correlations import Indices
from pysolve.errors import PysolveError
from pysolve.methods.goal import (
    Length,
    Memory,
    Target,
    check_distill,
    check_share,
    check_target,
    check_whole,
    network_of,
    options_for,
    prepared,
)
from pysolve.methods.kinds.codes import Codes
from pysolve.methods.kinds.zeros import Zeros
from pysolve.methods.layout import check_layout, plan_of
from pysolve.methods.matching import check_trained
from pysolve.methods.menu import Chosen, Fit
from pysolve.methods.quantize import LAYOUTS, coded, in_bytes
from pysolve.methods.rate import (
    Subject,
    priced,
    subject_of,
)
from pysolve.methods.rebuild import rebuild
from pysolve.methods.result import NO_REPORT, finish, following, matched
from pysolve.methods.sizes import site_reports
from pysolve.methods.stages import Stages, packed, sparse_bytes
from pysolve.methods.study import Clock, Study
from pysolve.methods.widths import chosen_width
from pysolve.nn.batches.items import Transform, check_batches
from pysolve.nn.cut.apply import apply
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import Evaluate, nbytes, parameters
from pysolve.nn.progress import one_bar, part
from pysolve.nn.running import Batch, Device, Ignored
from pysolve.nn.threads import one_blas_thread
from pysolve.plan import Site

# Share of the training before weights share values.
_BEFORE = 0.6


@one_blas_thread
@one_bar
def deep_compress(
    model: nn.Module | Compressed,
    batches: Iterable[Batch] | Study,
    *,
    target: Target | None = None,
    zeros: float | None = None,
    bits: int | None = None,
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
    """Make the file of a network as small as asked: fewer channels, zeros, few shared values, entropy coding.

    Each stage is left out where nothing asks for it, and all of them compete where only bytes are given.

    1. *Collapse*: channels are removed, and what is left is refitted, as ``compress`` does it.
    2. *Sparse*: a share of the weights becomes zero, as ``prune`` does it by "obs".
    3. *Shared*: the others take few values, as ``quantize`` does it with a codebook.
    4. *Matched*: the values, biases and norms are trained to give the original's outputs, without labels.
    5. *Coded*: in the file that ``save`` writes.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed.
    batches : iterable of batches
        As ``compress`` takes them, unlabelled.
    target : {"bytes" and/or "params": number}, optional
        "bytes": what the file may take, a number or a share of the original's tensors. Zeros and values
        follow from one price of a bit for all weights; of several widths that one is taken whose outputs are
        closest to the original's. "params": parameters after channels were removed, a number or a share; 1
        keeps all channels. By default searched for with "bytes", and otherwise 1.
    zeros : float, optional
        Share of the weights that is pruned before the rest is quantised; by default none by itself.
    bits : int, optional
        At most 2^bits values a layer; without bytes as a target, as many in every layer, by default 16.
    distill : number of seconds, or {"seconds" or "epochs": number, …}
        As ``quantize`` has it: three fifths of the time before weights share values, the rest afterwards.
    layout, ignore, evaluate, divergence, memory, transform, latency, process_group, device,
    seed, progress
        As ``quantize`` has them.

    Returns
    -------
    Compressed
        Its report has a table of the stages, and under ``file`` what ``save`` writes, to the byte.

    Raises
    ------
    PysolveError
        A target out of reach; nothing to quantise.
    TypeError, ValueError
        Arguments that make no sense, before any work.

    References
    ----------
    S. Han, H. Mao, W. J. Dally, Deep compression, 2016.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> tiny = ps.deep_compress(model, batches, target={"bytes": 0.2, "params": 1}, latency=False)
    >>> ps.file_bytes(tiny) == tiny.report.after["file"]
    True
    """
    check_batches(batches)
    before, given = network_of(model)
    how = check_distill(given, distill, ("trained",))
    _check(target, zeros, bits, how, layout)
    asked = dict(target or {})
    if iter(batches) is batches:
        batches = list(batches)
    options = options_for(
        given, ignore, divergence, memory, seed, progress, evaluate, transform, latency, process_group, device
    )
    network, options = prepared(given, options)
    clock = Clock()
    size = in_bytes(asked["bytes"], network) if "bytes" in asked else None
    share = _share(asked.get("params", None if size else 1.0), network)
    kind = Codes(bits=bits)
    make = partial(subject_of, to_bytes=size is not None, gather=bool(zeros))
    with part(1, 3, "study"):
        subject, notes = _studied(partial(make, network, batches, options, kind), share)
    stages = Stages(network, subject.study)
    stages.note("original", network, nbytes(network), 0.0)
    with part(2, 3, "channels"):
        width = chosen_width(
            before, subject, network, size, share, cut=bool(how), loose=bool(how) or layout != "dense"
        )
        if width is not None and width.keep:
            stages.rebuilt("collapsed", subject.study, Chosen(width.keep), width.seconds)
            if how:
                before, subject = _matched_first(before, subject, width.keep, batches, how, stages, make)
                width = replace(width, start=None, cut=True)
        keep = {} if width is None or width.cut else width.keep
        if width is not None and keep and size is not None:
            subject = priced(subject, keep)
        if zeros:
            subject = replace(subject, kind=replace(subject.kind, pruned=_pruned(subject, zeros)))
            stages.rebuilt("sparse", subject.study, Chosen(keep, subject.kind.pruned), size=sparse_bytes)
    start, rest = time.perf_counter(), _part(how, 1 - _BEFORE if width and width.cut else 1.0)
    known = width.start if width else None
    with part(3, 3, "codes"):
        rebuilt, laid = coded(before, subject, network, size, layout, rest, keep=keep, start=known)
    stages.note(
        "shared, matched" if how else "shared",
        laid.model,
        packed(subject.study, laid.plan),
        time.perf_counter() - start,
    )
    clock.stage("compress")
    result = finish(
        before,
        subject.study,
        laid,
        clock,
        against=network,
        target=asked or None,
        samples=rebuilt.samples,
        sites=[*site_reports(stages.study, width.sized)] if width else [],
        notes=(*notes, *stages.notes, *rebuilt.notes),
        selected=width is not None,
        file=True,
    )
    stages.note("coded", result.model, result.report.after["file"], 0.0)
    return replace(result, report=replace(result.report, stages=tuple(stages.rows)))


def _studied(make: Callable[..., Subject], share: float | None) -> tuple[Subject, list[str]]:
    """One study for channels and codes; without channels where these are searched for and cannot be found."""
    wide = share is not None and share >= 1
    if wide:
        return make(), []
    try:
        subject = make(sites=True)
        if subject.study.free or share is None:
            why = sorted({site.pinned for site in subject.study.sites if site.pinned})
            notes = [f"all channels stay: {'; '.join(why) or 'the network has no sites'}"]
            return subject, [] if subject.study.free else notes
        raise PysolveError("no channel of this network can be removed.")
    except PysolveError as error:
        if share is not None:
            raise
        return make(), [f"all channels stay: {error}"]


def _matched_first(
    before: nn.Module | Compressed,
    subject: Subject,
    keep: Mapping[Site, Indices],
    batches: Iterable[Batch],
    distill: Mapping[str, object],
    stages: Stages,
    make: Callable[..., Subject],
) -> tuple[Compressed, Subject]:
    """Remove the channels, match the original's outputs, and study what that is."""
    study, start = subject.study, time.perf_counter()
    plan = plan_of(study, rebuild(study, Chosen(keep)), {})
    options = {name: value for name, value in _part(distill, _BEFORE).items() if name != "trained"}
    student, notes = matched(study, study.model, apply(study.model, plan), options)
    stages.notes.extend(notes)
    stages.note("matched", student, nbytes(student), time.perf_counter() - start)
    smaller = following(before, Compressed(student, plan, NO_REPORT))
    # A study is of the original: its samples serve the smaller network, too.
    return smaller, make(
        student,
        [*batches] if isinstance(batches, Study) else batches,
        study.options,
        Codes(bits=subject.kind.bits),
    )


def _pruned(subject: Subject, zeros: float) -> Mapping[str, Fit]:
    """How weights are pruned first: optimal brain surgeon, the share of all together."""
    return Zeros("obs", amount=zeros, scope="global").choose(subject.study).fits


def _part(distill: Mapping[str, object], share: float) -> dict[str, object]:
    """Some of the training."""
    found = dict(distill)
    for unit in ("seconds", "epochs"):
        if unit in found:
            value = share * float(found[unit])  # type: ignore[arg-type]
            found[unit] = max(1, round(value)) if unit == "epochs" else value
    return found


def _share(number: float | None, network: nn.Module) -> float | None:
    """A number of parameters as a share."""
    return number if number is None or number <= 1 else number / parameters(network)


def _check(
    target: Target | None,
    zeros: float | None,
    bits: int | None,
    distill: Mapping[str, object],
    layout: str,
) -> None:
    """What can be told to be wrong before any work."""
    if not target and zeros is None and bits is None:
        raise ValueError("give target, zeros or bits: nothing says how small the file is to be.")
    if target:
        check_target(target, ("bytes", "params"), "the file of a network, and its channels, have a size")
    if zeros is not None:
        check_share("zeros", zeros)
    if bits is not None:
        check_whole("bits", bits, 1, 8)
    check_layout(layout, LAYOUTS, "deep_compress")
    check_trained(distill)
