"""The command line compresses a user's own network, from files and functions of theirs."""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import fields
from importlib import import_module
from inspect import signature

import numpy as np
import pytest
import torch
from families import opened_here
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pysolve as ps
from pysolve.cli.commands import Job, duration_of, targets_of
from pysolve.cli.inputs import load_network, load_samples
from pysolve.cli.main import app
from pysolve.errors import PysolveError
from pysolve.nn.evaluate import parameters
from pysolve.report.report import Report
from pysolve.report.rows import Latency, LayerMass, SiteReport, Solve, Stage

MODULE = """
    import torch
    from torch import nn

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))

    def batches():
        torch.manual_seed(1)
        return [torch.randn(50, 12) for _ in range(6)]

    def labelled():
        x = torch.cat(batches())
        return x, make()(x).argmax(1)

    def rated(network):
        x, y = labelled()
        return 100 * float((network(x).argmax(1) == y).float().mean())

    def words(network):
        return "good"

    def broken_score(network):
        return {}["x"]

    def one():
        return torch.cat(batches())

    def slow():
        import time
        def endless():
            while True:
                open("started", "w").close()
                time.sleep(0.05)
                yield torch.randn(50, 12)
        return endless()

    def fails():
        return {}["x"]

    def needs(width):
        return nn.Linear(width, 3)

    def mapping():
        return {"x": one()}

    def stops():
        yield torch.randn(50, 12)
        raise KeyError("later")

    def interrupted():
        yield torch.randn(50, 12)
        raise KeyboardInterrupt

    class Odd(nn.Module):
        def forward(self, x):
            assert len(x) == 3, "three only"

    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, x):
            return self.inner(x.nan_to_num())

    def fills():
        return Filling()

    number = 3

    def score():
        return 0.5
    """


@pytest.fixture(scope="module", autouse=True)
def _few_pictures():
    """Pictures of equal sizes are drawn once: most of what a command takes."""
    module = import_module("pysolve.report.page")
    draw, drawn = module._pictures, {}

    def pictures(report):
        key = tuple((site.name, site.kept, site.pinned, len(site.curve)) for site in report.sites)
        if key not in drawn:
            drawn[key] = draw(report)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_pictures", pictures)
        yield


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a user's module, arrays and weights, which is the current one."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    x = np.random.default_rng(0).standard_normal((300, 12))
    np.save("inputs.npy", x)
    model = load_network("mine:make")
    with torch.no_grad():
        np.savez("labelled.npz", x=x, y=model(torch.from_numpy(x).float()).argmax(1).numpy())
    save_file({name: 2 * value for name, value in model.state_dict().items()}, "doubled.safetensors")
    torch.save({"state_dict": model.state_dict()}, "same.pt")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_shows_what_can_shrink(home):
    result = run("inspect", "mine:make", "--data", "mine:batches")
    assert result.exit_code == 0, result.output
    assert "0 → 2" in result.stdout
    found = json.loads(run("inspect", "mine:make", "--data", "inputs.npy", "--json").stdout)
    assert [row["channels"] for row in found["rows"] if row["pinned"] is None] == [32, 16]


def test_a_dry_run_prints_what_targets_would_cost_and_writes_nothing(home):
    result = run("compress", "mine:make", "--data", "inputs.npy", "--target", "params=0.55", "--dry-run")
    assert result.exit_code == 0, result.output
    assert re.search(r"params 0\.55 +\d", result.stdout)
    assert not (home / "compressed").exists()
    told = json.loads(run("inspect", "mine:make", "--data", "inputs.npy", "--expect", "--json").stdout)
    assert [one["target"]["macs"] for one in told["expected"]] == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]


