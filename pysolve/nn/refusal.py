"""A network's run on a batch as it is, and what to say where the network refuses the batch."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.errors import DataError, PysolveError
from pysolve.nn.layer_kinds import EMBEDDINGS
from pysolve.nn.outputs import main_output
from pysolve.nn.overrides import Args, Kwargs
from pysolve.nn.running import (
    Batch,
    Device,
    Output,
    arguments,
    closest,
    evaluating,
    few_samples,
    forward,
    prepared,
    same_draws,
)

_TORCH, _NN = Path(torch.__file__).parent, Path(__file__).parent
# Where networks are called from, which is not where their errors come from.
_CALLERS = {
    str(_NN / name)
    for name in ("graph/export.py", "graph/sites.py", "graph/trials.py", "refusal.py", "running.py")
}

_SINGLE = (
    " It is a single sample, without a dimension of samples, as it seems: give batches of many, such as "
    "torch.stack(samples).split(100), or a Dataset."
)


class Refusal(DataError):
    """A network's own refusal of a batch."""

    def __init__(self, text: str, batch: Batch) -> None:
        super().__init__(text)
        self.batch = batch


def output_of(model: nn.Module, batch: Batch, device: Device = None) -> Output:
    """``forward`` of a network that the user gave, on a batch that the user gave.

    Raises
    ------
    DataError
        When the network refuses the batch: with its shapes and types, torch's sentence, and a remedy.
    """
    args, kwargs = prepared(model, batch, device)
    try:
        return model(*args, **kwargs)
    except (PysolveError, torch.OutOfMemoryError):
        raise
    # Whatever the network's own code raises.
    except Exception as error:
        remedy = _names(model, batch) or _types(model, batch) or _single(model, batch)
        raise Refusal(
            f"{type(model).__name__} itself refuses the batch ({_described(batch)})"
            f"{code_line(error)}: {sentence(error)}.{remedy}",
            batch,
        ) from error


@contextmanager
def beside(first: Batch) -> Iterator[None]:
    """Say of a batch of other sizes than the first, which the network has taken, that these are why."""
    try:
        yield
    except Refusal as error:
        given, taken = (
            [getattr(value, "shape", ()) for value in by_name(one).values()] for one in (error.batch, first)
        )
        if given == taken:
            raise
        raise DataError(
            f"{error} The first batch ({_described(first)}) it takes: a size is written into its code, but "
            "samples are held out, and batches may differ. Read sizes from the input, such as x.shape[0], or "
            "leave out batches of other ones."
        ) from error


