"""Calls of torch's functions, seen or changed while other code makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch.overrides import TorchFunctionMode

# What a function or a module of torch, or of the user, is called with.
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
Function: TypeAlias = Callable[..., Any]


class Overriding(TorchFunctionMode):
    """A mode in which ``call`` takes the place of every call of torch's functions."""

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        """The function's result, or what is to take its place."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: Args = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return self.call(func, args, dict(kwargs or {}))
