"""Pruning with and without retraining: the example's steps on a stand-in."""

import numpy as np
import pytest
from scripts import check_command, images_of, modules_of, text_of

from pysolve.nn.evaluate import parameters
from pysolve.nn.zoo import LeNet5, LeNetC5, Mlp

pytestmark = pytest.mark.slow


modules = modules_of("experiment", "e5_prune_retrain", "e5_weights", "e5_channels", "e5_surgery")


@pytest.fixture(scope="module")
def seeded(modules):
    return modules["experiment"].seeded


data = images_of()


def test_help_names_the_options_and_missing_data_are_one_sentence(modules, tmp_path):
    check_command(modules["e5_prune_retrain"].app, tmp_path)


def test_the_published_shares_stay_of_the_linear_layers(modules, seeded, data, tmp_path):
    parts = modules["e5_weights"].compare_weights(
        seeded(LeNetC5), data, tmp_path / "weights.png", shares=(1.0,), epochs=1
    )
    text = text_of(*parts)
    # 33,412 of the convolutions, 8,750 and 489 of the Linear layers, and their biases.
    for wanted in ("43,681", "43,685", "8,750", "489", "91.73", "98.69", "standard deviations of fc1"):
        assert wanted in text
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("size", [0.5, 0.1])
def test_rankings_fill_the_size_with_the_best_channels(modules, seeded, size, together):
    channels, model = modules["e5_channels"], seeded(LeNet5)
    for values in channels.scores(model).values():
        kept = channels.fitting(model, values, size, together=together)
        network = channels.ps.apply(
            model, channels.ps.Plan(tuple(map(channels.ps.Collapse, channels.SITES, kept)))
        )
        assert parameters(network) == channels.left(kept)
        assert 0.93 * size * 431_080 < parameters(network) <= size * 431_080
        for value, keep in zip(values, kept, strict=True):
            rest = np.delete(value, keep)
            assert not rest.size or value[keep].min() >= rest.max()


def test_every_ranking_has_a_row(modules, seeded, data):
    text = text_of(modules["e5_channels"].compare_rankings(seeded(LeNet5), data, sizes=(0.3,)))
    cells = [line.replace("│", " ").split() for line in text.splitlines()]
    rows = [row[1:4] for row in cells if row and row[0] == "30%"]
    rankings = [
        [score, *way] for score in ("norm", "importance") for way in (["by", "layer"], ["over", "all"])
    ]
    assert rows[:4] == rankings
    assert [row[0] for row in rows[4:]] == ["elimination"]


@pytest.mark.parametrize(
    ("name", "make", "wanted"),
    [
        # 2 % of 430,500 weights, and 580 biases; of 266,200, and 410.
        ("LeNet-5", LeNet5, ("9,190", "108", "46.9")),
        ("LeNet-300-100", lambda: Mlp((784, 300, 100, 10)), ("5,734", "56", "46.5")),
    ],
)
def test_surgery_is_compared_with_gradual_pruning(modules, seeded, data, tmp_path, name, make, wanted):
    parts = modules["e5_surgery"].compare_surgery(
        seeded(make), data, tmp_path / "surgery.png", name=name, amount=0.98, epochs=1
    )
    text = text_of(*parts)
    left, *others = wanted
    assert text.count(left) == 3
    for one in (name, "98.00%", *others):
        assert one in text
    assert (tmp_path / "surgery.png").read_bytes().startswith(b"\x89PNG")


def test_the_whole_script_prints_every_part(modules, seeded, data, tmp_path, monkeypatch, capsys):
    script = modules["e5_prune_retrain"]
    monkeypatch.setattr(script, "kept", lambda make, *args: seeded(make))
    for name in ("weights", "surgery"):
        monkeypatch.setattr(script, f"compare_{name}", lambda *args, part=name, **options: iter([part]))
    monkeypatch.setattr(script, "compare_rankings", lambda *args, **options: "channels")
    script.run(data, tmp_path / "out", 0, quick=True)
    assert capsys.readouterr().out.split()[:4] == ["weights", "channels", "surgery", "surgery"]
