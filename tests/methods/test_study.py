"""What is gathered once serves every verb; layers that no sample reaches stop nothing, and are named."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.methods.goal import Options, bytes_in
from pysolve.methods.kinds.channels import Channels
from pysolve.methods.studied import studied
from pysolve.methods.weights import weights_of
from pysolve.nn.gathering import passes
from pysolve.nn.gathering.gather import gather


class Experts(nn.Module):
    """Each token goes to one of three experts, none to the last; guarded, networks cannot be exported."""

    def __init__(self, guarded):
        super().__init__()
        torch.manual_seed(0)
        self.guarded = guarded
        self.gate, self.out = nn.Linear(6, 3), nn.Linear(6, 4)
        self.up = nn.ModuleList(nn.Linear(6, 10) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(10, 6) for _ in range(3))
        with torch.no_grad():
            self.gate.bias[2] = -100.0

    def forward(self, x):
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            rows = torch.where(chosen == i)[0]
            if not self.guarded or rows.numel():
                y = y.index_add(0, rows, down(up(x[rows]).relu()))
        return self.out(x + y)


def data():
    torch.manual_seed(1)
    return [torch.randn(64, 6) for _ in range(4)]


VERBS = {
    "obs": lambda model: ps.prune(model, data(), method="obs", amount=0.5, layout="dense", progress=False),
    "2:4": lambda model: ps.prune(model, data(), method="obs", pattern="2:4", layout="dense", progress=False),
    "codebook": lambda model: ps.quantize(model, data(), scheme="codebook", progress=False),
    "int8": lambda model: ps.quantize(model, data(), scheme="int8", progress=False),
    "low rank": lambda model: ps.low_rank(model, data(), rank=2, layout="factored", progress=False),
}


@pytest.mark.parametrize("guarded", [False, True], ids=["exported", "as it runs"])
@pytest.mark.parametrize("verb", VERBS)
def test_experts_that_no_token_reaches_stop_nothing(verb, guarded):
    model = Experts(guarded).eval()
    result = VERBS[verb](model)
    assert any("no sample reached up.2, down.2" in note for note in result.report.notes)
    x = data()[0]
    with torch.no_grad():
        assert torch.isfinite(result.model(x)).all()
        # What was not reached is as good as its own weights allow.
        wanted, got = model.up[2](x), result.model.up[2](x)
    limit = {"obs": 0.6, "2:4": 0.6, "codebook": 0.15, "int8": 0.01, "low rank": 1e-5}[verb]
    assert (got - wanted).norm() <= limit * wanted.norm()


def test_what_is_fitted_of_routed_experts_is_better_than_their_weights_alone():
    model = Experts(guarded=False).eval()
    fitted = VERBS["obs"](model)
    plain = ps.prune(model, data(), method="magnitude", amount=0.5, layout="dense", progress=False)
    assert fitted.report.divergence < plain.report.divergence
    assert not np.allclose(fitted.model.down[0].weight.detach(), plain.model.down[0].weight.detach())


def test_sites_that_nothing_is_known_of_are_pinned_and_others_go_on():
    sites = [ps.Site(10, (f"up.{i}",), (f"down.{i}",)) for i in range(3)]
    result = ps.compress(Experts(guarded=True).eval(), data(), keep=0.5, sites=sites, progress=False)
    assert [len(step.keep) for step in result.plan.steps] == [5, 5]
    assert result.report.sites[2].pinned == "no sample reached down.2"


def test_a_reader_without_samples_leaves_the_choice_to_the_others():
    site = ps.Site(10, ("up.0",), ("down.0", "down.2"))
    found = studied(Experts(guarded=True).eval(), data(), Options(progress=False), sites=[site])
    assert found.free == [site]
    assert [*found.correlations] == ["down.0"]


def test_layers_without_samples_alone_are_rounded_by_themselves():
    model, others = Experts(guarded=True).eval(), ["gate", "out", r"re:.*\.[01]"]
    result = ps.quantize(model, data(), scheme="codebook", ignore=others, progress=False)
    assert {*result.plan.forms} == {"up.2.weight", "down.2.weight"}


def test_empty_batches_are_refused():
    model = Experts(guarded=True).eval()
    with pytest.raises(ps.DataError, match="the first batch is empty"):
        studied(model, [data()[0][:0]], Options(progress=False), weights=weights_of(model)[0])


class Branches(nn.Module):
    """Layers that read one tensor, before and after it is written in place, and with other windows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, n, 3, padding=1) for n in (2, 4, 5))
        self.d, self.e = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 3, padding=1, bias=False)

    def forward(self, x):
        x = x * 1.5
        first = [self.a(x), self.b(x), self.d(x), self.e(x)]
        return torch.cat([*first, self.c(x.relu_())], 1).mean((2, 3))


