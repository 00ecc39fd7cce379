"""The golden table: what every verb makes of three small networks, to compare later versions of pysolve with.

python bench/golden.py record [--only lenet,resnet20,transformer] [--verbs compress,prune,…]
python bench/golden.py compare [--only lenet,resnet20,transformer] [--verbs compress,prune,…]

Trained networks, unlabelled calibration, fixed seed, one thread. Of each call: the divergence from the
original and the accuracy on test data, bytes of the file, parameters, calls of torch.export, passes over the
calibration data (through the original, through other networks, operator by operator), and seconds. compare
runs the calls again, prints what was recorded | what is now, and exits with 1 where outputs became worse.
Weights are trained once; images, text and ResNet-20 come from the folder that PYSOLVE_DATA or --data names.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

# Threads of libraries count when these are loaded.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import torch
import typer
from safetensors.torch import load_file, save_file
from subjects import Subject, lenet, resnet20
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import pysolve as ps
from pysolve.compressed import Compressed
from pysolve.nn.cost import profile
from pysolve.nn.divergence import kl_divergence
from pysolve.nn.evaluate import parameters
from pysolve.nn.refit.walk import Walk
from pysolve.training.fit import fit

DATA = Path(os.environ.get("PYSOLVE_DATA", "data"))
TABLE = Path(__file__).with_name("golden.json")
CONTEXT, WIDTH, HEADS = 32, 64, 4
# What passes for equal: growth of the divergence, an absolute floor of it, and points of accuracy.
GROWTH, FLOOR, POINTS = 0.02, 1e-6, 0.1

# Targets of compress and low_rank, bytes of codebooks and of deep_compress. The transformer's MACs are 0.7
# and half of what its layers take: attention's products, 7 % of all, stay.
TARGETS: dict[str, tuple[list[dict[str, float]], list[dict[str, float]], list[float]]] = {
    "lenet": ([{"macs": 0.5}, {"params": 0.2}], [{"macs": 0.5}, {"params": 0.2}], [0.05, 0.02]),
    "resnet20": ([{"macs": 0.7}, {"macs": 0.5}], [{"macs": 0.7}, {"macs": 0.5}], [1 / 8, 1 / 16]),
    "transformer": (
        [{"macs": 0.7222}, {"macs": 0.537}],
        [{"macs": 0.7222}, {"macs": 0.537}],
        [1 / 6, 1 / 10],
    ),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Call = Callable[..., Compressed]
Rows = dict[str, dict[str, Any]]
OnlyOption = Annotated[str, typer.Option(help="Networks.")]
VerbsOption = Annotated[str, typer.Option(help="Calls: what their names start with; all by default.")]
DataOption = Annotated[Path, typer.Option(help="Folder with the networks, the images and the text.")]
WeightsOption = Annotated[Path, typer.Option(help="Folder for the weights that are trained here.")]
TableOption = Annotated[Path, typer.Option(help="JSON file with the recorded rows.")]


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network, batches to compress it with, and test samples with their labels."""

    model: nn.Module
    batches: list[Tensor]
    x: Tensor
    y: Tensor

    @property
    def samples(self) -> int:
        return sum(map(len, self.batches))

    @cached_property
    def outputs(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.x[:1000])

    @property
    def checksum(self) -> int:
        return zlib.crc32(b"".join(value.numpy().tobytes() for value in self.model.state_dict().values()))


@dataclass
class Row:
    """Of one call.

    Passes are samples through the original, through other networks and walked, over those given; seconds of
    the processor are the ones that repeat on a busy machine.
    """

    sizes: str
    divergence: float
    accuracy: float
    bytes: int
    parameters: int
    exports: int
    passes: tuple[float, ...]
    seconds: float
    cpu_seconds: float


@dataclass
class Counts:
    """Calls of torch.export, and samples through the original, through other networks, and walked."""

    exports: int = 0
    original: int = 0
    others: int = 0
    walked: int = 0


class Transformer(nn.Module):
    """A causal transformer of two blocks for (n, CONTEXT) characters; returns (n, CONTEXT, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(classes, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions)))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm1(x)
        q, k, v = (
            layer(read).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        heads = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


def images(subject: Subject, batches: int, tested: int) -> Network:
    x, y = (torch.from_numpy(values[:tested]) for values in (subject.x_test, subject.y_test))
    return Network(subject.model, subject.calibration[:batches], x, y)


def transformer(data: Path, weights: Path) -> Network:
    """Trained on nine tenths of the text, calibrated on windows of these, tested on the last tenth."""
    text = (data / "text" / "tinyshakespeare.txt").read_text()
    letters = sorted(set(text))
    codes = torch.tensor([*map({letter: i for i, letter in enumerate(letters)}.get, text)])
    early, late = codes.split([len(codes) * 9 // 10, len(codes) - len(codes) * 9 // 10])
    torch.manual_seed(0)
    model = Transformer(len(letters))
    path = weights / "transformer.safetensors"
    if not path.exists():
        x, y = windows(early, 50_000)
        fit(model, x, y, batch_size=64, loss=character_loss, epochs=1, lr=3e-3, seed=0, progress=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    batches = list(windows(early, 512, seed=1)[0].split(32))
    return Network(model.eval(), batches, *windows(late, 500))


def windows(codes: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Characters at random places, and those that follow them."""
    starts = torch.randint(len(codes) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(seed))
    places = starts + torch.arange(CONTEXT)
    return codes[places], codes[places + 1]


