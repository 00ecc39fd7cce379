"""Networks and batches to correlations: what each layer reads, and what it should output."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from tqdm.auto import tqdm

from pysolve.correlations import Correlations
from pysolve.errors import DataError, PysolveError
from pysolve.nn.network import Device, evaluating, find_layer, forward
from pysolve.plan import Site

# What happens with the input and output of one call of a layer.
Record = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class _Sums:
    """Running sums of one layer, on its device; grown in place."""

    xx: Tensor
    yx: Tensor
    yy: Tensor
    x_sum: Tensor
    y_sum: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, d: int, h: int, device: torch.device) -> _Sums:
        shapes: tuple[tuple[int, ...], ...] = ((d, d), (h, d), (h, h), (d,), (h,), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples in rows."""
        self.xx.addmm_(x.T, x)
        self.yx.addmm_(y.T, x)
        self.yy.addmm_(y.T, y)
        self.x_sum.add_(x.sum(0))
        self.y_sum.add_(y.sum(0))
        self.count.add_(len(x))

    def correlations(self) -> Correlations:
        # A matrix product rounds its two triangles differently; their mean is exactly symmetric.
        tensors = ((self.xx + self.xx.T) / 2, self.yx, (self.yy + self.yy.T) / 2, self.x_sum, self.y_sum)
        xx, yx, yy, x_sum, y_sum = (tensor.cpu().numpy() for tensor in tensors)
        return Correlations(xx, yx, yy, int(self.count), x_sum, y_sum)


def gather(
    model: nn.Module,
    batches: Iterable[Any],
    sites: Sequence[Site] | None = None,
    layers: Sequence[str] | None = None,
    *,
    target_model: nn.Module | None = None,
    device: Device = None,
    progress: bool = True,
    positions: float = 1.0,
) -> dict[str, Correlations]:
    """Run the network over the batches and sum up what its Linear layers read and write.

    For each layer: Σ x xᵀ, Σ y xᵀ, Σ y yᵀ, Σ x, Σ y over all samples and positions, with x the layer's
    input and y its output, bias included. Products and sums are float64, on the layer's device.

    Parameters
    ----------
    model : nn.Module
        Runs in evaluation mode without gradients; its own mode is restored, and nothing in it is changed.
    batches : iterable of tensors, of tuples or lists, or of mappings
        A tuple's or list's first item is the input; a mapping holds keyword arguments.
    sites : sequence of Site, optional
        Gather for all readers of these sites.
    layers : sequence of str, optional
        Gather for these layers. With neither: for every Linear of the network.
    target_model : nn.Module, optional
        Take y from the layer of the same name in this network, run on the same batches.
    device : torch.device, optional
        Where to move the batches; by default they must be on the network's device.
    progress : bool
        Show a progress bar when on a terminal.
    positions : float
        Share, in (0, 1], of the rows to keep of inputs with more than 2 dimensions. The choice is random
        but the same in every run.

    Returns
    -------
    dict of str to Correlations
        One for each layer, uncentred, over all its calls.
    """
    _check_arguments(batches, positions)
    names = _layer_names(model, sites, layers)
    own = {name: _linear(model, name) for name in names}
    targets = {} if target_model is None else {name: _linear(target_model, name) for name in names}
    wanted: dict[str, deque[Tensor]] = {name: deque() for name in targets}
    sums: dict[str, _Sums] = {}
    record = _summing(sums, positions)
    seen, bar = 0, tqdm(batches, "gather", unit="batch", disable=None if progress else True)
    with evaluating(model, *([] if target_model is None else [target_model])):
        for seen, batch in enumerate(bar, start=1):  # noqa: B007
            if target_model is None:
                _run(model, own, batch, device, record)
            else:
                _run(target_model, targets, batch, device, _keeping(wanted))
                _run(model, own, batch, device, _with_targets(record, wanted))
                _check_paired(wanted)
    return _finished(names, sums, seen)


def _check_arguments(batches: Any, positions: float) -> None:
    if isinstance(batches, Tensor | Mapping):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, got one {kind}: wrap it in a list.")
    if not 0 < positions <= 1:
        raise ValueError(f"positions must be a share in (0, 1], got {positions}.")


