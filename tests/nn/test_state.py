"""Running and copying networks leaves them as they are, whatever their code keeps."""

import threading
from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.nn.running import evaluating
from pysolve.nn.state import copy_of, drop_graphs


class Keeping(nn.Module):
    """Keeps what it computes: in attributes, containers and buffers, anew and in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.last, self.maps, self.seen, self.calls = None, [], defaultdict(list), 0
        self.cache = SimpleNamespace(h=None)

    def forward(self, x):
        h = torch.relu(self.a(x))
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        self.last, self.calls, self.cache.h = h, self.calls + 1, h
        self.maps.append(h)
        self.seen["h"].append(h)
        return self.b(h)


def kept(model):
    """All that a network keeps, by value."""
    plain = [model.last, model.cache.h, *model.maps, *model.seen["h"], model.steps, model.mean]
    return [None if one is None else one.detach().clone() for one in plain], model.calls


def same(one, other):
    pairs = zip(one[0], other[0], strict=True)
    return one[1] == other[1] and all(a is b or torch.equal(a, b) for a, b in pairs)


def used():
    """A network whose last call was one with gradients."""
    model = Keeping()
    model(torch.randn(4, 6)).sum().backward()
    return model.eval()


def test_what_a_network_keeps_is_copied_without_its_graph():
    model = used()
    other = copy_of(model)
    assert same(kept(other), kept(model))
    assert other.last.is_leaf
    assert not model.last.is_leaf
    assert other.maps[0].data_ptr() != model.maps[0].data_ptr()


def test_what_a_hook_keeps_is_copied_without_its_graph():
    class Features:
        def __call__(self, layer, args, output):
            self.output = output

    model, hook = nn.Sequential(nn.Linear(6, 4), nn.ReLU()), Features()
    model[0].register_forward_hook(hook)
    model(torch.randn(2, 6))
    assert torch.equal(copy_of(model)(torch.ones(1, 6)), model(torch.ones(1, 6)))


@pytest.mark.parametrize(
    "kind", [dict, OrderedDict, lambda: defaultdict(list), list, lambda: deque(maxlen=2), set]
)
def test_a_copy_shares_with_itself_what_the_network_does_and_nothing_with_the_network(kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[0].notes = model[2].notes = kind()
    other, memo = copy_of(model), {id(model[0].bias): model[0].bias}
    assert other[2].weight is other[0].weight is not model[0].weight
    assert torch.equal(other[0].weight, model[0].weight)
    assert other[0].notes is other[2].notes is not model[0].notes
    assert repr(other[0].notes) == repr(model[0].notes)
    other[0].register_forward_hook(lambda layer, args, output: 2 * output)
    assert not model[0]._forward_hooks
    assert not other[2]._forward_hooks
    assert copy_of(model, memo)[0].bias is model[0].bias


def test_parts_without_copies_are_named_with_the_remedy():
    model = nn.Sequential(nn.Linear(6, 4))
    model.lock = threading.Lock()
    with pytest.raises(ps.PysolveError, match=r"^Sequential cannot be copied: .*lock.* Set to None"):
        copy_of(model)


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_call_writes_is_put_back(fails):
    model = used()
    before, buffers = kept(model), dict(model.named_buffers())
    with pytest.raises(RuntimeError) if fails else evaluating(), evaluating(model):
        model(torch.randn(5, 6))
        model(torch.randn(5, 7 if fails else 6))
    assert same(kept(model), before)
    assert all(one is buffers[name] for name, one in model.named_buffers())


class Rescaled(nn.Linear):
    """Keeps rows of its weight within a norm, as networks for electroencephalograms do."""

    def __init__(self, *sizes, max_norm=0.1):
        super().__init__(*sizes)
        self.max_norm = max_norm

    def forward(self, x):
        self.weight.data.renorm_(2, 0, self.max_norm)
        return super().forward(x)


class Replaced(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


RESCALED = {
    "embedding": (lambda: nn.Embedding(7, 5, max_norm=0.1), lambda: torch.randint(7, (40, 3))),
    "bag": (lambda: nn.EmbeddingBag(7, 5, max_norm=0.1), lambda: torch.randint(7, (40, 3))),
    "in place": (lambda: Rescaled(6, 5), lambda: torch.randn(40, 6)),
    "other memory": (lambda: Replaced(6, 5), lambda: torch.randn(40, 6)),
}


@pytest.mark.parametrize("case", RESCALED)
@pytest.mark.parametrize("verb", ["magnitude", "obs", "codebook"])
def test_weights_that_a_call_rescales_are_put_back(case, verb):
    torch.manual_seed(0)
    layer, sample = RESCALED[case]
    model = nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(12), nn.ReLU(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        model(sample())
    first = model[0].weight
    first.data.normal_(std=5)
    before, memory = first.detach().clone(), first.data_ptr()
    batches, options = [sample() for _ in range(3)], {"progress": False, "latency": False}
    if verb == "codebook":
        ps.quantize(model, batches, scheme="codebook", bits=4, **options)
    else:
        ps.prune(model, batches, method=verb, amount=0.5, **options)
    assert model[0].weight is first
    assert torch.equal(first, before)
    assert first.data_ptr() == memory


def test_a_layer_that_moves_its_weight_is_seen():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Replaced(8, 5)).eval()
    batches = [torch.randn(40, 6) for _ in range(3)]
    pruned = ps.prune(model, batches, method="obs", amount=0.5, progress=False, latency=False)
    assert not any("no sample reached" in note for note in pruned.report.notes)


def test_containers_within_themselves_are_no_trouble():
    model = used()
    model.maps.append(model.maps)
    with evaluating(model):
        model(torch.randn(5, 6))
    drop_graphs(model)
    assert model.maps[-1] is model.maps
    assert len(model.maps) == 2


def test_training_leaves_no_graphs():
    model, x = Keeping(), torch.randn(32, 6)
    ps.fit(model, x, torch.randint(3, (32,)), epochs=1, progress=False)
    assert model.calls == 1
    assert all(one.is_leaf for one in (model.last, *model.maps, *model.seen["h"]))


@pytest.mark.parametrize(
    "verb",
    [
        lambda model, x: ps.compress(model, x, keep=0.5, progress=False),
        lambda model, x: ps.prune(model, x, method="wanda", amount=0.5, refit="independent", progress=False),
        lambda model, x: ps.quantize(model, None, scheme="codebook", progress=False),
    ],
    ids=["compress", "prune", "quantize"],
)
def test_verbs_leave_the_original_as_it_is(verb):
    model = used()
    before = kept(model)
    verb(model, [torch.randn(16, 6) for _ in range(2)])
    assert same(kept(model), before)
    assert not model.last.is_leaf