def character_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(0, 1), labels.flatten())


NETWORKS: dict[str, Callable[[Path, Path], Network]] = {
    "lenet": lambda data, weights: images(lenet(data, weights), 8, 10_000),
    "resnet20": lambda data, weights: images(resnet20(data, weights), 4, 2_000),
    "transformer": transformer,
}
ALL = ",".join(NETWORKS)


def calls(network: str) -> dict[str, Call]:
    """What is measured, by name; nothing that times layers."""
    channels, ranks, files = TARGETS[network]
    dense, book = {"layout": "dense"}, {"scheme": "codebook", "layout": "dense"}
    mended = {"method": "activation", "refit": "sequential", **dense}
    found: dict[str, Call] = {f"compress {told(t)}": partial(ps.compress, target=t) for t in channels}
    for method, scope, amounts in (("obs", "global", (0.8, 0.9)), ("magnitude", "local", (0.5, 0.7))):
        for share in amounts:
            how = {"method": method, "scope": scope, "amount": share, **dense}
            found[f"prune {method} {share}"] = partial(ps.prune, **how)
    for share in (0.3, 0.5):
        found[f"prune activation {share}"] = partial(ps.prune, amount=share, **mended)
    for prune in (False, True):
        for target in ranks:
            name = f"low_rank {'pruned ' * prune}{told(target)}"
            found[name] = partial(ps.low_rank, target=target, prune=prune, layout="factored")
    found["quantize int8"] = partial(ps.quantize, scheme="int8", **dense)
    for bits in (4, 3):
        found[f"quantize codebook {bits} bits"] = partial(ps.quantize, bits=bits, **book)
    for parts in (10, 16):
        found[f"quantize codebook 1/{parts}"] = partial(ps.quantize, target={"bytes": 1 / parts}, **book)
    for share in files:
        found[f"deep_compress {share:.3g}"] = partial(ps.deep_compress, target={"bytes": share})
    return found


def told(target: dict[str, float]) -> str:
    return ", ".join(f"{what} {share}" for what, share in target.items())


@contextmanager
def counting(model: nn.Module) -> Iterator[Counts]:
    """Count what a network of this class and copies of it are called with, and the walks through graphs."""
    counts, own = Counts(), tensors_of(model)
    export, forward, start = torch.export.export, type(model).forward, Walk.__init__

    @wraps(export)
    def exported(*args: Any, **kwargs: Any) -> Any:
        counts.exports += 1
        return export(*args, **kwargs)

    @wraps(forward)
    def called(self: nn.Module, x: Tensor) -> Any:
        # Subclasses of tensors are those of tracing.
        if type(x) is Tensor:
            same = self is model and all(map(lambda a, b: a is b, tensors_of(self), own))
            kind = "original" if same else "others"
            setattr(counts, kind, getattr(counts, kind) + len(x))
        return forward(self, x)

    @wraps(start)
    def walked(self: Walk, graph: Any, model: nn.Module, batches: Any, *args: Any, **kwargs: Any) -> None:
        counts.walked += sum(map(len, batches))
        start(self, graph, model, batches, *args, **kwargs)

    with (
        patch.object(torch.export, "export", exported),
        patch.object(type(model), "forward", called),
        patch.object(Walk, "__init__", walked),
        # The fewest calls that the report times, so that passes do not depend on the machine.
        patch.object(profile, "SECONDS", 0),
    ):
        yield counts


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def measured(network: Network, call: Call) -> dict[str, Any]:
    """The row of one call, or what it raised."""
    torch.manual_seed(0)
    try:
        with counting(network.model) as counts:
            start, cpu = time.perf_counter(), time.process_time()
            result = call(network.model, network.batches, progress=False)
            seconds = time.perf_counter() - start, time.process_time() - cpu
        row = judged(network, result, counts, *seconds)
    # One call that fails is a row like others.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return asdict(row)


def judged(network: Network, result: Compressed, counts: Counts, seconds: float, cpu_seconds: float) -> Row:
    model = result.model.eval()
    with torch.no_grad():
        divergence = kl_divergence(network.outputs, model(network.x[:1000])).item()
    passes = (n / network.samples for n in (counts.original, counts.others, counts.walked))
    return Row(
        sizes(result),
        divergence,
        score(network, model),
        ps.file_bytes(result, report=False),
        parameters(model),
        counts.exports,
        tuple(round(number, 3) for number in passes),
        seconds,
        cpu_seconds,
    )


def score(network: Network, model: nn.Module) -> float:
    """Per cent of the labels that the largest output is at."""
    with torch.no_grad():
        found = torch.cat([model(part).argmax(-1) for part in network.x.split(500)])
    return 100 * (found == network.y).double().mean().item()


