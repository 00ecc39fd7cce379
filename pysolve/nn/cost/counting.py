"""Multiply-accumulates of a network: counted by operator while it runs, for the module that calls it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from pysolve.nn.layer_kinds import WEIGHTED, inputs_first
from pysolve.nn.layers.base import weight_of
from pysolve.nn.layers.quantized import QuantWeight
from pysolve.nn.layers.sparse import SparseWeight
from pysolve.nn.overrides import Args
from pysolve.nn.refusal import output_of
from pysolve.nn.running import Batch, arguments, calling_layers, device_of, evaluating, prepared

aten = torch.ops.aten
# Two for each multiply-accumulate, as torch has it; from arguments with sizes in the place of tensors.
Formula = Callable[..., int]
Sizes = Sequence[int]
# Parameters, and their number times that of the batch's entries, from which on counting takes less time
# without values than with them: BERT of 23 million on 2 × 32 words 0.16 s and 0.05 s.
_LARGE, _LONG = 2**22, 2**33


def _attention(query: Sizes, key: Sizes, value: Sizes, *_: object, **__: object) -> int:
    """All scores, masked or not, and all sums of values."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _vector(matrix: Sizes, *_: object, **__: object) -> int:
    return 2 * prod(matrix)


def _biased_vector(bias: Sizes, matrix: Sizes, *_: object, **__: object) -> int:
    return 2 * prod(matrix)


def _matrices(left: Sizes, right: Sizes, *_: object, **__: object) -> int:
    return 2 * prod(left) * right[-1]


def _biased_matrices(bias: Sizes, left: Sizes, right: Sizes, *_: object, **__: object) -> int:
    return 2 * prod(left) * right[-1]


def _bilinear(first: Sizes, weight: Sizes, second: Sizes, *expand: Sequence[int], **_: object) -> int:
    sizes = []
    for size, dims in zip((first, weight, second), expand, strict=False):
        wide = [*size]
        for dim in sorted(dims):
            wide.insert(dim, 1)
        sizes.append(wide)
    return 2 * prod(torch.broadcast_shapes(*sizes))  # type: ignore[no-untyped-call]


def _recurrent_layer(inputs: Sizes, by_input: Sizes, by_state: Sizes, *_: object, **__: object) -> int:
    return 2 * prod(inputs[:-1]) * (prod(by_input) + prod(by_state))


def _recurrent(inputs: Sizes, weights: Sequence[Sizes], *_: object, **__: object) -> int:
    return 2 * prod(inputs[:-1]) * sum(prod(size) for size in weights if len(size) > 1)


# What torch's own registry lacks of what networks do when they run forward.
_MORE: dict[str, Formula] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    "mv": _vector,
    "dot": _vector,
    "vdot": _vector,
    "addmv": _biased_vector,
    "addbmm": _biased_matrices,
    "_int_mm": _matrices,
    "_addmm_activation": _biased_matrices,
    "_trilinear": _bilinear,
    "mkldnn_rnn_layer": _recurrent_layer,
    "_cudnn_rnn": _recurrent,
    "miopen_rnn": _recurrent,
}