def _layer_names(
    model: nn.Module, sites: Sequence[Site] | None, layers: Sequence[str] | None
) -> tuple[str, ...]:
    """Names of the wanted layers, each once, in order."""
    if sites is None and layers is None:
        # The output projection of torch's attention is a Linear that torch never calls.
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
        ]
    elif isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names, got the string {layers!r}: pass [{layers!r}].")
    else:
        names = [*(layers or ()), *(reader for site in sites or () for reader in site.readers)]
    if not names:
        raise PysolveError(f"no layer to gather for: {type(model).__name__} has no Linear, or none is named.")
    return tuple(dict.fromkeys(names))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = find_layer(model, name)
    if not isinstance(module, nn.Linear):
        raise PysolveError(f"{name} is a {type(module).__name__}; gather handles Linear layers.")
    return module


def _run(
    model: nn.Module, layers: Mapping[str, nn.Linear], batch: Any, device: Device, record: Record
) -> None:
    """Run one batch; every call of one of the layers passes its input and output to ``record``."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> None:
            record(name, (args[0] if args else kwargs["input"]).detach(), y.detach())

        return hook

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(hook_for(name), with_kwargs=True).remove)
        forward(model, batch, device)


def _summing(sums: dict[str, _Sums], positions: float) -> Record:
    """A record that adds the samples of one call to the sums of its layer."""
    choices: dict[str, torch.Generator] = {}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        chosen = None
        if positions < 1 and x.ndim > 2:
            generator = choices.setdefault(name, torch.Generator().manual_seed(0))
            rows = x.shape[:-1].numel()
            chosen = torch.randperm(rows, generator=generator)[: max(1, round(positions * rows))]
        x, y = _rows(x, chosen), _rows(y, chosen)
        if name not in sums:
            sums[name] = _Sums.zeros(x.shape[1], y.shape[1], x.device)
        sums[name].add(x, y.to(x.device))
        _check_finite(name, sums[name])

    return record


def _rows(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Samples in rows, float64: leading dimensions flattened, and only the chosen rows of them."""
    rows = values.reshape(-1, values.shape[-1])
    if chosen is not None:
        rows = rows[chosen.to(rows.device)]
    # Apple's GPU has no float64.
    return rows.to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)


def _check_finite(name: str, sums: _Sums) -> None:
    """A sum of finite float32 numbers is finite in float64, so the sums tell whether every value was."""
    for values, what in ((sums.x_sum, "inputs"), (sums.y_sum, "outputs")):
        if not bool(values.isfinite().all()):
            raise DataError(f"the {what} of {name} hold NaN or infinity: check the batches and the weights.")


def _keeping(wanted: dict[str, deque[Tensor]]) -> Record:
    """A record that keeps the outputs, copied: the layer that follows may work in place."""
    return lambda name, x, y: wanted[name].append(y.clone())


def _with_targets(record: Record, wanted: dict[str, deque[Tensor]]) -> Record:
    """Pair each call in the network with the same call in the target network."""

    def paired(name: str, x: Tensor, y: Tensor) -> None:
        if not wanted[name]:
            raise PysolveError(f"{name} is called more often in the network than in the target network.")
        target = wanted[name].popleft()
        if target.shape[:-1] != x.shape[:-1]:
            raise PysolveError(
                f"{name} reads {tuple(x.shape)} in the network but writes {tuple(target.shape)} in the "
                "target network: the two must see the same samples."
            )
        record(name, x, target)

    return paired


def _check_paired(wanted: dict[str, deque[Tensor]]) -> None:
    for name, left in wanted.items():
        if left:
            raise PysolveError(f"{name} is called more often in the target network than in the network.")


def _finished(names: tuple[str, ...], sums: dict[str, _Sums], seen: int) -> dict[str, Correlations]:
    """Correlations of every layer, once all batches have been seen."""
    if not seen:
        raise DataError("there are no batches: expected at least one. Was a generator used up before?")
    for name in names:
        if name not in sums:
            raise PysolveError(f"{name} was never called: name the layers that do run with layers=[...].")
        if not sums[name].count:
            raise DataError(f"{name} saw no samples: the batches are empty.")
    return {name: sums[name].correlations() for name in names}
