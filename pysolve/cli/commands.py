"""Work of the commands, where torch may be imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from shlex import join

import torch
import typer
from safetensors.torch import save as tensors
from torch import nn

import pysolve as ps
from pysolve.cli.inputs import load_network, load_samples, load_score
from pysolve.cli.options import Value
from pysolve.cli.outputs import check_new, folder, write
from pysolve.errors import DataError, PysolveError
from pysolve.nn.evaluate import accuracy, latency, macs, nbytes, parameters
from pysolve.nn.files.plan_json import plain, plan_record
from pysolve.nn.progress import stage, whole
from pysolve.nn.running import Batch
from pysolve.report.page import page
from pysolve.report.plots import plot_pareto
from pysolve.report.report import Report, comparison
from pysolve.tables import Table, as_text
from pysolve.whole_files import replacing_folder

# Titles of reports: what became of the network.
_DONE = {
    "compress": "compressed",
    "prune": "pruned",
    "low_rank": "factored",
    "quantize": "quantized",
    "deep_compress": "compressed deeply",
}


def show_sites(
    network: str,
    data: str,
    weights: Path | None,
    ignore: Sequence[str],
    expect: bool,
    limit: int,
    device: str,
    as_json: bool,
) -> None:
    """Print which channels of a network can be removed, and what targets would cost where asked for."""
    model = load_network(network, weights, device)
    samples = load_samples(data)
    batch = next(iter(samples.batches(1, device)), None)
    if batch is None:
        raise DataError("the data hold no batch.")
    samples.check_finite(model, 1, "--data")
    found = ps.inspect(model, batch, ignore=ignore or ())
    record, lines = asdict(found), [str(found)]
    if expect:
        given = _batches(model, data, limit, device)
        told = ps.compress(
            model, given, target={"macs": 0.5}, ignore=ignore or (), progress=not as_json, dry_run=True
        ).report
        record["expected"] = [asdict(one) for one in told.expected]
        lines += as_text(told.targets())
    typer.echo(json.dumps(record, indent=1, default=str) if as_json else "\n".join(lines))


@dataclass(frozen=True)
class Job:
    """One compression: network, data, and where the result is written; ``limit`` is of an array's inputs."""

    network: str
    data: str | None
    study: Path | None
    weights: Path | None
    test: str | None
    out: Path
    overwrite: bool
    device: str
    limit: int
    as_json: bool
    quiet: bool

    @property
    def progress(self) -> bool:
        """Whether to show progress bars."""
        return not (self.quiet or self.as_json)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report is to say of the input."""
        return () if self.weights else (_no_weights(self.network),)

    def inputs(self) -> tuple[nn.Module, Iterable[Batch], Callable[[nn.Module], float] | None]:
        """Network, batches or a study, and a score of a network."""
        if (self.data is None) == (self.study is None):
            raise DataError("give --data, or --study with a file that pysolve study wrote.")
        model = load_network(self.network, self.weights, self.device)
        batches = (
            _batches(model, self.data or "", self.limit, self.device)
            if self.study is None
            else ps.Study.load(self.study, model)
        )
        return model, batches, None if self.test is None else load_score(self.test, model)

    def show(self, as_text: str, as_data: object, written: Sequence[str]) -> None:
        """Print the result, and which files were written."""
        if self.as_json:
            typer.echo(json.dumps(as_data, indent=1))
        elif not self.quiet:
            typer.echo(f"{as_text}\nWrote {', '.join(written)} to {self.out}/" if written else as_text)


def _no_weights(network: str) -> str:
    return f"no --weights: they are those that {network} made, random unless it loads trained ones"


def _parted(given: Mapping[str, Value]) -> tuple[Job, dict[str, Value]]:
    """The job, and the other options that were given, as arguments of a verb."""
    names = {field.name for field in fields(Job)}
    options = {name: value for name, value in given.items() if name not in names and value not in (None, [])}
    for name, parse in (("target", targets_of), ("distill", duration_of)):
        if name in options:
            options[name] = parse(options[name])
    return Job(**{name: given[name] for name in names}), options


def write_compressed(verb: str, given: Mapping[str, Value]) -> None:
    """Make a network smaller by a function of pysolve, and write it with its report."""
    job, options = _parted(given)
    state_dict, pretrained = options.pop("state_dict"), options.pop("pretrained", False)
    if options.get("dry_run"):
        model, batches, score = job.inputs()
        told = ps.compress(model, batches, evaluate=score, progress=job.progress, **options).report
        told = replace(told, notes=(*job.notes, *told.notes))
        job.show(str(told), plain(told.as_dict()), ())
        return
    written = ["network.safetensors", "plan.json", "report.json", "report.md", "report.html"]
    written += ["state_dict.safetensors"] * state_dict + ["pretrained"] * pretrained
    with folder(job.out, written, overwrite=job.overwrite), whole(verb, job.progress):
        stage("load")
        model, batches, score = job.inputs()
        result = getattr(ps, verb)(model, batches, evaluate=score, progress=job.progress, **options)
        ps.save(result, job.out / written[0])
        if state_dict:
            # Tensors of several names are written under each, for load_state_dict.
            state = {name: value.clone() for name, value in result.model.state_dict().items()}
            write(job.out / "state_dict.safetensors", tensors(state))
        # Sizes of the network's file, and of one for the original where it has none.
        before = dict(result.report.before)
        before.setdefault("file", len(tensors(_once(model))))
        after = {**result.report.after, "file": (job.out / written[0]).stat().st_size}
        notes = (*job.notes, *result.report.notes)
        report = replace(result.report, before=before, after=after, notes=notes)
        title = f"{job.network}, {_DONE[verb]}"
        # Channels and ranks are two stages.
        *earlier, plan = map(plan_record, (*result.earlier, result.plan))
        record = plain(report.as_dict())
        write(job.out / "plan.json", json.dumps({**plan, "earlier": earlier} if earlier else plan, indent=1))
        write(job.out / "report.json", json.dumps(record, indent=1))
        write(job.out / "report.md", f"# {title}\n\n{report.as_markdown()}")
        write(job.out / "report.html", page(report, title, _made_by()))
        if pretrained:
            ps.save_pretrained(result, job.out / "pretrained", overwrite=True)
    job.show(str(report), record, written)


def _made_by() -> dict[str, str]:
    """Day and command, for the page."""
    return {"day": date.today().isoformat(), "command": join(["pysolve", *sys.argv[1:]])}


def _once(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a network, tensors of several names under the first alone."""
    first: dict[tuple[int, torch.Size], str] = {}
    state = model.state_dict()
    for name, value in state.items():
        first.setdefault((value.data_ptr(), value.shape), name)
    return {name: state[name] for name in first.values()}


