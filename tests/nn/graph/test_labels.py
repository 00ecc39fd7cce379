"""What operators do to channels: one by one, between a layer that writes them and one that reads them."""

import numpy as np
import pytest
import torch
from graphs import traced as trace
from hypothesis import given
from hypothesis import strategies as st
from small import Net, Turned, vectors
from torch import nn
from torch.nn import functional as F

from pysolve.nn.graph.classes import Ledger, along, lean, none, spread, squashed
from pysolve.nn.graph.labels import _RULES, label_channels
from pysolve.nn.graph.sites import sites_of
from pysolve.plan import Site

INDEX = torch.tensor([1, 0])


def classes_of(model, batch):
    return label_channels(model, trace(model, batch, free_sizes=False))


def sites_between(function, width, n=2):
    """Sites of a network of two Linear layers, six channels, and a function of them in between."""
    model = Net(lambda net, x: net.b(function(net.a(x))), a=nn.Linear(4, 6), b=nn.Linear(width, 3))
    return sites_of(classes_of(model, vectors(n, 4)))


ELEMENTWISE = {
    "relu": F.relu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "logsigmoid": F.logsigmoid,
    "clamp": lambda x: x.clamp(min=0),
    "power": lambda x: x**2 + 2**x,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked": lambda x: x.masked_fill(x < 0, 1.0),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "casts": lambda x: x.double().to(torch.float32).type_as(x),
    "copies": lambda x: x.clone().contiguous().detach(),
    "maximum": lambda x: torch.maximum(x, -x),
    "zeros": lambda x: x + torch.zeros_like(x) + torch.full_like(x, 2),
    "shift": lambda x: x - x.mean(0),
    "running sum of samples": lambda x: x.cumsum(0),
    "softmax over samples": lambda x: x.softmax(0),
    "picked samples": lambda x: x[INDEX],
    "gathered samples": lambda x: x.gather(0, torch.zeros(2, 6, dtype=torch.long)),
    "selected samples": lambda x: x.index_select(0, INDEX),
    "samples picked by mask": lambda x: x[torch.tensor([True, False])],
    "samples picked by value": lambda x: x[torch.where(x.new_ones(2) > 0)],
    "written to samples": lambda x: torch.zeros_like(x).index_put((INDEX,), x[INDEX]),
    "written where a mask is": lambda x: x.relu().index_put((torch.ones(2) > 0,), x, accumulate=True),
    "written to positions": lambda x: (
        x[:, None].clone().index_put((INDEX, torch.zeros(2, dtype=torch.long)), x).squeeze(1)
    ),
    "added to samples": lambda x: torch.zeros_like(x).index_add(0, INDEX, x[INDEX]),
    "dimensions": lambda x: x.unsqueeze(1).transpose(1, 2).squeeze(-1).t().t(),
    "other dimensions": lambda x: x[None].movedim(0, 1).squeeze(1).view_as(x).reshape_as(x),
    "in place": lambda x: F.relu_(x.mul_(2)).clamp_(max=1),
    "input meets all": lambda x: x * x.new_ones(2, 1) + torch.ones(1),
    "sample axis glued": lambda x: torch.cat([x, x]).chunk(2)[0],
    "stacked samples": lambda x: torch.stack([x, x.relu()]).amax(0),
    "norm of samples": lambda x: x / torch.linalg.vector_norm(x, dim=0),
    "einsum over samples": lambda x: torch.einsum("bc,bd->bc", x, torch.ones(2, 5)),
    "einsum with dots": lambda x: torch.einsum("...c,...->...c", x, torch.ones(2)),
    "product with samples": lambda x: torch.ones(2, 2) @ x,
    "zeros written over": lambda x: x.new_zeros(x.shape).add_(x),
    "spectrum of samples": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=0), n=2, dim=0),
    "zeros in front": lambda x: torch.cat([torch.zeros(1, 6), x])[:2],
    "stacked on zeros": lambda x: torch.stack([x, torch.zeros(2, 6)]).sum(0),
    "each alone": lambda x: F.conv2d(x.view(-1, 1, 1, 1), torch.ones(1, 1, 1, 1)).view(2, 6),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(torch.stack([x, x], -1))).sum(-1),
    "ones, halved": lambda x: x - 0.5 * torch.ones_like(x[:1]),
    "set by number": lambda x: x.index_fill(0, torch.tensor([1]), 3.0),
    "scattered": lambda x: x.scatter(0, torch.ones(1, 6, dtype=torch.long), 2 * x),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_channels_pass_what_works_on_each_alone(name):
    site, _ = sites_between(ELEMENTWISE[name], 6)
    assert (site.channels, site.pinned) == (6, None)
    assert site.columns["b"].ravel().tolist() == list(range(6))


