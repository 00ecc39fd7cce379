"""Networks as they come: wrappers are taken off, and what nothing can be done with is refused."""

from __future__ import annotations

import sys
from itertools import chain

from torch import nn
from torch.fx import GraphModule
from torch.jit import ScriptModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from pysolve.errors import PysolveError
from pysolve.nn.state import Memo, copy_of

_NAMED = 3


def plain_network(model: nn.Module) -> nn.Module:
    """A network without the wrappers of parallel training and of torch.compile, on it or in it.

    Where parts are wrapped, another network with the same parameters, in which they are not; where tensors
    allow no gradients, a copy.

    Raises
    ------
    PysolveError
        A network whose weights cannot be read or changed: says what to give instead.
    TypeError
        What is given is no network.
    """
    model = unwrapped(model)
    check_plain(model)
    tensors = chain(model.parameters(), model.buffers())
    # No gradient passes tensors that were made under inference_mode; copies are others.
    return copy_of(model) if any(tensor.is_inference() for tensor in tensors) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """A network without wrappers, whatever else it is."""
    while _is_wrapper(model):
        model = _inner(model)
    wrappers = [part for part in model.modules() if _is_wrapper(part)] if isinstance(model, nn.Module) else []
    if not wrappers:
        return model
    # What a copy takes in the place of parts: the tensors themselves, and what the wrappers hold.
    memo: Memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    for wrapper in reversed(wrappers):
        memo[id(wrapper)] = copy_of(_inner(wrapper), memo)
    return copy_of(model, memo)


def check_plain(model: nn.Module) -> None:
    """Refuse what is no network of layers with values."""
    given: object = model
    if not isinstance(given, nn.Module):
        kind = type(model).__name__
        if kind == "ExportedProgram":
            raise TypeError("an exported program has no layers: give the network that it was made of.")
        raise TypeError(f"model must be a torch.nn.Module, or what compress returned, got {kind}.")
    if isinstance(model, GraphModule) and "eval" in vars(model):
        raise PysolveError("an exported program has no layers: give the network that it was made of.")
    for name, part in model.named_modules():
        if isinstance(part, ScriptModule):
            what = f"`{name}` is" if name else "the network is"
            raise PysolveError(
                f"{what} scripted, traced or frozen by torch.jit, and cannot be changed: give the network as "
                "it was before, and script the result."
            )
        if type(part).__module__.startswith("torch.ao.nn.quantized"):
            raise PysolveError(
                f"{f'`{name}`' if name else 'the network'} is quantised by torch.ao, which hides its "
                "weights: give the network as it was before."
            )
    tensors = [*chain(model.named_parameters(), model.named_buffers())]
    if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise PysolveError(
            f"{_some(lazy)} of lazy layers have no shape yet: call the network on a batch once."
        )
    if meta := [name for name, tensor in tensors if tensor.is_meta]:
        raise PysolveError(
            f"{_some(meta)}: there are no values on the meta device; call model.to_empty(device='cpu') and "
            "load the weights."
        )
    state = model.state_dict()
    if lost := [name for name, _ in model.named_parameters() if name not in state]:
        raise PysolveError(
            f"{_some(lost)}: state_dict() of {type(model).__name__} leaves them out or renames them, "
            "so that no file could hold what becomes of them: take the hook or the method off that does so."
        )


def _is_wrapper(model: object) -> bool:
    # Torch's compiler takes a second to import, and a network that it has wrapped has imported it.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    compiled = (compiler.OptimizedModule,) if compiler is not None else ()
    return isinstance(model, (DataParallel, DistributedDataParallel, *compiled))


def _inner(wrapper: nn.Module) -> nn.Module:
    inner = (
        wrapper.module if isinstance(wrapper, DataParallel | DistributedDataParallel) else wrapper._orig_mod
    )
    assert isinstance(inner, nn.Module)
    return inner


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
