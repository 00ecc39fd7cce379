"""Imports point one way: a module imports only from rows below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pysolve"
ROWS = [
    {"cli"},
    {"cli_compress", "cli_quantize"},
    {"demo", "commands", "app"},
    {"sources", "show.page", "options"},
    {"pruning.methods", "lowrank.methods", "quantization.methods", "quantization.deep"},
    {"quantization.pipeline"},
    {"quantization.recipe"},
    {"pruning.channels", "pruning.training", "lowrank.choose", "quantization.layout"},
    {"quantization.within"},
    {"quantization.subject"},
    {"recipe", "pruning.weights", "lowrank.factoring", "quantization.retraining"},
    {"shrink", "pruning.layout", "lowrank.candidates", "quantization.worth", "quantization.network"},
    {"sizes", "checks", "pruning.selected"},
    {"show.figures", "show.plots", "study", "layerwise", "nn.checkpoint"},
    {"nn.architecture"},
    {"account", "calibrate", "show.curves", "offline", "nn.inspect", "compressed", "training.distill"},
    {"nn.graph.sites", "nn.costs", "nn.profile", "training.teaching"},
    {"nn.graph.trial", "nn.lockstep", "nn.calibration", "nn.dense", "nn.compact"},
    {
        "show.drawing",
        "nn.gather",
        "nn.surgery",
        "nn.packing",
        "nn.evaluate",
        "nn.graph.branches",
        "nn.modes",
        "nn.walk",
        "nn.nonzeros",
        "nn.sensitivity",
        "training.lessons",
        "training.goal",
    },
    {
        "nn.layers",
        "training.fit",
        "training.finetune",
        "nn.surgeon",
        "nn.verify",
        "nn.graph.labels",
        "nn.rows",
        "nn.values",
        "nn.divergence",
        "training.features",
    },
    {"nn.graph.layer_rules"},
    {"nn.graph.operators"},
    {"nn.graph.calls", "training.loop", "nn.sharing"},
    {
        "nn.graph.export",
        "nn.graph.classes",
        "training.options",
        "nn.masking",
        "nn.snapping",
        "nn.slicing",
        "nn.windows",
        "nn.factored",
        "nn.quantized",
    },
    {
        "nn.network",
        "nn.quant_weight",
        "nn.integers",
        "nn.zoo",
        "nn.storage",
        "nn.products",
        "training.resume",
        "training.optimizers",
    },
    # torch begins above this line
    {"lowrank.single", "quantization.single", "nn.coded", "nn.decoded"},
    {"lowrank.layer", "lowrank.shares"},
    {"lowrank.spatial"},
    {"lowrank.spectrum", "lowrank.ranks"},
    {"choice", "pruning.obs"},
    {
        "selection",
        "pruning.searches",
        "quantization.grids",
        "quantization.rates",
        "quantization.rounding",
    },
    {"path", "budget", "pruning.row_paths", "quantization.codebooks"},
    {"solvers", "elimination", "knapsack", "quantization.targets"},
    {"scaling", "solution", "prox", "pruning.supports", "certificate"},
    {"least_squares"},
    {
        "problem",
        "records",
        "cautions",
        "pruning.masks",
        "pruning.scores",
        "pruning.lamp",
        "quantization.clusters",
    },
    {"correlations", "plan", "datasets", "sparse", "report", "quantization.coding"},
    {"image_files", "forms", "entries", "show.tables", "quantization.huffman", "nn.distinct", "nn.zipped"},
    {"quantization.forms"},
    {"errors", "_core"},
]
_FIRST = next(i for i, row in enumerate(ROWS) if "lowrank.single" in row)
TORCH_FREE = set().union(*ROWS[_FIRST:])
PARTS = ("nn", "nn.graph", "lowrank", "training", "pruning", "quantization", "show")
PACKAGES = {"pysolve", *(f"pysolve.{name}" for name in PARTS)}
EXEMPT = {"__init__", "__main__", *(f"{name}.__init__" for name in PARTS)}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), ast.parse(path.read_text())


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def row_of(name):
    return next((i for i, row in enumerate(ROWS) if name in row), None)


@pytest.mark.parametrize(("name", "tree"), [m for m in modules() if m[0] not in EXEMPT])
def test_a_module_imports_only_from_rows_below(name, tree):
    own = row_of(name)
    assert own is not None, f"{name} has no row yet"
    for imported in imports(tree):
        if imported.startswith("pysolve.") and imported != "pysolve.__version__":
            other = row_of(imported.removeprefix("pysolve."))
            assert other is not None, f"{name} imports {imported}, which has no row"
            assert other > own, f"{name} imports {imported}"
        if imported.split(".")[0] == "torch":
            assert name not in TORCH_FREE, f"{name} imports torch"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, pysolve; assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
