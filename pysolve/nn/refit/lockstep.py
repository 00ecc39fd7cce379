"""One walk through a network, original and compressed side by side, refitting layer after layer.

Every operator runs on all batches before the next one does. At a layer, the compressed network's inputs x̂
and the original's outputs y of all samples are at hand: its correlations are summed, it is refitted, and the
walk goes on with its new outputs. Cost: two forward passes and the correlations, whatever the depth. Where
layers that read one tensor have more outputs together than inputs, the products Σ x x̂ᵀ with the original's
inputs serve all of them: with y = M x + b,  Σ y x̂ᵀ = M Σ x x̂ᵀ + b Σ x̂ᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn
from torch.fx import Node

from pysolve.correlations import Indices
from pysolve.nn import layer_matrix as rows
from pysolve.nn.batches.padding import token_masks
from pysolve.nn.graph.branches import Kept, Layer, find_layers, kept_channels, layer_values, read_by
from pysolve.nn.graph.export import Graph
from pysolve.nn.graph.mixtures import Mixture, in_order
from pysolve.nn.graph.routes import routed
from pysolve.nn.progress import steps
from pysolve.nn.ranks import ALONE, Ranks
from pysolve.nn.refit.expert_refit import refit_experts
from pysolve.nn.refit.layer_refit import SAMPLING, Fit, Reads, Sampling, Task, along, channel_dim, fitted
from pysolve.nn.refit.lookahead import sums_beyond, what_went
from pysolve.nn.refit.row_weights import RowWeights, masked_weights
from pysolve.nn.refit.walk import Walk, end_of_numbers, last_uses, unread
from pysolve.nn.running import Batch, evaluating
from pysolve.plan import tensor_name


def refit(
    graph: Graph,
    model: nn.Module,
    batches: Sequence[Batch],
    cuts: Mapping[str, Kept],
    fit: Fit,
    *,
    values: Mapping[str, Tensor],
    new_biases: Collection[str] = (),
    sampling: Sampling = SAMPLING,
    row_weights: RowWeights = MappingProxyType({}),
    only: Collection[str] | None = None,
    always: Collection[str] = (),
    norms: Mapping[str, Indices] = MappingProxyType({}),
    mixtures: Sequence[Mixture] = (),
    prepare: Callable[[str], object] = lambda name: None,
    told: Callable[[str, Node | None], object] = lambda name, node: None,
    joined: Callable[[Collection[str]], object] = lambda names: None,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> dict[str, Tensor]:
    """New parameters of every layer that lost inputs or whose inputs changed, front to back.

    Parameters
    ----------
    graph : Graph
        Of ``model``, the original; nothing in it is changed.
    cuts : {layer: Kept}
        What stays of each layer; a layer not named stays whole.
    fit : Fit
    values : {state-dict name: tensor}
        What layers that cannot be refitted here (those called several times) take instead.
    new_biases : collection of str
        Layers without a bias that may be given one; a batch norm right behind a layer always takes one.
    row_weights : RowWeights
        Rows of layers that are not among them weigh the same.
    only : collection of str, optional
        Fit none but these layers.
    always : collection of str
        Layers to fit whether or not anything in front of them changed.
    norms : {weight: (k,) int array}
        Layer norms that are over some channels alone.
    mixtures : sequence of Mixture
        Matrices of experts that are refitted together.
    prepare : callable
        Called with a layer's name before its correlations are summed, which take memory.
    told : callable
        Called with the name of a layer that reads NaN or infinity in the compressed network, in rows that are
        left out, and with the operator that makes them of numbers: None for all but the first such layer.
    joined : callable
        Called with the values of mixtures that were refitted.
    ranks : Ranks
        Processes that walk with other batches.

    Returns
    -------
    {state-dict name: tensor}
        ``values`` and the new ones, in the shapes of the original.
    """
    walk, state = Walk(graph, model, batches, values, norms), model.state_dict()
    called = {node: layer for node, layer in find_layers(graph, model).items() if layer.calls == 1}
    layers = {node: layer for node, layer in called.items() if only is None or layer.name in only}
    every, mixtures = in_order([node for node in graph.module.graph.nodes if node.op != "output"], mixtures)
    ends = [*layers, *(mixture.nodes[0] for mixture in mixtures)]
    nodes = every[: max(map(every.index, ends), default=-1) + 1]
    finished, apart, unmade = last_uses(every), routed(graph), unread(graph)
    reads = Reads(layers.values(), [*layers])
    gone = {node for node, layer in called.items() if layer.name in cuts and not len(cuts[layer.name].inputs)}
    beyond = sums_beyond(graph, called, gone) if gone else {}
    broken: list[str] = []
    done: set[str] = set()

    def no_numbers(name: str, node: Node) -> None:
        told(name, None if broken else end_of_numbers(walk, every[: every.index(node)]))
        broken.append(name)

    # All processes weigh, or none does: they add up what they weigh.
    masks = [token_masks(batch) for batch in batches]
    padded = any(ranks.all(any(not mask.all() for known in masks for mask in known.values())))
    with evaluating(model):
        for node in steps(nodes, "refit", unit="op", shown=progress):
            if node.op != "placeholder":
                together = refit_experts(walk, node, mixtures, ranks, masks)
                walk.values |= together
                joined(together)
                done.update(name.rpartition(".")[0] for name in together)
                (walk.outline if node in unmade else walk.run_original)(node)
                layer = layers.get(node)
                layer = None if layer is not None and layer.name in done else layer
                touched = layer is not None and (node in beyond or _is_touched(walk, node, layer, cuts))
                if layer is not None and (layer.name in always or touched):
                    prepare(layer.name)
                    cut = cuts.get(layer.name)
                    went = None
                    if node in beyond:
                        went = what_went(walk, every[every.index(node) + 1 :], *beyond[node], finished)
                    kept = kept_channels(layer, cut)
                    own = row_weights.get(layer.name)
                    own = masked_weights(own, layer, walk.original[node], masks) if padded else own
                    tell = partial(no_numbers, layer.name, node)
                    task = Task(walk, node, layer, *kept, sampling, reads, apart, ranks, went, own, told=tell)
                    M, bias = ranks.first(fitted(task, fit, layer.takes_bias or layer.name in new_biases))
                    walk.values |= layer_values(state, layer, cut, M, bias)
                    _show_new_bias(walk, node, layer)
                if node is not nodes[-1] and node not in unmade:
                    walk.run_compressed(node)
            walk.forget(finished[node])
            reads.forget(finished[node])
    return walk.values


def _is_touched(walk: Walk, node: Node, layer: Layer, cuts: Mapping[str, Kept]) -> bool:
    """Whether a layer lost inputs, reads anything new, or can compensate what its shortcut lost."""
    if layer.name in cuts and len(cuts[layer.name].inputs) < rows.channels(layer.module)[0]:
        return True
    shortcut = layer.shortcut if layer.shortcut in walk.original else None
    return walk.differs(read_by(node)) or (shortcut is not None and walk.differs(shortcut))


def _show_new_bias(walk: Walk, node: Node, layer: Layer) -> None:
    """Let the walk add a bias that the graph does not know of."""
    new = walk.values.get(tensor_name(layer.name, "bias"))
    if layer.module.bias is None and new is not None:
        walk.added[node] = along(channel_dim(layer), new, walk.original[node][0])