def test_layers_that_read_one_tensor_share_its_sums_and_have_their_own(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("pysolve.nn.gathering.calibration.ROWS_PER_INPUT", 10**6)
    model, batches = Branches().eval(), [torch.randn(3, 3, 6, 6), torch.randn(2, 3, 6, 6)]
    weights, _ = weights_of(model)
    found = studied(model, batches, Options(progress=False), weights=weights).correlations
    wanted = gather(model, batches)
    assert set(found) == set(wanted) == set("abcde")
    for name, one in found.items():
        for part in ("xx", "yx", "x_sum", "y_sum"):
            np.testing.assert_allclose(getattr(one, part), getattr(wanted[name], part), rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(one.yy, np.diag(wanted[name].yy), rtol=1e-5)
    assert found["a"].xx is found["b"].xx is found["e"].xx
    assert found["a"].xx is not found["c"].xx


class Twice(nn.Module):
    """Two layers whose channels one layer reads together."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(40, 150), nn.Linear(40, 150), nn.Linear(300, 8)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1).relu())


def test_rounding_is_no_data_where_a_reader_s_other_inputs_are_minimised_out():
    # 200 rows, less their mean, leave 49 directions of one layer's channels that the other's do not explain.
    found = studied(Twice().eval(), [torch.randn(200, 40)], Options(progress=False), sites=True)
    menus = [Channels().menu(found, site) for site in found.free]
    assert [menu.whole for menu in menus] == [150, 150]
    assert all(menu.error[10] > 1e-4 and menu.error[50:].max() <= 1e-8 for menu in menus)


def convolutional():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 4))
    return nn.Sequential(*layers).eval()


def pictures(seed=1, count=5):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 6, 6, generator=random) for _ in range(count)]


OF_STUDIES = {
    "compress": lambda model, given: ps.compress(model, given, target={"params": 0.5}, progress=False),
    "prune": lambda model, given: ps.prune(
        model, given, method="obs", amount=0.5, layout="dense", progress=False
    ),
    "low_rank": lambda model, given: ps.low_rank(
        model, given, target={"params": 0.5}, prune=True, layout="factored", progress=False
    ),
    "quantize": lambda model, given: ps.quantize(
        model, given, scheme="codebook", target={"bytes": 0.2}, layout="dense", progress=False
    ),
    "deep_compress": lambda model, given: ps.deep_compress(
        model, given, target={"bytes": 0.1}, distill={"epochs": 1}, layout="dense", progress=False
    ),
}


def assert_same_network(one, other):
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.safetensors"
    ps.study(convolutional(), pictures(), progress=False).save(path)
    return path


@pytest.mark.parametrize("verb", OF_STUDIES)
def test_a_verb_gives_the_same_network_of_a_saved_study_as_of_the_batches(saved, verb):
    if verb == "deep_compress":
        # Its second half studies the smaller network on what is kept, without the samples held out.
        found = OF_STUDIES[verb](convolutional(), ps.Study.load(saved, convolutional()))
        assert ps.file_bytes(found) <= 0.1 * found.report.before["bytes"]
        return
    model = convolutional()
    loaded = ps.Study.load(saved, convolutional())
    assert_same_network(OF_STUDIES[verb](model, pictures()), OF_STUDIES[verb](model, loaded))


def test_a_study_knows_its_network(saved):
    other = convolutional()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ps.PysolveError, match=r"another network, which has another 0\.weight"):
        ps.Study.load(saved, other)
    with pytest.raises(ps.PysolveError, match="another network"):
        ps.compress(other, ps.Study.load(saved, convolutional()), progress=False)


def test_studies_of_parts_of_the_data_add_up():
    model = convolutional()
    whole = ps.study(model, pictures(), progress=False)
    parts = [ps.study(model, some, progress=False) for some in (pictures()[:2], pictures()[2:])]
    both = parts[0] + parts[1]
    assert {*both.correlations} == {*whole.correlations} == {"0", "3", "5"}
    assert both.calibration.seen + both.calibration.out == 80
    # Which samples are held out differs.
    for name, one in whole.correlations.items():
        np.testing.assert_allclose(both.correlations[name].r_xx, one.r_xx, atol=0.3 * np.abs(one.r_xx).max())
    assert ps.compress(model, both, target={"params": 0.5}, progress=False).report.divergence < 0.1


class Named(nn.Module):
    """Called by keywords, with a mask that may be missing, in bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.down = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids, scale, mask=None, flag=True):
        hidden = self.words(ids) * scale[..., None]
        return self.down(self.up(hidden).relu()) if flag else hidden


def test_batches_of_any_form_come_back_from_a_file(tmp_path):
    model, random = Named().eval(), torch.Generator().manual_seed(0)
    batches = [
        {
            "ids": torch.randint(9, (8, 5), generator=random),
            "scale": torch.rand(8, 5, generator=random),
            "mask": None,
            "flag": True,
        }
        for _ in range(4)
    ]
    ps.study(model, batches, progress=False).save(tmp_path / "study")
    loaded = ps.Study.load(tmp_path / "study", model)
    target = {"params": 0.8}
    one, other = (ps.compress(model, given, target=target, progress=False) for given in (batches, loaded))
    assert_same_network(one, other)


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "file")
    with pytest.raises(ps.DataError, match="no file of sums"):
        ps.Study.load(tmp_path / "file", convolutional())
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ps.DataError, match="no file of sums"):
        ps.Study.load(tmp_path / "text", convolutional())