COLUMNS = {
    "flip": (lambda x: x.flip(-1), [[5], [4], [3], [2], [1], [0]]),
    "roll": (lambda x: x.roll(1, -1), [[1], [2], [3], [4], [5], [0]]),
    "repeat": (lambda x: x.repeat(1, 2), [[i, 6 + i] for i in range(6)]),
    "interleave": (lambda x: x.repeat_interleave(2, -1), [[2 * i, 2 * i + 1] for i in range(6)]),
    "cat": (lambda x: torch.cat([x, -x], -1), [[i, 6 + i] for i in range(6)]),
    "stack": (lambda x: torch.stack([x, -x], -1).flatten(1), [[2 * i, 2 * i + 1] for i in range(6)]),
    "expand": (lambda x: x[:, None].expand(-1, 2, -1).flatten(1), [[i, 6 + i] for i in range(6)]),
    "unfold": (lambda x: x.unfold(1, 2, 2).flatten(1), [[i] for i in range(6)]),
    "chunk": (lambda x: torch.sub(*x.chunk(2, -1)), [[0], [1], [2]]),
    "split": (lambda x: sum(x.split(2, -1)), [[0], [1]]),
    "unequal pieces": (lambda x: x.split([5, 1], 1)[0], [[0], [1], [2], [3], [4]]),
    "swapped halves": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), [[0, 3], [1, 4], [2, 5]]),
    "glu": (F.glu, [[0], [1], [2]]),
    "unbind": (lambda x: sum(x.view(-1, 3, 2).unbind(-1)), [[0], [1], [2]]),
    "front padding": (lambda x: F.pad(x, (2, 0)), [[2], [3], [4], [5], [6], [7]]),
    "cropping": (lambda x: F.pad(x, (-2, -1)), [[0], [1], [2]]),
    "input beside": (lambda x: torch.cat([torch.ones(2, 2), x], 1), [[2], [3], [4], [5], [6], [7]]),
    "heads": (lambda x: x.view(-1, 3, 2).softmax(-1).flatten(1), [[0, 1], [2, 3], [4, 5]]),
    "head norm": (lambda x: F.layer_norm(x.view(-1, 3, 2), (2,)).flatten(1), [[0, 1], [2, 3], [4, 5]]),
    "head scale": (
        lambda x: (x.view(-1, 3, 2).softmax(-1) * torch.ones(2)).flatten(1),
        [[0, 1], [2, 3], [4, 5]],
    ),
    "head sum": (lambda x: x.view(-1, 3, 2).sum(-1), [[0], [1], [2]]),
    "best of head": (lambda x: x.view(-1, 3, 2).max(-1).values, [[0], [1], [2]]),
    "head product": (lambda x: (x.view(-1, 3, 2) @ torch.ones(2, 4)).flatten(1), None),
    "head einsum": (
        lambda x: torch.einsum("bhd,de->bhe", x.view(-1, 3, 2), torch.ones(2, 4)).flatten(1),
        None,
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_channels_end_up_in_these_columns(name):
    function, columns = COLUMNS[name]
    columns = columns or [[*range(4 * i, 4 * i + 4)] for i in range(3)]
    width = function(torch.ones(2, 6)).shape[1]
    site = next(site for site in sites_between(function, width) if site.pinned is None)
    assert site.columns["b"].tolist() == columns


def by_heads(x):
    heads, result = x.view(-1, 3, 2).softmax(-1), torch.zeros(2, 6)
    for i, head in enumerate(heads.unbind(1)):
        result[:, 2 * i : 2 * i + 2].add_(head)
    return result


PINNED = {
    "softmax": (lambda x: x.softmax(-1), "softmax mixes"),
    "log softmax": (lambda x: F.log_softmax(x, 1), "log_softmax mixes"),
    "layer norm": (lambda x: F.layer_norm(x, (6,)), "layer_norm mixes"),
    "rms norm": (lambda x: F.rms_norm(x, (6,)), "rms_norm mixes"),
    "normalize": (F.normalize, "linalg_vector_norm mixes"),
    "standardize": (lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), "mean mixes"),
    "sum": (lambda x: x.sum(1, keepdim=True) * torch.ones(6), "sum mixes"),
    "cumsum": (lambda x: x.cumsum(1), "cumsum mixes"),
    "sort": (lambda x: x.sort(-1).values, "sort mixes"),
    "topk": (lambda x: x.topk(6).values, "topk mixes"),
    "all of them": (lambda x: x / x.abs().max(), "max mixes"),
    "product": (lambda x: x @ torch.ones(6, 6), "matmul mixes"),
    "einsum": (lambda x: torch.einsum("bi,ij->bj", x, torch.ones(6, 6)), "einsum mixes"),
    "outer": (lambda x: (x[:, :, None] * x[:, None])[:, 0], "mul mixes"),
    "addmm": (lambda x: torch.addmm(x, x, torch.ones(6, 6)), "addmm mixes"),
    "constant": (lambda x: x + torch.arange(6), "an input or constant meets these channels directly"),
    "constant heads": (
        lambda x: (x.view(-1, 3, 2) * torch.arange(3)[:, None]).flatten(1),
        "an input or constant",
    ),
    "stacked": (lambda x: torch.stack([x, torch.arange(12).view(2, 6)]).sum(0), "an input or constant"),
    "glued": (lambda x: torch.cat([x, torch.arange(6)[None]]), "an input or constant"),
    "written over": (lambda x: torch.rand(2, 6).add_(x), "an input or constant meets"),
    "written over a view": (lambda x: torch.zeros(2, 6).view(2, 6).add_(x), "an input or constant"),
    "picked": (lambda x: x[:, torch.arange(6)], "index picks channels by number"),
    "gathered": (
        lambda x: x.gather(1, torch.zeros(2, 6, dtype=torch.long)),
        "gather picks channels by number",
    ),
    "added up": (
        lambda x: x.index_add(1, torch.arange(6), x),
        "index_add picks channels by number",
    ),
    "written": (
        lambda x: x.index_put((INDEX[:1], INDEX[:1]), x[0, :1]),
        "index_put picks channels by number",
    ),
    "rows of channels": (lambda x: torch.zeros(6, 2).index_put((torch.arange(6),), x.t()), "index_put picks"),
    "scattered": (
        lambda x: x.scatter_add(1, torch.arange(6).expand(2, 6), x),
        "scatter_add picks channels by number",
    ),
    "mask": (lambda x: x * (x[x > 0]).sum(), "index picks by a mask"),
    "looked up": (lambda x: torch.arange(3.0)[(x > 0).long()], "index takes them for positions"),
    "head by head": (by_heads, "writes them over values that have no channels"),
    "fft": (lambda x: torch.fft.rfft(x).real.repeat(1, 2)[:, :6], "fft_rfft mixes these channels"),
    "weights": (lambda x: F.linear(torch.ones(2, 2), x.t()), "linear runs outside of a layer of its own"),
    "transposed reader": (lambda x: x.t().repeat(1, 3)[:2], "channel labels differ across positions"),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_works_on_several_channels_at_once_pins_them(name):
    function, reason = PINNED[name]
    width = function(torch.ones(2, 6)).shape[1]
    site = sites_between(function, width)[0]
    assert site.writers == ("a",)
    assert reason in site.pinned
    assert "test_labels.py" in site.pinned or "small.py" in site.pinned


def test_two_channels_that_are_a_complex_number_go_together():
    def turned(x):
        return torch.view_as_real(1j * torch.view_as_complex(x.view(-1, 3, 2))).flatten(1)

    site, _ = sites_between(turned, 6)
    assert (site.channels, site.pinned) == (3, None)


def test_pixels_may_be_pooled_padded_and_shuffled():
    def through(layer, width=6):
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), layer, nn.Conv2d(width, 2, 1))
        return sites_of(classes_of(model, vectors(2, 3, 8, 8)))[0]

    kept = (
        *(
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(3),
            nn.AdaptiveMaxPool2d(1),
            nn.LPPool2d(2, 2),
        ),
        *(nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bicubic"), nn.ZeroPad2d(1)),
        *(
            nn.ReflectionPad2d(1),
            nn.ReplicationPad2d(2),
            nn.CircularPad2d(1),
            nn.ConstantPad2d((-1, 2, 0, 1), 3.0),
        ),
        *(nn.FractionalMaxPool2d(2, 3), nn.Dropout2d(), nn.BatchNorm2d(6), nn.InstanceNorm2d(6, affine=True)),
    )
    for layer in kept:
        site = through(layer)
        assert (site.channels, site.pinned) == (6, None), layer
    pairs = through(nn.ChannelShuffle(2))
    assert pairs.rows["0"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert pairs.columns["2"].tolist() == [[0, 1], [2, 3], [4, 5]]
    spread = through(nn.PixelUnshuffle(2), 24)
    assert spread.columns["2"].tolist() == [[*range(4 * i, 4 * i + 4)] for i in range(6)]
    few = through(nn.PixelShuffle(1))
    assert (few.channels, few.pinned) == (6, None)
    assert "mixes the channels of a group" in through(nn.GroupNorm(1, 6)).pinned


def test_norms_in_code_are_pinned_with_their_parameters():
    def run(net, x):
        return net.b(F.batch_norm(net.a(x), net.mean, torch.ones(6)))

    model = Net(run, a=nn.Linear(4, 6), mean=nn.Parameter(torch.zeros(6)), b=nn.Linear(6, 2))
    assert "batch_norm runs outside of a layer" in sites_of(classes_of(model, vectors(2, 4)))[0].pinned


def test_hidden_units_go_with_the_channels_that_they_meet():
    def run(net, x):
        return net.b(net.rnn(net.a(x))[0] + net.c(x))

    layers = {
        "a": nn.Linear(4, 6),
        "rnn": nn.GRU(6, 6, batch_first=True),
        "c": nn.Linear(4, 6),
        "b": nn.Linear(6, 2),
    }
    into, hidden, _ = sites_of(classes_of(Net(run, **layers), vectors(2, 5, 4)))
    assert (into.writers, into.readers) == (("a",), ("rnn.weight_ih_l0:oi",))
    assert hidden.writers == ("rnn.weight_ih_l0:oi", "rnn.weight_hh_l0:oi", "c")
    assert hidden.readers == ("rnn.weight_hh_l0:oi", "b")
    assert into.pinned is hidden.pinned is None


def test_recurrent_layers_whose_weights_are_computed_are_not_understood():
    layers = {"a": nn.Linear(4, 6), "rnn": nn.GRU(6, 6, batch_first=True), "b": nn.Linear(6, 2)}
    model = Net(lambda net, x: net.b(net.rnn(net.a(x))[0]), **layers)
    torch.nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    into, _ = sites_of(classes_of(model, vectors(2, 5, 4)))
    assert "gru is not understood" in into.pinned


class Falcon(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x.relu()).tanh()


@pytest.mark.parametrize(
    "make", [lambda: Falcon(6, 5, bias=False), lambda: Turned(6, 5), lambda: Scaled(6, 5)]
)
def test_a_layer_is_known_by_the_operator_that_takes_its_weight(make):
    model = nn.Sequential(nn.Linear(4, 6), make(), nn.Linear(5, 2))
    before, after, _ = sites_of(classes_of(model, vectors(2, 3, 4)))
    assert (before.writers, before.readers, before.pinned) == (("0",), ("1",), None)
    assert (after.writers, after.readers, after.pinned) == (("1",), ("2",), None)


class Wrong(nn.Linear):
    def forward(self, x):
        return x @ self.weight


class Squared(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight**2, self.bias)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Wrong(5, 5, bias=False), "matmul mixes these channels"),
        (Falcon(5, 5), "matmul mixes these channels"),
        (Squared(5, 5), "the weight of `1` is computed from other values"),
    ],
)
def test_a_layer_whose_operator_takes_something_else_is_pinned(layer, why):
    model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 2))
    assert any(why in site.pinned for site in sites_of(classes_of(model, vectors(2, 4)))[:2] if site.pinned)


