"""How much is measured, and on what."""

from functools import cache

import pytest
import torch
from small import Net
from torch import nn

from pysolve.methods import price as priced
from pysolve.methods.goal import Options
from pysolve.methods.kinds.channels import Channels
from pysolve.methods.price import LEAST_ROWS, LEAST_SAMPLES, LEAST_WORDS, LONG, price, probe
from pysolve.methods.studied import studied
from pysolve.nn.batches.samples import samples_in


def reader(pooled):
    """Words in, logits of every word out, or of the whole text."""

    def run(net, x):
        y = net.down(net.up(net.words(x)).relu())
        return net.head(y.mean(1) if pooled else y)

    torch.manual_seed(0)
    layers = {"words": nn.Embedding(20, 8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}
    return Net(run, **layers, head=nn.Linear(8, 5)).eval()


@cache
def known(pooled, length, count=800):
    torch.manual_seed(0)
    texts = torch.randint(20, (count, length)).split(80)
    return studied(reader(pooled), texts, Options(progress=False), sites=True)


def taken(found):
    menus = Channels().menus(found)
    return sum(map(samples_in, probe(found, menus).batches))


@pytest.fixture
def thrifty(monkeypatch):
    """As little as may be measured on."""
    monkeypatch.setattr(priced, "PROBE_ROWS", 1)


def test_the_fewest_are_so_many_outputs_not_samples(thrifty):
    assert taken(known(True, 16)) == LEAST_ROWS
    assert taken(known(False, 4)) == LEAST_ROWS / 4
    assert taken(known(False, 16)) == LEAST_SAMPLES
    assert taken(known(False, LONG)) * LONG == taken(known(False, LEAST_WORDS)) * LEAST_WORDS == LEAST_WORDS


def test_work_is_counted_in_outputs(monkeypatch):
    found = known(False, 16)
    monkeypatch.setattr(priced, "PROBE_ROWS", 1600)
    menus = Channels().menus(found)
    changes = sum(len(menu.probes()) for menu in menus)
    assert taken(found) == 1600 // 16 // changes


def test_longer_texts_are_not_more_work_for_a_unit():
    rows = [taken(known(False, length)) * length for length in (64, 512)]
    assert rows[1] <= 2 * rows[0]


def test_measuring_takes_no_more_than_a_few_passes(monkeypatch):
    found = known(True, 16)
    monkeypatch.setattr(priced, "PASSES", 0.15)
    changes = sum(len(menu.probes()) for menu in Channels().menus(found))
    assert taken(found) == max(LEAST_ROWS, 0.15 * 800 // changes)


def test_few_samples_of_many_outputs_tell_what_all_held_out_do():
    found = known(False, 64)
    menus = Channels().menus(found)
    few = price(found, menus, probe(found, menus))
    every = price(found, menus, priced._probe(found, found.held))
    for one, other in zip(few, every, strict=True):
        for size, divergence in one.measured.items():
            assert divergence == pytest.approx(other.measured[size], rel=0.3)
