"""compress reaches its target, says what it did, and leaves the original alone; sweep does so for many."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from small import Net, attention, images, network
from torch import nn
from torch.nn.functional import relu
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pysolve as ps
from pysolve.methods.compress import made
from pysolve.methods.goal import Options
from pysolve.methods.kinds.channels import Channels
from pysolve.methods.price import price, probe
from pysolve.methods.result import CHOSEN_ON
from pysolve.methods.sizes import by_keep, by_lam, within
from pysolve.methods.studied import studied
from pysolve.methods.study import Clock
from pysolve.nn.cost.counting import layer_macs
from pysolve.nn.divergence import kl_divergence, mean_divergence, run
from pysolve.nn.evaluate import macs, nbytes, parameters
from pysolve.nn.gathering import calibration
from pysolve.nn.zoo import Mlp
from pysolve.plan import Site
from pysolve.solve.least_squares import refit as refitted


def samples(n=32, d=6, batches=4, seed=0):
    return [*torch.randn(n * batches, d, generator=torch.Generator().manual_seed(seed)).split(n)]


def mlp(sizes=(6, 12, 9, 4), seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Mlp(sizes).to(dtype)


def compressed(model=None, batches=None, **options):
    if not {"target", "keep", "lam"} & set(options):
        options["target"] = {"params": 0.6}
    options.setdefault("progress", False)
    if model is None and "ignore" not in options:
        options.setdefault("sites", known_sites())
    return ps.compress(
        mlp() if model is None else model, samples() if batches is None else batches, **options
    )


@cache
def known_sites():
    """Of the usual network; to find them takes longer than all the rest."""
    return ps.find_sites(mlp(), samples()[0])


@cache
def default():
    """What most tests look at; nothing of it is changed."""
    return compressed()


@cache
def known(seed=0):
    return looked_at(mlp(seed=seed), samples(), known_sites())


def looked_at(model, batches, sites=True, seed=0):
    return studied(model, batches, Options(seed=seed, progress=False), sites=sites)


def menus(found):
    return [Channels().menu(found, site) for site in found.free]


@cache
def priced():
    """Divergences of the usual network's sites, and the samples they are measured on."""
    where = probe(known(), menus(known()))
    return price(known(), menus(known()), where), where


def shrunk(found, keep, refit="sequential", distill=()):
    """What compress makes of a network that was studied."""
    sized = by_keep(found, menus(found), keep)
    return made(found.model, found, sized, Clock(), None, refit, dict(distill))