def sentence(error: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    return next(filter(None, map(str.strip, str(error).splitlines())), repr(error)).rstrip(".")


def code_line(error: BaseException) -> str:
    """The innermost line outside of torch that an error comes from, in brackets; nothing if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        known = Path(frame.filename).is_absolute() and frame.filename != inspect.__file__
        if known and not of_torch(frame.filename) and frame.filename not in _CALLERS:
            return f" ({Path(frame.filename).name}:{frame.lineno}: {frame.line})"
    return ""


def of_torch(file: str) -> bool:
    """Whether a file is torch's, or one of the layers here that stand for torch's."""
    return Path(file).is_relative_to(_TORCH) or Path(file).is_relative_to(_NN / "layers")


def by_name(batch: Batch) -> dict[str, object]:
    """Every value of a batch by the place where it stands: ``mask``, ``states[0]``; ``input`` of a tensor."""
    args, kwargs = arguments(batch)
    named = {"input": args[0]} if args else kwargs
    return {
        f"{name}{pytree.keystr(path)}": leaf
        for name, value in named.items()
        for path, leaf in pytree.tree_flatten_with_path(value)[0]
    }


def in_words(value: object) -> str:
    """A tensor by its type and shape, anything else by what it is."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _described(batch: Batch, shown: int = 8) -> str:
    """The first values of a batch in words."""
    words = [f"{name}: {in_words(value)}" for name, value in by_name(batch).items()]
    return ", ".join(words[:shown] + ["…"] * (len(words) > shown))


def _unfit(model: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, inspect.Parameter] | None:
    """What ``forward`` takes, where it cannot be called in this way."""
    with suppress(TypeError, ValueError):
        signature = inspect.signature(model.forward)
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            return {name: one for name, one in signature.parameters.items() if one.kind not in several}
    return None


def _names(model: nn.Module, batch: Batch) -> str:
    """What to do where the batch does not have the arguments of ``forward``."""
    args, kwargs = arguments(batch)
    known = _unfit(model, args, kwargs)
    if known is None:
        return ""
    needed = [name for name, p in known.items() if p.default is p.empty]
    mapping = "{" + ", ".join(f"{name!r}: …" for name in needed) + "}"
    if args:
        ignored = " Of a tuple or list the first item is the input; the rest is taken for labels."
        several = isinstance(batch, tuple | list) and len(batch) > 1
        return f"{ignored if several else ''} Give its {len(needed)} inputs by name: {mapping}."
    unknown = [name for name in kwargs if name not in known]
    meant = [f"{name!r}: {closest(name, known, 'forward does not take it')}" for name in unknown]
    if len(needed) == 1 and not set(needed) & set(kwargs):
        meant.append(f"or, where forward takes the whole mapping, wrap it: {mapping}")
    return f" Give what forward takes, {mapping}, and nothing else. {'; '.join(meant)}".rstrip(" .") + "."


def _types(model: nn.Module, batch: Batch) -> str:
    """What to do where inputs are of another type than the weights."""
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    reads_ids = any(isinstance(module, EMBEDDINGS) for module in model.modules())
    for name, value in by_name(batch).items():
        if not isinstance(value, Tensor) or wanted is None or value.dtype == wanted:
            continue
        kind, float_ = in_words(value).partition("[")[0], str(wanted).removeprefix("torch.")
        if value.is_floating_point():
            return f" {name} is {kind}, the network's weights are {float_}: give {name}.to(torch.{float_})."
        if value.dtype == torch.uint8:
            return f" {name} is uint8: scale images as in training, such as {name}.to(torch.{float_}) / 255."
        if not reads_ids and value.dtype != torch.bool:
            return f" {name} is {kind}, the network's weights are {float_}: give {name}.to(torch.{float_})."
    if reads_ids and all(v.is_floating_point() for v in by_name(batch).values() if isinstance(v, Tensor)):
        return " Embeddings read whole numbers: give them with .long()."
    return ""


def check_many(model: nn.Module, batch: Batch) -> None:
    """Refuse a single sample where the network takes one as well as a batch, but not a part of one.

    Raises
    ------
    DataError
        The network makes of the batch what it makes of it as the only one of a batch.
    """
    few = few_samples(batch)
    if few is batch or _tried(model, few) is not None:
        return
    alone, among = _tried(model, batch), _tried(model, _as_only(batch))
    if alone is not None and among is not None and among.shape == (1, *alone.shape):
        raise DataError(
            f"expected batches of samples, got {_described(batch)}.{_SINGLE} Where these are many samples, "
            "the code takes no fewer: read how many there are from the input, such as x.shape[0]."
        )


def _single(model: nn.Module, batch: Batch) -> str:
    """What to do where the batch is one sample: tried out."""
    return "" if _tried(model, _as_only(batch)) is None else _SINGLE


def _as_only(batch: Batch) -> Batch:
    """A batch of one sample, of a sample."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: leaf[None], arguments(batch))
    return kwargs or args


def _tried(model: nn.Module, batch: Batch) -> Tensor | None:
    """The main tensor that the network makes of a batch; None where it refuses it."""
    try:
        with evaluating(model), same_draws(model):
            return main_output(forward(model, batch))
    # Whatever the network's own code raises.
    except Exception:
        return None