def test_a_grouped_convolution_beside_its_input_is_as_fixed_as_that():
    def run(net, x):
        return net.c(net.a(x) + net.b(x))

    model = Net(run, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1, groups=3), c=nn.Conv2d(3, 2, 1))
    site, _ = sites_of(classes_of(model, vectors(2, 3, 4, 4)))
    assert "conv2d reads channels that are fixed" in site.pinned


def test_embeddings_may_be_tied_or_take_channels_for_words():
    model = Net(lambda net, ids: net.out(net.words(ids)), words=nn.Embedding(9, 6), out=nn.Linear(6, 9))
    model.out.weight = model.words.weight
    both, words = sites_of(classes_of(model, torch.arange(8).view(2, 4)))
    assert (both.writers, both.readers, both.pinned) == (("words",), ("out",), None)
    assert words.pinned == "`words` shares its values with `out.weight`"
    model = Net(lambda net, x: net.words((net.a(x) > 0).long()), a=nn.Linear(4, 6), words=nn.Embedding(2, 3))
    site, _ = sites_of(classes_of(model, vectors(2, 4)))
    assert "embedding takes them for weights or positions" in site.pinned


def broken(call):
    raise RuntimeError


@pytest.mark.parametrize("rule", [broken, lambda call: call.first[:1], lambda call: None])
def test_a_rule_that_fails_or_says_something_impossible_pins(monkeypatch, rule):
    monkeypatch.setitem(_RULES, "softmax", rule)
    assert "softmax is not understood" in sites_between(lambda x: x.softmax(0), 6)[0].pinned


