"""One walk through a network, original and compressed side by side, refitting layer after layer.

Every operator runs on all batches before the next one does. At a layer, the compressed network's inputs x̂
and the original's outputs y of all samples are at hand: its correlations are summed, it is refitted, and the
walk goes on with its new outputs. Cost: two forward passes and the correlations, whatever the depth. Where a
layer ends a branch that is added to a shortcut, its target is corrected by what the shortcut has lost:

    y + (s − ŝ)     s: the original shortcut, ŝ: the compressed one

so that the error which the stream has gathered is repaired at every sum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from tqdm.auto import tqdm

from pysolve.correlations import Array, Correlations, group_columns
from pysolve.nn.export import Graph
from pysolve.nn.network import evaluating
from pysolve.nn.rows import LAYERS, Sums, blocks, matrix, positions, taps, weight_like
from pysolve.nn.walk import Walk, last_uses
from pysolve.plan import Indices

# New weight and bias (None: it needs none) of a layer, from its name, the correlations of its kept inputs and
# outputs, and whether it can have a bias.
Fit = Callable[[str, Correlations, bool], tuple[Array, Array | None]]

# A branch may pass these on its way to a sum: they keep its shape and do nothing in evaluation mode.
_PLAIN = {"dropout", "dropout_", "contiguous", "clone", "alias", "detach"}
_SUMS = {"add", "add_"}


@dataclass(frozen=True, eq=False)
class Cut:
    """Input and output channels of a layer that stay."""

    inputs: Indices
    outputs: Indices


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer at its one place in the graph.

    Parameters
    ----------
    name : str
    module : nn.Module
    norm : Node, optional
        The batch norm that alone reads it.
    mean : str, optional
        State-dict name of that norm's running mean, which can hold the layer's bias.
    shortcut : Node, optional
        What the layer's branch is added to.
    """

    name: str
    module: rows.Layer
    norm: Node | None
    mean: str | None
    shortcut: Node | None
    rectified: bool
    calls: int = 1

    @property
    def takes_bias(self) -> bool:
        """Whether a bias costs no new parameter."""
        return self.module.bias is not None or self.mean is not None


