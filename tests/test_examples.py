"""The published experiments: their command lines, their steps on a stand-in, and their claims in small."""

import importlib.util
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import pysolve as ps
from pysolve import demo
from pysolve.datasets import Dataset, mnist
from pysolve.nn.evaluate import accuracy
from pysolve.nn.train import fit
from pysolve.nn.zoo import LeNet5
from pysolve.path import lam_for_groups

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def e1():
    name = "e1_linear_reconstruction"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture
def printed(e1, monkeypatch):
    """What the example prints, as a console that records it."""
    console = Console(record=True, file=open(os.devnull, "w"), width=100)  # noqa: SIM115
    monkeypatch.setattr(e1, "console", console)
    yield console
    console.file.close()


def stand_in(n=40):
    """Images of ten classes that differ in where they are bright."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 10
    x = 0.3 * rng.standard_normal((n, 1, 28, 28)).astype(np.float32)
    for image, label in zip(x, y, strict=True):
        image[0, 5 * (label // 2) + 2 : 5 * (label // 2) + 7, 14 * (label % 2) : 14 * (label % 2) + 14] += 2
    return Dataset("stand-in", x, y, x[::2], y[::2])


@pytest.fixture
def small(e1, monkeypatch):
    monkeypatch.setattr(e1, "RECIPE", {"epochs": 1, "batch_size": 20, "lr": 2e-3})
    # One thread: on a busy machine two wait for each other.
    with demo.threads(1):
        yield stand_in()


def fc2(model, dataset):
    """Correlations of fc2, and its problem without and with a bias."""
    correlations = ps.gather(model, demo.batches(dataset.x_train), layers=["fc2"])["fc2"]
    plain = (correlations.r_xx, model.fc2.weight.detach().double().numpy() @ correlations.r_xx)
    centred = (correlations.centered().r_xx, correlations.centered().r_yx)
    return correlations, plain, centred


def test_help_names_the_options(e1):
    result = CliRunner().invoke(e1.app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for option in ("--data", "--out", "--seed", "--retrain"):
        assert option in result.output


def test_missing_data_are_one_sentence_and_exit_status_2(e1, tmp_path):
    result = CliRunner().invoke(e1.app, ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "is not a folder" in result.output
    assert not (tmp_path / "out").exists()


def test_weights_are_trained_once_and_again_when_anything_differs(e1, small, tmp_path, printed):
    path = tmp_path / "lenet5.safetensors"
    first = e1.trained(small, path)
    again = e1.trained(small, path)
    other = e1.trained(small, path, seed=1)
    path.write_bytes(b"damaged")
    mended = e1.trained(small, path)
    said = [line.split()[0] for line in printed.export_text().splitlines()]
    assert said == ["Trained", "Loaded", "Trained", "Trained"]
    assert torch.equal(first.fc2.weight, again.fc2.weight)
    assert torch.equal(first.fc2.weight, mended.fc2.weight)
    assert not torch.equal(first.fc2.weight, other.fc2.weight)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_retraining_is_on_request(e1, small, tmp_path, printed):
    for _ in range(2):
        e1.trained(small, tmp_path / "lenet5.safetensors", retrain=True)
    assert "Loaded" not in printed.export_text()


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


def test_the_table_of_fc2_has_both_variants(e1, small, tmp_path, printed, monkeypatch):
    model = e1.trained(small, tmp_path / "lenet5.safetensors")
    _, *problems = fc2(model, small)
    monkeypatch.setattr(e1, "LAM", 0.1 * min(ps.lam_max(*problem) for problem in problems) / 500)
    monkeypatch.setattr(e1, "lam_for_groups", partial(lam_for_groups, max_solves=2))
    e1.compress_fc2(model, small)
    text = printed.export_text()
    for wanted in ("97.21", "98.81", "98.75", "70,996 (16.47 %)", "unpenalised bias", "the same inputs kept"):
        assert wanted in text


def test_solvers_are_timed_and_drawn(e1, tmp_path, printed, monkeypatch):
    sizes = iter([(20, 10, 12, 200), (30, 10, 20, 300)])
    original = e1.random_problem
    monkeypatch.setattr(e1, "random_problem", lambda *published: original(*next(sizes)))
    e1.compare_solvers(tmp_path / "convergence.png")
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    text = printed.export_text()
    for method in ("newton", "alternate_minimization", "fista", "proximal_gradient", "q = 250", "4.39 s"):
        assert method in text


@pytest.mark.mnist
def test_fc2_on_a_ninth_of_its_inputs(e1, mnist_folder):
    full = mnist(mnist_folder)
    data = Dataset("part", full.x_train[:5000], full.y_train[:5000], full.x_test[:2000], full.y_test[:2000])
    with demo.threads(1), torch.random.fork_rng():
        torch.manual_seed(0)
        model = LeNet5()
        fit(model, data.x_train, data.y_train, epochs=1, batch_size=64, lr=3e-3, progress=False)
        correlations, plain, centred = fc2(model, data)
        dense = accuracy(model, data.x_test, data.y_test)
        for problem, bias in ((plain, None), (centred, correlations.bias)):
            solution = lam_for_groups(*problem, 56)[0]
            one = e1.compress(model, data, e1.FC2, problem, solution, bias)
            assert one.collapsed == one.solved
            assert one.change < 1e-5
            # Noise: 0.3 % of 2,000 images are 6.
            assert one.debiased >= one.solved - 0.3
            assert one.debiased > dense - 1
            assert one.parameters == 25_580 + 811 * one.kept
        same, difference = e1.constant_input(correlations, solution.lam)
    assert same
    assert difference < 1e-8
