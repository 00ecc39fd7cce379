"""The loop that all training shares: steps, epochs, the clock, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from pysolve.errors import DataError, PysolveError, path_of
from pysolve.nn.evaluate import score_of
from pysolve.nn.progress import in_call, passed, stage
from pysolve.nn.running import Batch, device_of, keeping_modes
from pysolve.nn.state import drop_graphs
from pysolve.training.options import Run, optimizer_of, schedule_of
from pysolve.training.resume import Parts, Progress, copied, plain, put, read, write

# What one step of training takes: rows of an array, a batch, or a batch with its position.
Item = TypeVar("Item")
Value = TypeVar("Value")
# From an epoch's number to the items of its steps, each with its weight in the epoch's mean loss.
Passes = Callable[[int], Iterable[tuple[int, Item]]]


@dataclass(frozen=True)
class Extras(Generic[Item]):
    """Optional parts of a training.

    ``auxiliary`` is trained together with the network; ``generators`` are the batches'; ``prepare`` is called
    before the first step of a training that is not finished yet, and its time counts; a checkpoint must share
    the ``settings`` to be resumed; ``nonfinite`` goes from an item and the number of its step to the part of
    it that is NaN or infinite, in words, or "".
    """

    auxiliary: nn.Module | None = None
    generators: Sequence[torch.Generator] = ()
    prepare: Callable[[], None] | None = None
    settings: Mapping[str, object] | None = None
    nonfinite: Callable[[Item, int], str] = lambda item, number: ""


def optimise(
    model: nn.Module,
    loss: Callable[[Item], Tensor],
    run: Run,
    passes: Passes[Item],
    extras: Extras[Item] | None = None,
) -> list[float]:
    """Train the parameters that require a gradient, in place; return the mean loss of each epoch.

    ``loss`` is that of one item; the caller sets the network's mode. Raises PysolveError when nothing can be
    trained or the loss becomes NaN or infinite; DataError when an epoch has no batches, an item is not
    finite, or the checkpoint is of another training.
    """
    extras = extras or Extras()
    parts = _parts(model, run, extras)
    settings = {name: plain(value) for name, value in (run.settings() | dict(extras.settings or {})).items()}
    path = None if run.checkpoint is None else path_of("checkpoint", run.checkpoint)
    with _bar(run) as bar, torch.enable_grad(), _random_state(run.seed, device_of(model)):
        stage("train")
        progress = Progress() if path is None else read(path, parts, settings)
        start = time.perf_counter() - progress.elapsed
        if extras.prepare is not None and not progress.finished:
            extras.prepare()
            progress.before += time.perf_counter() - start - progress.elapsed
        while not progress.finished:
            _epoch(progress, loss, run, passes(len(progress.losses)), parts, extras.nonfinite, start, bar)
            _judge(progress, run, model)
            if path is not None:
                write(path, progress, parts, settings)
    drop_graphs(model)
    return progress.losses


def _parts(model: nn.Module, run: Run, extras: Extras[Item]) -> Parts:
    modules = [model] if extras.auxiliary is None else [model, extras.auxiliary]
    trained = [value for module in modules for value in module.parameters() if value.requires_grad]
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PysolveError("no parameter of the network requires a gradient: nothing can be trained.")
    optimizer = optimizer_of(run.optimizer, trained, float(run.lr), float(run.weight_decay))
    schedule = schedule_of(run.schedule, optimizer, run.length, momentum=isinstance(run.optimizer, str))
    return Parts(modules, optimizer, schedule, extras.generators, run.after_step)


def _epoch(
    progress: Progress,
    loss: Callable[[Item], Tensor],
    run: Run,
    items: Iterable[tuple[int, Item]],
    parts: Parts,
    nonfinite: Callable[[Item, int], str],
    start: float,
    bar: tqdm[NoReturn],
) -> None:
    """Steps on all items of one pass, or until the training ends."""
    epoch, total, seen = len(progress.losses) + 1, 0.0, 0
    for number, (weight, item) in enumerate(items, start=1):
        value = _step(parts, loss(item), run.clip)
        if not math.isfinite(value):
            raise _not_finite(value, epoch, number, run, nonfinite(item, number))
        total, seen = total + value * weight, seen + weight
        progress.done += 1
        progress.elapsed = time.perf_counter() - start
        # The clock's estimate may fall back.
        position = run.position(progress.done, progress.elapsed, progress.before)
        progress.position = max(progress.position, position)
        bar.set_postfix(epoch=epoch, loss=f"{total / seen:.4g}", refresh=False)
        bar.update(progress.position - bar.n)
        passed(progress.position / run.length)
        if run.after_step is not None:
            run.after_step(progress.position / run.length)
        if progress.position == run.length:
            break
        while parts.schedule.last_epoch < progress.position:
            parts.schedule.step()
    if not seen:
        raise DataError("there are no batches any more: give a list of them, or a DataLoader.")
    progress.losses.append(total / seen)


def _step(parts: Parts, loss: Tensor, clip: float | None) -> float:
    """Take one optimizer step if the loss is finite; return the loss before it."""
    value = loss.item()
    if math.isfinite(value):
        parts.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            groups = parts.optimizer.param_groups
            clip_grad_norm_([value for group in groups for value in group["params"]], clip)
        parts.optimizer.step()
    return value


def _judge(progress: Progress, run: Run, model: nn.Module) -> None:
    """Score the network after an epoch; at the end of the training, restore the best epoch."""
    epochs = len(progress.losses)
    progress.finished = progress.position == run.length or epochs == run.epochs
    if run.evaluate is None:
        return
    # Scoring must not change the course of the training.
    # What the user's function writes into the network is the user's.
    with keeping_modes(model), torch.no_grad(), _random_state(run.seed, device_of(model)):
        model.eval()
        score = score_of(run.evaluate, model)
    if math.isnan(score):
        raise PysolveError(
            f"evaluate gave nan after epoch {epochs}: it must give a number, higher is better."
        )
    progress.stale += 1
    if score > progress.score or not progress.best:
        progress.score, progress.stale, progress.best = score, 0, copied(model)
    progress.finished |= run.patience is not None and progress.stale >= run.patience
    if progress.finished:
        put(model, progress.best)


def _not_finite(value: float, epoch: int, number: int, run: Run, why: str) -> PysolveError:
    said = f"the loss became {value} in epoch {epoch}"
    if why:
        return DataError(f"{said}: {why} holds NaN or infinity.")
    rate = f"lower lr ({run.lr})" if isinstance(run.optimizer, str) else "lower the optimizer's lr"
    return PysolveError(f"{said}: {rate}, or give clip. That was in step {number} of the epoch.")


def nonfinite_batch(batch: Batch, number: int) -> str:
    """Name of the batch if it holds NaN or infinity, else ""."""
    leaves = pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return "" if all(bool(tensor.isfinite().all()) for tensor in tensors) else f"batch {number}"


def nonfinite_sample(samples: Tensor, rows: Tensor) -> str:
    """Name of the first of some samples that holds NaN or infinity, or ""."""
    finite = samples[rows].flatten(1).isfinite().all(1) if samples.ndim > 1 else samples[rows].isfinite()
    return "" if bool(finite.all()) else f"sample {int(rows[~finite.to(rows.device)][0])}"


def computing(run: Run, device: torch.device) -> AbstractContextManager[object]:
    """Compute in the run's precision inside."""
    return torch.autocast(device.type, torch.bfloat16) if run.bfloat16(device) else nullcontext()


def in_float32(output: Value) -> Value:
    """An output whose half-precision tensors are float32, for the loss."""
    short = (torch.bfloat16, torch.float16)
    full: Value = pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype in short else t, output)
    return full


def shuffled(n: int, steps: int, seed: int) -> Passes[Tensor]:
    """Indices of n examples, shuffled anew in every epoch, in parts of nearly equal size for its steps."""
    generator, drawn = torch.Generator().manual_seed(int(seed)), 0

    def rows(epoch: int) -> Iterator[tuple[int, Tensor]]:
        nonlocal drawn
        # One stream for all epochs: what was drawn before a stop is drawn again.
        while drawn <= epoch:
            order, drawn = torch.randperm(n, generator=generator), drawn + 1
        # Parts of nearly equal size: batch norm cannot train on a last batch of one sample.
        return ((len(part), part) for part in order.tensor_split(steps))

    return rows


def _bar(run: Run) -> tqdm[NoReturn]:
    form = None if run.seconds is None else "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    off = None if run.progress and not in_call() else True
    return tqdm(total=run.length, desc="train", unit="batch", disable=off, bar_format=form)


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global random state inside (for dropout) and restore it afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield
