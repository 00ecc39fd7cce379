"""What the weights of a network's layers are multiplied with while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from pysolve.errors import PysolveError
from pysolve.nn.gathering.products import as_called, product
from pysolve.nn.layer_kinds import inputs_first, is_extended
from pysolve.nn.layer_matrix import Layer
from pysolve.nn.overrides import Args, Function, Kwargs, Overriding

# Called with the name of a layer, the layer as it is called, its input and its output; what it returns, if
# anything, takes the output's place.
Record = Callable[[str, Layer, Tensor, Tensor], Tensor | None]


@contextmanager
def watching(layers: Mapping[str, Layer], record: Record) -> Iterator[None]:
    """Record every call of some layers: of torch's own the call, of others that of their weight's operator.

    A convolution that pads by itself, say, reads the padded input.
    """

    def hook_for(name: str) -> Callable[..., Tensor | None]:
        def hook(
            layer: Layer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor
        ) -> Tensor | None:
            x = args[0] if args else kwargs["input"]
            check_visible(name, x, y)
            return record(name, layer, x, y)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            if not is_extended(layer):
                # First of all hooks: users' own may change what the layer itself gives.
                hook = layer.register_forward_hook(hook_for(name), with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
        extended = {name: layer for name, layer in layers.items() if is_extended(layer)}
        if extended:
            stack.enter_context(_Operators(extended, record))
        yield


def check_visible(name: str, *values: Tensor) -> None:
    """Raise PysolveError where a layer runs inside a transform of a function, which hides its values."""
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, values)):
        raise PysolveError(
            f"{name} runs inside torch.vmap or another transform of torch.func, where what it reads cannot "
            f"be seen: call it on whole batches instead, or leave it out, ignore=[{name!r}]."
        )


class _Operators(Overriding):
    """Records the operators that take the weights of some layers."""

    def __init__(self, layers: Mapping[str, Layer], record: Record) -> None:
        super().__init__()
        self.layers = {layer.weight.data_ptr(): (name, layer) for name, layer in layers.items()}
        # Code that rescales its weight, by ``weight.data = …``, moves it elsewhere.
        self.weights = {id(layer.weight): (name, layer) for name, layer in layers.items()}
        self.record = record

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        result = func(*args, **kwargs)
        call = product(getattr(func, "__name__", ""), args, kwargs)
        if call is None or not isinstance(call.weight, Tensor):
            return result
        known = self.layers.get(call.weight.data_ptr(), ("", None))
        name, layer = self.weights.get(id(call.weight), known)
        if layer is None or not call.of(layer) or not _is_weight(call.weight, layer, call.takes_inputs_first):
            return result
        check_visible(name, call.x, result)
        called = as_called(layer, call)
        changed = None if called is None else self.record(name, called, call.x, result)
        return result if changed is None else changed


def _is_weight(given: Tensor, layer: Layer, inputs_are_first: bool) -> bool:
    """Whether an operator is given a layer's weight as it is stored, or turned as it takes it."""
    own = layer.weight if layer.weight.ndim > 2 or inputs_first(layer) == inputs_are_first else layer.weight.T
    return given.shape == own.shape and given.stride() == own.stride()
