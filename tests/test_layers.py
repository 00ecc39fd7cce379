"""Imports point one way: a room imports only from rooms below it, and no imports form a circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "pysolve"
NOUNS = {"errors", "correlations", "forms", "plan", "compressed", "tables", "_core"}
# A room imports from itself and from those behind it; report and layer do not know each other.
ROOMS = ["__main__", "cli", "methods", "training", "nn", "report", "layer", "solve", "nouns"]


def imports(path, modules):
    """Modules that a file imports, at once or later, but for those of names in annotations alone."""
    tree = ast.parse(path.read_text())
    types = {n for one in ast.walk(tree) if isinstance(one, ast.If) for n in ast.walk(one)}
    for node in (one for one in ast.walk(tree) if one not in types):
        if isinstance(node, ast.ImportFrom):
            names = {one.name: f"{node.module}.{one.name}" for one in node.names}
            yield from (full if full in modules else node.module for full in names.values())
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names)


def test_imports_point_down_and_never_in_circles():
    paths = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    arrows = {name: set(imports(path, paths)) for name, path in paths.items() if name != "pysolve.__init__"}
    rooms = {name: "nouns" if (one := name.split(".")[1]) in NOUNS else one for name in paths}
    floor = {name: ROOMS.index(rooms[name]) for name in arrows}
    inside = [(a, b) for a, found in arrows.items() for b in found if b in rooms]
    up = [pair for pair in inside if floor[pair[0]] > floor[pair[1]]]
    assert up + [(a, b) for a, b in inside if (rooms[a], rooms[b]) == ("report", "layer")] == []
    assert [a for a, found in arrows.items() if "torch" in found and floor[a] > ROOMS.index("nn")] == []
    list(TopologicalSorter({a: found & arrows.keys() for a, found in arrows.items()}).static_order())


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, pysolve; assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