# This package's layers that run in a form of their own.
_OWN: tuple[type[nn.Module], ...] = (SparseWeight, QuantWeight)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator that multiplies.

    Parameters
    ----------
    layer : str
        First name of the innermost module around it; "" of the network itself.
    macs : float
    what : str
        The operator.
    formula : callable, optional
        From the operands to twice the MACs; None of layers that count as a whole.
    operands : tuple
        Positional and keyword arguments and the result, as meta tensors.
    weight : float
        In a mean: ``macs`` are the formula's times this.
    """

    layer: str
    macs: float
    what: str = ""
    formula: Formula | None = None
    operands: object = ()
    weight: float = 1.0

    @property
    def sizes(self) -> list[int]:
        """Those of all tensors, one after the other."""
        return [size for leaf in pytree.tree_leaves(self.operands) for size in shape_of(leaf)]

    def at(self, sizes: Sequence[int]) -> float:
        """MACs with other sizes of its tensors."""
        assert self.formula is not None
        left = iter(sizes)

        def resized(leaf: object) -> object:
            return _empty([next(left) for _ in leaf.shape]) if isinstance(leaf, Tensor) else leaf

        args, kwargs, out = pytree.tree_map(resized, self.operands)
        return self.weight * float(self.formula(*args, **kwargs, out_val=out)) / 2

    def times(self, weight: float) -> Call:
        """As part of a mean."""
        return replace(self, macs=self.macs * weight, weight=self.weight * weight)


def calls(model: nn.Module, batch: Batch) -> list[Call]:
    """Every call of an operator that multiplies, in the order of one run in evaluation mode.

    Torch's registry of formulas (``torch.utils.flop_counter``) counts matrix products and convolutions; to it
    come attention's and recurrent layers' kernels, products of vectors, and this package's own layers, which
    count by what they multiply: sparse ones by their entries, integers as the weights that they stand for.
    Of networks that torch cannot count, as those with nested tensors, Linear layers and convolutions.
    Large networks run without values where their code does not ask for these. DataError where the network
    refuses the batch.
    """
    entries = sum(leaf.numel() for leaf in pytree.tree_leaves(arguments(batch)) if isinstance(leaf, Tensor))
    if (size := sum(one.numel() for one in model.parameters())) >= _LARGE and size * entries >= _LONG:
        # Whatever code raises that asks for values.
        with suppress(Exception):
            return _calls(model, batch, FakeTensorMode(allow_non_fake_inputs=True))
    return _calls(model, batch)


def _calls(model: nn.Module, batch: Batch, fake: FakeTensorMode | None = None) -> list[Call]:
    ledger = _Ledger({module: name for name, module in model.named_modules()})
    mapping = {key: ledger.recording(key, formula) for key, formula in _formulas().items()}
    with ExitStack() as context:
        context.enter_context(evaluating(model))
        context.enter_context(calling_layers())
        context.enter_context(warnings.catch_warnings())
        # Of compiled networks, whose hooks torch calls twice: the second time it is another module.
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        context.callback(register_module_forward_pre_hook(ledger.enter).remove)
        context.callback(register_module_forward_hook(ledger.leave, always_call=True).remove)
        try:
            args, kwargs = prepared(model, batch, device_of(model))
            if fake is not None:
                context.enter_context(fake)
                args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, (args, kwargs))
            with FlopCounterMode(display=False, custom_mapping=mapping):
                model(*args, **kwargs)
        # Torch's counter meets tensors of many kinds; if the network itself fails, it does so again.
        except Exception:
            if fake is not None:
                raise
            ledger.found.clear()
            ledger.layers = (*WEIGHTED, *_OWN)
            output_of(model, batch, device_of(model))
    return ledger.found


class _Ledger:
    """Calls, and the modules that run now; of one that counts as a whole, the operators inside do not."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.names, self.found, self.layers = names, list[Call](), _OWN
        self.stack: list[tuple[str, bool]] = [("", False)]

    def enter(self, module: nn.Module, _: object) -> None:
        """Hook before a module runs."""
        if module in self.names:
            self.stack.append((self.names[module], self.stack[-1][1] or isinstance(module, self.layers)))

    def leave(self, module: nn.Module, args: Args, output: object) -> None:
        """Hook after it ran."""
        if module in self.names:
            name, _ = self.stack.pop()
            if isinstance(module, self.layers) and isinstance(output, Tensor):
                self.found.append(Call(name, _whole(module, args, output)))

    def recording(self, what: object, formula: Formula) -> Formula:
        """A formula that also writes down what it is asked."""

        def count(*args: object, out_val: object = None, **kwargs: object) -> int:
            twice = formula(*args, out_val=out_val, **kwargs)
            name, inside = self.stack[-1]
            if not inside:
                self.found.append(
                    Call(name, twice / 2, str(what), formula, _emptied((args, kwargs, out_val)))
                )
            return twice

        # Torch then gives tensors, not their sizes.
        count._get_raw = True  # type: ignore[attr-defined]
        return count


def macs(model: nn.Module, example: Batch) -> int:
    """Multiply-accumulates of a network on one batch.

    Parameters
    ----------
    model : nn.Module
    example : one batch
        In the forms that ``gather`` takes; with one sample in it, the result is per sample.
    """
    return round(sum(call.macs for call in calls(model, example)))


def layer_macs(model: nn.Module, example: Batch) -> dict[str, int]:
    """``macs`` by the innermost module that multiplies, by its first name; "" is the network itself."""
    return {name: round(count) for name, count in by_layer(calls(model, example)).items()}


def by_layer(found: Sequence[Call]) -> dict[str, float]:
    """MACs of each module."""
    counts: dict[str, float] = {}
    for call in found:
        counts[call.layer] = counts.get(call.layer, 0.0) + call.macs
    return counts


def _whole(layer: nn.Module, args: Args, output: Tensor) -> float:
    """MACs of one call of a layer, by its weight."""
    if isinstance(layer, SparseWeight):
        return output.numel() // layer.shape[0] * layer.values.numel()
    weight = layer.codes if isinstance(layer, QuantWeight) else weight_of(layer)
    # Every output, or input where these come first, is multiplied with one slice of the weight.
    return (args[0] if inputs_first(layer) else output).numel() * weight[0].numel()


def _formulas() -> dict[object, Formula]:
    more = {name: formula for name, formula in _MORE.items() if hasattr(aten, name)}
    return {**flop_registry, **{getattr(aten, name): _sized(formula) for name, formula in more.items()}}


def _sized(formula: Formula) -> Formula:
    """A formula of sizes for tensors."""

    def count(*args: object, out_val: object = None, **kwargs: object) -> int:
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.shape, (args, kwargs))
        return formula(*args, **kwargs)

    return count


def _emptied(operands: object) -> object:
    """Meta tensors in the place of tensors."""
    if isinstance(operands, Tensor):
        return _empty(operands.shape)
    if type(operands) is tuple:
        return tuple(map(_emptied, operands))
    if type(operands) is list:
        return [*map(_emptied, operands)]
    if type(operands) is dict:
        return {key: _emptied(one) for key, one in operands.items()}
    return operands


def _empty(sizes: Sequence[int]) -> Tensor:
    return torch.empty(tuple(sizes), device="meta")


def shape_of(leaf: object) -> tuple[int, ...]:
    """Sizes of a tensor; none of anything else."""
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else ()