def sizes(result: Compressed) -> str:
    """Channels of sites that can shrink, and ranks, bits or density by layer."""
    kept = [f"{site.kept}/{site.channels}" for site in result.report.sites if site.pinned is None]
    layers = [
        layer.layout.replace(", ", "-").removeprefix("rank ")
        if layer.layout.startswith("rank")
        else f"{layer.density:.0%}"
        if layer.bits is None
        else f"{layer.bits:.2f}b"
        for layer in result.report.layers
    ]
    return " ".join([*kept, *layers])


@app.command()
def record(
    only: OnlyOption = ALL,
    verbs: VerbsOption = "",
    data: DataOption = DATA,
    weights: WeightsOption = Path("results/golden"),
    table: TableOption = TABLE,
) -> None:
    """Measure and keep rows; those of other calls stay as they are, unless the network is another."""
    kept = read(table)
    for name, network, found in runs(only, verbs, data, weights):
        if kept.get(name, {}).get("checksum") != network.checksum:
            kept[name] = {"checksum": network.checksum, "original": score(network, network.model), "rows": {}}
        for call, run in found.items():
            row = kept[name]["rows"][call] = measured(network, run)
            write(table, kept)
            print(f"{name:11} {call:27} {line(row, row)}", flush=True)


@app.command()
def compare(
    only: OnlyOption = ALL,
    verbs: VerbsOption = "",
    data: DataOption = DATA,
    weights: WeightsOption = Path("results/golden"),
    table: TableOption = TABLE,
) -> None:
    """Measure again, beside what was recorded; status 1 where outputs became worse."""
    kept, worse = read(table), []
    for name, network, found in runs(only, verbs, data, weights):
        if kept.get(name, {}).get("checksum") != network.checksum:
            raise typer.BadParameter(f"{table} has no rows of {name} with the weights in {weights}.")
        for call, run in found.items():
            if (old := kept[name]["rows"].get(call)) is None:
                print(f"{name:11} {call:27} was not recorded", flush=True)
                continue
            new = measured(network, run)
            print(f"{name:11} {call:27} {line(old, new)}", flush=True)
            if why := harm(old, new):
                worse.append(f"{name}, {call}: {why}")
    print("\n".join(["Worse:", *worse] if worse else ["Nothing is worse."]))
    raise typer.Exit(int(bool(worse)))


def runs(only: str, verbs: str, data: Path, weights: Path) -> Iterator[tuple[str, Network, dict[str, Call]]]:
    """Networks by name, with the calls that were asked for."""
    torch.set_num_threads(1)
    names = only.split(",")
    if unknown := set(names) - set(NETWORKS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {ALL}.")
    for name in names:
        network = NETWORKS[name](data, weights)
        # What torch loads at its first export would count for the first call.
        ps.inspect(network.model, network.batches[0][:2])
        found = {call: run for call, run in calls(name).items() if call.startswith(tuple(verbs.split(",")))}
        print(f"{name}: accuracy {score(network, network.model):.2f}", flush=True)
        yield name, network, found


def harm(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In what a row became worse; nothing if it did not."""
    if "error" in old or "error" in new:
        return new["error"] if "error" in new and "error" not in old else ""
    found = []
    if not new["divergence"] <= old["divergence"] * (1 + GROWTH) + FLOOR:
        found.append(f"divergence {old['divergence']:.6g} to {new['divergence']:.6g}")
    if not new["accuracy"] >= old["accuracy"] - POINTS - 1e-9:
        found.append(f"accuracy {old['accuracy']:.2f} to {new['accuracy']:.2f}")
    return ", ".join(found)


def line(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Two rows side by side, or one where they are the same object."""
    if "error" in old or "error" in new:
        return " | ".join(dict.fromkeys(row.get("error", "no error") for row in (old, new)))
    forms = {
        "divergence": lambda n: f"{n:10.4g}",
        "accuracy": lambda n: f"{n:6.2f}",
        "bytes": lambda n: f"{n:9,}",
        "parameters": lambda n: f"{n:8,}",
        "exports": lambda n: f"{n:2}",
        "passes": lambda all: " ".join(f"{n:6.2f}" for n in all),
        "seconds": lambda n: f"{n:6.1f}",
        "cpu_seconds": lambda n: f"{n:6.1f}",
    }
    pair = (new,) if old is new else (old, new)
    parts = [
        f"{what.replace('_', ' ')} {' | '.join(form(row[what]) for row in pair)}"
        for what, form in forms.items()
    ]
    if old is not new:
        parts.append(f"({new['cpu_seconds'] / old['cpu_seconds']:.2f} times as long)")
    differing = dict.fromkeys(row["sizes"] for row in pair)
    parts.append("same sizes" if len(differing) < len(pair) else f"sizes {' | '.join(differing)}")
    return "  ".join(parts)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, kept: dict[str, Any]) -> None:
    """Never half a file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    app()