def write_study(given: Mapping[str, Value]) -> None:
    """Gather what any verb needs of a network, and write it to a file."""
    out, device, quiet = Path(given["out"]), given["device"], given["quiet"]
    check_new(out, overwrite=given["overwrite"])
    model = load_network(given["network"], given["weights"], device)
    batches = _batches(model, given["data"], given["limit"], device)
    options = {name: given[name] for name in ("memory", "checkpoint")}
    found = ps.study(model, batches, ignore=given["ignore"] or (), progress=not quiet, **options)
    found.save(out)
    if not quiet:
        notes = () if given["weights"] else (_no_weights(given["network"]),)
        typer.echo("\n".join([f"{found}: wrote {out}", *notes, *found.notes]))


def _batches(model: nn.Module, data: str, limit: int, device: str) -> Iterable[Batch]:
    samples = load_samples(data)
    samples.check_finite(model, limit, "--data")
    return samples.batches(limit, device)


def write_sweep(given: Mapping[str, Value]) -> None:
    """Compress a network to many sizes after one pass over the data, and write the reports."""
    targets = [targets_of([one]) for one in given["target"]]
    job, options = _parted({**given, "target": None})
    written = ["sweep.json", "pareto.png", "networks"]
    with folder(job.out, written, overwrite=job.overwrite), whole("sweep", job.progress):
        stage("load")
        model, batches, score = job.inputs()
        found = ps.sweep(model, batches, targets=targets, evaluate=score, progress=job.progress, **options)
        reports = [replace(report, notes=(*job.notes, *report.notes)) for report in found.reports]
        with replacing_folder(job.out / "networks") as networks:
            for given_target, result in zip(given["target"], found, strict=True):
                ps.save(result, networks / f"{given_target}.safetensors")
        rows = [plain(report.as_dict()) for report in reports]
        write(job.out / "sweep.json", json.dumps(rows, indent=1))
        plot_pareto(reports, path=job.out / "pareto.png")
    job.show("\n".join(as_text(comparison(reports))), rows, written)
    if job.progress:
        # What the table has no room for.
        for text in dict.fromkeys((*job.notes, *(text for report in reports for text in report.warnings))):
            typer.echo(text, err=True)


