"""Correlations of layers' inputs and outputs, gathered from a network and batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from tqdm.auto import tqdm

from pysolve.correlations import AnyArray, Correlations
from pysolve.errors import DataError, PysolveError
from pysolve.nn import layer_matrix as rows
from pysolve.nn import running
from pysolve.nn.bare import is_stack
from pysolve.nn.items import Transform, batched
from pysolve.nn.layer_kinds import LINEAR
from pysolve.nn.layer_matrix import LAYERS, Layer
from pysolve.nn.plain import plain_network
from pysolve.nn.refusal import output_of
from pysolve.nn.running import Batch, Device, evaluating
from pysolve.nn.sums import Sums, room
from pysolve.nn.watching import watching
from pysolve.plan import Site

# Called with the name, the layer, the input and the output of one call.
Record = Callable[[str, Layer, Tensor, Tensor], None]
# Rows that tell whether a layer's outputs are  M x + b, and what rounding of half types may make of them.
_TRIED, _NEAR = 64, 0.02


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
    """
    model = plain_network(model)
    target_model = None if target_model is None else plain_network(target_model)
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
    seen, bar = 0, tqdm(batches, "gather", unit="batch", disable=None if progress else True)
    with evaluating(model, *([] if target_model is None else [target_model])):
        for seen, batch in enumerate(bar, start=1):  # noqa: B007
            if target_model is None:
                found.run(model, batch, device)
            else:
                # Copies: the next layer may work in place.
                _run(target_model, targets, batch, device, lambda n, layer, x, y: wanted[n].append(y.clone()))
                _run(model, own, batch, device, _with_targets(found.record, wanted))
                for name in filter(wanted.get, wanted):
                    where = "in the target network than in the network"
                    raise PysolveError(f"{name} is called more often {where}.")
    if not seen:
        raise DataError(running.NO_BATCHES)
    return {name: found.pop(name, sizes[name], full=full) for name in names if name in found.sums}


class Gathered:
    """What was summed of some layers so far; it can be put away, and taken up again.

    Parameters
    ----------
    layers : {name: layer}
    shares : {name: share}
        Of the positions of each call.
    double : collection of str
        Layers whose products are all float64.
    own : bool
        Whether outputs are the layers' own.
    rounded : bool
        Whether those of half precision may be taken for exact ones.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        shares: Mapping[str, float],
        double: Collection[str] = (),
        *,
        own: bool = True,
        rounded: bool = True,
    ) -> None:
        self.layers, self.shares, self.double = layers, shares, double
        self.own, self.rounded = own, rounded
        self.sums: dict[str, _Seen] = {}
        self.choices: dict[str, torch.Generator] = {}
        self.starts: dict[str, tuple[Tensor, Tensor]] = {}

    def start_as(self, model: nn.Module, batch: Batch) -> None:
        """Shift and scale every layer's sums as if this batch were the first."""
        other = Gathered(self.layers, self.shares, self.double, own=self.own, rounded=self.rounded)
        other.run(model, batch)
        self.starts = {name: (seen.sums.shift, seen.sums.scale) for name, seen in other.sums.items()}

    def run(self, model: nn.Module, batch: Batch, device: Device = None) -> None:
        """Add what the layers read and write in one batch; in evaluation mode."""
        _run(model, self.layers, batch, device, self.record)

    def record(self, name: str, layer: Layer, x: Tensor, y: Tensor) -> None:
        """Add the samples of one call."""
        chosen, share = None, self.shares.get(name, 1.0)
        if share < 1 and (x.ndim > 2 or not isinstance(layer, LINEAR)):
            random = self.choices.setdefault(name, torch.Generator().manual_seed(0))
            chosen = rows.choice(rows.positions(layer, y), share, random)
        for values, what in ((x, "inputs"), (y, "outputs")):
            # A sum is read faster than a mask is made; one that is too large is not what is looked for.
            if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
                raise DataError(f"the {what} of {name} hold NaN or infinity: check batches and weights.")
        limit = room(rows.channels(layer)[0] * rows.taps(layer))
        for some_x, some_y in rows.blocks(layer, x, y, chosen, limit=limit):
            if name not in self.sums:
                exact = self.rounded or y.dtype.itemsize >= 4
                double = name in self.double
                self.sums[name] = _Seen.of(layer, some_x, some_y, own=self.own and exact, double=double)
                if name in self.starts:
                    self.sums[name].sums.start(*self.starts[name])
            seen = self.sums[name]
            seen.sums.add(*([some_x, some_y] if seen.bias is None else [some_x]))

    def pop(self, name: str, group_size: int = 1, *, full: bool = False) -> Correlations | None:
        """The correlations of a layer, whose sums are dropped; None without samples."""
        seen = self.sums.pop(name)
        return _correlations(seen, group_size, full=full)

    def state(self) -> dict[str, AnyArray]:
        """All sums so far as arrays, to put away."""
        parts = {
            f"{name}:{part}": one for name, seen in self.sums.items() for part, one in seen.state().items()
        }
        random = {f"{name}:random": one.get_state() for name, one in self.choices.items()}
        return {name: np.asarray(one.cpu()) for name, one in {**parts, **random}.items()}

    def resume(self, state: Mapping[str, AnyArray]) -> None:
        """Go on from sums that were put away."""
        layers: dict[str, dict[str, Tensor]] = {}
        for key, values in state.items():
            name, part = key.rsplit(":", 1)
            layers.setdefault(name, {})[part] = torch.from_numpy(np.array(values))
        for name, parts in layers.items():
            if (random := parts.pop("random", None)) is not None:
                self.choices[name] = torch.Generator()
                self.choices[name].set_state(random)
            if parts:
                self.sums[name] = _Seen.resumed(self.layers[name], parts)


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


