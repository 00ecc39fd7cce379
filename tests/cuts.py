"""The sites of every small network, and what holds of a network whose sites are cut."""

import copy
from functools import cache

import numpy as np
import torch
from small import network
from torch import nn
from torch.utils import _pytree as pytree

from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.cut.bare import is_stack
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.layers.attention import opened
from pysolve.nn.running import forward
from pysolve.plan import Collapse, Plan

# Each site as "channels: writers → readers | passed ! words of the reason why it is pinned".
SITES = {
    "residual": ["6: stem conv2 → conv1 fc | bn", "5: conv1 → conv2", "4: fc → ! output"],
    "two_residuals": ["6: stem b1 b2 → a1 a2 fc", "5: a1 → b1", "7: a2 → b2", "3: fc → ! output"],
    "projection_shortcut": ["4: stem → conv shortcut", "6: conv shortcut → fc | bn", "3: fc → ! output"],
    "padded_shortcut_in_code": [
        "4: stem conv2 → conv1 fc",
        "5: conv1 → conv2",
        "4: conv2 → fc ! zero channels are padded in",
        "3: fc → ! output",
    ],
    "padded_shortcut_by_a_layer": [
        "4: stem conv2 → conv1 fc",
        "5: conv1 → conv2",
        "4: conv2 → fc | shortcut.pad",
        "3: fc → ! output",
    ],
    "depthwise": ["6: 0 → 5 | 1 3 4", "4: 5 → ! output"],
    "depth_multiplier": ["4: 0 → 2 | 1", "2: 2 → ! output"],
    "grouped": ["4: 0 → 3 | 2", "2: 3 → ! output"],
    "depthwise_on_the_input": ["5: 1 → 2", "2: 2 → ! output"],
    "transposed": ["5: 0 → 2", "6: 2 → 4", "2: 4 → ! output"],
    "dilated": ["5: 0 → 2", "2: 2 → ! output"],
    "concat": ["4: a → c", "5: b → c", "2: c → ! output"],
    "sliced": [
        "3: a → b ! a width is written into the code",
        "5: a → c ! a width is written into the code",
        "2: b c → ! output",
    ],
    "chunked_swiglu": ["7: a → b", "4: b → ! output"],
    "swiglu": ["7: gate up → down", "4: down → ! output"],
    "flattened_by_view": ["5: conv → fc", "3: fc → ! output"],
    "adaptive_pool": ["5: 0 → 4", "3: 4 → ! output"],
    "upsampled": ["5: 0 → 2", "2: 2 → ! output"],
    "shared_layer": ["6: stem twice → twice out", "2: out → ! output"],
    "unused_layer": ["6: a → b", "2: b → ! output"],
    "single_channel": ["1: 0 → 2 ! it is a single channel", "2: 2 → ! output"],
    "norm_without_affine": ["5: 0 → 3 | 1", "2: 3 → ! output"],
    "instance_norm": ["5: 0 → 3 | 1 2", "2: 3 → ! output"],
    "group_norm": ["3: 0 → 3 | 1", "2: 3 → ! output"],
    "one_group_norm": ["1: 0 → 2 | 1 ! group_norm mixes the channels of a group", "2: 2 → ! output"],
    "squeeze_and_excite": ["8: conv up → down out", "4: down → up", "2: out → ! output"],
    "attention": ["3: q k v → o", "4: o → ! output"],
    "hard_coded_attention": ["3: q k v → o ! a width is written into the code", "4: o → ! output"],
    "attention_by_products": ["3: q k v → o", "4: o → ! output"],
    "grouped_queries": ["2: q k v → o", "4: o → ! output"],
    "counted_heads": ["5: 0 → 1.q 1.k 1.v", "3: 1.q 1.k 1.v → 1.o", "4: 1.o → ! output"],
    "shuffled_by_views": ["4: stem branch second → branch second out", "2: out → ! output"],
    "interleaved_by_views": ["4: a → b", "2: b → ! output"],
    "vectors_to_images": ["5: fc → up side | norm", "4: up side → out", "2: out → ! output"],
    "class_token": ["6: stem → fc | token places", "7: fc → out", "2: out → ! output"],
    "unflattened": ["4: 0 → 3", "3: 3 → 4", "2: 4 → ! output"],
    "one_key_head": [
        "3: q → o",
        "1: k → ! matmul uses these channels for every head",
        "1: v → ! matmul uses these channels for every head",
        "3: o → ! output",
    ],
    "multihead_attention": [
        "6: stem → attention.q_proj attention.k_proj attention.v_proj",
        "2: attention.q_proj attention.k_proj attention.v_proj → attention.out_proj",
        "6: attention.out_proj → fc1",
        "7: fc1 → fc2",
        "3: fc2 → ! output",
    ],
    "transformer_layer": [
        "2: self_attn.q_proj self_attn.k_proj self_attn.v_proj → self_attn.out_proj",
        "6: self_attn.out_proj linear2 → linear1 | norm1 norm2 ! meets these channels directly",
        "7: linear1 → linear2",
    ],
    "layer_norm_stream": [
        "6: stem fc2 → fc1 out | norm",
        "7: fc1 → fc2",
        "3: out → ! output",
    ],
    "rms_norm_stream": [
        "6: stem fc2 → fc1 out | norm",
        "7: fc1 → fc2",
        "3: out → ! output",
    ],
    "handmade_norm_stream": [
        "1: stem fc2 → fc1 out ! mean mixes these channels",
        "7: fc1 → fc2",
        "3: out → ! output",
    ],
    "offset_norm_stream": ["6: stem fc2 → fc1 out | norm.weight", "7: fc1 → fc2", "3: out → ! output"],
    "hard_coded_reshape": ["8: a → b ! a width is written into the code", "2: b → ! output"],
    "conv1d": ["5: 0 → 3 | 1", "2: 3 → ! output"],
    "conv3d": ["5: 0 → 4", "3: 4 → ! output"],
    "embedding_stream": ["6: words places fc2 → fc1 out", "7: fc1 → fc2", "3: out → ! output"],
    "keywords": ["6: words → fc1", "7: fc1 → fc2", "3: fc2 → ! output"],
    "input_shortcut": [
        "4: stem → fc ! an input or constant meets these channels directly",
        "2: fc → ! output",
    ],
    "scaled_by_a_parameter": ["6: stem → fc | scale", "2: fc → ! output"],
    "weighted_features": [
        "6: a b → b c | mask",
        "7: c → out | scales.0 scales.1",
        "2: out → ! output",
    ],
    "handmade_batch_norms": [
        "6: 0 → 3 | 1.gain 1.shift 1.mean 1.var",
        "5: 3 → 6 | 4.gain 4.shift 4.mean 4.var",
        "2: 6 → ! output",
    ],
    "learned_positions": ["6: stem → q k v | places", "3: q k v → o | sharpness", "4: o → ! output"],
    "added_parameter_is_summed": ["1: stem → fc | shift ! sum mixes these channels", "2: fc → ! output"],
    "unknown_operator": ["8: 0 → ! renorm is not understood", "5: 2 → 4", "2: 4 → ! output"],
    "shuffled_pixels": ["2: stem → inner", "3: inner → out", "2: out → ! output"],
    "unshuffled_pixels": ["4: 0 → 3 | 1", "2: 3 → ! output"],
    "shuffled_channels": ["4: 0 → 3", "2: 3 → ! output"],
    "computed_weight": [
        "6: a → b ! the weight of `a` is computed from other values",
        "5: b → c",
        "2: c → ! output",
    ],
    "tied_weights": [
        "6: a c → b ! output",
        "4: b → a c ! linear reads channels that are fixed",
    ],
    "borrowed_weight": ["6: a → b ! `a.weight` is used outside of its layer", "2: b → ! output"],
    "autocast": ["6: a → b", "2: b → ! output"],
    "dead_end": ["5: unread → ! nothing reads these channels", "6: a → b", "2: b → ! output"],
    "in_place": ["6: a b → b c", "2: c → ! output"],
    "noisy": ["6: a → b", "3: b → c ! outputs are random", "2: c → ! output"],
    "pooled_by_scores": [
        "6: key → score query:io",
        "1: score query:io → ! mul reads it for several channels",
        "5: value → out",
        "2: out → ! output",
    ],
    "single_head": ["1: q k → ! matmul mixes these channels", "6: v → o", "4: o → ! output"],
    "gated_images": [
        "6: a b → psi",
        "1: psi → ! mul reads it for several channels",
        "5: value → out",
        "2: out → ! output",
    ],
    "outer_product": [
        "6: a → c",
        "3: b → ! mul mixes these channels with others",
        "3: d → ! mul mixes these channels with others",
        "2: c → ! output",
    ],
    "matrices_of_parameters": [
        "6: a:io → b:oi",
        "5: b:oi → c:io",
        "7: c:io → out | bias",
        "2: out → ! output",
    ],
    "channels_first_norm": ["6: 0 → 2 | 1", "5: 2 → 4", "2: 4 → ! output"],
    "size_of_another": [
        "8: a → b c ! a width is written into the code",
        "8: b → d | norm ! a width is written into the code",
        "2: d c → ! output",
    ],
    "parameters_of_a_layers_own": [
        "4: 0 → 1 1.down:oi",
        "6: 1 1.up:oi → 3 | 1.gain",
        "3: 1.down:oi → 1.up:oi",
        "2: 3 → ! output",
    ],
    "unread_sum": ["6: stem residual → a", "5: a → residual out", "2: out → ! output"],
    "added_to_zeros": ["6: a → b", "2: b → ! output"],
    "state_from_zeros": ["6: a again → again out", "2: out → ! output"],
    "filtered_images": ["6: a → b | shift blur", "2: b → ! output"],
    "windows_of_images": ["5: conv → fc", "2: fc → ! output"],
    "softmax_between": ["1: 0 → 2 ! softmax mixes these channels", "2: 2 → ! output"],
}
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@cache
def found(name):
    """The sites of a small network; they hold nothing of it."""
    return tuple(find_sites(*network(name), attention=True))


