"""The published experiments: their command lines, their steps on a stand-in, and their claims in small."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scripts import check_command, modules_of, one_of, stand_in, text_of
from typer.testing import CliRunner

import pysolve as ps
from pysolve.cli import demo
from pysolve.cli.datasets import Dataset, mnist
from pysolve.nn.evaluate import accuracy
from pysolve.nn.zoo import LeNet5
from pysolve.solve.path import lam_for_groups
from pysolve.training.fit import fit

pytestmark = pytest.mark.slow


modules = modules_of("e1_linear_reconstruction", "e1_solvers", "e1_layers", "e1_network")
e1 = one_of("e1_linear_reconstruction")
solvers = one_of("e1_solvers")
layers = one_of("e1_layers")
network = one_of("e1_network")


@pytest.fixture
def small(e1, monkeypatch):
    monkeypatch.setattr(e1, "RECIPE", {"epochs": 1, "batch_size": 20, "lr": 2e-3})
    # One thread: on a busy machine two wait for each other.
    with demo.threads(1):
        yield stand_in(40)


@pytest.fixture(scope="module")
def trained():
    """A LeNet-5 that has seen the stand-in."""
    with demo.threads(1), torch.random.fork_rng():
        torch.manual_seed(0)
        model, dataset = LeNet5(), stand_in(40)
        fit(model, dataset.x_train, dataset.y_train, epochs=5, batch_size=20, lr=2e-3, progress=False)
        return model


def fc2_problems(model, correlations):
    """The problem of fc2 without and with a bias."""
    plain = (correlations.r_xx, model.fc2.weight.detach().double().numpy() @ correlations.r_xx)
    return plain, (correlations.centered().r_xx, correlations.centered().r_yx)


def column(table, header):
    return next(list(one.cells) for one in table.columns if one.header == header)


def test_help_names_the_options_and_missing_data_are_one_sentence(e1, tmp_path):
    check_command(e1.app, tmp_path, "--retrain", "--threads")


def test_it_says_whether_weights_were_trained_or_read(e1, small, tmp_path, monkeypatch):
    monkeypatch.setattr(e1, "mnist", lambda folder: small)
    monkeypatch.setattr(e1, "compare_solvers", lambda path: iter([]))
    for part in ("compress_layers", "compress_network"):
        monkeypatch.setattr(e1, part, lambda *args, **options: None)
    said = []
    for options in ((), (), ("--seed", "1"), ("--retrain",)):
        output = CliRunner().invoke(e1.app, ["--out", str(tmp_path), *options]).output
        said += [line.split()[0] for line in output.splitlines() if "lenet5.safetensors" in line]
    assert said == ["Trained", "Loaded", "Trained", "Trained"]


def test_the_published_scaling_has_the_same_minimiser(e1):
    rng = np.random.default_rng(0)
    x, W = np.maximum(rng.standard_normal((300, 20)), 0), rng.standard_normal((3, 20))
    ours = ps.Correlations.from_samples(x, x @ W.T)
    published = (x.T / 20) @ (x / len(x))
    lam = 0.3 * ps.lam_max(published, W @ published)
    theirs = ps.solve_linear_reconstruction(published, W @ published, lam)
    same = ps.solve_linear_reconstruction(ours.r_xx, ours.r_yx, 20 * lam)
    assert 0 < len(theirs.keep) < 20
    np.testing.assert_array_equal(theirs.keep, same.keep)
    np.testing.assert_allclose(theirs.M, same.M, atol=1e-6)


def test_the_table_of_fc2_has_both_variants(layers, small, trained, monkeypatch):
    correlations = layers.gather_readers(trained, small)["fc2"]
    largest = min(ps.lam_max(*problem) for problem in fc2_problems(trained, correlations))
    monkeypatch.setattr(layers, "LAM", 0.1 * largest / 500)
    monkeypatch.setattr(layers, "lam_for_groups", partial(lam_for_groups, max_solves=2))
    text = text_of(*layers.compress_fc2(trained, small, correlations))
    for wanted in ("97.21", "98.81", "98.75", "70,996 (16.47 %)", "unpenalised bias", "the same inputs kept"):
        assert wanted in text


def test_channels_are_groups_of_taps_and_of_pixels(layers, small, trained):
    correlations = layers.gather_readers(trained, small)
    sizes = {name: (one.groups, one.group_size) for name, one in correlations.items()}
    assert sizes == {"conv2": (20, 25), "fc1": (50, 16), "fc2": (500, 1)}


@pytest.mark.parametrize("site", ["CONV2", "FC1", "FC2"])
def test_all_channels_with_their_own_weights_change_nothing(layers, small, trained, site):
    site = getattr(layers, site)
    layer = trained.get_submodule(site.readers[0])
    M, bias = (value.detach().double().numpy() for value in (layer.weight.flatten(1), layer.bias))
    plan = layers.plan_of(trained, site, np.arange(site.channels), M, lambda _: bias)
    again = ps.apply(trained, plan)
    assert layers.largest_change(trained, again, torch.from_numpy(small.x_test)) == 0


@pytest.mark.parametrize("site", ["CONV2", "FC1", "FC2"])
def test_a_row_for_every_lam_counts_what_is_left(layers, small, trained, site):
    site = getattr(layers, site)
    correlations = layers.gather_readers(trained, small)[site.readers[0]]
    table = layers.compare_selectors(trained, small, site, correlations, shares=(1.0, 0.3, 1e-3))
    kept = [int(k) for k in column(table, "kept")]
    left = [int(count.replace(",", "")) for count in column(table, "parameters left")]
    assert kept[0] == 0 < kept[1] < kept[2]
    assert left[0] == {"conv2": 405_560, "fc1": 5_510, "fc2": 10}[site.readers[0]]
    # Of every channel: what its writer needs for it and what its reader does.
    written, read = {"conv2": (26, 50 * 25), "fc1": (501, 16 * 500), "fc2": (801, 10)}[site.readers[0]]
    assert [431_080 - count for count in left[1:]] == [
        (site.channels - k) * (written + read) for k in kept[1:]
    ]


def test_nothing_left_is_the_networks_answer_to_a_bias(layers, small, trained):
    correlations = layers.gather_readers(trained, small)["fc2"]
    for problem, bias in zip(fc2_problems(trained, correlations), (None, correlations.bias), strict=True):
        zero = ps.solve_linear_reconstruction(*problem, 1.01 * ps.lam_max(*problem))
        one = layers.compress(trained, small, layers.FC2, problem, zero, bias)
        given = trained.fc2.bias.detach().numpy() if bias is None else bias(zero.M)
        right = 100 * np.mean(small.y_test == given.argmax())
        assert (one.kept, one.parameters) == (0, 10)
        assert one.solved == one.collapsed == one.debiased == pytest.approx(right)
        assert layers.cells(one, 431_080)["inputs kept"] == "0 (0.0 %)"


@pytest.fixture(scope="module")
def pairs(network, trained):
    with demo.threads(1):
        return network.compare_sizes(trained, stand_in(40), shares=(1.1, 0.2))


def test_both_methods_meet_at_every_size(pairs):
    assert [pair.share for pair in pairs] == [1.1, 0.2, None]
    for pair in pairs[:2]:
        assert pair.elimination.after["params"] <= pair.lasso.after["params"]
    assert pairs[2].elimination.share("params") <= 0.1647
    for report in (*(pair.elimination for pair in pairs), *(pair.lasso for pair in pairs[:2])):
        assert 0 <= report.score_after <= 100
        assert 0 <= report.retrained <= 100


def test_where_the_lasso_leaves_nothing_one_channel_stays_and_the_table_says_so(network, pairs):
    zero = pairs[0].lasso
    assert [site.kept for site in zero.sites if site.pinned is None] == [1, 1, 1]
    assert zero.after["params"] == 89
    text = " ".join(text_of(network.sizes_table(pairs)).split())
    for wanted in ("lam = ", "leaves no channel of conv1 → conv2", "98.81 % at 16.47 %", "1 1 1"):
        assert wanted in text


def test_the_picture_is_drawn_even_without_errors(network, pairs, tmp_path):
    perfect = [replace(pair, elimination=replace(pair.elimination, score_after=100.0)) for pair in pairs]
    network.draw_sizes(perfect, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_solvers_are_timed_and_drawn(solvers, tmp_path, monkeypatch):
    sizes = iter([(20, 10, 12, 200), (30, 10, 20, 300)])
    original = solvers.random_problem
    monkeypatch.setattr(solvers, "random_problem", lambda *published: original(*next(sizes)))
    text = text_of(*solvers.compare_solvers(tmp_path / "convergence.png"))
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    for method in ("newton", "alternate_minimization", "fista", "proximal_gradient", "q = 250", "4.39 s"):
        assert method in text


def test_the_whole_script_prints_every_part_and_writes_its_files(e1, layers, small, tmp_path, monkeypatch):
    monkeypatch.setattr(e1, "mnist", lambda folder: small)
    monkeypatch.setattr(e1, "compare_solvers", lambda path: iter(["solvers"]))
    monkeypatch.setattr(e1, "FEW_SHARES", ((1.0,), (1.1,)))
    monkeypatch.setattr(layers, "lam_for_groups", partial(lam_for_groups, max_solves=2))
    result = CliRunner().invoke(e1.app, ["--out", str(tmp_path), "--quick"])
    assert result.exit_code == 0, result.output
    for part in ("solvers", "fc2 of LeNet-5 on MNIST", "conv2 of", "fc1 of", "accuracy against size"):
        assert part in result.output
    assert {file.name for file in tmp_path.iterdir()} == {"lenet5.safetensors", "accuracy.png"}


@pytest.mark.mnist
def test_fc2_on_a_ninth_of_its_inputs(layers, mnist_folder):
    full = mnist(mnist_folder)
    data = Dataset("part", full.x_train[:5000], full.y_train[:5000], full.x_test[:2000], full.y_test[:2000])
    with demo.threads(1), torch.random.fork_rng():
        torch.manual_seed(0)
        model = LeNet5()
        fit(model, data.x_train, data.y_train, epochs=1, batch_size=64, lr=3e-3, progress=False)
        correlations = ps.gather(model, demo.batches(data.x_train), layers=["fc2"])["fc2"]
        dense = accuracy(model, data.x_test, data.y_test)
        problems = fc2_problems(model, correlations)
        for problem, bias in zip(problems, (None, correlations.bias), strict=True):
            solution = lam_for_groups(*problem, 56)[0]
            one = layers.compress(model, data, layers.FC2, problem, solution, bias)
            assert one.collapsed == one.solved
            assert one.change < 1e-5
            # Noise: 0.3 % of 2,000 images are 6.
            assert one.debiased >= one.solved - 0.3
            assert one.debiased > dense - 1
            assert one.parameters == 25_580 + 811 * one.kept
        same, difference = layers.constant_input(correlations, solution.lam)
    assert same
    assert difference < 1e-8
