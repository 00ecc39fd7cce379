"""Options of training are checked before anything is trained."""

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.training.options import BaseOptions, Run, optimizer_of, run_of, schedule_of

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either epochs or seconds, got epochs=None and seconds=None"),
        ({"epochs": 1, "seconds": 2.0}, "either epochs or seconds"),
        ({"epochs": 0}, "epochs must be positive, an integer of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be positive, an integer of at least 1, got 1.5"),
        ({"seconds": 0}, "seconds must be a positive number"),
        ({"seconds": NAN}, "seconds must be a positive number"),
        ({"epochs": 1, "lr": -1}, "lr must be a positive number"),
        ({"epochs": 1, "lr": "high"}, "lr must be a positive number, got high"),
        ({"epochs": 1, "clip": 0}, "clip must be a positive number"),
        ({"epochs": 1, "weight_decay": -1}, "weight_decay must be a number of 0 and above"),
        ({"epochs": 1, "optimizer": "adamm"}, "optimizer must be one of adam, adamw, sgd or a callable"),
        (
            {"epochs": 1, "schedule": "step"},
            "schedule must be one of one-cycle, cosine, constant or a callable",
        ),
        ({"epochs": 1, "schedule": ["step"]}, "schedule must be one of"),
        ({"epochs": 1, "precision": "half"}, "precision must be one of float32, bfloat16, auto, got 'half'"),
        ({"epochs": 1, "patience": 3}, "patience needs evaluate"),
        ({"epochs": 1, "patience": 0, "evaluate": len}, "patience must be positive"),
    ],
)
def test_what_is_out_of_range_is_a_value_error(options, message):
    with pytest.raises(ValueError, match=message):
        Run(3, **options)


def test_unknown_names_are_told_with_the_known_ones():
    model, x = nn.Linear(2, 2), torch.randn(4, 2)
    pairs = [(x, x.argmax(1))]
    known = "options of training are epochs, seconds, lr, weight_decay, optimizer, schedule, clip, precision"
    for train in (ps.finetune, lambda *given, **how: ps.distill(nn.Linear(2, 2), *given, **how)):
        with pytest.raises(TypeError, match=rf"unknown option epoch; {known}"):
            train(model, pairs, epoch=3)
    with pytest.raises(TypeError, match="unknown option patience, after_step; "):
        ps.prune_gradually(model, pairs, amount=0.5, epochs=1, patience=1, after_step=print)


def test_options_of_pruning_are_those_without_a_best_epoch():
    assert run_of(2, {"epochs": 3}, BaseOptions).length == 6
    with pytest.raises(TypeError, match="unknown option evaluate"):
        run_of(2, {"epochs": 3, "evaluate": len}, BaseOptions)


def test_numbers_of_numpy_are_numbers():
    assert Run(2, epochs=np.int64(3), lr=np.float32(0.1)).length == 6


def test_auto_is_full_precision_where_nothing_else_is_faster():
    assert not Run(1, epochs=1, precision="auto").bfloat16(torch.device("cpu"))
    assert Run(1, epochs=1, precision="bfloat16").bfloat16(torch.device("cpu"))


@pytest.mark.parametrize("supported", [True, False])
def test_auto_asks_the_accelerator(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert Run(1, epochs=1, precision="auto").bfloat16(torch.device("cuda")) is supported
    assert not Run(1, epochs=1, precision="auto").bfloat16(torch.device("mps"))


def test_what_is_not_an_optimizer_or_a_factor_is_told():
    parameters = [nn.Parameter(torch.ones(1))]
    with pytest.raises(TypeError, match=r"must return a torch.optim.Optimizer, got list"):
        optimizer_of(list, parameters, 0.1, 0.0)
    with pytest.raises(TypeError, match="LBFGS computes the loss several times"):
        optimizer_of(torch.optim.LBFGS, parameters, 0.1, 0.0)
    optimizer = optimizer_of("sgd", parameters, 0.1, 0.0)
    with pytest.raises(ValueError, match=r"schedule must give factors of 0 and above, got -1.0 at 0"):
        schedule_of(lambda share: share - 1, optimizer, 4, momentum=True)
