"""Zero pruning and activation pruning: the example's steps on a stand-in, and its claims in small."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scripts import check_command, images_of, modules_of, one_of
from torch.nn.functional import relu
from typer.testing import CliRunner

from pysolve.cli import demo
from pysolve.cli.datasets import mnist
from pysolve.nn.evaluate import accuracy
from pysolve.nn.zoo import Mlp

pytestmark = pytest.mark.slow


modules = modules_of("experiment", "e2_pruning", "e2_thresholds")
experiment = one_of("experiment")
script = one_of("e2_pruning")
thresholds = one_of("e2_thresholds")
data = images_of(side=10)


@pytest.fixture(scope="module")
def model(experiment, data):
    """A narrow network of the published depth that has seen the stand-in."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Mlp((100, 24, 20, 16, 10))
    experiment.adam(network, data, epochs=5, batch_size=10, lr=1e-3)
    return network


def test_help_names_the_options_and_missing_data_are_one_sentence(script, tmp_path):
    check_command(script.app, tmp_path)


def test_the_network_is_trained_once_and_again_when_anything_differs(experiment, data, tmp_path):
    def made(seed=0, recipe=None, **options):
        chosen = recipe or {"epochs": 1, "batch_size": 20, "lr": 1e-3}
        return experiment.kept(lambda: Mlp((100, 8, 10)), data, path, chosen, seed, **options)

    path = tmp_path / "new" / "mlp.safetensors"
    first = made()
    written = path.stat().st_mtime_ns
    again = made()
    assert path.stat().st_mtime_ns == written
    others = [made(seed=1), made(recipe={"epochs": 1, "batch_size": 20, "lr": 2e-3})]
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not any(torch.equal(first.fc1.weight, other.fc1.weight) for other in others)
    path.write_bytes(b"damaged")
    assert torch.equal(first.fc1.weight, made().fc1.weight)
    written = path.stat().st_mtime_ns
    made(retrain=True)
    assert path.stat().st_mtime_ns > written
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("tau", [0.0, 0.05])
def test_zeros_are_the_weights_below_the_threshold(thresholds, model, data, tau):
    one = thresholds.without_weights(model, data, tau, few=20)
    weights = torch.cat([layer.weight.detach().flatten() for layer in model.children()])
    gone = weights.abs() < tau
    assert one.removed == pytest.approx(100 * float(gone.double().mean()))
    # Values and columns of the weights and the biases that stay, and where each row ends.
    rows = 24 + 20 + 16 + 10
    stay = len(weights) - int(gone.sum()) + rows
    assert one.left == f"{8 * stay + 4 * (rows + 4) + 4 * 2 * 4:,}"
    if not tau:
        assert one.pruned == one.refitted == one.ours == accuracy(model, data.x_test, data.y_test)


def test_neurons_of_low_mean_activation_are_gone(thresholds, model, data):
    x, means = torch.from_numpy(data.x_train).flatten(1), []
    with torch.no_grad():
        for layer in (model.fc1, model.fc2, model.fc3):
            x = relu(layer(x))
            means.append(x.mean(0))
    # In the widest gap between neurons: samples that were held out do not decide.
    middle = torch.cat(means).sort().values[9:-9]
    widest = int(middle.diff().argmax())
    limit = float(middle[widest : widest + 2].mean())
    one = thresholds.without_neurons(model, data, limit, few=20)
    widths = [int((mean >= limit).sum()) for mean in means]
    assert one.left == " ".join(map(str, widths))
    sizes = [100, *widths, 10]
    left = sum((n + 1) * m for n, m in pairwise(sizes))
    assert one.removed == pytest.approx(100 * (1 - left / sum(p.numel() for p in model.parameters())))


def test_published_and_ours_stand_side_by_side(thresholds):
    one = thresholds.Outcome(0.03, 60.1, "1,234", 96.5, 97.1, 97.2, 97.0)
    (row,) = thresholds.zeros_table([one], 2000).rows
    assert row == ("0.03", "61.0", "96.58", "60.1", "96.50", "1,234", "97.10", "97.20", "97.00")
    (row,) = thresholds.zeros_table([replace(one, threshold=0.05)], 2000).rows
    assert row[:4] == ("0.05", "", "", "60.1")
    table = thresholds.neurons_table([replace(one, threshold=0.1)], 2000)
    assert table.rows[0][:3] == ("0.1", "62.0", "96.44")
    assert table.head[-1] == "on 2,000 images"


def test_the_whole_script_prints_both_tables_and_writes_its_files(
    script, thresholds, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "mnist", lambda folder, **scale: data)
    monkeypatch.setattr(script, "Mlp", lambda: Mlp((100, 8, 10)))
    for name in ("without_weights", "without_neurons"):
        monkeypatch.setattr(
            script,
            name,
            lambda model, dataset, limit, few: thresholds.Outcome(limit, 60.0, "1", 95.0, 96.0, 97.0, 96.5),
        )
    result = CliRunner().invoke(script.app, ["--out", str(tmp_path), "--quick"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line[:12] for line in lines if line.startswith("**")] == ["**Weights be", "**Neurons of"]
    first = [line.split("|")[1].strip() for line in lines if line.startswith("| 0")]
    assert first == ["0", "0.03", "0.06", "0.09", "0", "0.3", "0.7"]
    assert {file.name for file in tmp_path.iterdir()} == {"mlp.safetensors", "pruning.png"}
    assert (tmp_path / "pruning.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mnist
def test_refitting_compensates_most_of_what_thresholds_cost(experiment, thresholds, mnist_folder):
    data = experiment.first_images(mnist(mnist_folder, mean=0.5, std=0.5), 2000)
    # Every second pixel of every second row.
    data = replace(data, x_train=data.x_train[..., ::2, ::2], x_test=data.x_test[..., ::2, ::2])
    with demo.threads(1), torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mlp((196, 64, 48, 32, 10))
        experiment.adam(model, data, epochs=6, batch_size=64, lr=2e-3)
        dense = accuracy(model, data.x_test, data.y_test)
        weights = thresholds.without_weights(model, data, 0.08, few=500)
        neurons = thresholds.without_neurons(model, data, 0.9, few=500)
    assert weights.removed > 60
    assert neurons.removed > 30
    for one in (weights, neurons):
        assert one.pruned < one.refitted
        # Noise: 1 % of 2,000 images are 20.
        assert one.ours > dense - 2
        assert one.few > dense - 4
