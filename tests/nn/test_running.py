"""Layers are found by name, batches are taken in every form, and modes come back."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import pysolve as ps
from pysolve.errors import DataError, LayerNotFoundError
from pysolve.nn import to_dense
from pysolve.nn.running import (
    Inputs,
    as_input,
    as_tensor,
    evaluating,
    find_layer,
    find_matching,
    forward,
    labelled,
)


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Linear(3, 2))


def test_a_shared_layer_answers_to_each_of_its_names():
    model = network()
    model.add_module("again", model[0])
    assert find_layer(model, "again") is find_layer(model, "0")


def test_an_unknown_name_brings_up_the_close_ones():
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layer1": nn.ReLU(), "layer2": nn.ReLU()})})
    with pytest.raises(LayerNotFoundError, match=r"'encoder\.layer"):
        find_layer(model, "encoder.layer3")


def test_a_pattern_that_is_no_regular_expression_is_quoted():
    with pytest.raises(ValueError, match=r"'re:\(' in ignore is no regular expression: missing \)"):
        find_matching(network(), ["re:("])


def test_evaluating_restores_every_mode_and_turns_gradients_off():
    model = network().train()
    model[1].eval()

    def modes():
        return [module.training for module in model.modules()]

    def broken():
        with evaluating(model):
            assert not any(modes())
            assert not torch.is_grad_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert modes() == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_a_module_that_overrides_its_mode_gets_it_back():
    class Frozen(nn.Linear):
        def train(self, mode=True):
            return super().train(False)

    model = nn.Sequential(Frozen(2, 2))
    model[0].training = True
    with evaluating(model):
        pass
    assert model[0].training


def test_in_place_layers_do_not_reach_the_callers_batch():
    x = -torch.ones(3, 4)
    forward(nn.ReLU(inplace=True), x)
    forward(nn.ReLU(inplace=True), {"input": x})
    assert (x == -1).all()


def test_a_network_without_parameters_takes_a_batch_from_anywhere():
    assert forward(nn.ReLU(), torch.ones(2, device="meta")).device.type == "meta"


def test_arrays_become_tensors_whatever_their_memory():
    array = np.arange(6.0).reshape(2, 3)
    frozen = array.copy()
    frozen.flags.writeable = False
    for values in (array, array[:, ::-1], array.T, frozen):
        assert as_tensor(values).tolist() == values.tolist()
    assert as_tensor(array).data_ptr() == array.ctypes.data


def test_floating_inputs_take_the_networks_type_and_others_stay():
    assert as_input(network(), np.ones((2, 4))).dtype == torch.float32
    assert as_input(network().double(), torch.ones(2, 4)).dtype == torch.float64
    assert as_input(network(), np.ones((2, 4), np.int64)).dtype == torch.int64
    assert as_input(nn.ReLU(), np.ones((2, 4))).dtype == torch.float64


def test_inputs_and_labels_must_be_equally_many_and_not_none():
    with pytest.raises(DataError, match="got 3 for 2 inputs"):
        labelled(network(), np.ones((2, 4)), np.ones(3))
    with pytest.raises(DataError, match="got 0 for 0 inputs"):
        labelled(network(), np.ones((0, 4)), np.ones(0))


def blocks():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 1))
    return nn.Sequential(nn.Linear(4, 4), inner, nn.ReLU())


@pytest.mark.parametrize(
    ("ignore", "found"),
    [
        (["0"], {"0"}),
        (["1"], {"1", "1.0", "1.1"}),
        (["re:1.*0"], {"1.0"}),
        (["re:.*"], {"0", "1", "1.0", "1.1", "2"}),
        ([nn.Linear], {"0", "1.0"}),
        ([nn.Sequential], {"1", "1.0", "1.1"}),
        ([nn.Conv1d, "0"], {"0", "1.1"}),
        ((), set()),
    ],
)
def test_what_is_ignored_is_named_by_name_pattern_or_type_with_what_it_holds(ignore, found):
    assert find_matching(blocks(), ignore) == found


def test_layers_themselves_are_ignored_and_those_of_other_networks_refused():
    model = blocks()
    assert find_matching(model, [model[1], model[2]]) == {"1", "1.0", "1.1", "2"}
    for stranger in (nn.Linear(4, 4), nn.LayerNorm, 3):
        with pytest.raises(LayerNotFoundError, match="has no layer that is"):
            find_matching(model, [stranger])
    for single in ("0", nn.Linear, model[0]):
        with pytest.raises(TypeError, match=r"ignore must be a sequence of names.*: pass \["):
            find_matching(model, single)


def test_a_network_of_one_layer_can_be_ignored():
    assert find_matching(nn.Linear(2, 2), [nn.Linear]) == {""}


def test_what_goes_through_all_tensors_of_a_value_finds_those_of_batches_with_shared_ones():
    batch = Inputs({"x": torch.ones(2, 3), "mask": torch.zeros(3), "flag": True}, {1})
    found = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor + 1, [batch])[0]
    assert isinstance(found, Inputs)
    assert found.shared == {1}
    assert torch.equal(found["x"], torch.full((2, 3), 2.0))
    assert torch.equal(found["mask"], torch.ones(3))
    assert found["flag"] is True


OF_NETWORKS = {
    "accuracy": lambda model: ps.accuracy(model, torch.zeros(2, 3), [0, 1]),
    "apply": lambda model: ps.apply(model, ps.Plan(())),
    "codebooks_of": ps.codebooks_of,
    "mask_weights": lambda model: ps.mask_weights(model, {}),
    "masks_of": ps.masks_of,
    "nonzeros": ps.nonzeros,
    "remove_masks": ps.remove_masks,
    "remove_sharing": ps.remove_sharing,
    "share_weights": lambda model: ps.share_weights(model, {}),
    "stored_bytes": ps.stored_bytes,
    "ternary_weights": lambda model: ps.ternary_weights(model, []),
    "to_dense": to_dense,
}


@pytest.mark.parametrize("name", OF_NETWORKS)
def test_what_is_no_network_is_refused_by_what_it_is(name):
    result = ps.prune(nn.Sequential(nn.Linear(3, 2)), amount=0.5, progress=False)
    for given in (result, None, nn.Linear, {"0.weight": torch.zeros(2, 3)}):
        kind = type(given).__name__
        with pytest.raises(TypeError, match=rf"model must be a torch\.nn\.Module, .*; got {kind}\."):
            OF_NETWORKS[name](given)


def test_values_that_are_no_numbers_and_what_is_no_plan_are_refused():
    model = nn.Linear(3, 2)
    for x, y in ((["a"], [0]), (torch.zeros(1, 3), ["a"]), (None, [0])):
        with pytest.raises(TypeError, match="expected an array or a tensor of numbers"):
            ps.accuracy(model, x, y)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        ps.accuracy(model, torch.zeros(1, 3), [0], batch_size=0)
    for plan in (None, [ps.Plan(())]):
        with pytest.raises(TypeError, match=r"plan must be a Plan, such as a result's \.plan"):
            ps.apply(model, plan)