def sizes(result=None, *, seed=0, target=None, keep=None, lam=None, round_to=1):
    """Channels that stay, by writer."""
    if result is not None:
        sites = [site for site in result.report.sites if site.pinned is None]
        return {site.name.split(" ")[0]: site.kept for site in sites}
    found = known(seed)
    if keep is not None:
        chosen = by_keep(found, menus(found), keep, round_to)
    elif lam is not None:
        chosen = by_lam(found, menus(found), lam)
    else:
        chosen = within(found, priced()[0], target, priced()[1], round_to)
    return {site.writers[0]: len(kept) for site, kept in zip(found.free, chosen.kept, strict=True)}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a, b):
    """The same parameters and buffers, to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def outputs(model, batch):
    (output,) = run(model, [batch])
    return output


# --- targets


@cache
def swept():
    """Reports of a network wide enough for steps of less than a per cent."""
    targets = (
        *({"params": share} for share in (0.1, 0.35, 0.9)),
        {"macs": 0.5},
        {"bytes": 5000},
        {"params": 0.5, "macs": 0.4, "bytes": 0.45},
    )
    model = mlp((20, 120, 110, 5))
    return targets, ps.sweep(model, samples(100, 20), targets=targets, progress=False).reports


def test_targets_are_reached_within_a_per_cent_and_never_exceeded():
    targets, reports = swept()
    for target, report in zip(targets, reports, strict=True):
        left = [share_of(report, m, v) - report.share(m) for m, v in target.items()]
        assert 0 <= min(left) <= 0.01, (target, left)
        assert report.target == target


def share_of(report, measure, value):
    return value if value <= 1 else value / report.before[measure]


def test_a_smaller_target_does_more_harm():
    _, reports = swept()
    small, middle, large = reports[:3]
    assert small.divergence > middle.divergence > large.divergence


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("residual", {"macs": 0.6}),
        ("flattened_by_view", {"params": 0.7}),
        ("swiglu", {"bytes": 0.7}),
        ("depthwise", {"bytes": 0.8, "macs": 0.9}),
    ],
)
def test_no_site_of_a_small_network_could_have_one_channel_more(name, target):
    model, batch = network(name)
    batches = [torch.randn(16, *batch.shape[1:], generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    result = compressed(model, batches, target=target)
    costs = measured(result.model, batches[0])
    assert costs == {measure: result.report.after[measure] for measure in costs}
    assert measured(model, batches[0]) == {m: result.report.before[m] for m in costs}
    allowed = {m: share * result.report.before[m] for m, share in target.items()}
    assert all(costs[m] <= allowed[m] for m in target)
    for step in result.plan.steps:
        more = np.sort(np.append(step.keep, step.removed[0]))
        others = [other for other in result.plan.steps if other is not step]
        wider = ps.apply(model, ps.Plan((*others, ps.Collapse(step.site, more)), biases(result.plan)))
        costs = measured(wider, batches[0])
        assert any(costs[m] > allowed[m] for m in target)


def encoder():
    """Attention by heads and an MLP, both of which can shrink."""
    torch.manual_seed(0)
    heads, hidden = attention(48, 12)[0], [nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)]
    return nn.Sequential(heads, *hidden).eval(), [torch.randn(16, 20, 5) for _ in range(4)]


@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
def test_macs_of_attention_shrink_to_the_target(share):
    model, batches = encoder()
    result = compressed(model, batches, target={"macs": share})
    one = batches[0][:1]
    before, after = (sum(layer_macs(net, one).values()) for net in (model, result.model))
    head, hidden = 20 * 4 * (3 * 5 + 4) + 2 * 20**2 * 4, result.model[1].out_features
    assert 0 <= share * before - after < (20 * (4 + 4) if hidden < 16 else head)
    assert (result.report.before["macs"], result.report.after["macs"]) == (before, after)
    assert sum(row.macs for row in result.report.mass) == before
    assert sum(row.macs_left for row in result.report.mass) == after
    assert layer_macs(model, one)["0"] > before / 2


def test_what_no_site_can_reduce_counts_in_the_target():
    def run(net, x):
        return net.head(net.fc(net.rnn(x)[0].mean(1)))

    torch.manual_seed(0)
    layers = {"rnn": nn.GRU(4, 8, batch_first=True), "fc": nn.Linear(8, 40), "head": nn.Linear(40, 3)}
    model, batches = Net(run, **layers).eval(), [torch.randn(16, 3, 4) for _ in range(4)]
    recurrent, others = 3 * 24 * (4 + 8), 40 * (8 + 3)
    with pytest.raises(ps.PysolveError, match=rf"macs cannot go below {recurrent + 11} \(67.1 %\)"):
        compressed(model, batches, target={"macs": 0.6}, ignore=["rnn"])
    result = compressed(model, batches, target={"macs": 0.8}, ignore=["rnn"])
    assert result.report.before["macs"] == recurrent + others
    assert result.report.after["macs"] == recurrent + 11 * int((0.8 * (recurrent + others) - recurrent) / 11)


def measured(model, batch):
    return {"params": parameters(model), "macs": macs(model, batch[:1]), "bytes": nbytes(model)}


def biases(plan):
    return {name: value for name, value in plan.values.items() if name.endswith("bias")}


def test_without_any_wish_a_quarter_of_the_parameters_is_left():
    result = ps.compress(mlp((8, 60, 40, 4)), samples(d=8), progress=False)
    assert 0.24 < result.report.share("params") <= 0.25
    assert result.report.target == {"params": 0.25}


def test_a_target_out_of_reach_names_the_smallest_one():
    with pytest.raises(ps.PysolveError, match=r"params cannot go below 17 \(7.05 %\)"):
        compressed(target={"params": 0.05})
    assert compressed(target={"params": 17}).report.after["params"] == 17


# --- which channels go


def test_by_sensitivity_channels_stay_that_the_networks_outputs_depend_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3)).eval()
    with torch.no_grad():
        # Four channels for two outputs that are read, and four for eight that hardly are.
        signs = torch.randn(10, 8).sign() / 2
        signs[:2, 4:] = signs[2:, :4] = 0.0
        model[0].weight.copy_(torch.eye(8))
        model[2].weight.copy_(signs)
        model[4].weight[:, 2:] *= 1e-3
    batches = [torch.randn(100, 8) for _ in range(4)]

    def kept(select):
        found = compressed(model, batches, target=None, keep={"0": 4, "2": 10}, select=select)
        return {step.site.name: step.keep.tolist() for step in found.plan.steps}

    assert kept("sensitivity") == {"0 → 2": [0, 1, 2, 3]}
    assert kept("elimination") == {"0 → 2": [4, 5, 6, 7]}


# --- what is told before anything is cut


def test_a_dry_run_changes_nothing_and_tells_what_targets_would_cost():
    model = mlp()
    told = compressed(model, target={"params": 0.45}, dry_run=True)
    assert_equal(state(told.model), state(model))
    assert told.plan.steps == ()
    shares = [one.target["params"] for one in told.report.expected]
    assert shares == [0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.3]
    found = [one.divergence for one in told.report.expected]
    assert all(0 <= more <= less for more, less in pairwise(found))
    assert "params 0.45" in str(told.report)
    assert found[5] == pytest.approx(compressed(model, target={"params": 0.45}).report.divergence, rel=1e-6)


def test_a_dry_run_says_which_targets_are_out_of_reach_and_takes_several_measures():
    told = compressed(target={"params": 0.05}, dry_run=True).report
    assert [one.divergence is None for one in told.expected] == [False] * 7 + [True]
    assert "out of reach" in str(told)
    both = compressed(target={"params": 0.5, "macs": 0.6}, dry_run=True).report
    assert [one.target for one in both.expected] == [{"params": 0.5, "macs": 0.6}]


# --- what stays as it was


@pytest.mark.parametrize("options", [{}, {"refit": "independent"}, {"distill": {"epochs": 1}}])
def test_the_original_is_not_changed(options):
    model, batch = network("residual")
    model.train()
    model.bn.eval()
    before, gradients = state(model), [p.requires_grad for p in model.parameters()]
    batches = [batch.repeat(4, 1, 1, 1) for _ in range(2)]
    kept = [one.clone() for one in batches]
    result = compressed(model, batches, **options)
    assert_equal(state(model), before)
    assert model.training
    assert not model.bn.training
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(batches, kept, strict=True))
    assert result.model.training
    assert not result.model.bn.training
    assert not set(map(id, model.parameters())) & set(map(id, result.model.parameters()))


def test_the_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ps.compress(Mlp((6, 12, 9, 4)), samples(), target={"params": 0.6}, distill={"epochs": 1}, progress=False)
    torch.manual_seed(5)
    Mlp((6, 12, 9, 4))
    assert not torch.equal(torch.get_rng_state(), before)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    compressed(Mlp((6, 12, 9, 4)), distill={"epochs": 1})
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("options", [{}, {"distill": {"epochs": 1}, "memory": "64MiB", "select": "swap"}])
def test_the_same_seed_gives_the_same_network(options):
    first, again = (compressed(seed=3, **options) for _ in range(2))
    assert_equal(state(first.model), state(again.model))
    assert first.report.divergence == again.report.divergence


def test_the_plan_applied_to_the_original_is_the_result():
    assert_equal(state(ps.apply(mlp(), default().plan)), state(default().model))
    model, _ = network("residual")
    for refit in ("sequential", "independent"):
        result = compressed(model, [images(n=16)], refit=refit)
        assert_equal(state(ps.apply(model, result.plan)), state(result.model))


# --- what batches may be


def test_labels_are_ignored_and_every_kind_of_iterable_is_taken():
    batches = samples()
    wanted = state(default().model)
    dataset = TensorDataset(torch.cat(batches), torch.zeros(128, dtype=torch.long))
    for others in (
        tuple([x, torch.zeros(len(x)), "more"] for x in batches),
        DataLoader(dataset, batch_size=32),
        [{"x": x} for x in batches],
    ):
        assert_equal(state(compressed(batches=others).model), wanted)


class Endless(IterableDataset):
    """Samples of which nobody knows how many there are."""

    def __iter__(self):
        return iter(torch.cat(samples()))


def test_iterators_without_a_length_are_taken_once():
    wanted = state(default().model)
    assert_equal(state(compressed(batches=(x for x in samples())).model), wanted)
    assert_equal(state(compressed(batches=DataLoader(Endless(), batch_size=32)).model), wanted)


def test_single_samples_and_batches_of_any_sizes_are_taken():
    x = torch.cat(samples())
    for sizes in ([1] * 40, [1, 30, 2, 7], [1]):
        result = compressed(batches=[*x[: sum(sizes)].split(sizes)])
        assert result.report.share("params") <= 0.6
        assert np.isfinite(result.report.divergence)


def test_networks_called_by_keywords_are_compressed():
    model, batch = network("keywords")
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"ids": torch.randint(0, 11, (16, 5), generator=generator), "mask": torch.ones(16, 5)}
        for _ in range(2)
    ]
    result = compressed(model, batches, target={"params": 0.8}, distill={"epochs": 1})
    assert result.report.share("params") <= 0.8
    assert outputs(result.model, batch)["scores"][0].shape == (2, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_keeps_its_data_type(dtype):
    batches = [x.to(dtype) for x in samples()]
    result = compressed(mlp(dtype=dtype), batches)
    assert {value.dtype for value in result.model.state_dict().values()} == {dtype}
    assert result.report.divergence < 0.01


def test_code_that_fixes_the_batch_size_uses_whole_batches():
    model = Net(
        lambda net, x: net.b(relu(torch.stack([net.a(row) for row in x]))),
        a=nn.Linear(6, 12),
        b=nn.Linear(12, 3),
    )
    report = compressed(model, samples(n=8)).report
    assert report.notes == (
        "the refit used 24 of 28 samples: the network's code takes batches of one size alone",
        CHOSEN_ON,
    )
    assert report.samples == 24
    notes = compressed(model, samples(n=8, batches=1)).report.notes
    assert len(notes) == 2
    assert (
        "the network's code takes batches of one size alone, so its readers were refitted independently"
        in notes
    )


def test_little_memory_means_fewer_samples_and_a_note(monkeypatch):
    monkeypatch.setattr("pysolve.nn.gathering.passes.free_memory", lambda: 3000)
    report = compressed().report
    assert report.samples < 112
    too_many = f"the refit used {report.samples} of 112 samples: more would not fit in memory"
    assert report.notes == (too_many, CHOSEN_ON)
    monkeypatch.undo()
    assert default().report.notes == (CHOSEN_ON,)


def test_batch_norms_that_need_several_samples_are_no_hindrance():
    layers = (nn.Linear(6, 12), nn.BatchNorm1d(12, track_running_stats=False), nn.ReLU(), nn.Linear(12, 3))
    result = compressed(nn.Sequential(*layers).eval())
    assert result.report.share("params") <= 0.6


# --- other ways to say how small


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        (0.5, {"fc1": 6, "fc2": 4}),
        (5, {"fc1": 5, "fc2": 5}),
        (np.int64(1), {"fc1": 1, "fc2": 1}),
        (1, {"fc1": 1, "fc2": 1}),
        (1.0, {"fc1": 12, "fc2": 9}),
        (100, {"fc1": 12, "fc2": 9}),
        ({"fc1": 0.25}, {"fc1": 3, "fc2": 9}),
        ({"fc1": 0.001, "fc2": 7}, {"fc1": 1, "fc2": 7}),
    ],
)
def test_keep_says_how_many_channels_stay(keep, wanted):
    assert sizes(keep=keep) == wanted


@pytest.mark.parametrize("option", ["keep", "lam"])
def test_two_sites_of_one_name_have_values_of_their_own(option):
    model, columns = mlp((6, 12, 4)), np.arange(12).reshape(2, 6, 1)
    first, second = (
        Site(6, ("fc1",), ("fc2",), rows={"fc1": part}, columns={"fc2": part}) for part in columns
    )
    assert first.name == second.name
    values = {first: 2, second: 5} if option == "keep" else {first: 1e9, second: 1e-9}
    result = compressed(model, sites=[first, second], **{option: values})
    wanted = [2, 5] if option == "keep" else [1, 6]
    assert [site.kept for site in result.report.sites] == wanted
    assert result.model.fc1.out_features == sum(wanted)
    stranger = Site(12, ("fc1",), ("fc2",))
    with pytest.raises(ValueError, match=f"{option} names the site fc1 → fc2"):
        compressed(model, sites=[first, second], **{option: {stranger: 1}})


def test_scores_select_by_site_or_by_its_name():
    model, columns = mlp((6, 12, 4)), np.arange(12).reshape(2, 6, 1)
    first, second = (
        Site(6, ("fc1",), ("fc2",), rows={"fc1": part}, columns={"fc2": part}) for part in columns
    )
    scores = {first: [5, 4, 3, 2, 1, 0], second: [0, 1, 2, 3, 4, 5]}
    result = compressed(model, sites=[first, second], keep=2, select=scores)
    assert [step.keep.tolist() for step in result.plan.steps] == [[0, 1], [4, 5]]
    named = {"fc1 → fc2": range(12), "fc2 → fc3": range(9)}
    assert [step.keep.tolist() for step in compressed(keep=2, select=named).plan.steps] == [[10, 11], [7, 8]]
    with pytest.raises(ValueError, match="fc2 → fc3 has none"):
        compressed(keep=2, select={"fc1 → fc2": range(12)})


def test_what_keep_says_is_what_the_network_has():
    result = compressed(keep={"fc1": 0.25, "fc2": 7})
    assert (result.model.fc1.out_features, result.model.fc2.out_features) == (3, 7)
    assert sizes(result) == {"fc1": 3, "fc2": 7}
    assert result.report.target is None


def test_keeping_everything_changes_nothing():
    result = compressed(keep=1.0)
    assert_equal(state(result.model), state(mlp()))
    assert result.plan.steps == ()
    assert result.report.divergence == 0.0


def test_sizes_are_multiples_of_round_to():
    assert sizes(keep=0.5, round_to=4) == {"fc1": 8, "fc2": 4}
    assert sizes(keep=0.5, round_to=100) == {"fc1": 12, "fc2": 9}
    assert all(kept % 3 == 0 for kept in sizes(target={"params": 0.6}, round_to=3).values())


def test_a_penalty_keeps_what_the_group_lasso_does():
    model, batches = mlp(seed=2), samples()
    result = compressed(model, batches, lam={"fc1": 0.02, "fc2": 0.001})
    found = ps.gather(model, [x[4:] for x in batches], progress=False)
    for step, (reader, lam) in zip(result.plan.steps, (("fc2", 0.02), ("fc3", 0.001)), strict=True):
        keep = ps.newton(found[reader].centered(), lam=lam).keep
        np.testing.assert_array_equal(step.keep, keep)
        assert 1 < len(keep) < step.site.channels
    assert result.report.notes == ()
    assert result.report.target is None


def test_a_penalty_so_small_keeps_all_and_one_so_large_the_most_useful_channel():
    assert sizes(seed=1, lam=1e-9) == {"fc1": 12, "fc2": 9}
    result = compressed(mlp(seed=1), lam={"fc2": 1e9})
    assert sizes(result) == {"fc1": 12, "fc2": 1}
    assert result.report.notes == ("lam = 1e+09 leaves no channel of fc2 → fc3: the most useful one stays.",)
    found = ps.gather(mlp(seed=1), [x[4:] for x in samples()], progress=False)["fc3"]
    np.testing.assert_array_equal(result.plan.steps[0].keep, ps.select_channels(found.centered(), k=1))


@pytest.mark.parametrize("option", ["keep", "lam"])
def test_names_that_can_do_nothing_are_an_error_that_says_what_there_is(option):
    with pytest.raises(
        ValueError, match=f"{option} names 'fc9', which writes no site; those that .* fc1, fc2"
    ):
        sizes(**{option: {"fc9": 0.5}})
    with pytest.raises(
        ValueError, match=f"{option} names 'fc3', whose channels cannot be removed .the network's output"
    ):
        sizes(**{option: {"fc1": 0.5, "fc3": 0.5}})


def test_writers_of_one_site_cannot_have_different_values():
    model, batch = network("residual")
    found = looked_at(model, [batch.repeat(8, 1, 1, 1)])
    assert len(by_keep(found, menus(found), {"stem": 3, "conv2": 3}).kept[0]) == 3
    with pytest.raises(ValueError, match="stem, conv2 write one site"):
        by_keep(found, menus(found), {"stem": 3, "conv2": 4})


@pytest.mark.parametrize("select", ["swap", "lasso", "activation"])
def test_every_way_to_select_channels_reaches_the_target(select):
    assert compressed(select=select).report.share("params") <= 0.6


# --- sites


def test_layers_to_ignore_keep_their_channels():
    result = compressed(keep=0.5, ignore=["re:fc1"])
    assert (result.model.fc1.out_features, result.model.fc2.out_features) == (12, 4)
    assert result.report.sites[0].pinned == "`fc1` is to be ignored"


def branching():
    """No graph can follow it: what it does depends on values."""

    def run(net, x):
        h = relu(net.a(x))
        return net.b(h * 2 if h.sum() > 1e9 else h)

    torch.manual_seed(0)
    return Net(run, a=nn.Linear(6, 12), b=nn.Linear(12, 4))


def test_a_network_that_cannot_be_exported_needs_sites_by_hand():
    with pytest.raises(ps.PysolveError, match=r"cannot be traced.*list of Site, written by hand"):
        compressed(branching())
    result = compressed(branching(), sites=[Site(12, ("a",), ("b",))])
    assert result.report.share("params") <= 0.6
    assert result.report.notes == (
        "the network cannot be exported, so its readers were refitted independently",
        CHOSEN_ON,
    )
    alone = compressed(branching(), sites=[Site(12, ("a",), ("b",))], refit="independent")
    assert alone.report.notes == (CHOSEN_ON,)


def test_sites_by_hand_are_the_only_ones():
    site = Site(9, ("fc2",), ("fc3",))
    result = compressed(sites=[site, Site(1, ("fc1",), ("fc2",), pinned="not today")], target={"params": 0.9})
    assert [step.site for step in result.plan.steps] == [site]
    assert [line.pinned for line in result.report.sites] == [None, "not today"]


def test_a_site_of_one_channel_stays():
    model = mlp((6, 1, 9, 4))
    result = compressed(model, sites=[Site(1, ("fc1",), ("fc2",)), Site(9, ("fc2",), ("fc3",))])
    assert sizes(result)["fc1"] == 1


def test_a_layer_of_two_names_is_refitted_once():
    torch.manual_seed(0)
    layer = nn.Linear(12, 12)
    model = Net(
        lambda net, x: net.c(relu(net.second(relu(net.a(x))))),
        a=nn.Linear(6, 12),
        first=layer,
        second=layer,
        c=nn.Linear(12, 3),
    )
    result = compressed(model)
    assert result.model.first is result.model.second
    assert result.report.divergence < 0.01


def test_blocks_of_code_that_the_graph_hides_are_compressed_too():
    def run(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = net.b(relu(net.a(x)))
        return net.c(relu(h.float()))

    torch.manual_seed(0)
    model = Net(run, a=nn.Linear(6, 12), b=nn.Linear(12, 8), c=nn.Linear(8, 3))
    result = compressed(model, keep=0.5)
    assert result.report.divergence < 0.01
    assert {"b.weight", "c.weight"} <= set(result.plan.values)


@pytest.mark.parametrize("name", ["softmax_between", "single_channel", "tied_weights"])
def test_without_anything_to_shrink_the_reasons_are_named(name):
    model, batch = network(name)
    with pytest.raises(
        ps.PysolveError, match=r"no channel of this network can be removed: .*(mixes|single|fixed)"
    ):
        compressed(model, [batch])
    with pytest.raises(ps.PysolveError, match="it has no sites"):
        compressed(sites=[])


def test_layers_that_no_site_has_are_named():
    sparse = ps.prune(nn.Sequential(nn.Linear(6, 5)), amount=0.9, layout="sparse", progress=False).model
    with pytest.raises(ps.PysolveError, match=r"in no site: 0 \(it is sparse; nn.to_dense changes"):
        compressed(sparse, [torch.randn(32, 6)])


# --- what the result is worth


def held_out():
    return [torch.cat([x[:4] for x in samples()])]


@pytest.fixture
def eleven_to_choose_on(monkeypatch):
    """Of the sixteen samples held out, the last five are for the report alone."""
    monkeypatch.setattr(calibration, "HELD_SAMPLES", 11)
    monkeypatch.setattr(calibration, "APART_SAMPLES", 5)
    monkeypatch.setattr(calibration, "LEAST_APART", 5)


@pytest.mark.usefixtures("eleven_to_choose_on")
def test_the_divergence_reported_is_that_of_the_outputs_on_samples_that_no_fit_and_no_choice_saw():
    result = compressed()
    pairs = [run(model, [held_out()[0][11:]]) for model in (mlp(), result.model)]
    wanted = mean_divergence(list(pairs[0]), pairs[1], [held_out()[0][11:]], kl_divergence)
    assert result.report.divergence == pytest.approx(wanted)
    assert (result.report.held, result.report.samples) == (5, 112)
    assert result.report.notes == ()


def test_with_few_samples_the_divergence_reported_is_that_of_those_that_sizes_were_chosen_on():
    result = default()
    pairs = [run(model, held_out()) for model in (mlp(), result.model)]
    wanted = mean_divergence(list(pairs[0]), pairs[1], held_out(), kl_divergence)
    assert result.report.divergence == pytest.approx(wanted)
    assert (result.report.held, result.report.samples) == (16, 112)
    assert result.report.notes == (CHOSEN_ON,)


def test_held_out_samples_have_no_part_in_the_result():
    batches = samples()
    others = [torch.cat([x[:4].flip(0), x[4:]]) for x in batches]
    first, again = (compressed(batches=x, keep=0.5, distill={"epochs": 1}) for x in (batches, others))
    assert_equal(state(first.model), state(again.model))


@pytest.mark.usefixtures("eleven_to_choose_on")
def test_samples_for_the_report_have_no_part_in_the_sizes():
    """Sizes chosen under a target, with the samples apart replaced by others."""
    given = samples()
    given[2] = torch.cat([given[2][:3], 3 * given[2][3:4] + 1, given[2][4:]])
    given[3] = torch.cat([3 * given[3][:4] + 1, given[3][4:]])
    first, changed = compressed(), compressed(batches=given)
    assert_equal(state(changed.model), state(first.model))
    assert changed.report.divergence != first.report.divergence
    assert [(s.predicted, s.measured) for s in changed.report.sites] == [
        (s.predicted, s.measured) for s in first.report.sites
    ]


def counted(**options):
    """Runs of the original, calls of the divergence, and the report."""
    model, runs, calls = mlp(), [], []
    model.fc3.register_forward_hook(lambda *_: runs.append(1))

    def divergence(original, output):
        calls.append(1)
        return kl_divergence(original, output)

    report = compressed(model, sites=known_sites(), divergence=divergence, **options).report
    return len(runs), len(calls), report


@pytest.mark.parametrize("option", ["keep", "lam"])
def test_explicit_sizes_pay_for_no_sensitivities(option):
    runs, calls, report = counted(**{option: 0.01 if option == "lam" else 0.5})
    assert calls == 1
    assert [(site.predicted, site.measured) for site in report.sites] == [(None, None)] * 3
    one_site, _, _ = counted(keep={"fc1": 0.5})
    assert runs == one_site
    chosen, measured, _ = counted(target={"params": 0.6})
    assert chosen > runs
    assert measured > calls


def test_another_divergence_is_measured_with():
    seen = []

    def squares(original, output):
        seen.append(1)
        return (original - output).square().mean()

    result = compressed(divergence=squares)
    pairs = zip(run(mlp(), held_out()), run(result.model, held_out()), strict=True)
    assert result.report.divergence == pytest.approx(np.mean([squares(a, b).item() for a, b in pairs]))
    assert len(seen) > 5


def test_refitting_in_lockstep_is_better_than_reader_by_reader():
    found = looked_at(mlp((6, 40, 30, 20, 4)), samples(200))
    lockstep, alone = (shrunk(found, 0.3, refit) for refit in ("sequential", "independent"))
    assert lockstep.report.divergence < alone.report.divergence


def test_matching_that_harms_beyond_the_scatter_of_the_samples_is_undone(monkeypatch):
    def spoil(student, *args, **kwargs):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(-1)

    plain = compressed(keep=0.5)
    monkeypatch.setattr("pysolve.methods.result.teach", spoil)
    result = compressed(keep=0.5, distill={"epochs": 1})
    assert "undone" in result.report.notes[-1]
    assert torch.equal(result.model.fc2.weight, plain.model.fc2.weight)
    # A change too small to tell from chance is kept.
    monkeypatch.setattr("pysolve.methods.result.teach", lambda *args, **kwargs: None)
    assert not any("undone" in note for note in compressed(keep=0.5, distill={"epochs": 1}).report.notes)


def test_distilling_brings_the_outputs_closer():
    plain, distilled = (shrunk(known(), 0.4, distill=distill) for distill in ({}, {"epochs": 2}))
    assert distilled.report.divergence < plain.report.divergence
    assert "distill" in distilled.report.seconds
    assert "distill" not in plain.report.seconds


def test_scores_are_those_of_the_two_networks():
    model, scored = mlp(), []

    def evaluate(network):
        scored.append(network)
        return torch.tensor(float(parameters(network)))

    result = compressed(model, evaluate=evaluate)
    assert scored == [model, result.model]
    assert (result.report.score_before, result.report.score_after) == (241.0, parameters(result.model))
    assert result.report.retrained is None
    assert default().report.score_after is None


def test_a_result_can_be_compressed_further():
    further = compressed(default(), target={"params": 0.7})
    assert further.report.before == default().report.after
    assert_equal(state(further.model), state(compressed(default().model, target={"params": 0.7}).model))


def test_the_report_tells_of_every_site_and_goes_into_a_file():
    report = compressed(
        evaluate=lambda model: 1.0, target={"params": np.float64(0.5), "macs": np.int64(150)}
    ).report
    assert [site.name for site in report.sites] == ["fc1 → fc2", "fc2 → fc3", "fc3 → nothing"]
    for site in report.sites[:2]:
        assert 0 < site.error < 1
        assert site.predicted > 0
        assert site.measured > 0
    assert report.sites[2].pinned == "the network's output"
    assert json.loads(json.dumps(report.as_dict()))["target"] == {"params": 0.5, "macs": 150}
    assert {"find", "gather", "measure", "refit", "apply"} <= set(report.seconds)
    assert "fc1 → fc2" in str(report)


def test_nothing_is_printed_and_no_bar_is_shown(capsys):
    compressed(distill=0.01)
    ps.sweep(mlp(), samples(), targets=[{"params": 0.5}], distill={"epochs": 1}, progress=False)
    assert capsys.readouterr() == ("", "")


# --- sweep


def test_a_sweep_is_what_compress_does_at_each_target():
    model, targets = mlp((6, 40, 30, 4)), [{"params": 0.4}, {"params": 0.5, "macs": 0.6}]
    options = {"distill": {"epochs": 1}, "seed": 1, "round_to": 1, "memory": "64MiB"}
    results = ps.sweep(model, samples(), targets=iter(targets), progress=False, **options)
    for target, result in zip(targets, results, strict=True):
        alone = compressed(model, target=target, **options)
        for one, other in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.equal(one, other)
        report, wanted = result.report, alone.report
        for field in ("before", "after", "divergence", "samples", "held", "notes", "target"):
            assert getattr(report, field) == getattr(wanted, field), field
        for what in ("kept", "predicted", "measured"):
            assert [getattr(site, what) for site in report.sites] == [
                getattr(site, what) for site in wanted.sites
            ]


def test_a_sweep_of_nothing_is_empty():
    assert ps.sweep(mlp(), samples(), targets=[], progress=False) == ()


def test_a_sweep_evaluates_before_and_after_retraining():
    retrained = []

    def retrain(network):
        retrained.append(network)
        for parameter in network.parameters():
            parameter.data.zero_()

    def evaluate(network):
        return sum(float(parameter.detach().abs().sum()) for parameter in network.parameters())

    model = mlp()
    results = ps.sweep(
        model,
        samples(),
        targets=[{"params": 0.7}, {"params": 0.3}],
        evaluate=evaluate,
        retrain=retrain,
        progress=False,
    )
    reports = results.reports
    assert [report.retrained for report in reports] == [0.0, 0.0]
    assert all(report.score_after > 0 for report in reports)
    assert {report.score_before for report in reports} == {evaluate(model)}
    assert [result.model for result in results] == retrained


# --- arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target": {"params": 0.5}, "keep": 0.5},
            ValueError,
            "one of target, keep and lam, got target and keep",
        ),
        ({"keep": 0.5, "lam": 0.5}, ValueError, "got keep and lam"),
        ({"target": 0.5}, TypeError, 'targets are like {"params": 0.5}, got float'),
        ({"target": {}}, ValueError, "names no measure"),
        ({"target": {"flops": 0.5}}, ValueError, "unknown measure 'flops'"),
        ({"target": {"params": "half"}}, TypeError, "must be a number, got str"),
        ({"target": {"params": 1.5}}, ValueError, "share in (0, 1] or an integer"),
        ({"keep": 0}, ValueError, "keep must be positive"),
        ({"keep": True}, TypeError, "keep must be a number, got bool"),
        ({"keep": 2.5}, ValueError, "keep must be a share in (0, 1] or an integer, got 2.5"),
        ({"keep": {"fc1": "all"}}, TypeError, "keep of fc1 must be a number"),
        ({"lam": -1.0}, ValueError, "lam must be positive and finite, got -1.0"),
        ({"lam": {"fc1": float("inf")}}, ValueError, "lam of fc1 must be positive"),
        ({"refit": "fast"}, ValueError, "unknown refit 'fast'; choose one of sequential, independent"),
        ({"select": "luck"}, ValueError, "unknown method 'luck'; choose one of activation"),
        ({"distill": {"lr": 3}}, ValueError, "must name seconds or epochs, one of them, got {'lr': 3}"),
        ({"distill": {"epochs": 1, "steps": 3}}, ValueError, "no option 'steps'"),
        ({"distill": {"epochs": 1, "seconds": 1}}, ValueError, "one of them"),
        ({"distill": {}}, ValueError, "one of them, got {}"),
        ({"distill": {"epochs": 1.5}}, ValueError, "an integer number of epochs, got 1.5"),
        ({"distill": -1}, ValueError, "distill in seconds must be positive"),
        ({"distill": True}, TypeError, "must be a number, got bool"),
        ({"dry_run": True, "keep": 0.5}, ValueError, "a dry run tells what targets"),
        ({"dry_run": True, "target": {"ms": 1.0}}, ValueError, "a dry run tells what targets"),
        ({"round_to": 0}, ValueError, "round_to must be an integer of at least 1, got 0"),
        ({"round_to": 1.5}, ValueError, "round_to must be an integer"),
        ({"memory": 0}, ValueError, "memory must be positive"),
        ({"sites": ["fc1"]}, TypeError, "sites must be a list of Site, got a str"),
        (
            {"sites": [Site(12, ("fc1",), ("fc2",))], "ignore": ["fc1"]},
            ValueError,
            "ignore is for sites that",
        ),
        ({"ignore": "fc1"}, TypeError, "ignore must be a sequence of names"),
        ({"ignore": None}, TypeError, "ignore must be a sequence of names"),
        ({"sites": Site(12, ("fc1",), ("fc2",))}, TypeError, "sites must be a list of Site, got one"),
        ({"sites": [Site(12, ("fc1",), ())]}, ValueError, "a site needs layers that write its channels"),
        ({"round_to": {"re:[": 4}}, ValueError, "'re:[' in round_to is no regular expression"),
        ({"seed": "first"}, ValueError, "seed must be an integer of 0 … 9223372036854775807, got 'first'"),
        ({"seed": 1.5}, ValueError, "seed must be an integer"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"divergence": "kl"}, TypeError, "divergence must be a function, got 'kl'"),
        ({"evaluate": 99.0}, TypeError, "evaluate must be a function, got 99.0"),
        ({"dry_run": "no"}, TypeError, "dry_run must be True or False, got 'no'"),
        ({"head_dims": None}, TypeError, "head_dims must be True or False"),
        ({"latency": "no"}, TypeError, "latency must be True or False"),
        ({"ignore": ["fc9"]}, ps.LayerNotFoundError, "no layer 'fc9'"),
        ({"sites": [Site(12, ("fc1",), ("fc9",))]}, ps.LayerNotFoundError, "no layer 'fc9'"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(options, error, message):
    batches = iter(samples())
    with pytest.raises(error) as info:
        ps.compress(mlp(), batches, progress=False, **options)
    assert message in str(info.value)
    if error in (TypeError, ValueError) and "ignore" not in options:
        assert len(list(batches)) == 4


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"keep": {}}, {"keep": 0.5, "round_to": 100}])
def test_where_nothing_is_removed_a_note_says_so(options):
    result = compressed(seed=np.int64(1), progress=np.False_, **options)
    assert result.report.after["params"] == result.report.before["params"]
    assert any(note.startswith("nothing was removed") for note in result.report.notes)
    assert not any(note.startswith("nothing was removed") for note in compressed(keep=0.5).report.notes)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ps.DataError, "there are no batches"),
        (iter([]), ps.DataError, "Was a generator used up"),
        (torch.zeros(4, 6), TypeError, "got one Tensor: wrap it in a list"),
        ({"x": torch.zeros(4, 6)}, TypeError, "got one dict: wrap it in a list"),
        (["text"], TypeError, "a batch must be a tensor"),
        ([torch.full((8, 6), torch.nan)], ps.DataError, "hold NaN or infinity"),
    ],
)
def test_wrong_batches_are_named(batches, error, message):
    with pytest.raises(error, match=message):
        compressed(batches=batches)


def test_what_is_no_network_is_refused():
    for call in (compressed, lambda model: ps.sweep(model, samples(), targets=[])):
        with pytest.raises(
            TypeError, match=r"model must be a torch\.nn\.Module, or what compress returned, got str"
        ):
            call("resnet")


def test_distilling_needs_something_to_train():
    with pytest.raises(ValueError, match="require a gradient, but none does"):
        compressed(mlp().requires_grad_(False), distill={"epochs": 1})
    result = compressed(mlp().requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in result.model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": [{"params": 0.5}], "keep": 0.5}, TypeError, "'keep'"),
        ({"targets": [{"params": 0.5}], "nonsense": 1}, TypeError, "'nonsense'"),
        ({"targets": {"params": 0.5}}, TypeError, "targets must be a list of targets, got one: pass "),
        ({"targets": [{"params": 0.5}, {"flops": 1}]}, ValueError, "unknown measure 'flops'"),
        ({"targets": [{"params": 0.5}], "refit": "fast"}, ValueError, "unknown refit 'fast'"),
        ({"targets": [{"params": 0.5}], "retrain": print}, ValueError, "retrain needs evaluate"),
    ],
)
def test_wrong_arguments_of_a_sweep_are_named_before_any_work(options, error, message):
    batches = iter(samples())
    with pytest.raises(error, match=message):
        ps.sweep(mlp(), batches, progress=False, **options)
    assert len(list(batches)) == 4


# --- the pass over the data


@pytest.mark.parametrize("n", [1, 4])
def test_a_layer_is_gathered_over_as_many_rows_as_its_inputs_need(n):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    found = looked_at(nn.Sequential(*layers), images(size=20, n=16).split(n))
    rows = {name: correlations.count for name, correlations in found.correlations.items()}
    positions = {"2": 18 * 18, "4": 16 * 16}
    for name, inputs in (("2", 6), ("4", 4 * 9)):
        assert rows[name] == pytest.approx(min(60 * inputs, 16 * positions[name]), rel=0.3)


def test_a_sensitivity_is_the_divergence_with_one_site_shrunk_alone():
    (_, menu), found, batches = priced()[0], known(), held_out()
    assert menu.measured
    assert menu.measured.keys() <= set(range(1, 10))
    for k, divergence in menu.measured.items():
        if k < 9:
            step = ps.Collapse(found.free[1], menu.at(k).keep[found.free[1]])
            readers = found.correlations["fc3"]
            M, bias, _ = refitted(
                readers, step.keep, mlp().fc3.weight.detach().double().numpy()[:, step.keep]
            )
            smaller = ps.apply(mlp(), ps.Plan((replace(step, weights={"fc3": M}, biases={"fc3": bias}),)))
            wanted = mean_divergence([*run(mlp(), batches)], run(smaller, batches), batches, kl_divergence)
            assert divergence == pytest.approx(wanted, rel=1e-3)


def test_sizes_are_chosen_until_what_they_do_is_what_was_expected():
    sites = default().report.sites[:2]
    assert sum(site.measured for site in sites) <= 1.1 * sum(site.predicted for site in sites)


def test_a_bias_that_a_layer_did_not_have_must_be_worth_its_parameters():
    torch.manual_seed(0)
    layers = (
        nn.Linear(6, 16),
        nn.ReLU(),
        nn.Linear(16, 12, bias=False),
        nn.ReLU(),
        nn.Linear(12, 3, bias=False),
    )
    model = nn.Sequential(*layers)
    assert compressed(model, keep=0.5).model[2].bias is not None
    targets = [{"params": share} for share in (0.3, 0.45, 0.6, 0.75)]
    reports = ps.sweep(model, samples(), targets=targets, progress=False).reports
    assert all(
        report.share("params") <= target["params"] for report, target in zip(reports, targets, strict=True)
    )
    # Inputs of mean zero, each with its opposite, leave a bias nothing to do.
    odd = nn.Sequential(nn.Linear(6, 16, bias=False), nn.Linear(16, 3, bias=False))
    pairs = [torch.stack([x, -x], 1).flatten(0, 1) for x in samples()]
    assert compressed(odd, pairs, keep=0.3).model[1].bias is None


def test_layers_that_cannot_be_given_a_bias_are_not_counted_with_one():
    model, batch = network("shared_layer")
    model.twice.bias = model.out.bias = None
    found = looked_at(model, [batch.repeat(4, 1)])
    assert {reader for site in found.free for reader in site.readers} == {"twice", "out"}
    assert found.new_biases == {"out"}


def test_what_a_layer_was_known_to_need_holds_where_samples_tell_nothing(monkeypatch):
    monkeypatch.setattr("pysolve.nn.gathering.passes.free_memory", lambda: 1)
    one, alone = compressed(keep=0.5), compressed(refit="independent", keep=0.5)
    assert one.report.samples == 1
    # A single sample has no variance, so nothing speaks against the weights fitted before.
    for name in ("fc2.weight", "fc3.weight"):
        keep = one.plan.steps[1].keep if name == "fc2.weight" else slice(None)
        np.testing.assert_allclose(one.plan.values[name][keep], alone.plan.values[name][keep], rtol=1e-5)


def test_another_seed_samples_other_rows():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    found = looked_at(nn.Sequential(*layers), [images(size=20, n=16)])
    seeded = [replace(found, options=replace(found.options, seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (state(shrunk(one, 0.5).model) for one in seeded)
    assert_equal(first, again)
    assert not torch.equal(first["2.weight"], other["2.weight"])


def test_a_head_that_is_tied_to_its_embedding_shrinks_with_it_and_stays_tied():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.mid, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20)
            self.head.weight = self.words.weight

        def forward(self, ids):
            x = self.words(ids)
            return self.head(x + self.mid(x).relu())

    torch.manual_seed(0)
    model = Words().eval()
    data = [torch.randint(0, 20, (32, 5)) for _ in range(3)]
    result = ps.compress(model, data, target={"params": 0.6}, progress=False)
    assert result.model.head.weight is result.model.words.weight
    assert result.report.share("params") <= 0.6
    assert {*result.plan.values} <= {"mid.weight", "mid.bias", "head.bias"}