def shown(site):
    passed = f" | {' '.join(site.passed)}" if site.passed else ""
    return f"{site.channels}: {' '.join(site.writers)} → {' '.join(site.readers)}{passed}".strip()


def outputs(model, batch):
    """All tensors that a network returns, the same random numbers given."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return [leaf for leaf in pytree.tree_leaves(forward(model, batch)) if isinstance(leaf, torch.Tensor)]


def assert_same(model, other, batch):
    for a, b in zip(outputs(model, batch), outputs(other, batch), strict=True):
        assert a.shape == b.shape
        scale = a.abs().max().item() if a.is_floating_point() else 0
        assert (a - b).abs().max().item() <= (2e-2 if a.dtype == torch.bfloat16 else 1e-5) * scale


def free(sites):
    return [site for site in sites if site.pinned is None]


def random_plan(sites, seed):
    rng = np.random.default_rng(seed)

    def keep(site):
        return np.sort(rng.choice(site.channels, rng.integers(1, site.channels), replace=False))

    return Plan(tuple(Collapse(site, keep(site)) for site in free(sites)))


def assert_cuts_cleanly(model, batch, sites, seed):
    """The cut network equals the masked one, in which the channels that go are silent already."""
    plan = random_plan(sites, seed)
    silenced = masked(model, plan)
    assert_same(silenced, apply(model, plan), batch)
    # Layer norms of the masked network are none that can be cut.
    if not any(norm.centred for step in plan.steps for norm in step.site.norms):
        assert_same(silenced, apply(silenced, plan), batch)


def poisoned_columns(model, batch, site, channel):
    """Which input channels of which layers see that one channel of a site is not a number.

    Layers that read channels pass no poison on; grouped convolutions read none.
    """
    model, seen = copy.deepcopy(model), {}
    rows = {name: site.rows[name][channel] for name in site.writers}

    def hook(name, layer):
        def changed(_, args, y):
            dim = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
            if isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1:
                bad = args[0].isnan().movedim(dim, 0).flatten(1).any(1).nonzero().flatten()
                if len(bad):
                    seen.setdefault(name, set()).update(bad.tolist())
                y = torch.zeros_like(y)
            return y.index_fill(dim, torch.tensor(rows[name]), torch.nan) if name in rows else y

        return changed

    for name, layer in model.named_modules():
        if isinstance(layer, (*LAYERS, nn.Embedding)):
            layer.register_forward_hook(hook(name, layer))
    assert not any(y.isnan().any() for y in outputs(model, batch))
    return seen


def assert_poison_stays_inside(model, batch, sites):
    model = opened(model)
    # A norm spreads what is no number to all of its channels; matrices in a parameter are not looked at.
    for site in (
        one for one in free(sites) if not one.norms and not any(map(is_stack, (*one.writers, *one.readers)))
    ):
        for channel in range(site.channels):
            expected = {name: set(site.columns[name][channel].tolist()) for name in site.readers}
            assert poisoned_columns(model, batch, site, channel) == expected, shown(site)
