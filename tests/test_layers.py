"""Imports point one way: a room imports only from rooms below it, and no imports form a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "pysolve"
NOUNS = {"errors", "correlations", "forms", "plan", "compressed", "tables", "whole_files", "_core"}
# A room imports from itself and from those behind it; report and layer do not know each other.
ROOMS = ["__main__", "cli", "methods", "training", "nn", "report", "layer", "testing", "solve", "nouns"]


def imports(path, modules):
    """Modules that a file imports, at once or later, but for those of names in annotations alone."""
    tree = ast.parse(path.read_text())
    guards = (one for one in ast.walk(tree) if isinstance(one, ast.If))
    types = {n for one in guards if getattr(one.test, "id", "") == "TYPE_CHECKING" for n in ast.walk(one)}
    for node in (one for one in ast.walk(tree) if one not in types):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{one.name}" for one in node.names]
            yield from (name if name in modules else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names)


def test_imports_point_down_and_never_in_circles():
    paths = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    arrows = {name: set(imports(path, paths)) for name, path in paths.items() if name != "pysolve.__init__"}
    rooms = {name: "nouns" if (one := name.split(".")[1]) in NOUNS else one for name in paths}
    floor = {name: ROOMS.index(rooms[name]) for name in arrows}
    inside = [(a, b) for a, found in arrows.items() for b in found if b in rooms]
    assert [
        (a, b) for a, b in inside if floor[a] > floor[b] or (rooms[a], rooms[b]) == ("report", "layer")
    ] == []
    torch = {name for name, found in arrows.items() if any(one.split(".")[0] == "torch" for one in found)}
    assert [name for name in torch if floor[name] > ROOMS.index("nn")] == []
    list(TopologicalSorter({a: found & arrows.keys() for a, found in arrows.items()}).static_order())