def test_networks_that_cannot_be_traced_have_a_study_too():
    model = Experts(guarded=True).eval()
    found = ps.study(model, data(), progress=False)
    assert found.graph is None
    assert "down.0" in found.correlations


@pytest.mark.parametrize("verb", ["compress", "low_rank", "quantize", "prune"])
def test_bounded_memory_gives_the_same_network(monkeypatch, verb):
    model = convolutional()
    free = OF_STUDIES[verb](model, pictures())
    forced = []

    def on_disk(*args, **kwargs):
        plan = replace(passes_for(*args, **kwargs), on_disk=True)
        forced.append(plan)
        return replace(plan, each=[[name] for name in plan.sharing])

    passes_for = passes.passes_for
    monkeypatch.setattr("pysolve.nn.gathering.calibration.passes_for", on_disk)
    assert_same_network(OF_STUDIES[verb](model, pictures()), free)
    assert forced


def test_memory_is_taken_in_words_and_too_little_is_refused():
    with pytest.raises(ps.PysolveError, match=r"memory=1MiB is too little.*Give at least memory='\d+MiB'"):
        ps.compress(convolutional(), pictures(), memory="1MiB", progress=False)
    for wrong in ("much", "-3GB", "0"):
        with pytest.raises(ValueError, match="memory must be"):
            ps.compress(convolutional(), pictures(), memory=wrong, progress=False)
    sizes = {"4GiB": 4 << 30, "500 MB": 500_000_000, "1.5kib": 1536, 7: 7, "7": 7}
    assert [bytes_in(one) for one in sizes] == [*sizes.values()]


