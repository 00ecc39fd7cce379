"""Correlations of layers' inputs and outputs, gathered from a network and batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pysolve.correlations import Correlations
from pysolve.errors import DataError, PysolveError
from pysolve.nn import layer_matrix as rows
from pysolve.nn import running
from pysolve.nn.batches.items import Transform, batched
from pysolve.nn.cut.bare import is_stack
from pysolve.nn.gathering.gathered import Gathered, Record, run_watched
from pysolve.nn.layer_matrix import LAYERS, Layer
from pysolve.nn.layers.attention import opened
from pysolve.nn.plain import plain_network
from pysolve.nn.progress import steps
from pysolve.nn.running import Batch, Device, checked_device, evaluating
from pysolve.plan import Site


def gather(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Sequence[Site] | None = None,
    layers: Sequence[str] | None = None,
    *,
    target_model: nn.Module | None = None,
    device: Device = None,
    progress: bool = True,
    positions: float | Mapping[str, float] = 1.0,
    transform: Transform | None = None,
) -> dict[str, Correlations]:
    """Gather the correlations of the inputs and outputs of Linear layers and convolutions.

    Sums for each layer  Σ x xᵀ, Σ y xᵀ, Σ y yᵀ, Σ x, Σ y  over all samples and positions, with x the layer's
    input and y its output, bias included. A convolution reads, at each position of its output, the patch of
    the padded input under its kernel: (channels × taps) numbers in the order of ``weight.flatten(1)``, or of
    ``weight.transpose(0, 1).flatten(1)`` for a transposed one. Where y is the layer's own output M x + b,
    only Σ x xᵀ and Σ x are summed, and the others follow from them. Sums are float64, on the layer's device;
    so are products but those of float32 inputs of 256 numbers and more, whose sums are within 1e-6 of the
    exact ones in the Frobenius norm.

    Parameters
    ----------
    model : nn.Module
        Runs in evaluation mode without gradients; its own mode is restored, and nothing in it is changed.
    batches : iterable of tensors, of tuples or lists, or of mappings
        A tuple's or list's first item is the input; a mapping holds keyword arguments.
    sites : sequence of Site, optional
        Gather for all readers of these sites. Their ``group_size`` is that of the site's channels where
        these are all of a reader's inputs, in order: height × width for a Linear after a flatten.
    layers : sequence of str, optional
        Gather for these layers. With neither: for every Linear and every convolution but the grouped ones.
    target_model : nn.Module, optional
        Take y from the layer of the same name in this network, run on the same batches.
    device : torch.device, optional
        Where to move the batches; by default they must be on the network's device.
    progress : bool
        Show a progress bar when on a terminal.
    positions : float or {layer: float}
        Share, in (0, 1], of the output positions to keep in each call of a convolution, or of a Linear whose
        input has more than 2 dimensions; all, for a layer without an entry. The choice is random but the
        same in every run.
    transform : callable, optional
        Makes inputs of an item of ``batches``, as ``compress`` has it.

    Returns
    -------
    dict of str to Correlations
        One for each layer, uncentred, over all its calls; ``group_size`` is the taps of its kernel, 1 for a
        Linear, unless a site says more.

    Raises
    ------
    TypeError, ValueError
        When an argument is of the wrong type or out of its range.
    PysolveError
        When a layer is of another kind or grouped, never runs, or runs differently in the two networks.
    DataError
        When there are no samples, or inputs or outputs are NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> found = ps.gather(model, batches)["2"]
    >>> found.count, found.r_xx.shape, found.r_yx.shape
    (500, (64, 64), (4, 64))
    """
    model = opened(plain_network(model))
    checked_device(device, computes=False)
    target_model = None if target_model is None else opened(plain_network(target_model))
    names = _layer_names(model, sites, layers)
    found = gather_reached(
        model,
        batched(batches, transform),
        names,
        sites or (),
        target_model=target_model,
        device=device,
        progress=progress,
        positions=positions,
        double=[
            r
            for site in sites or ()
            for r in site.readers
            if not is_stack(r) and reads_more(site, r, gathered_layer(model, r))
        ],
    )
    for name, one in found.items():
        if one is None:
            raise DataError(f"{name} saw no samples: the batches are empty.")
    for name in names:
        if name not in found:
            raise PysolveError(f"{name} was never called: name the layers that do run with layers=[...].")
    return {name: one for name, one in found.items() if one is not None}


def gather_reached(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Sequence[str],
    sites: Sequence[Site] = (),
    *,
    target_model: nn.Module | None = None,
    device: Device = None,
    progress: bool = True,
    positions: float | Mapping[str, float] = 1.0,
    full: bool = True,
    double: Collection[str] = (),
) -> dict[str, Correlations | None]:
    """What ``gather`` gives, of those of the named layers that were called; None where without samples.

    Without ``full``, of Σ y yᵀ the diagonal alone where that is less work. Products of the layers in
    ``double`` are all float64.
    """
    batches = batched(batches)
    for share in positions.values() if isinstance(positions, Mapping) else (positions,):
        if not 0 < share <= 1:
            raise ValueError(f"positions must be a share in (0, 1], got {share}.")
    own = {name: gathered_layer(model, name) for name in names}
    sizes = _group_sizes(own, sites)
    targets = {} if target_model is None else {name: gathered_layer(target_model, name) for name in names}
    wanted: dict[str, deque[Tensor]] = {name: deque() for name in targets}
    shares = positions if isinstance(positions, Mapping) else dict.fromkeys(names, positions)
    found = Gathered(own, shares, double, own=target_model is None, rounded=not full)
    seen, bar = 0, steps(batches, "gather", unit="batch", shown=progress)
    with evaluating(model, *([] if target_model is None else [target_model])):
        for seen, batch in enumerate(bar, start=1):  # noqa: B007
            if target_model is None:
                found.run(model, batch, device)
            else:
                # Copies: the next layer may work in place.
                run_watched(
                    target_model, targets, batch, device, lambda n, layer, x, y: wanted[n].append(y.clone())
                )
                run_watched(model, own, batch, device, _with_targets(found.record, wanted))
                for name in filter(wanted.get, wanted):
                    where = "in the target network than in the network"
                    raise PysolveError(f"{name} is called more often {where}.")
    if not seen:
        raise DataError(running.NO_BATCHES)
    return {name: found.pop(name, sizes[name], full=full) for name in names if name in found.sums}


def _layer_names(
    model: nn.Module, sites: Sequence[Site] | None, layers: Sequence[str] | None
) -> tuple[str, ...]:
    """Names of the layers to gather for, each once, in order."""
    if sites is None and layers is None:
        # The output projection of torch's attention is a Linear that torch never calls.
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, LAYERS)
            and rows.groups(module) == 1
            and not isinstance(module, NonDynamicallyQuantizableLinear)
        ]
    elif isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names, got the string {layers!r}: pass [{layers!r}].")
    elif sites is not None and not (
        isinstance(sites, Sequence) and all(isinstance(site, Site) for site in sites)
    ):
        raise TypeError(f"sites must be a list of Site, got {sites!r}; names of layers are layers=.")
    else:
        names = [*(layers or ()), *(r for site in sites or () for r in site.readers if not is_stack(r))]
    if not names:
        kinds = "no Linear and no ungrouped convolution"
        raise PysolveError(f"no layer to gather for: {type(model).__name__} has {kinds}, or none is named.")
    return tuple(dict.fromkeys(names))


def gathered_layer(model: nn.Module, name: str) -> Layer:
    """The layer of a name; PysolveError where its correlations cannot be gathered."""
    module = running.find_layer(model, name)
    if not isinstance(module, LAYERS):
        kind = type(module).__name__
        raise PysolveError(f"{name} is a {kind}; gather handles Linear layers and convolutions.")
    if rows.groups(module) > 1:
        raise PysolveError(
            f"{name} is a grouped {type(module).__name__} (groups={module.groups}), which no single matrix "
            "describes: leave it out of layers and sites."
        )
    return module


def _group_sizes(layers: Mapping[str, Layer], sites: Sequence[Site]) -> dict[str, int]:
    """Columns of each layer's matrix that belong to one channel."""
    sizes = {name: rows.taps(layer) for name, layer in layers.items()}
    for site in sites:
        for reader in (name for name in site.readers if not is_stack(name)):
            width = rows.channels(layers[reader])[0]
            columns = site.columns_of(reader, width)
            if np.array_equal(columns.ravel(), np.arange(width)):
                sizes[reader] = columns.shape[1] * rows.taps(layers[reader])
    return sizes


def reads_more(site: Site, reader: str, layer: Layer) -> bool:
    """Whether a reader has inputs that are not the site's.

    These are minimised out. Where they explain the site's, what is left is rounding: that of single precision
    would be taken for data.
    """
    width = rows.channels(layer)[0]
    return site.columns_of(reader, width).size < width


def _with_targets(record: Record, wanted: dict[str, deque[Tensor]]) -> Record:
    """Record with the output of the same call in the target network."""

    def paired(name: str, layer: Layer, x: Tensor, y: Tensor) -> None:
        if not wanted[name]:
            raise PysolveError(f"{name} is called more often in the network than in the target network.")
        target = wanted[name].popleft()
        if _places(layer, target) != _places(layer, y):
            raise PysolveError(
                f"{name} reads {tuple(x.shape)} in the network but writes {tuple(target.shape)} in the "
                "target network: the two must see the same samples."
            )
        record(name, layer, x, target)

    return paired


def _places(layer: Layer, y: Tensor) -> tuple[int, ...]:
    """Sizes of an output except for its channels."""
    channel = y.ndim + 1 - layer.weight.ndim
    return (*y.shape[:channel], *y.shape[channel + 1 :])