def _run(model: nn.Module, layers: Mapping[str, Layer], batch: Batch, device: Device, record: Record) -> None:
    """Run one batch and record every call of the layers."""

    def detached(name: str, layer: Layer, x: Tensor, y: Tensor) -> None:
        record(name, layer, x.detach(), y.detach())

    with watching(layers, detached):
        output_of(model, batch, device)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What was summed of a layer: of its inputs alone where outputs are  M x + bias, and the layer as called.

    ``bias`` is None where outputs were summed too.
    """

    layer: Layer
    sums: Sums
    bias: Tensor | None

    @classmethod
    def of(cls, layer: Layer, x: Tensor, y: Tensor, *, own: bool, double: bool) -> _Seen:
        """For rows like these; ``own``: y is what the layer made of x."""
        bias = _own_bias(layer, x[:_TRIED], y[:_TRIED]) if own else None
        outputs, full = (y.shape[1], True) if bias is None else (0, False)
        return cls(layer, Sums.zeros(x.shape[1], outputs, x.device, full=full, double=double), bias)

    def state(self) -> dict[str, Tensor]:
        """The sums as tensors, by what they are."""
        return {**self.sums.state(), **({} if self.bias is None else {"bias": self.bias})}

    @classmethod
    def resumed(cls, layer: Layer, state: Mapping[str, Tensor]) -> _Seen:
        """What ``state`` was of, on the layer's device."""
        home = layer.weight.device
        bias = state.get("bias")
        sums = Sums.resumed({name: one for name, one in state.items() if name != "bias"}, home)
        return cls(layer, sums, None if bias is None else bias.to(home))


def _own_bias(layer: Layer, x: Tensor, y: Tensor) -> Tensor | None:
    """The b of  y = M x + b  where this is what the layer does: its bias, or zero; else None."""
    M = rows.matrix(layer).double()
    rest, near = y.double() - x.double() @ M.T, _NEAR * y.double().norm()
    given = layer.bias
    for b in ([] if given is None else [given.detach().double()]) + [M.new_zeros(len(M))]:
        if (rest - b).norm() <= near:
            return b
    return None


def _correlations(seen: _Seen, group_size: int, *, full: bool) -> Correlations | None:
    """The sums of a layer, with those that follow from its weights."""
    if not seen.sums.count:
        return None
    known = seen.sums.correlations(group_size, last=True)
    return known if seen.bias is None else own_outputs(known, seen.layer, bias=seen.bias, full=full)


def own_outputs(
    known: Correlations, layer: Layer, *, bias: Tensor | None = None, full: bool = False
) -> Correlations:
    """Correlations of inputs with  y = M x + b.

    Parameters
    ----------
    known : Correlations
        Of the inputs; its outputs do not matter.
    layer : one of LAYERS
    bias : (h,) tensor, optional
        b, by default the layer's own.
    full : bool
        Whether Σ y yᵀ is wanted in full, rather than its diagonal.
    """
    M = np.asarray(rows.matrix(layer).double().cpu().numpy())
    given = layer.bias if bias is None else bias
    b = np.zeros(len(M)) if given is None else np.asarray(given.detach().double().cpu().numpy())
    explained, mean = M @ known.xx, M @ known.x_sum
    yy = explained @ M.T if full else np.einsum("ij,ij->i", explained, M)
    if full:
        yy += np.outer(b, 2 * mean + known.count * b)
        yy = (yy + yy.T) / 2
    else:
        yy = yy + 2 * b * mean + known.count * b * b
    yx = explained + np.outer(b, known.x_sum)
    return replace(known, yx=yx, yy=yy, y_sum=mean + known.count * b)


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
