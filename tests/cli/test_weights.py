"""Weights are found in whatever training scripts write, and fit or are refused by name."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pysolve.cli.weights import fill
from pysolve.errors import DataError


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


STATE = network(1).state_dict()


def prefixed(prefix):
    return OrderedDict((prefix + name, value) for name, value in STATE.items())


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        dict(STATE),
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("module._orig_mod."),
        {"0._orig_mod.weight": STATE["0.weight"], **{n: v for n, v in STATE.items() if n != "0.weight"}},
        {"model": STATE, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3},
        {"state_dict": prefixed("model."), "epoch": 3},
        {"model": {"state_dict": prefixed("module.")}},
        {"model_state_dict": STATE, "loss": 0.5},
        {"model": STATE, "ema": {name: 0 * value for name, value in STATE.items()}},
    ],
)
def test_a_state_dict_is_found_in_a_checkpoint(tmp_path, content):
    path, model = tmp_path / "a.pt", network()
    torch.save(content, path)
    fill(model, path, "mine:make")
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())


def test_a_layer_that_is_called_like_a_wrapper_is_no_wrapper(tmp_path):
    model, path = nn.ModuleDict({"module": nn.Linear(4, 2), "model": nn.Linear(4, 2)}), tmp_path / "a.pt"
    torch.save({"module." + name: 2 * value for name, value in model.state_dict().items()}, path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fill(model, path, "mine:make")
    assert all(torch.equal(value, 2 * before[name]) for name, value in model.state_dict().items())


class Versioned(nn.Module):
    """Its layer was narrower in files of before version 2, as the stem of MNASNet was."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get("version", 1) < 2:
            self.a = nn.Linear(4, 3)
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("width", [6, 3])
def test_versions_of_layers_are_those_of_the_file(tmp_path, prefix, width):
    path, source = tmp_path / "a.pt", Versioned()
    source.a = nn.Linear(4, width)
    wrapped = nn.ModuleDict({"module": source}) if prefix else source
    state = wrapped.state_dict()
    if width == 3:
        state._metadata[prefix.rstrip(".")]["version"] = 1
    torch.save({"model": state}, path)
    model = Versioned()
    fill(model, path, "mine:make")
    assert torch.equal(model.a.weight, source.a.weight)


@pytest.mark.parametrize("width", [6, 3])
def test_a_file_without_versions_is_of_today_or_of_before(tmp_path, width):
    path, source = tmp_path / "a.safetensors", Versioned()
    source.a = nn.Linear(4, width)
    save_file(source.state_dict(), path)
    model = Versioned()
    fill(model, path, "mine:make")
    assert torch.equal(model.a.weight, source.a.weight)


def test_norms_may_lack_their_counters_as_old_files_do(tmp_path):
    path, model = tmp_path / "a.safetensors", network()
    save_file({n: v for n, v in STATE.items() if "num_batches" not in n}, path)
    fill(model, path, "mine:make")
    assert torch.equal(model[0].weight, STATE["0.weight"])


def test_what_does_not_fit_is_named_in_few_words(tmp_path):
    path, deep = tmp_path / "a.pt", nn.Sequential(*(nn.Linear(4, 4) for _ in range(200)))
    torch.save({f"other.{name}": value for name, value in deep.state_dict().items()}, path)
    with pytest.raises(
        DataError, match=r'a\.pt does not fit mine:make: .*Missing key.*"0\.weight"'
    ) as caught:
        fill(deep, path, "mine:make")
    assert "other.0.weight" in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2), r"not a file of tensors alone: it holds a torch\.nn"),
        ({"model": STATE, "score": np.float64(3)}, "not a file of tensors alone: it holds a numpy"),
        ([1, 2], "expected tensors by name, got list"),
        ({}, "expected tensors by name, got nothing"),
        ({"epoch": 3, "lr": 0.1}, "expected tensors by name, got epoch, lr"),
    ],
)
def test_what_holds_no_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=message):
        fill(network(), tmp_path / "a.pt", "mine:make")
