"""Distillation and low rank of small networks: the example's steps on a stand-in."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import check_command, images_of, modules_of
from typer.testing import CliRunner

from pysolve.cli import demo
from pysolve.cli.datasets import mnist
from pysolve.nn.evaluate import accuracy, parameters
from pysolve.nn.zoo import Mlp

pytestmark = pytest.mark.slow


modules = modules_of("experiment", "e2_pruning", "e2_lowrank_distill", "e2_student", "e2_ranks")


@pytest.fixture(scope="module")
def operations(modules):
    return modules["e2_ranks"].operations


data = images_of()


def test_help_names_the_options_and_missing_data_are_one_sentence(modules, tmp_path):
    check_command(modules["e2_lowrank_distill"].app, tmp_path)


def test_operations_are_the_published_ones(operations):
    assert operations((32, 256, 128)) == 1_048_576
    published = {60: 852_480, 20: 258_560, 10: 126_080}
    assert {rank: operations((32, 256, rank, rank, 128)) for rank in published} == published


@given(sizes=st.lists(st.integers(1, 20), min_size=3, max_size=6))
def test_operations_are_the_least_of_any_order(operations, sizes):
    def least(i, j):
        if j == i + 1:
            return 0
        ways = (least(i, k) + least(k, j) + sizes[i] * sizes[k] * sizes[j] for k in range(i + 1, j))
        return min(ways)

    assert operations(tuple(sizes)) == least(0, len(sizes) - 1)


def test_teacher_and_student_are_the_published_networks(modules):
    student = modules["e2_student"]
    assert parameters(student.conv_teacher()) == 832 + 65_664 + 1_290
    assert parameters(student.small_student()) == 785 * 128 + 129 * 10
    assert student.conv_teacher()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_student_learns_from_its_teacher_or_from_labels(modules, data, tmp_path):
    student, recipe = modules["e2_student"], {"epochs": 12, "batch_size": 10, "lr": 1e-3}
    teacher = student.trained_teacher(data, tmp_path / "teacher.safetensors", recipe, 0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for way in student.WAYS:
        network = student.distilled(teacher, data, way.options, recipe, 0)
        assert accuracy(network, data.x_test, data.y_test) > 60, way.name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_full_rank_is_the_layer_itself_and_ranks_that_do_not_pay_have_no_fit(modules, data):
    ranks = modules["e2_ranks"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mlp((784, 24, 20, 16, 10))
    dense = accuracy(model, data.x_test, data.y_test)
    assert ranks.accuracies(model, data, 16, (20,)) == [dense]
    # Of 20 x 16, at most 8 pay.
    assert len(ranks.accuracies(model, data, 8, (20, 60))) == 3
    assert len(ranks.accuracies(model, data, 9, (20, 60))) == 1


def test_published_and_ours_stand_side_by_side(modules):
    ranks = modules["e2_ranks"]
    table = ranks.ranks_table(Mlp(), {128: [97.0], 60: [97.0, 96.5, 96.6]}, (10, 60), 97.1)
    dense, full, some = table.rows
    assert dense == ("dense", "", "97.10", "", "", *["1,048,576"] * 3)
    assert full[:5] == ("128", "97.24", "97.00", "not smaller", "not smaller")
    assert some == ("60", "97.26", "97.00", "96.50", "96.60", "852,480", "852,480", "737,280")


def test_the_whole_script_prints_both_tables_and_writes_its_files(modules, data, tmp_path, monkeypatch):
    script = modules["e2_lowrank_distill"]
    monkeypatch.setattr(modules["e2_pruning"], "mnist", lambda folder, **scale: data)
    monkeypatch.setattr(script, "RANKS", (128, 20, 5, 2))
    result = CliRunner().invoke(script.app, ["--out", str(tmp_path), "--quick"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line[:14] for line in lines if line.startswith("**")] == ["**Distillation", "**fc3 at low r"]
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert [row for row in rows if row.isdigit()] == ["128"]
    assert {file.name for file in tmp_path.iterdir()} == {
        "teacher.safetensors",
        "mlp.safetensors",
        "ranks.png",
    }
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mnist
def test_by_what_it_reads_a_layer_needs_fewer_directions(modules, mnist_folder):
    experiment = modules["experiment"]
    data = experiment.first_images(mnist(mnist_folder, mean=0.5, std=0.5), 2000)
    # Every second pixel of every second row.
    data = replace(data, x_train=data.x_train[..., ::2, ::2], x_test=data.x_test[..., ::2, ::2])
    with demo.threads(1), torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mlp((196, 64, 48, 32, 10))
        experiment.adam(model, data, epochs=6, batch_size=64, lr=2e-3)
        plain, ours = modules["e2_ranks"].accuracies(model, data, 3, (2000,))
    # Of 2,000 images, 5 % are 100.
    assert ours > plain + 5
