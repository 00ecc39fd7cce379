"""Hooks that only look on see no tensors of a trace; those that act are part of the network."""

import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.nn.graph.export import trace


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def doubled_in_place(layer, args, output):
    output.mul_(2)


def with_own_weight(layer, args):
    layer.weight = layer.own * 2


def operators(model):
    graph = trace(model, torch.randn(2, 6), free_sizes=False)
    return [node for node in graph.module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "look",
    [
        lambda seen, layer, args, output: seen.append(output.numpy()),
        lambda seen, layer, args, output: seen.append(output),
        lambda seen, layer, args, output: seen.append(output.abs().max().item()),
    ],
    ids=["numpy", "kept", "item"],
)
def test_hooks_that_look_on_see_no_trace(look):
    model, seen = network(), []
    handle = model[1].register_forward_hook(lambda *given: look(seen, *given))
    count = len(operators(network()))
    assert len(operators(model)) == count
    # Once as it is, and once watched.
    assert len(seen) == 2
    assert not isinstance(seen[0], torch._subclasses.FakeTensor)
    assert [*model[1]._forward_hooks] == [handle.id]


@pytest.mark.parametrize("kind", ["returns", "writes", "before"])
def test_hooks_that_act_are_traced(kind):
    model, count = network(), len(operators(network()))
    if kind == "returns":
        model[1].register_forward_hook(lambda layer, args, output: 2 * output)
    elif kind == "writes":
        model[1].register_forward_hook(doubled_in_place)
    else:
        model[1].register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    assert len(operators(model)) == count + 1


def test_hooks_that_set_the_weight_are_traced():
    model, count = network(), len(operators(network()))
    model[0].own = nn.Parameter(model[0].weight.detach().clone())
    del model[0].weight
    model[0].register_forward_pre_hook(with_own_weight)
    assert len(operators(model)) == count + 1


def test_hooks_with_keywords_stay_what_they_are():
    model, seen = network(), []

    def look(layer, args, kwargs, output):
        seen.append(len(args))

    model[1].register_forward_hook(look, with_kwargs=True, prepend=True)
    result = ps.compress(model, [torch.randn(16, 6)], keep=0.5, progress=False)
    seen.clear()
    result.model(torch.randn(2, 6))
    assert seen == [1]


@pytest.mark.parametrize(
    "verb",
    [
        lambda model, x: ps.prune(
            model, x, method="wanda", amount=0.1, refit="independent", layout="dense", progress=False
        ),
        lambda model, x: ps.low_rank(model, x, rank=2, layout="factored", progress=False),
        lambda model, x: ps.quantize(model, x, scheme="int8", progress=False),
    ],
    ids=["fitted", "factored", "integers"],
)
@pytest.mark.parametrize("where", [0, 2])
def test_what_hooks_make_of_a_layer_is_not_fitted_by_the_layer(verb, where):
    torch.manual_seed(1)
    model, x = network(), [torch.randn(64, 6) for _ in range(4)]
    model[where].register_forward_hook(lambda layer, args, output: 2 * output)
    result = verb(model, x)
    with torch.no_grad():
        wanted, got = model(x[0]), result.model(x[0])
    assert len(result.model[where]._forward_hooks) == 1
    assert (wanted - got).norm() < 0.35 * wanted.norm()


def test_a_hook_that_fails_is_named_by_the_trace():
    def fail(layer, args, output):
        raise RuntimeError("no such feature")

    model = network()
    model[1].register_forward_hook(fail)
    with pytest.raises(ps.PysolveError, match="no such feature"):
        operators(model)


def noting(layer, args, output):
    vars(layer)["noted"] = output


class Noting(nn.Module):
    """Reads what a hook has noted down."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.first.register_forward_hook(noting)

    def forward(self, x):
        self.first(x)
        return self.last(vars(self.first).pop("noted").tanh())


@pytest.mark.parametrize("form", ["factored", "sparse"])
def test_hooks_on_gradients_stay_where_another_layer_is_put(form):
    model, x, seen = network(), [torch.randn(64, 6) for _ in range(2)], []
    model[2].register_full_backward_hook(lambda layer, given, gradients: seen.append(type(layer)))
    if form == "factored":
        result = ps.low_rank(model, x, rank={"2": 2}, layout="factored", progress=False)
    else:
        result = ps.prune(model, x, amount={"2": 0.9}, layout="sparse", progress=False)
    assert type(result.model[2]) is not nn.Linear
    seen.clear()
    result.model(x[0].requires_grad_()).sum().backward()
    assert seen == [type(result.model[2])]


def test_hooks_that_a_network_needs_are_traced():
    torch.manual_seed(0)
    model, count = Noting().eval(), len(operators(network()))
    assert len(operators(model)) == count
    assert sum(site.pinned is None for site in ps.find_sites(model, torch.randn(2, 6))) == 1