def refit(
    graph: Graph,
    model: nn.Module,
    batches: Sequence[Any],
    cuts: Mapping[str, Cut],
    fit: Fit,
    *,
    values: Mapping[str, Tensor],
    new_biases: Collection[str] = (),
    rows_per_input: int = 60,
    passes: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """New parameters of every layer that lost inputs or whose inputs changed, front to back.

    Parameters
    ----------
    graph : Graph
        Of ``model``.
    model : nn.Module
        The original; nothing in it is changed.
    batches : sequence of batches
    cuts : {layer: Cut}
        What stays of each layer; a layer not named stays whole.
    fit : callable
        From a layer's name, the correlations of its kept inputs with its kept (corrected) outputs and
        whether it may have a bias, to its new (h, d) weight and its (h,) bias or None.
    values : {state-dict name: tensor}
        What layers that cannot be refitted here (those called several times) take instead.
    new_biases : collection of str
        Layers without a bias that may be given one; a batch norm right behind a layer always takes one.
    rows_per_input : int
        Samples and positions of a layer to use, as a multiple of its inputs; chosen at random, the same in
        every run.
    progress : bool
        Show a progress bar when on a terminal.

    Returns
    -------
    {state-dict name: tensor}
        ``values`` and the new ones, in the shapes of the original.
    """
    walk, state = Walk(graph, model, batches, values), model.state_dict()
    layers = find_layers(graph, model)
    nodes = list(graph.module.graph.nodes)
    finished = last_uses(nodes)
    with evaluating(model):
        for node in tqdm(nodes, "refit", unit="op", disable=None if progress else True):
            if node.op == "output":
                break
            if node.op != "placeholder":
                walk.run_original(node)
                if node in layers and layers[node].calls == 1:
                    layer = layers[node]
                    new = _refit_layer(
                        walk,
                        node,
                        layer,
                        cuts.get(layer.name),
                        fit,
                        layer.takes_bias or layer.name in new_biases,
                        rows_per_input,
                        passes,
                        seed,
                    )
                    if new is not None:
                        M, bias = new
                        walk.values |= layer_values(state, layer, cuts.get(layer.name), M, bias)
                        _give_bias(walk, node, layer)
                walk.run_compressed(node)
            walk.forget(finished[node])
    return walk.values


def find_layers(graph: Graph, model: nn.Module) -> dict[Node, Layer]:
    """The layers that can be refitted, by their node: Linear and ungrouped convolutions called once."""
    modules = {f"{name}.weight": (name, m) for name, m in model.named_modules() if isinstance(m, LAYERS)}
    layers: dict[Node, Layer] = {}
    for weight, parameter in graph.parameters.items():
        name, module = modules.get(parameter, ("", None))
        if module is None or getattr(module, "groups", 1) > 1:
            continue
        for node in weight.users:
            if len(node.args) > 1 and node.args[1] is weight and isinstance(node.args[0], Node):
                layers[node] = _layer(graph, node, name, module, len(weight.users))
    return layers


def _layer(graph: Graph, node: Node, name: str, module: nn.Module, calls: int) -> Layer:
    # The norms of a layer that is called several times may differ.
    norm = _only_user(node) if calls == 1 else None
    if norm is None or _operator(norm) != "batch_norm" or norm.args[3] is None:
        norm = None
    mean = norm.args[3] if norm else None
    last, reader = node, _only_user(node)
    while reader is not None and (reader is norm or _operator(reader) in _PLAIN):
        last, reader = reader, _only_user(reader)
    shortcut = None
    if reader is not None and _operator(reader) in _SUMS and not reader.kwargs:
        others = [operand for operand in reader.args if isinstance(operand, Node) and operand is not last]
        shortcut = others[0] if len(others) == 1 else None
        reader = _only_user(reader)
    while reader is not None and _operator(reader).startswith("max_pool"):
        reader = _only_user(reader)
    rectified = reader is not None and _operator(reader) in {"relu", "relu_"}
    return Layer(
        name,
        module,
        norm,
        graph.parameters[mean] if isinstance(mean, Node) else None,
        shortcut,
        rectified,
        calls,
    )


def layer_values(
    state: Mapping[str, Tensor], layer: Layer, cut: Cut | None, M: Array, bias: Array | None
) -> dict[str, Tensor]:
    """New parameters and buffers, by their state-dict names, that give a layer a weight and a bias.

    Parameters
    ----------
    state : {state-dict name: tensor}
        The original's.
    layer : Layer
    cut : Cut, optional
        What stays of the layer; None: everything. Columns of inputs that go become zero.
    M : (h, d) array
        On the inputs and outputs that stay.
    bias : (h,) array, optional
        A layer without one leaves it to its batch norm, whose running mean falls by as much; without a batch
        norm, the layer is given a new one.
    """
    weight = matrix(layer.module).detach()
    inputs, kept = _kept(layer.module, cut)
    columns = torch.as_tensor(group_columns(inputs.cpu(), taps(layer.module)), device=weight.device)
    new = weight.index_fill(0, kept, 0.0)
    new[kept[:, None], columns] = torch.as_tensor(M).to(weight)
    values = {f"{layer.name}.weight": weight_like(layer.module, new)}
    if bias is None:
        return values
    own, change = f"{layer.name}.bias", torch.as_tensor(bias).to(weight)
    if own not in state and layer.mean is not None:
        return {**values, layer.mean: state[layer.mean].index_add(0, kept, change, alpha=-1)}
    old = state[own] if own in state else new.new_zeros(len(new))
    return {**values, own: old.index_copy(0, kept, change)}


def _refit_layer(walk, node, layer, cut, fit, intercept, rows_per_input, passes, seed):
    read = node.args[0]
    assert isinstance(read, Node)
    present = layer.shortcut is not None and layer.shortcut in walk.wide
    repaired = present and walk.differs(layer.shortcut)
    inputs, kept = _kept(layer.module, cut)
    if not repaired and not walk.differs(read) and len(inputs) == _kept(layer.module, None)[0].numel():
        return None
    sums = None

    def rows():
        total = sum(positions(layer.module, y) for y in walk.wide[node])
        share = rows_per_input * len(inputs) * taps(layer.module) / total
        random = torch.Generator().manual_seed(seed)
        dim = -1 if isinstance(layer.module, nn.Linear) else 1
        for b in walk.batches:
            y = walk.wide[node][b]
            target = y + _lost(walk, layer, b) if repaired else y
            if present:
                target = torch.cat([target, walk.slim[layer.shortcut][b]], dim)
            chosen = _choice(positions(layer.module, y), share, random)
            x = walk.slim[read][b].index_select(dim, inputs)
            for read_rows, wanted in blocks(layer.module, x, target, chosen):
                h = y.shape[dim]
                yield read_rows, wanted[:, :h][:, kept], wanted[:, h:][:, kept] if present else None

    for x, y, _ in rows():
        sums = sums or Sums.zeros(x.shape[1], len(kept), x.device)
        sums.add(x, y)
    corr = sums.correlations()
    M, bias = fit(layer.name, corr, intercept)
    if not layer.rectified or (layer.shortcut is not None and not present):
        return M, bias
    gain, shift = _affine(walk, layer)
    from dataclasses import replace

    for _ in range(passes):
        yx = torch.zeros(*M.shape, dtype=torch.float64)
        ys = torch.zeros(len(M), dtype=torch.float64)
        Mt = torch.as_tensor(M)
        bt = torch.as_tensor(bias) if bias is not None else 0.0
        for x, y, s in rows():
            x = x.double()
            y = y.double()
            fitted = x @ Mt.T + bt
            if gain is not None:
                g, c = gain[kept].double(), shift[kept].double()
                usable = g.abs() > 1e-3 * g.abs().max()
                g = torch.where(usable, g, 1.0)
            else:
                g, c, usable = (
                    torch.ones(len(kept)).double(),
                    torch.zeros(len(kept)).double(),
                    torch.ones(len(kept)).bool(),
                )
            tau = -(c + (0 if s is None else s.double())) / g
            off = (y - tau) * g <= 0
            clamped = torch.where(
                g > 0,
                torch.minimum(fitted, tau.expand_as(fitted)),
                torch.maximum(fitted, tau.expand_as(fitted)),
            )
            t = torch.where(off & usable, clamped, y)
            yx.addmm_(t.T, x)
            ys += t.sum(0)
        M, bias = fit(layer.name, replace(corr, yx=yx.numpy(), y_sum=ys.numpy()), intercept)
    return M, bias


def _affine(walk, layer):
    if layer.norm is None:
        return None, None
    _, weight, bias, mean, variance, _, _, eps, *_ = layer.norm.args
    gain = torch.rsqrt(walk.fixed[variance] + eps)
    gain = gain if weight is None else gain * walk.fixed[weight]
    return gain, (0 if bias is None else walk.fixed[bias]) - walk.fixed[mean] * gain


def _lost(walk: Walk, layer: Layer, b: int) -> Tensor:
    """What to add to a layer's output, so that its branch makes up for what the shortcut has lost."""
    assert layer.shortcut is not None
    lost: Tensor = walk.wide[layer.shortcut][b] - walk.slim[layer.shortcut][b]
    gain, _ = _affine(walk, layer)
    if gain is None:
        return lost
    # A channel that the norm all but silences cannot be corrected through it.
    usable = gain.abs() > 1e-3 * gain.abs().max()
    return lost * _along_channels(torch.where(usable, 1 / torch.where(usable, gain, 1.0), 0.0), lost)


def _give_bias(walk: Walk, node: Node, layer: Layer) -> None:
    """Let the walk add a bias that the graph does not know of."""
    new = walk.values.get(f"{layer.name}.bias")
    if layer.module.bias is None and new is not None:
        linear = isinstance(layer.module, nn.Linear)
        walk.added[node] = new if linear else _along_channels(new, walk.wide[node][0])


def _kept(module: nn.Module, cut: Cut | None) -> tuple[Tensor, Tensor]:
    """Input and output channels of a layer that stay, as tensors on its device."""
    weight = matrix(module)
    inputs = range(weight.shape[1] // taps(module)) if cut is None else cut.inputs
    kept = range(len(weight)) if cut is None else cut.outputs
    return torch.as_tensor(inputs, device=weight.device), torch.as_tensor(kept, device=weight.device)


def _choice(n: int, share: float, random: torch.Generator) -> Tensor | None:
    return None if share >= 1 else torch.randperm(n, generator=random)[: max(1, round(share * n))]


def _along_channels(values: Tensor, like: Tensor) -> Tensor:
    """A vector shaped to broadcast along dimension 1 of ``like``."""
    return values.view(-1, *[1] * (like.ndim - 2))


def _operator(node: Node) -> str:
    """The operator's name without namespace and overload: add, relu_, batch_norm."""
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