def test_branches_that_depend_on_values_are_not_understood():
    def either(x):
        return torch.cond(torch.rand(()) > 0, lambda y: y * 2, lambda y: -y, (x,))

    assert "cond is not understood" in sites_between(either, 6)[0].pinned


def test_one_layer_under_two_names_has_its_first():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    model.append(model[0])
    site, _ = sites_of(classes_of(model, vectors(2, 4)))[:2]
    assert site.writers == ("0",)


def test_labels_take_memory_for_channels_only():
    labels = lean(spread(torch.arange(5), 1, (4, 5, 100, 100)).clone())
    assert labels.untyped_storage().nbytes() >= 4 * 5 * 100 * 100 * 8
    assert squashed(labels).shape == (1, 5, 1, 1)
    assert labels.shape == (4, 5, 100, 100)
    assert none((1000, 1000, 1000)).untyped_storage().nbytes() == 8


shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3)


@given(shapes, st.data())
def test_lean_labels_are_the_same_labels(shape, data):
    size = int(np.prod(shape))
    values = data.draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size))
    labels = torch.tensor(values).reshape(shape)
    assert torch.equal(lean(labels), labels)
    for dim in range(labels.ndim):
        same = bool((labels == labels.narrow(dim, 0, 1)).all())
        assert (squashed(lean(labels)).shape[dim] == 1) == same
        columns = labels.movedim(dim, 0).reshape(shape[dim], -1)
        assert along(lean(labels), dim).tolist() == columns.amax(1).tolist()


