"""Outputs of every structure are traced, compared and compressed."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import distributions, nn

import pysolve as ps
from pysolve.nn.divergence import kl_divergence
from pysolve.nn.outputs import main_output, tensors_of
from pysolve.nn.running import evaluating

Pair = namedtuple("Pair", "scores hidden")


@dataclass
class Scored:
    scores: torch.Tensor
    hidden: torch.Tensor


@dataclass
class Registered:
    scores: torch.Tensor
    hidden: torch.Tensor


torch.export.register_dataclass(Registered)


class Plain:
    """Holds itself, too."""

    def __init__(self, scores, hidden):
        self.scores, self.more, self.me = scores, [hidden, None, 3, "text"], self


KINDS = {
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: [[a], {"hidden": (b, None)}],
    "namedtuple": Pair,
    "dataclass": Scored,
    "registered dataclass": Registered,
    "object": Plain,
}


class Two(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.b, self.c = kind, nn.Linear(5, 16), nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x):
        h = self.a(x).relu()
        return self.kind(self.b(h), self.c(h))


def data():
    return torch.randn(64, 5, generator=torch.Generator().manual_seed(1)).split(16)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_found_in_order_and_the_first_is_the_main_one(kind):
    a, b = torch.zeros(2), torch.ones(3)
    output = KINDS[kind](a, b)
    assert [*map(id, tensors_of(output))] == [id(a), id(b)]
    assert main_output(output) is a


@pytest.mark.parametrize("kind", KINDS)
def test_networks_with_outputs_of_every_structure_are_compressed_alike(kind):
    result = ps.compress(Two(KINDS[kind]), data(), keep=0.5, progress=False)
    wanted = ps.compress(Two(KINDS["tuple"]), data(), keep=0.5, progress=False)
    assert type(result.model(data()[0])) is type(Two(KINDS[kind])(data()[0]))
    for name, value in wanted.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], value)


class Heads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.b, self.c = kind, nn.Linear(5, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return self.kind(self.b(h), self.c(h))


DISTRIBUTIONS = {
    "normal": lambda a, b: distributions.Normal(a, b.exp()),
    "independent": lambda a, b: distributions.Independent(distributions.Normal(a, b.exp()), 1),
    "categorical": lambda a, b: distributions.Categorical(logits=a + b),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_distributions_are_compared_by_their_divergence(kind):
    model = Heads(DISTRIBUTIONS[kind]).eval()
    # Torch's compiler, where it was used, has them unchecked for good.
    checked = distributions.Distribution._validate_args
    result = ps.compress(model, data(), keep=0.5, progress=False)
    p, q = model(data()[0]), result.model(data()[0])
    assert result.report.divergence > 0
    wanted = distributions.kl_divergence(p, q).mean()
    assert kl_divergence(p, q).item() == pytest.approx(wanted.item())
    assert distributions.Distribution._validate_args is checked


@pytest.mark.parametrize("kind", [*DISTRIBUTIONS, "bernoulli", "among others"])
def test_what_distributions_keep_of_themselves_is_no_output(kind):
    """Their divergence makes probabilities of logits, and keeps them."""
    more = {
        "bernoulli": lambda a, b: distributions.Independent(distributions.Bernoulli(logits=a), 1),
        "among others": lambda a, b: (distributions.Categorical(logits=a), b),
    }
    model = Heads({**DISTRIBUTIONS, **more}[kind]).eval()

    def divergence(p, q):
        p, q = (one[0] if kind == "among others" else one for one in (p, q))
        return distributions.kl_divergence(p, q).mean()

    result = ps.compress(
        model, data(), target={"params": 0.5}, divergence=divergence, progress=False, latency=False
    )
    assert 0 < result.report.divergence < 1


@pytest.mark.parametrize("kind", ["sparse_coo", "nested"])
def test_outputs_that_are_not_dense_are_refused(kind):
    def made(a, b):
        return a.relu().to_sparse() if kind == "sparse_coo" else torch.nested.nested_tensor([a, b])

    with pytest.raises(TypeError, match=f"dense tensor in the network's output, got a {kind} one"):
        ps.compress(Heads(made).eval(), data(), progress=False)


def test_outputs_without_rows_are_no_distance_apart():
    """As of a detector that finds nothing."""
    model = Heads(lambda a, b: a[a[:, 0] > 1e3]).eval()
    result = ps.compress(model, data(), target={"params": 0.5}, progress=False, latency=False)
    assert result.report.divergence == 0
    assert result.report.share("params") <= 0.5


class Tasks(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.trunk = kind, nn.Linear(5, 16)
        self.a, self.b = (nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, n)) for n in (3, 2))

    def forward(self, x):
        h = self.trunk(x).relu()
        return self.kind(20 * self.a(h), self.b(h))


@pytest.mark.parametrize("kind", ["tuple", "nested", "dataclass"])
def test_no_task_of_several_is_given_up_for_the_others(kind):
    model = Tasks(KINDS[kind]).eval()
    result = ps.compress(model, data(), target={"params": 0.6}, progress=False, latency=False)
    kept = {step.site.writers[0]: len(step.keep) for step in result.plan.steps}
    assert kept.get("b.0", 16) >= 5
    found, wanted = (tensors_of(one(data()[0])) for one in (result.model, model))
    assert all((a - b).var() < 0.1 * b.var() for a, b in zip(found, wanted, strict=True))


class Config:
    use_cache = True


class Cache:
    def __init__(self, keys):
        self.keys = keys


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.config, self.a, self.b = config, nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return {"logits": self.b(h)} | ({"past": Cache(h)} if self.config.use_cache else {})


class Whole(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.config = Config()
        self.decoder = Decoder(self.config if shared else Config())

    def forward(self, x):
        return self.decoder(x)


@pytest.mark.parametrize("shared", [True, False])
def test_a_decoder_runs_without_its_cache_whoever_holds_the_configuration(shared):
    model = Whole(shared)
    (site,) = [site for site in ps.find_sites(model, data()[0]) if site.pinned is None]
    assert site.writers == ("decoder.a",)
    with evaluating(model):
        assert [*model(data()[0])] == ["logits"]
    assert model.config.use_cache
    assert model.decoder.config.use_cache
    result = ps.compress(model, data(), keep=0.5, progress=False)
    assert [*result.model(data()[0])] == ["logits", "past"]
