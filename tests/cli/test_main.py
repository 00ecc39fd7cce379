"""The command line answers quickly, fails in one line, and its demo keeps what it promises."""

import errno
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import pysolve
from pysolve.cli.main import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "--data" in re.sub(r"\x1b\[[0-9;]*m", "", run("demo", "--help").output)


def test_a_pager_that_is_left_early_is_no_error(monkeypatch):
    left = Mock(side_effect=BrokenPipeError(errno.EPIPE, "Broken pipe"))
    monkeypatch.setattr("pysolve.cli.commands.evaluate_network", left)
    result = run("evaluate", "a:b", "--data", "c.npy")
    assert (result.exit_code, result.output) == (1, "")


def test_version_is_the_packages():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"pysolve {pysolve.__version__}\n"


def test_help_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys; from typer.testing import CliRunner; from pysolve.cli.main import app;"
        "assert CliRunner().invoke(app, ['demo', '--help']).exit_code == 0;"
        "print({'torch', 'matplotlib', 'sklearn'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_the_module_can_be_run():
    command = [sys.executable, "-m", "pysolve", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("pysolve ")


@pytest.mark.parametrize("arguments", [("nothing",), ("demo", "--epochs", "0"), ("demo", "--seed", "x")])
def test_wrong_usage_exits_with_2(arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_mnist_is_one_red_line_and_status_2(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "nothing"
    result = run("demo", "--data", folder, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert str(folder) in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line_and_status_2(tmp_path):
    (tmp_path / "file").touch()
    result = run("demo", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_ctrl_c_exits_with_130(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pysolve.cli.demo.run", interrupted)
    assert run("demo").exit_code == 130


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("pysolve.cli.demo.run", broken)
    assert isinstance(run("demo").exception, ZeroDivisionError)


@pytest.fixture(scope="module")
def digits_demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run("demo", "--out", out, "--epochs", 3), out


def test_the_demo_shows_before_and_after(digits_demo):
    result, _ = digits_demo
    assert result.exit_code == 0, result.output
    for row in ("test accuracy", "parameters", "MACs per image", "bytes on disk", "latency, 1 image"):
        assert row in result.stdout
    assert re.search(r"Kept \d+ of 256 neurons .* certified to be within [\d.]+e-\d+", result.stdout)


def test_the_demo_prints_plain_lines_off_a_terminal(digits_demo):
    result, _ = digits_demo
    assert result.stderr == ""
    assert "\r" not in result.stdout
    assert "\x1b" not in result.stdout


def test_the_demo_writes_a_network_that_is_really_smaller(digits_demo):
    _, out = digits_demo
    assert sorted(path.name for path in out.iterdir()) == [
        "compressed.safetensors",
        "demo.png",
        "dense.safetensors",
    ]
    dense, small = load_file(out / "dense.safetensors"), load_file(out / "compressed.safetensors")
    kept = len(small["fc1.bias"])
    assert 0.1 * 256 < kept < 0.3 * 256
    assert small["fc1.weight"].shape == (kept, 512)
    assert small["fc2.weight"].shape == (10, kept)
    assert small["conv2.weight"].tolist() == dense["conv2.weight"].tolist()
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_hardly_loses_accuracy(digits_demo):
    result, _ = digits_demo
    before, after = map(float, re.search(r"test accuracy\D+([\d.]+) %\D+([\d.]+) %", result.stdout).groups())
    assert before > 80
    assert after > before - 3