@pytest.mark.parametrize("data", ["mine:batches", "mine:one", "inputs.npy", "labelled.npz"])
def test_compress_writes_a_network_that_loads_and_its_report(home, data):
    result = run("compress", "mine:make", "--data", data, "--target", "params=0.5", "--test", "labelled.npz")
    assert result.exit_code == 0, result.output
    assert re.search(r"score +100\.00 ", result.stdout)
    assert sorted(path.name for path in (home / "compressed").iterdir()) == [
        "network.safetensors",
        "plan.json",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert "<svg" in (home / "compressed/report.html").read_text()
    plan = json.loads((home / "compressed/plan.json").read_text())
    assert [step["writers"] for step in plan["steps"]] == [["0"], ["2"]]
    assert all(step["keep"] for step in plan["steps"])
    report = json.loads((home / "compressed/report.json").read_text())
    assert report["after"]["params"] <= 0.5 * report["before"]["params"]
    assert report["after"]["file"] == os.path.getsize("compressed/network.safetensors")
    assert "# mine:make, compressed" in (home / "compressed/report.md").read_text()
    smaller = ps.load("compressed/network.safetensors", load_network("mine:make"))
    assert sum(p.numel() for p in smaller.parameters()) == report["after"]["params"]


def test_the_json_report_has_the_fields_and_types_that_are_documented(home):
    run("compress", "mine:make", "--data", "mine:batches", "--select", "lasso", "--quiet")
    report = json.loads((home / "compressed/report.json").read_text())
    assert {*report} == {field.name for field in fields(Report)}
    for name, kind in (("sites", SiteReport), ("mass", LayerMass), ("solves", Solve)):
        assert report[name]
        assert all({*entry} == {field.name for field in fields(kind)} for entry in report[name])
    assert all(isinstance(value, int) for value in (*report["before"].values(), *report["after"].values()))
    assert all(solve["relative_gap"] <= 1e-5 for solve in report["solves"])
    assert all({*one} == {*other} == {f.name for f in fields(Latency)} for one, other in report["latencies"])
    assert [one["batch_size"] for one, _ in report["latencies"]] == [1, 37]
    assert report["made_with"]["seed"] == "0"


def test_the_plain_tensors_are_written_on_request(home):
    run("compress", "mine:make", "--data", "mine:batches", "--state-dict", "--quiet")
    smaller = ps.load("compressed/network.safetensors", load_network("mine:make"))
    state = load_file("compressed/state_dict.safetensors")
    assert {*state} == {*smaller.state_dict()}
    assert all(torch.equal(state[name], value) for name, value in smaller.state_dict().items())


def test_the_compressed_file_is_evaluated_like_the_network_it_came_from(home):
    run("compress", "mine:make", "--data", "mine:batches", "--target", "params=0.6", "--out", "small")
    whole = json.loads(run("evaluate", "mine:make", "--data", "labelled.npz", "--json").stdout)
    command = ("evaluate", "mine:make", "--data", "labelled.npz", "--compressed", "small/network.safetensors")
    small = json.loads(run(*command, "--json").stdout)
    assert whole["accuracy"] == 100.0
    assert 60 < small["accuracy"] <= 100
    assert small["params"] <= 0.6 * whole["params"]
    assert small["latency_ms"] > 0
    text = run(*command).stdout
    assert re.search(rf"parameters +{small['params']:,}", text)


def test_labels_may_come_from_a_function(home):
    found = json.loads(run("evaluate", "mine:make", "--data", "mine:labelled", "--json").stdout)
    assert found["accuracy"] == 100.0


@pytest.mark.parametrize("weights", ["doubled.safetensors", "same.pt"])
def test_weights_come_from_files(home, weights):
    factor = 2 if weights.startswith("doubled") else 1
    model, plain = load_network("mine:make", home / weights), load_network("mine:make")
    assert torch.equal(model[0].weight, factor * plain[0].weight)
    assert run("evaluate", "mine:make", "--data", "labelled.npz", "--weights", weights).exit_code == 0


def test_without_a_file_of_weights_the_report_says_whose_they_are(home):
    command = ("prune", "mine:make", "--data", "inputs.npy", "--amount", "0.5", "--method", "magnitude")
    said = "no --weights: they are those that mine:make made"
    assert said in run(*command).stdout
    assert said in (home / "pruned/report.md").read_text()
    assert said not in run(*command, "--weights", "same.pt").stdout
    assert said in run("evaluate", "mine:make", "--data", "labelled.npz").stderr


def test_warnings_are_in_the_report_and_nowhere_else(home):
    np.save("few.npy", np.load("inputs.npy")[:40])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run("compress", "mine:make", "--data", "few.npy")
    report = json.loads((home / "compressed/report.json").read_text())
    assert report["warnings"]
    assert all(result.output.count(text) == 1 for text in report["warnings"])
    assert not [one for one in caught if issubclass(one.category, ps.PysolveWarning)]
    swept = run("sweep", "mine:make", "--data", "few.npy", "--test", "labelled.npz", "--target", "params=0.5")
    assert all(swept.stderr.count(text) == 1 for text in report["warnings"])


@pytest.mark.parametrize("sample", [0, 7, 299])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_named_by_its_number_in_the_file(home, sample, value):
    x = np.load("inputs.npy")
    x[sample, 3] = value
    np.savez("wrong.npz", x=x, y=np.zeros(300, int))
    for arguments in (
        ("evaluate", "mine:make", "--data", "wrong.npz"),
        ("quantize", "mine:make", "--data", "wrong.npz"),
        ("prune", "mine:make", "--amount", "0.5", "--method", "magnitude", "--data", "wrong.npz"),
        ("compress", "mine:make", "--data", "inputs.npy", "--test", "wrong.npz"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        said = f"Error: sample {sample} of {arguments[-2]}, counted from 0, holds NaN or infinity.\n"
        assert result.stderr == said


@pytest.mark.parametrize("verb", ["compress", "prune", "low_rank", "quantize", "deep_compress", "sweep"])
@pytest.mark.parametrize(("ignore", "said"), [("re:(", "is no regular expression"), ("7", "no layer '7'")])
def test_what_cannot_be_ignored_is_refused_before_any_work(verb, ignore, said):
    options = {"prune": {"amount": 0.5}, "low_rank": {"rank": 2}, "sweep": {"targets": [{"params": 0.5}]}}
    options |= {name: {"target": {"params": 0.5}} for name in ("compress", "deep_compress")}
    model, batches = torch.nn.Sequential(torch.nn.Linear(3, 3)), [torch.zeros(2, 3)]
    evaluate = raises(AssertionError("evaluated"))
    with pytest.raises((ValueError, ps.LayerNotFoundError), match=said):
        getattr(ps, verb)(model, batches, ignore=[ignore], evaluate=evaluate, **options.get(verb, {}))


def test_samples_beyond_the_limit_and_gaps_that_a_network_fills_may_hold_anything(home):
    x = np.load("inputs.npy")
    x[200] = np.nan
    np.save("late.npy", x)
    command = ("prune", "--data", "late.npy", "--amount", "0.5", "--method", "magnitude", "--quiet")
    assert run(*command, "mine:make", "--samples", "100").exit_code == 0
    assert run(*command, "mine:fills", "--overwrite").exit_code == 0
    assert run(*command, "mine:make").exit_code == 2


def test_a_place_that_cannot_be_written_costs_no_work(home, monkeypatch):
    def no_work(*args, **options):
        raise AssertionError("work was done")

    monkeypatch.setattr("pysolve.cli.commands.load_network", no_work)
    (home / "full/report.md").mkdir(parents=True)
    for out, said in (("full", "report.md cannot be written"), ("mine.py", "is a file")):
        result = run("compress", "mine:make", "--data", "inputs.npy", "--overwrite", "--out", out)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    monkeypatch.setattr("tempfile.TemporaryFile", raises(PermissionError(13, "Permission denied")))
    result = run("compress", "mine:make", "--data", "inputs.npy", "--out", "new/folder")
    assert result.stderr == "Error: nothing can be written to --out new/folder: Permission denied\n"
    assert not (home / "new").exists()


def raises(error):
    def function(*args, **options):
        raise error

    return function


def test_a_failure_at_the_end_leaves_the_files_that_were_there(home, monkeypatch):
    command = ("prune", "mine:make", "--data", "inputs.npy", "--amount", "0.5", "--method", "magnitude")
    assert run(*command).exit_code == 0
    before = {path.name: path.read_bytes() for path in (home / "pruned").iterdir()}
    monkeypatch.setattr(os, "replace", raises(OSError(28, "No space left on device")))
    result = run(*command, "--overwrite")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in result.stderr
    assert {path.name: path.read_bytes() for path in (home / "pruned").iterdir()} == before
    assert run(*command, "--out", "new").exit_code == 2
    assert not (home / "new").exists()


@pytest.mark.parametrize("most", [0, 300, 1000])
@pytest.mark.parametrize(
    "command",
    [
        ("prune", "mine:make", "--data", "inputs.npy", "--amount", "0.5", "--method", "magnitude"),
        ("sweep", "mine:make", "--data", "inputs.npy", "--target", "params=0.5"),
        ("study", "mine:make", "--data", "inputs.npy"),
    ],
)
def test_a_full_disk_is_one_line_and_status_2(home, command, most):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        result = run(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (result.exit_code, result.stderr.count("Error: ")) == (2, 1), result.output
    assert "cannot be written: File too large. It needs " in result.stderr
    assert not [*home.rglob("*.part")]


def test_json_and_quiet_print_nothing_else(home):
    command = ("compress", "mine:make", "--data", "mine:batches", "--target", "macs=0.5")
    result = run(*command, "--json")
    assert json.loads(result.stdout)["target"] == {"macs": 0.5}
    assert result.stderr == ""
    result = run(*command, "--quiet", "--overwrite", "--distill", "1e", "--round-to", "4", "--ignore", "re:4")
    assert (result.exit_code, result.output) == (0, "")
    report = json.loads((home / "compressed/report.json").read_text())
    assert all(site["kept"] % 4 == 0 for site in report["sites"] if site["pinned"] is None)


@pytest.mark.parametrize(
    ("method", "layout"), [("obs", "dense"), ("magnitude", "dense"), ("magnitude", "sparse"), ("ln", "dense")]
)
def test_prune_writes_a_network_that_loads_and_its_report(home, method, layout):
    arguments = ("prune", "mine:make", "--data", "mine:batches", "--method", method, "--amount", "0.5")
    result = run(*arguments, "--test", "labelled.npz", "--layout", layout)
    assert result.exit_code == 0, result.output
    report = json.loads((home / "pruned/report.json").read_text())
    assert report["after"]["nonzeros"] < 0.6 * report["before"]["nonzeros"]
    smaller = ps.load("pruned/network.safetensors", load_network("mine:make"))
    assert sum(int(p.count_nonzero()) for p in smaller.parameters()) == report["after"]["nonzeros"]
    assert bool(report["layers"]) == (method != "ln")


@pytest.mark.parametrize(
    "how",
    [("--target", "params=0.6"), ("--rank", "3"), ("--energy", "0.9"), ("--target", "params=0.6", "--prune")],
)
def test_low_rank_writes_a_network_that_loads_and_its_report(home, how):
    arguments = ("low-rank", "mine:make", "--data", "mine:batches", "--layout", "factored", *how)
    result = run(*arguments, "--test", "labelled.npz")
    assert result.exit_code == 0, result.output
    report = json.loads((home / "factored/report.json").read_text())
    smaller = ps.load("factored/network.safetensors", load_network("mine:make"))
    assert parameters(smaller) == report["after"]["params"] < report["before"]["params"]
    assert "--prune" in how or any("rank" in layer["layout"] for layer in report["layers"])


@pytest.mark.parametrize(
    "how",
    [
        (),
        ("--scheme", "int8", "--bits", "6", "--group", "4"),
        ("--scheme", "codebook", "--bits", "3", "--layout", "shared"),
        ("--scheme", "codebook", "--target", "bytes=0.4", "--distill", "1e"),
        ("--scheme", "ternary", "--method", "nearest", "--ignore", "4"),
    ],
    ids=str,
)
def test_quantize_writes_a_network_that_loads_and_its_report(home, how):
    arguments = ("quantize", "mine:make", "--data", "mine:batches", "--test", "labelled.npz")
    result = run(*arguments, "--state-dict", *how)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (home / "quantized").iterdir()) == [
        "network.safetensors",
        "plan.json",
        "report.html",
        "report.json",
        "report.md",
        "state_dict.safetensors",
    ]
    report = json.loads((home / "quantized/report.json").read_text())
    assert report["after"]["file"] == os.path.getsize("quantized/network.safetensors")
    assert report["before"]["file"] == report["before"]["bytes"]
    assert all(layer["bits"] <= 8 for layer in report["layers"])
    smaller = ps.load("quantized/network.safetensors", load_network("mine:make"))
    assert {*load_file("quantized/state_dict.safetensors")} == {*smaller.state_dict()}
    assert parameters(smaller) == report["after"]["params"] == report["before"]["params"]
    assert "## Weights by layer" in (home / "quantized/report.md").read_text()
    if "--target" in how:
        assert report["after"]["file"] <= 0.4 * report["before"]["bytes"]


@pytest.mark.parametrize(
    ("how", "stages"),
    [
        (("--bytes", "1500", "--target", "params=1"), ["original", "shared", "coded"]),
        (("--target", "bytes=0.35"), None),
        (
            ("--target", "params=0.6", "--zeros", "0.5", "--bits", "4", "--distill", "2e"),
            ["original", "collapsed", "matched", "sparse", "shared, matched", "coded"],
        ),
    ],
    ids=str,
)
def test_deep_compress_writes_a_network_that_loads_and_its_stages(home, how, stages):
    arguments = ("deep-compress", "mine:make", "--data", "mine:batches", "--test", "labelled.npz")
    result = run(*arguments, *how)
    assert result.exit_code == 0, result.output
    report = json.loads((home / "deep/report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == stages or stages is None
    assert {*report["stages"][0]} == {field.name for field in fields(Stage)}
    size = os.path.getsize("deep/network.safetensors")
    assert report["after"]["file"] == report["stages"][-1]["bytes"] == size
    assert size <= report["target"].get("bytes", size) * (report["before"]["file"] if stages is None else 1)
    smaller = ps.load("deep/network.safetensors", load_network("mine:make"))
    assert parameters(smaller) == report["after"]["params"]
    assert "## Stages" in (home / "deep/report.md").read_text()
    assert "<h2>Stages</h2>" in (home / "deep/report.html").read_text()
    assert re.search(r"stage +bytes", result.stdout)


def test_sweep_shows_every_size(home):
    command = ("sweep", "mine:make", "--data", "mine:batches", "--test", "labelled.npz")
    result = run(*command, "--target", "params=0.7", "--target", "macs=0.5")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 4
    assert (home / "swept/pareto.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((home / "swept/sweep.json").read_text())
    assert [row["target"] for row in rows] == [{"params": 0.7}, {"macs": 0.5}]
    assert json.loads(run(*command, "--overwrite", "--json").stdout)[2]["target"] == {"params": 0.1}
    # None of the networks before is left.
    names = sorted(path.stem for path in (home / "swept/networks").iterdir())
    assert names == ["params=0.1", "params=0.25", "params=0.5"]


def test_sweep_needs_no_labels(home):
    result = run("sweep", "mine:make", "--data", "mine:batches", "--target", "params=0.7", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["score_after"] is None
    assert row["divergence"] > 0
    assert (home / "swept/pareto.png").read_bytes().startswith(b"\x89PNG")
    smaller = ps.load(home / "swept/networks/params=0.7.safetensors", load_network("mine:make"))
    assert parameters(smaller) == row["after"]["params"]


def test_a_written_report_is_shown_again(home):
    command = ("mine:make", "--data", "mine:batches", "--target", "params=0.5")
    shown = run("compress", *command).stdout.rsplit("\nWrote", 1)[0]
    for place in ("compressed", "compressed/report.json"):
        assert run("report", place).stdout == f"{shown}\n"
    assert json.loads(run("report", "compressed", "--json").stdout)["target"] == {"params": 0.5}
    shown = run("sweep", *command, "--target", "macs=0.7").stdout.rsplit("\nWrote", 1)[0]
    assert run("report", "swept").stdout == f"{shown}\n"


def test_notes_are_said_on_the_way_where_asked(home, caplog):
    command = ("compress", "mine:make", "--data", "mine:batches", "--target", "params=0.5", "--quiet")
    logger = logging.getLogger("pysolve")
    try:
        assert run(*command, "--overwrite").exit_code == 0
        assert not [one for one in caplog.records if one.name == "pysolve"]
        assert run("-v", *command, "--overwrite").exit_code == 0
        assert [one for one in caplog.records if one.name == "pysolve"]
    finally:
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("content", ["", "[", "{}", "[1]", '"x"', '{"before": 1, "after": {}}'])
def test_what_is_no_report_is_refused(home, content):
    (home / "some.json").write_text(content)
    for file in ("some.json", "none.json", "."):
        result = run("report", file)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1


def test_a_function_of_the_network_scores_it(home):
    command = ("compress", "mine:make", "--data", "mine:batches", "--json", "--overwrite", "--test")
    labelled = json.loads(run(*command, "mine:labelled").stdout)
    result = run(*command, "mine:rated")
    assert result.exit_code == 0, result.output
    scored = json.loads(result.stdout)
    for when in ("score_before", "score_after"):
        assert scored[when] == pytest.approx(labelled[when], rel=1e-6)
    for name, said in (("mine:words", "must return a number"), ("mine:broken_score", "failed: KeyError")):
        result = run(*command, name)
        assert result.exit_code == 2
        assert said in result.stderr


def test_a_study_takes_the_place_of_the_data(home):
    command = ("study", "mine:make", "--data", "mine:batches", "--memory", "1GiB", "--checkpoint", "sums")
    for _ in range(2):
        # The second goes on from what the first left: all of it.
        result = run(*command, "--overwrite")
        assert result.exit_code == 0, result.output
        assert "wrote study.safetensors" in result.stdout
    options = ("--study", "study.safetensors", "--target", "params=0.5", "--quiet")
    assert run("compress", "mine:make", *options).exit_code == 0
    found = (home / "compressed/network.safetensors").read_bytes()
    options = ("--data", "mine:batches", "--target", "params=0.5", "--quiet")
    assert run("compress", "mine:make", *options, "--overwrite").exit_code == 0
    assert (home / "compressed/network.safetensors").read_bytes() == found
    for wrong in ((), ("--data", "mine:batches", "--study", "study.safetensors")):
        result = run("compress", "mine:make", "--overwrite", *wrong)
        assert result.exit_code == 2
        assert "give --data, or --study" in result.output


def test_solve_certifies_and_writes_the_solution(home):
    x = np.random.default_rng(0).standard_normal((200, 10))
    r_xx, r_yx = x.T @ x / 200, (x[:, :2] @ np.ones((2, 3))).T @ x / 200
    np.savez("problem.npz", r_xx=r_xx, r_yx=r_yx)
    result = run("solve", "problem.npz", "--lam", "0.3", "--out", "solution.npz", "--json")
    found = json.loads(result.stdout)
    assert found["relative_gap"] <= 1e-8
    with np.load("solution.npz") as file:
        written = dict(file)
    assert len(written["keep"]) == found["kept"] < 10
    certificate = ps.certify(r_xx, r_yx, written["M"], found["lam"])
    assert certificate.relative_gap <= 1e-7
    assert found["lam"] == pytest.approx(0.3 * ps.lam_max(r_xx, r_yx))
    assert run("solve", "problem.npz", "--lam", "0.2", "--absolute").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "mine", "--data", "inputs.npy"), "expected package.module:factory"),
        (("inspect", "mine:nothing", "--data", "inputs.npy"), "mine has no 'nothing'"),
        (("inspect", "mine:number", "--data", "inputs.npy"), "must be callable, got int"),
        (("inspect", "mine:batches", "--data", "inputs.npy"), "must return a torch.nn.Module, got list"),
        (("inspect", "mine:make", "--data", "mine:score"), "must return batches, got float"),
        (("inspect", "not_there:make", "--data", "inputs.npy"), "No module named 'not_there'"),
        (("inspect", "mine:make", "--data", "nothing.npy"), "no file nothing.npy"),
        (("inspect", "mine:make", "--data", "nothing"), "no folder, no .npy or .npz file"),
        (("inspect", "mine:make", "--data", "mine.npz"), "no file mine.npz"),
        (("inspect", "mine:make", "--data", "broken.npz"), "cannot be read"),
        (("inspect", "mine:make", "--data", "inputs.npy", "--weights", "no.pt"), "no file no.pt"),
        (("inspect", "mine:make", "--data", "inputs.npy", "--weights", "mine.py"), "not a file of tensors"),
        (("inspect", "mine:make", "--data", "inputs.npy", "--weights", "other.safetensors"), "does not fit"),
        (("compress", "mine:make", "--data", "inputs.npy", "--target", "params"), "such as params=0.25"),
        (("compress", "mine:make", "--data", "inputs.npy", "--target", "size=0.5"), "size"),
        (("compress", "mine:make", "--data", "inputs.npy", "--distill", "long"), "such as 60s, 2m or 5e"),
        (("compress", "mine:make", "--data", "inputs.npy", "--select", "best"), "best"),
        (("compress", "mine:make", "--data", "inputs.npy", "--ignore", "7"), "no layer '7'"),
        (("evaluate", "mine:make", "--data", "inputs.npy"), "labels are needed"),
        (("low-rank", "mine:make", "--data", "inputs.npy", "--target", "ms=0.5"), "got ms"),
        (("compress", "mine:make", "--data", "inputs.npy", "--target", "ms=1e-9"), "ms cannot go below"),
        (("compress", "mine:make", "--data", "inputs.npy", "--device", "cuda:99"), "compute on 'cuda:99'"),
        (("evaluate", "mine:make", "--data", "labelled.npz", "--device", "toaster"), "compute on 'toaster'"),
        (("evaluate", "mine:make", "--data", "wide.npz"), "cannot be multiplied"),
        (("prune", "mine:make", "--data", "inputs.npy"), "exactly one of amount"),
        (("prune", "mine:make", "--data", "inputs.npy", "--pattern", "3"), 'must be like "2:4"'),
        (("quantize", "mine:make", "--data", "inputs.npy", "--scheme", "float"), "unknown scheme 'float'"),
        (("quantize", "mine:make", "--data", "inputs.npy", "--target", "bytes=0.1"), "a target needs"),
        (("quantize", "mine:make", "--data", "inputs.npy", "--distill", "long"), "such as 60s, 2m or 5e"),
        (("deep-compress", "mine:make", "--data", "inputs.npy"), "zeros or bits"),
        (
            ("deep-compress", "mine:make", "--data", "inputs.npy", "--bytes", "-1"),
            "target for bytes must be",
        ),
        (
            ("deep-compress", "mine:make", "--data", "inputs.npy", "--bytes", "nan"),
            "target for bytes must be",
        ),
        (("deep-compress", "mine:make", "--data", "inputs.npy", "--bytes", "100"), "Give a larger target"),
        (("inspect", "mine:make", "--data", "text.npy"), "text.npy cannot be read: it is no file of NumPy's"),
        (
            ("inspect", "mine:make", "--data", "objects.npy"),
            "it holds Python objects: save arrays of numbers",
        ),
        (("inspect", "mine:make", "--data", "inputs.npy", "--weights", "empty.pt"), "read: it is empty"),
        (("solve", "inputs.npy"), "must be an .npz file with r_xx and r_yx, but it has x"),
        (("solve", "text.npy"), "text.npy cannot be read: it is no file of NumPy's"),
        (("solve", "nothing.npz"), "there is no file nothing.npz"),
        (("solve", "problem.npz", "--lam", "-1"), "lam must be positive and finite, at most 1e+90, got -1.0"),
        (("solve", "zero.npz"), "r_yx in zero.npz is zero"),
        (("solve", "problem.npz", "--out", "no/where.npz"), "there is no folder no"),
        (("solve", "problem.npz", "--out", "."), "what is there is no file"),
        (("inspect", "wrong:make", "--data", "inputs.npy"), "wrong cannot be imported: SyntaxError: "),
        (("inspect", "wrong:make", "--data", "inputs.npy"), "(wrong.py, line 1)"),
        (("inspect", "lacking:make", "--data", "inputs.npy"), "'nothing_at_all' (lacking.py, line 1)"),
        (("inspect", "leaves:make", "--data", "inputs.npy"), "SystemExit: 3 (leaves.py, line 2)"),
        (
            ("inspect", "mine.py:make", "--data", "inputs.npy"),
            "expected package.module:factory, as in import",
        ),
        (
            ("inspect", "mine:fails", "--data", "inputs.npy"),
            "mine:fails failed: KeyError: 'x' (mine.py, line",
        ),
        (
            ("inspect", "mine:needs", "--data", "inputs.npy"),
            "missing 1 required positional argument: 'width'",
        ),
        (("inspect", "mine:make", "--data", "mine:fails"), "mine:fails failed: KeyError: 'x'"),
        (("compress", "mine:make", "--data", "mine:stops"), "Error: KeyError: 'later' (mine.py, line"),
        (
            ("evaluate", "mine:Odd", "--data", "labelled.npz"),
            "Error: AssertionError: three only (mine.py, line",
        ),
        (("inspect", "mine:make", "--data", "mine:mapping"), "must return batches, got dict"),
        (("inspect", "mine:make", "--data", "words.npy"), "words.npy must hold an array of numbers"),
        (("inspect", "mine:make", "--data", "scalar.npy"), "one row a sample, got float32 of ()"),
        (("evaluate", "mine:make", "--data", "words.npz"), "labels must be class numbers, got <U1"),
        (("evaluate", "mine:make", "--data", "from_one.npz"), "expected labels of 0 … 2"),
        (("compress", "mine:make", "--data", "inputs.npy", "--ignore", "re:("), "is no regular expression"),
        (("prune", "mine:make", "--data", "inputs.npy", "--amount", "0.5", "--ignore", "re:("), "'re:('"),
        (
            ("compress", "mine:make", "--data", "inputs.npy", "--target", "params=1.5"),
            "integer above 1, got 1.5",
        ),
        (("compress", "mine:make", "--data", "inputs.npy", "--target", "params=3"), "the target is 3 ("),
        (("compress", "mine:make", "--data", "inputs.npy", "--target", "params=0.0001"), "(0.01 %)"),
        (
            ("compress", "mine:make", "--data", "inputs.npy", "--target", "macs=0.5", "--target", "macs=0.2"),
            "expected one target for macs, got 0.5 and 0.2",
        ),
        (
            ("deep-compress", "mine:make", "--data", "inputs.npy", "--bytes", "1k"),
            "such as params=0.25",
        ),
        (("compress", "mine:make", "--data", "inputs.npy", "--distill", "5.7e"), "epochs, got 5.7"),
        (("compress", "mine:make", "--data", "inputs.npy", "--distill", "nane"), "finite, got nan"),
        (("compress", "mine:make", "--data", "inputs.npy", "--device", "meta"), "compute on 'meta'"),
        (("compress", "mine:make", "--data", "inputs.npy", "--out", "mine.py"), "--out mine.py is a file"),
        (("compress", "mine:make", "--data", "inputs.npy", "--out", "mine.py/a"), "is below a file"),
        (
            ("sweep", "mine:make", "--data", "inputs.npy", "--test", "labelled.npz", "--out", "mine.py"),
            "a file",
        ),
        (("evaluate", "mine:make", "--data", "labelled.npz", "--compressed", "."), "give the file, of "),
        (("evaluate", "mine:make", "--data", "labelled.npz", "--compressed", "no"), "no: No such file"),
        (
            ("evaluate", "mine:make", "--data", "labelled.npz", "--compressed", "doubled.safetensors"),
            "which a state dict alone does not have",
        ),
        (
            ("evaluate", "mine:make", "--data", "labelled.npz", "--compressed", "same.pt"),
            "torch.save wrote it",
        ),
        (("inspect", "mine:make", "--data", "inputs.npy", "--weights", "."), ". is a folder"),
        (("inspect", "mine:make", "--data", "inputs.npy", "--weights", "whole.pt"), "Sequential. Others are"),
        (("inspect", "mine:make", "--data", "inputs.npy", "--weights", "epoch.pt"), "by name, got epoch"),
        (
            ("inspect", "mine:make", "--data", "inputs.npy", "--weights", "small.safetensors"),
            "as --compressed",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(home, arguments, message):
    (home / "broken.npz").write_bytes(b"PK\x03\x04broken")
    (home / "text.npy").write_text("1, 2, 3")
    (home / "empty.pt").touch()
    np.save("objects.npy", np.array([1, "a"], dtype=object))
    save_file({"0.weight": torch.zeros(3, 3)}, "other.safetensors")
    np.savez("wide.npz", x=np.zeros((4, 13)), y=np.zeros(4, int))
    np.savez("problem.npz", r_xx=np.eye(4), r_yx=np.ones((2, 4)))
    np.savez("zero.npz", r_xx=np.eye(4), r_yx=np.zeros((2, 4)))
    np.save("words.npy", np.array(["a", "b"]))
    np.save("scalar.npy", np.float32(3))
    np.savez("words.npz", x=np.zeros((2, 12)), y=np.array(["a", "b"]))
    np.savez("from_one.npz", x=np.zeros((3, 12)), y=np.arange(1, 4))
    (home / "wrong.py").write_text("def make(:")
    (home / "lacking.py").write_text("import nothing_at_all")
    (home / "leaves.py").write_text("import sys\nsys.exit(3)")
    torch.save(torch.nn.Sequential(torch.nn.ReLU()), "whole.pt")
    torch.save({"epoch": 3}, "epoch.pt")
    save_file({":coded": torch.zeros(1)}, "small.safetensors", {"pysolve": "2 0 0"})
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert not any((home / folder).exists() for folder in ("compressed", "pruned", "quantized", "deep"))


def test_debug_shows_where_an_error_came_from(home):
    result = run("--debug", "inspect", "mine:nothing", "--data", "inputs.npy")
    assert isinstance(result.exception, PysolveError)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_exits_with_130_and_leaves_nothing(home):
    result = run("compress", "mine:make", "--data", "mine:interrupted", "--quiet")
    assert (result.exit_code, result.output) == (130, "")
    assert not os.path.exists(home / "compressed")


@pytest.mark.slow
def test_ctrl_c_ends_a_process_with_130_and_leaves_nothing(home):
    command = [sys.executable, "-m", "pysolve", "compress", "mine:make", "--data", "mine:slow", "--quiet"]
    with subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True) as child:
        while not (home / "started").exists() and child.poll() is None:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (130, "")
    assert not os.path.exists(home / "compressed")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["params=0.25"], {"params": 0.25}),
        (["macs=0.5", "bytes=1e6"], {"macs": 0.5, "bytes": 1_000_000}),
        (["ms=0.5"], {"ms": 0.5}),
        (["ms=2.5"], {"ms": 2.5}),
    ],
)
def test_targets_are_shares_or_whole_numbers(given, expected):
    assert targets_of(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("60s", 60.0), ("2m", 120.0), ("45", 45.0), ("5e", {"epochs": 5}), ("0", 0.0)]
)
def test_times_are_seconds_minutes_or_epochs(given, expected):
    assert duration_of(given) == expected


def test_a_folder_has_a_part_to_learn_from_and_one_to_test_on(mnist_folder):
    assert len(load_samples(str(mnist_folder)).labelled()[0]) == 60_000
    assert len(load_samples(str(mnist_folder), train=False).labelled()[0]) == 10_000
    assert [len(batch) for batch in load_samples(str(mnist_folder)).batches(600)] == [250, 250, 100]


@pytest.mark.parametrize("verb", ["compress", "prune", "low_rank", "quantize", "deep_compress"])
def test_options_of_a_command_are_arguments_of_its_function(verb):
    command = next(one for one in app.registered_commands if one.callback.__name__ == verb)
    options = {*signature(command.callback).parameters} - {field.name for field in fields(Job)}
    assert options - {"state_dict", "bytes", "pretrained"} <= {*signature(getattr(ps, verb)).parameters}


@pytest.mark.slow
def test_a_folder_for_other_programs_is_written_where_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    (tmp_path / "decoder.py").write_text(
        textwrap.dedent("""
            import torch
            from families import made
            import transformers

            def make():
                return made(transformers, "llama")[0]

            def batches():
                torch.manual_seed(1)
                return [{"input_ids": torch.randint(30, (16, 6))} for _ in range(4)]
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("pysolve.nn.pretrained.reopening._run", opened_here)
    words = ["compress", "decoder:make", "--data", "decoder:batches", "--target", "params=0.8", "--quiet"]
    done = CliRunner().invoke(app, [*words, "--widths", "uniform", "--save-pretrained", "--out", "small"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "small/pretrained/config.json").read_text())
    assert record["intermediate_size"] < 12
    assert type(ps.load_pretrained(tmp_path / "small/pretrained")).__name__ == "LlamaForCausalLM"


def test_results_of_an_earlier_command_stay_or_are_replaced_whole(home):
    command = ("compress", "mine:make", "--data", "mine:batches", "--target", "macs=0.5", "-q")
    assert run(*command, "--state-dict").exit_code == 0
    before = {path.name: path.read_bytes() for path in (home / "compressed").iterdir()}
    for other in (
        command,
        ("sweep", "mine:make", "--data", "mine:batches", "--test", "labelled.npz", "--out", "compressed"),
    ):
        result = run(*other)
        assert (result.exit_code, "--overwrite" in result.stderr) == (2, True), result.stderr
        assert {path.name: path.read_bytes() for path in (home / "compressed").iterdir()} == before
    assert run(*command, "--overwrite").exit_code == 0
    assert {path.name for path in (home / "compressed").iterdir()} == before.keys() - {
        "state_dict.safetensors"
    }


def test_evaluate_takes_the_folder_that_compress_wrote(home):
    assert run("compress", "mine:make", "--data", "mine:batches", "-q").exit_code == 0
    found = [
        json.loads(
            run("evaluate", "mine:make", "--data", "labelled.npz", "--compressed", path, "--json").stdout
        )
        for path in ("compressed", "compressed/network.safetensors")
    ]
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert found[0]["params"] < parameters(load_network("mine:make"))


def test_help_has_a_short_name():
    assert "--overwrite" in re.sub(r"\x1b\[[0-9;]*m", "", run("compress", "-h").output)
