"""Wrapped networks are taken out of their wrappers; what cannot be changed is refused with the remedy."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils import spectral_norm, weight_norm
from torch.nn.utils.parametrizations import orthogonal

import pysolve as ps
from pysolve.nn.files.architecture import fingerprint
from pysolve.nn.plain import plain_network, unwrapped


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def data():
    torch.manual_seed(1)
    return [torch.randn(16, 6) for _ in range(2)]


def compiled(part):
    return torch.compile(part, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda part: compiled(nn.DataParallel(part))])
def test_wrappers_are_taken_off(wrap):
    model = network()
    assert plain_network(wrap(model)) is model


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_wrappers_within_a_network_are_taken_off_a_copy_with_its_parameters(wrap):
    model, plain = network(), network()
    model[0], model[2] = wrap(nn.DataParallel(model[0])), wrap(model[2])
    found = plain_network(model)
    assert fingerprint(found) == fingerprint(plain)
    assert [type(part) for part in found] == [nn.Linear, nn.ReLU, nn.Linear]
    assert {*map(id, found.parameters())} == {*map(id, model.parameters())}
    assert type(model[2]) is not nn.Linear


def test_networks_without_wrappers_are_themselves():
    model = network()
    assert unwrapped(model) is plain_network(model) is model


def test_results_of_wrapped_networks_are_plain_and_load_into_either(tmp_path):
    wrapped = nn.DataParallel(network())
    result = ps.compress(wrapped, data(), keep=0.5, progress=False)
    ps.save(result, tmp_path / "small.safetensors")
    for original in (wrapped, network(), compiled(network())):
        loaded = ps.load(tmp_path / "small.safetensors", original)
        assert type(loaded) is nn.Sequential
        assert torch.equal(loaded(data()[0]), result.model(data()[0]))


def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))


def on_meta():
    with torch.device("meta"):
        return network()


def exported():
    return torch.export.export(network(), (data()[0],))


REFUSED = {
    "scripted": (lambda: torch.jit.script(network()), "the network is scripted, .* as it was before"),
    "frozen": (lambda: torch.jit.freeze(torch.jit.script(network())), "the network is scripted, .* frozen"),
    "part": (lambda: nn.Sequential(torch.jit.script(network())), "`0` is scripted"),
    "lazy": (lazy, "0.weight, .* call the network on a batch once"),
    "meta": (on_meta, r"0.weight, .* and 1 more: .* call model.to_empty"),
    "program": (exported, "give the network that it was made of"),
    "its module": (lambda: exported().module(), "give the network that it was made of"),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}),
        "`0` is quantised by torch.ao, .* as it was before",
    ),
    "no network": (lambda: {"weight": torch.zeros(3)}, "must be a torch.nn.Module, .* got dict"),
}
VERBS = {
    "inspect": lambda model: ps.inspect(model, data()[0]),
    "gather": lambda model: ps.gather(model, data(), progress=False),
    "compress": lambda model: ps.compress(model, data(), keep=0.5, progress=False),
    "prune": lambda model: ps.prune(model, amount=0.5, progress=False),
    "quantize": lambda model: ps.quantize(model, progress=False),
    "low_rank": lambda model: ps.low_rank(model, rank=2, layout="factored", progress=False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_changed_is_refused_by_every_verb_with_the_remedy(kind):
    make, message = REFUSED[kind]
    model = make()
    for verb in VERBS.values():
        with pytest.raises((ps.PysolveError, TypeError), match=message):
            verb(model)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_networks_and_batches_made_under_inference_mode_are_taken(verb):
    with torch.inference_mode():
        model = network()
    before = copy.deepcopy(model)
    found = VERBS[verb](model)
    if isinstance(found, ps.Compressed):
        found.model(data()[0]).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("verb", ["obs", "codebook", *VERBS][:-3])
def test_batches_of_another_precision_are_refused_with_the_remedy(verb, dtype):
    verbs = VERBS | {
        "obs": lambda model: ps.prune(model, data(), method="obs", amount=0.5, progress=False),
        "codebook": lambda model: ps.quantize(model, data(), scheme="codebook", progress=False),
    }
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ps.DataError, match=rf"float32.*{name}"):
        verbs[verb](network().to(dtype))


def test_networks_that_convert_their_batches_take_them():
    class Converting(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(self[0].weight.dtype))

    model = Converting(*network().bfloat16()).eval()
    result = ps.prune(model, data(), method="obs", amount=0.5, layout="dense", progress=False)
    assert result.report.after["nonzeros"] < result.report.before["nonzeros"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (weight_norm, "remove_weight_norm"),
        (spectral_norm, "remove_spectral_norm"),
        (lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
        (orthogonal, "parametrize.remove_parametrizations"),
    ],
)
def test_computed_weights_stay_and_the_remedy_is_named(change, remedy):
    model = network()
    change(model[0])
    model(data()[0]).sum().backward()
    result = ps.prune(model, amount=0.5, layout="dense", progress=False)
    said = f"its weight is computed from others: torch.nn.utils.{remedy} makes it a parameter): 0"
    assert any(note.endswith(said) for note in result.report.notes)
    (row, *_) = ps.inspect(model, data()[0]).rows
    assert f"torch.nn.utils.{remedy} makes it a parameter" in row.pinned


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda model: ps.mask_weights(model, {"0": torch.eye(8, 6) > 0}), "remove_masks"),
        (
            lambda model: ps.share_weights(model, {"0": ps.quantize_layer(model[0].weight).form}),
            "remove_sharing",
        ),
        (lambda model: ps.ternary_weights(model, ["0"]), "remove_sharing"),
    ],
)
def test_weights_that_are_masked_or_shared_name_the_call_that_ends_it(make, remedy):
    model = network()
    make(model)
    (row, *_) = ps.inspect(model, data()[0]).rows
    assert f"pysolve.{remedy} makes it a parameter" in row.pinned
    getattr(ps, remedy)(model)
    assert ps.inspect(model, data()[0]).rows[0].pinned is None


def test_networks_compiled_in_place_are_seen_as_they_are_and_stay_compiled():
    model = network()
    model.compile(backend="eager")
    model(data()[0])
    before = model._compiled_call_impl
    assert ps.gather(model, data(), progress=False)["2"].count == 32
    assert model._compiled_call_impl is before


def leaving_out(model):
    def leave_out(module, state, prefix, metadata):
        del state[f"{prefix}0.weight"]

    model.register_state_dict_post_hook(leave_out)


def renaming(model):
    own = model.state_dict
    model.state_dict = lambda: {f"net.{name}": value for name, value in own().items()}


@pytest.mark.parametrize("change", [leaving_out, renaming])
@pytest.mark.parametrize(
    "verb",
    [
        lambda model: ps.prune(model, amount=0.5, progress=False),
        lambda model: ps.compress(model, data(), keep=0.5, progress=False),
        lambda model: ps.quantize(model, scheme="int8", progress=False),
    ],
    ids=["prune", "compress", "quantize"],
)
def test_weights_that_a_state_dict_does_not_name_are_refused(change, verb):
    model = network()
    change(model)
    with pytest.raises(ps.PysolveError, match=r"0\.weight.*: state_dict\(\) of Sequential leaves them out"):
        verb(model)