def merged(n, pairs):
    """The slow way: give one label the other's number until nothing changes."""
    numbers = list(range(n))
    for _ in range(n):
        for a, b in pairs:
            numbers[a] = numbers[b] = min(numbers[a], numbers[b])
    return numbers


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12), st.sets(st.integers(0, 9)))
def test_classes_are_what_repeated_renaming_gives(pairs, pinned):
    ledger = Ledger()
    labels = ledger.member("layer", "writers", 10)
    for a, b in pairs:
        ledger.unite(labels[a], labels[b])
    ledger.pin(labels[sorted(pinned)], "because")
    classes, slow = ledger.resolve(), merged(10, pairs)
    assert [[a == b for b in classes.roots] for a in classes.roots] == [[a == b for b in slow] for a in slow]
    held = {slow[i] for i in pinned}
    assert [root in classes.pinned for root in classes.roots.tolist()] == [number in held for number in slow]


def test_what_varies_is_judged_when_all_unions_are_known():
    ledger = Ledger()
    labels = ledger.fresh(4).view(2, 2)
    ledger.pin_varying(labels, (1,), "varies along the second")
    ledger.unite(labels[0, 0], labels[0, 1])
    assert ledger.resolve().pinned.keys() == {ledger.resolve().roots[2], ledger.resolve().roots[3]}


def test_no_channel_goes_with_any_only_where_it_may():
    ledger = Ledger()
    labels = torch.stack([ledger.fresh(2), torch.tensor([-1, -1])])
    ledger.pin_varying(labels, (0,), "may", wildcard=True)
    assert not ledger.resolve().pinned
    ledger.pin_varying(labels, (0,), "may not")
    assert len(ledger.resolve().pinned) == 2


def test_mixing_with_what_is_no_channel_pins():
    ledger = Ledger()
    labels = torch.cat([ledger.fresh(2), torch.tensor([-1])])
    ledger.mix(labels, (0,), "mixed")
    classes = ledger.resolve()
    assert classes.pinned == classes.first == {int(classes.roots[0]): "mixed"}


def test_an_empty_network_has_no_sites():
    assert sites_of(Ledger().resolve()) == []
    assert sites_of(classes_of(nn.ReLU(), vectors(2, 4))) == []
    assert isinstance(sites_between(F.relu, 6)[0], Site)
