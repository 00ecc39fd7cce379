"""Batches looked at before anything is fitted to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.errors import DataError
from pysolve.nn.graph.export import Graph
from pysolve.nn.graph.sizes import fits
from pysolve.nn.outputs import main_output
from pysolve.nn.refusal import by_name, in_words, output_of
from pysolve.nn.running import Batch, evaluating


def sound(
    model: nn.Module, batches: Iterable[Batch], first: Batch, graph: Graph | None, *, run: bool
) -> Iterator[Batch]:
    """The batches, each looked at before anything is fitted to it; odd ones run if nothing else runs them."""
    for index, batch in enumerate(batches):
        if graph is not None:
            _check_plain_values(index, batch, first)
            if run and not fits(graph, batch):
                with evaluating(model):
                    output_of(model, batch)
        _check_finite(model, index, batch)
        yield batch


def _check_plain_values(index: int, batch: Batch, traced: Batch) -> None:
    """Refuse a batch that the graph does not stand for: what is no tensor is a constant in it."""
    given, known = _plain_values(batch), _plain_values(traced)
    pairs = {name: (given.get(name, ...), known.get(name, ...)) for name in {**known, **given}}
    others = [f"{name} is {_said(a)}, not {_said(b)}" for name, (a, b) in pairs.items() if not _equal(a, b)]
    if others:
        raise DataError(
            f"batch {index} has other values than the first, which the network is traced with once for all: "
            f"{'; '.join(others)}. Give numbers as tensors, and all else (None, flags, words, which inputs "
            "there are) the same in every batch."
        )


def _plain_values(batch: Batch) -> dict[str, object]:
    """What is no tensor, and of tensors the type."""
    return {name: v.dtype if isinstance(v, Tensor) else v for name, v in by_name(batch).items()}


def _equal(one: object, other: object) -> bool:
    return type(one) is type(other) and (one is other or bool(np.all(one == other)))


def _said(value: object) -> str:
    if isinstance(value, torch.dtype):
        return f"a tensor of {str(value).removeprefix('torch.')}"
    return "left out" if value is ... else in_words(value)


def _check_finite(model: nn.Module, index: int, batch: Batch) -> None:
    """Refuse NaN and infinity that reach the outputs; masks of −∞, and gaps that a network fills, do not."""
    tensors = {name: v for name, v in by_name(batch).items() if isinstance(v, Tensor)}
    bad = {name: v for name, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all())}
    if not bad:
        return
    with evaluating(model):
        output = main_output(output_of(model, batch))
    # Masked classes are −∞ by design; behind a mask of −∞ they prove nothing.
    masks = not any(bool((value.isnan() | value.isposinf()).any()) for value in bad.values())
    if bool((output.isnan() | output.isposinf() if masks else ~output.isfinite()).any()):
        places = "; ".join(f"{name} in {_samples_with(~value.isfinite())}" for name, value in bad.items())
        raise DataError(
            f"samples of batch {index} hold NaN or infinity, and so do the network's outputs: {places}. "
            "Leave these samples out, or mend how they are read and scaled."
        )


def _samples_with(found: Tensor, shown: int = 5) -> str:
    """Numbers of the samples in which anything was found."""
    rows = found.reshape(len(found), -1).any(1).nonzero().flatten().tolist() if found.ndim else [0]
    more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
    return f"sample{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:shown]))}{more}"