class Masked(nn.Module):
    """Tokens of each sample, and one mask for all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 4)

    def forward(self, x, mask):
        return self.down(self.up(x * mask).relu())


def masked():
    random = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(16, 6, generator=random), "mask": torch.ones(6)} for _ in range(5)]


def test_batches_with_tensors_for_all_samples_are_gone_through_as_often_as_needed(tmp_path, monkeypatch):
    model = Masked().eval()
    free = OF_STUDIES["compress"](model, masked())
    found = ps.study(model, masked(), checkpoint=tmp_path, progress=False)
    assert {type(batch).__name__ for batch in found} == {"Inputs"}
    assert_same_network(free, OF_STUDIES["compress"](model, found))

    def in_passes(*args, once, **kwargs):
        assert not once
        plan = passes_for(*args, once=once, **kwargs)
        return replace(plan, on_disk=True, each=[[name] for name in plan.sharing])

    passes_for = passes.passes_for
    monkeypatch.setattr("pysolve.nn.gathering.calibration.passes_for", in_passes)
    assert_same_network(free, OF_STUDIES["compress"](model, masked()))


@pytest.fixture
def exports(monkeypatch):
    """How many times torch.export has run."""
    export, calls = torch.export.export, []
    monkeypatch.setattr(
        torch.export, "export", lambda *args, **kwargs: calls.append(0) or export(*args, **kwargs)
    )
    return calls


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def test_verbs_trace_a_network_that_was_studied_no_more(exports):
    model = perceptron()
    known = ps.study(model, data(), progress=False)
    before = len(exports)
    small = ps.compress(model, known, target={"params": 0.5}, progress=False)
    ps.low_rank(model, known, rank=2, layout="factored", progress=False)
    assert len(exports) == before
    fresh = ps.compress(model, data(), target={"params": 0.5}, progress=False)
    for own, other in zip(small.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(own, other)


def replaced(model):
    model[1] = nn.GELU()


def hooked(model):
    model[1].register_forward_hook(lambda layer, inputs, output: output.tanh())


@pytest.mark.parametrize("change", [replaced, hooked])
def test_a_network_that_changed_after_its_study_is_traced_anew(exports, change):
    model = perceptron()
    known = ps.study(model, data(), progress=False)
    change(model)
    before = len(exports)
    ps.compress(model, known, target={"params": 0.5}, progress=False)
    assert len(exports) > before


def test_other_layers_to_leave_alone_are_found_in_the_same_graph():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    known = ps.study(model, data(), progress=False)
    small = ps.compress(model, known, target={"params": 0.6}, ignore=["0"], progress=False)
    assert small.model[0].out_features == 12
    assert small.model[2].out_features < 12


@pytest.mark.parametrize("taken", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_study_is_written_by_save_alone(taken):
    study = ps.study(Experts(guarded=False).eval(), data(), progress=False)
    with pytest.raises(TypeError, match="neither copied nor pickled: save writes it"):
        taken(study)


class Autoencoder(nn.Module):
    """Draws around a mean, in use as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 6))

    def forward(self, x):
        mean, spread = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + torch.randn_like(mean) * (0.5 * spread).exp())


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("compress", {"target": {"params": 0.7}}),
        ("compress", {"target": {"params": 0.7}, "select": "sensitivity"}),
        ("low_rank", {"target": {"params": 0.7}, "layout": "factored"}),
        ("prune", {"method": "obs", "amount": 0.5, "layout": "dense"}),
    ],
)
def test_a_random_network_becomes_the_same_whatever_was_drawn_before(verb, options):
    model, batches, found = Autoencoder().eval(), data(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        result = getattr(ps, verb)(model, batches, progress=False, latency=False, **options)
        found.append(result.model.state_dict())
    assert all(map(torch.equal, found[0].values(), found[1].values()))
