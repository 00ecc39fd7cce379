"""The command line answers quickly, fails in one line, and its demo keeps what it promises."""

import errno
import re
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import pysolve
import pysolve as ps
from pysolve.cli import demo
from pysolve.cli.main import app
from pysolve.nn.evaluate import parameters
from pysolve.nn.zoo import DigitsNet


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


@pytest.mark.parametrize("verb", ["compress", "sweep", "low-rank", "quantize"])
def test_what_is_on_by_default_can_be_turned_off(verb):
    flags = [
        f"--no-{one.replace('_', '-')}"
        for one in ("latency", *(("head_dims",) * (verb in ("compress", "sweep"))))
    ]
    result = run(verb, "a:b", *flags)
    assert "No such option" not in result.output
    assert "--data" in result.output


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
    with pytest.MonkeyPatch.context() as patch:
        # The smallest share is what is saved, and the largest begins the lines of the picture.
        patch.setattr(demo, "DIGITS", replace(demo.DIGITS, shares=demo.DIGITS.shares[::2]))
        return run("demo", "--out", out, "--epochs", 3), out


def test_the_demo_shows_the_original_and_each_way_to_shrink_it(digits_demo):
    result, _ = digits_demo
    assert result.exit_code == 0, result.output
    for row in ("original", "magnitudes", "compress", "low_rank", "deep_compress"):
        assert re.search(rf"{row}\W+[\d.]+ %", result.stdout)
    assert not re.search("certified|lam", result.stdout)


def test_the_demo_prints_plain_lines_off_a_terminal(digits_demo):
    result, _ = digits_demo
    assert result.stderr == ""
    assert "\r" not in result.stdout
    assert "\x1b" not in result.stdout


def test_the_demo_writes_networks_that_are_really_smaller_and_can_be_loaded(digits_demo):
    _, out = digits_demo
    assert sorted(path.name for path in out.iterdir()) == sorted(demo.FILES)
    dense = load_file(out / "dense.safetensors")
    for name in demo.NETWORKS:
        found = ps.load(out / f"{name}.safetensors", DigitsNet())
        assert parameters(found) < 0.02 * sum(one.size for one in dense.values())
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (out / "report.html").read_text()


def test_the_demo_hardly_loses_accuracy(digits_demo):
    result, _ = digits_demo
    found = dict(re.findall(r"(\w+)\W+([\d.]+) %", result.stdout))
    assert float(found["original"]) > 80
    assert min(float(found[name]) for name in demo.NETWORKS) > float(found["original"]) - 6


def test_solving_needs_no_torch(tmp_path):
    np.savez(tmp_path / "p.npz", r_xx=np.eye(3), r_yx=np.ones((2, 3)))
    code = (
        "import sys\n"
        f"sys.argv = ['pysolve', 'solve', {str(tmp_path / 'p.npz')!r}]\n"
        "from pysolve.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert not {'torch', 'matplotlib', 'sklearn'} & sys.modules.keys(), 'heavy imports'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Solution(" in done.stdout