def show_report(file: Path, as_json: bool) -> None:
    """Print a report that a command has written, or several of a sweep."""
    names = ("report.json", "sweep.json")
    inside = next((file / name for name in names if (file / name).is_file()), file)
    if not inside.is_file():
        raise DataError(f"there is no report {inside}: give report.json, sweep.json, or a folder with one.")
    try:
        record = json.loads(inside.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{inside} is no JSON file: {error}") from error
    several = isinstance(record, list)
    reports = [Report.from_dict(one) for one in (record if several else [record])]
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        typer.echo("\n".join(as_text(comparison(reports))) if several else str(reports[0]))


def evaluate_network(
    network: str,
    data: str,
    weights: Path | None,
    compressed: Path | None,
    batch: int,
    device: str,
    as_json: bool,
) -> None:
    """Print a network's accuracy on labelled data, its costs, and how long a batch takes."""
    model = load_network(network, weights, device)
    if compressed is not None:
        inside = compressed / "network.safetensors"
        model = ps.load(inside if inside.exists() else compressed, model)
    samples = load_samples(data, train=False)
    x, y = samples.labelled()
    samples.check_finite(model, len(x), "--data")
    time = latency(model, x[:batch])
    found = {
        "accuracy": accuracy(model, x, y),
        "params": parameters(model),
        "macs": macs(model, torch.from_numpy(x[:1])),
        "bytes": nbytes(model),
        "latency_ms": 1e3 * time.median,
        "batch": time.batch_size,
        "threads": time.threads,
    }
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    if weights is None and compressed is None:
        typer.echo(_no_weights(network), err=True)
    threads = f"{time.threads} thread{'s' * (time.threads > 1)}"
    rows = (
        ("accuracy", f"{found['accuracy']:.2f} % of {len(x):,}"),
        ("parameters", f"{found['params']:,}"),
        ("MACs a sample", f"{found['macs']:,}"),
        ("bytes in memory", f"{found['bytes']:,}"),
        ("latency", f"{time} for {time.batch_size} samples on {threads}"),
    )
    typer.echo("\n".join(as_text(Table("", ("", ""), rows, words=(0, 1)))).strip("\n"))


def targets_of(given: Sequence[str]) -> dict[str, float]:
    """Parse ``params=0.25`` into {"params": 0.25}."""
    found: dict[str, float] = {}
    for item in given:
        measure, _, text = item.partition("=")
        value = _number(text)
        if value is None:
            raise PysolveError(f"expected a target such as params=0.25 or macs=0.5, got {item!r}.")
        if measure in found:
            raise PysolveError(f"expected one target for {measure}, got {found[measure]:,} and {value:,}.")
        # A share up to 1, or else an integer.
        found[measure] = _whole(value) if value > 1 else value
    return found


def duration_of(given: str) -> float | dict[str, float]:
    """Parse ``60s``, ``2m`` or ``60`` into seconds, ``5e`` into epochs."""
    number, unit = (given[:-1], given[-1]) if given[-1:] in ("s", "m", "e") else (given, "s")
    value = _number(number)
    if value is None:
        raise PysolveError(f"expected a time such as 60s, 2m or 5e (epochs), got {given!r}.")
    return {"epochs": _whole(value)} if unit == "e" else value * (60 if unit == "m" else 1)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(value: float) -> float:
    """An integer where the value is one; what it is otherwise is told where it is used."""
    return int(value) if value.is_integer() else value
