"""A deep MLP by singular values: the example's steps on a stand-in."""

from dataclasses import replace

import pytest
import torch
from scripts import check_command, images_of, modules_of, one_of
from typer.testing import CliRunner

from pysolve.cli import demo
from pysolve.nn.evaluate import accuracy, parameters
from pysolve.nn.layers.factored import Factored
from pysolve.nn.zoo import Mlp

pytestmark = pytest.mark.slow

SIZES = (100, 48, 48, 48, 10)


modules = modules_of("experiment", "e3_svd_mlp")
script = one_of("e3_svd_mlp")
data = images_of(120, side=10)


@pytest.fixture(scope="module")
def model(script, data):
    """A narrow network that has seen the stand-in."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Mlp(SIZES)
    script.experiment.adam(network, data, epochs=10, batch_size=10, lr=1e-3)
    return network


def test_help_names_the_options_and_missing_data_are_one_sentence(script, tmp_path):
    check_command(script.app, tmp_path)


def test_the_published_network_is_factored_but_for_its_last_layer(script, model, data):
    assert parameters(Mlp(script.SIZES)) == 785 * 1024 + 4 * 1025 * 1024 + 1025 * 10
    plain, few, many = script.factored(model, data, 4, (20, 120))
    for network in (plain, few, many):
        assert [type(layer) is Factored for layer in network.children()] == [True, True, True, False]
        assert {layer.rank for layer in network.children() if isinstance(layer, Factored)} == {4}
    W = model.fc1.weight.detach().double()
    U, s, V = torch.linalg.svd(W)
    torch.testing.assert_close(plain.fc1.weight.double(), U[:, :4] @ s[:4].diag() @ V[:4], atol=1e-5, rtol=0)
    assert accuracy(many, data.x_test, data.y_test) >= accuracy(plain, data.x_test, data.y_test)


def test_training_on_starts_from_a_copy_and_keeps_the_rank(script, model, data):
    (smaller,) = script.factored(model, data, 3, ())
    before = accuracy(smaller, data.x_test, data.y_test)
    kept = {name: value.clone() for name, value in smaller.state_dict().items()}
    on = {"epochs": 8, "lr": 3e-3, "batch_size": 10}
    networks = script.trained_on(model, smaller, data, on, 0)
    assert [*networks] == ["with labels", "without labels, by the original's outputs"]
    for network in networks.values():
        assert parameters(network) == parameters(smaller)
        assert accuracy(network, data.x_test, data.y_test) > max(before, 60)
    assert all(torch.equal(value, kept[name]) for name, value in smaller.state_dict().items())


def test_published_and_ours_stand_side_by_side(script, model):
    scores, networks = {10: [70.0, 95.0, 95.5], 30: [96.0, 97.0]}, {10: [model], 30: [model]}
    table = script.ranks_table(97.8, scores, networks, model, (2000, 60_000))
    assert table.head[3:5] == ("by what is read, 2,000 images", "by what is read, 60,000 images")
    count = f"{parameters(model):,}"
    assert table.rows == (
        ("dense", "98.5 (53 epochs)", "97.80", "", "", count),
        ("10", "67.9–74.5", "70.00", "95.00", "95.50", count),
        ("30", "97–97.6", "96.00", "97.00", "", count),
    )


def test_the_whole_script_prints_both_tables_and_writes_its_files(script, data, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "mnist", lambda folder: data)
    monkeypatch.setattr(script, "SIZES", SIZES)
    result = CliRunner().invoke(script.app, ["--out", str(tmp_path), "--quick"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line[:9] for line in lines if line.startswith("**")] == ["**Five la", "**D = 20 "]
    first = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert first[2:5] == ["dense", "10", "20"]
    assert {file.name for file in tmp_path.iterdir()} == {"mlp.safetensors", "ranks.png"}
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mnist
def test_factors_by_what_is_read_lose_less_and_gain_when_trained_on(script, mnist_folder):
    data = script.first_images(script.mnist(mnist_folder), 2000)
    # Every second pixel of every second row.
    data = replace(data, x_train=data.x_train[..., ::2, ::2], x_test=data.x_test[..., ::2, ::2])
    with demo.threads(1), torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mlp((196, 96, 96, 96, 10))
        script.experiment.adam(model, data, epochs=8, batch_size=64, lr=1e-3)
        plain, ours = script.factored(model, data, 5, (2000,))
        on = {"epochs": 6, "lr": 3e-3, "batch_size": 64}
        labelled, unlabelled = script.trained_on(model, ours, data, on, 0).values()
    scores = [script.score(network, data) for network in (plain, ours, labelled, unlabelled)]
    # Of 2,000 images, 1 % are 20.
    assert scores[1] > scores[0] + 8
    assert min(scores[2:]) > scores[1]
