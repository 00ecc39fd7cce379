"""Sites of repeated layers keep equally many channels, chosen in one knapsack like all others."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from families import batches, made
from torch import nn

import pysolve as ps
from pysolve.methods.budget import choose, costs_of
from pysolve.methods.goal import Options
from pysolve.methods.kinds.channels import Channels
from pysolve.methods.price import price, probe
from pysolve.methods.sizes import by_keep, within
from pysolve.methods.studied import studied
from pysolve.methods.ties import alike, grouped, rounded, separate, uniform
from pysolve.nn.pretrained.stock import with_fields
from pysolve.solve.budget import limits_of

QUIET = {"progress": False, "latency": False}


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(6, hidden, bias=False), nn.Linear(hidden, 6, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def network():
    torch.manual_seed(0)
    blocks = [Block(8), Block(8), Block(10)]
    return nn.Sequential(*blocks, nn.Linear(6, 3)).eval()


@cache
def found(bias=False):
    torch.manual_seed(1)
    data = [torch.randn(64, 6) for _ in range(6)]
    return studied(network(), data, Options(progress=False, new_biases=bias), sites=True)


@cache
def priced():
    menus = Channels().menus(found())
    where = probe(found(), menus)
    return price(found(), menus, where), where


def test_repeated_layers_of_equal_widths_are_tied():
    assert [[*group] for group in alike(found()).groups] == [[0, 1], [2]]
    assert [len(mask) for mask in alike(found()).allowed] == [9, 11]
    assert [[*group] for group in separate(found()).groups] == [[0], [1], [2]]


def test_costs_of_tied_sites_are_those_of_all():
    costs, ties = costs_of(found()), alike(found())
    tied = costs.tied(ties.groups)
    assert tied.original == costs.original
    for a, b in product((1, 5, 8), (2, 10)):
        assert tied.cost([a, b]) == pytest.approx(costs.cost([a, a, b]))
    c, g, H = tied.expansion()
    k = np.array([3, 4])
    assert c + g @ k + 0.5 * k @ H @ k == pytest.approx([*costs.cost([3, 3, 4]).values()])


def test_divergences_of_tied_sites_add_up():
    menus, _ = priced()
    both, alone = grouped(menus, alike(found()))
    assert alone.unit is menus[2].unit
    for size in both.measured:
        assert both.curve[size] == pytest.approx(sum(menu.curve[size] for menu in menus[:2]))
    assert both.error == pytest.approx(menus[0].error + menus[1].error)
    assert [len(kept) for kept in both.at(3).keep.values()] == [3, 3]


def test_the_best_tied_sizes_are_found():
    menus, _ = priced()
    ties, costs = alike(found()), costs_of(found())
    units, target = grouped(menus, ties), {"params": 0.6}
    sizes, _ = choose(costs.tied(ties.groups), units, (), target)
    (_, limits) = limits_of(costs, target)
    fitting = [
        (units[0].curve[a] + units[1].curve[b], a, b)
        for a, b in product(range(1, 9), range(1, 11))
        if costs.cost([a, a, b])["params"] <= limits[0]
    ]
    assert units[0].curve[sizes[0]] + units[1].curve[sizes[1]] == pytest.approx(min(fitting)[0])


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_both_choices_are_reported(share):
    menus, where = priced()
    own = within(found(), menus, {"params": share}, where)
    one = within(found(), menus, {"params": share}, where, ties=uniform(found()))
    assert len(one.kept[0]) == len(one.kept[1])
    assert 'one width for all repeated layers (widths="uniform")' in own.notes[0]
    assert 'layers of their own widths (widths="per_layer")' in one.notes[0]
    said = [float(text) for text in (own.notes[0].split()[2], one.notes[0].split()[2])]
    assert said == pytest.approx([sum(own.predicted), sum(one.predicted)], rel=0.01)


def test_sizes_are_multiples_by_pattern():
    steps = {"re:[01].up": 4, found().free[2]: 5}
    ties = rounded(found(), alike(found()), steps)
    assert [np.flatnonzero(mask).tolist() for mask in ties.allowed] == [[0, 4, 8], [0, 5, 10]]
    menus, where = priced()
    sized = within(found(), menus, {"params": 0.6}, where, steps, alike(found()))
    assert [len(kept) % step for kept, step in zip(sized.kept, (4, 4, 5), strict=True)] == [0, 0, 0]
    with pytest.raises(ValueError, match="round_to names 'nothing'"):
        rounded(found(), alike(found()), {"nothing": 2})


def test_numbers_told_for_one_are_for_all():
    menus, _ = priced()
    sized = by_keep(found(), menus, {"1.up": 3}, ties=alike(found()))
    assert [len(kept) for kept in sized.kept] == [3, 3, 10]
    with pytest.raises(ValueError, match="which cannot be several"):
        by_keep(found(), menus, {"0.up": 2, "1.up": 3}, ties=alike(found()))


def test_uniform_layers_get_no_biases():
    data = [torch.randn(64, 6) for _ in range(6)]
    own = ps.compress(network(), data, keep=0.5, **QUIET).model.state_dict().keys()
    one = ps.compress(network(), data, keep=0.5, widths="uniform", **QUIET).model.state_dict().keys()
    assert own > one == network().state_dict().keys()
    (result,) = ps.sweep(network(), data, targets=[{"params": 0.6}], widths="uniform", **QUIET)
    first, second, _ = (site.kept for site in result.report.sites if site.pinned is None)
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": "even"}, "unknown widths 'even'; choose one of per_layer, uniform"),
        ({"widths": "uniform", "lam": 0.1}, "lam finds a size for each site"),
        ({"round_to": {"0.up": 0}}, r"round_to of 0\.up must be an integer"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ps.compress(network(), [torch.randn(64, 6)], **options)


def families(name):
    pytest.importorskip("transformers")
    import transformers

    model, batch = made(transformers, name)
    data = batches(batch)
    return studied(model, data, Options(progress=False, new_biases=False), sites=True), model, data


def test_what_a_configuration_does_not_count_stays():
    study, _, _ = families("bert")
    ties = uniform(study)
    assert [[*group] for group in ties.groups] == [[1, 3], [0, 2]]
    assert [int(mask[1:].sum()) for mask in ties.allowed] == [12, 1]
    assert {*ties.pinned} == {study.free[0], study.free[2]}
    assert {*ties.pinned.values()} == {"no field of BertConfig counts these channels alone"}


def test_a_configuration_refuses_sizes():
    study, model, _ = families("llama")
    ties = uniform(study)
    assert [mask.tolist() for mask in ties.allowed if len(mask) == 3] == [[True, True, True]]
    # Five groups of keys, whose heads must divide the hidden size of 20; and many neurons.
    changes = {"hidden_size": 20, "num_attention_heads": 10, "intermediate_size": 300}
    config = with_fields(model.config, {**changes, "num_key_value_heads": 5, "head_dim": 4})
    data = batches({"input_ids": torch.arange(12).view(2, 6)})
    study = studied(type(model)(config).eval(), data, Options(progress=False), sites=True)
    heads, stream, neurons = sorted(uniform(study).allowed, key=len)
    assert np.flatnonzero(heads).tolist() == [0, 1, 2, 5]
    assert np.flatnonzero(stream).tolist() == [0, 10, 20]
    assert len(neurons) == 301
    assert neurons.all()


def test_one_field_may_count_encoder_and_decoder():
    study, model, data = families("t5")
    ties = uniform(study)
    tied = [[study.free[i].writers[0].split(".")[0] for i in group] for group in ties.groups]
    assert tied[0] == ["encoder", "encoder", "decoder", "decoder"]
    result = ps.compress(model, data, target={"params": 0.9}, widths="uniform", head_dims=False, **QUIET)
    kept = [site for site in result.report.sites if site.channels == 12]
    assert len({site.kept for site in kept}) == 1
    assert kept[0].kept < 12
    pinned = [site.pinned for site in result.report.sites if site.pinned and "T5Config" in site.pinned]
    assert len(pinned) == 2
