"""Files are data: nothing that reads one can run code of it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "pysolve"
# Modules and functions that run what they read.
FORBIDDEN = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "runpy"),
    *("eval", "exec", "compile", "__import__", "load_module", "read_pickle", "from_file", "genfromtxt"),
}


def calls():
    """Calls of the package: file, name of the function, what it belongs to, keywords, arguments."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
                yield path, owner, name, {one.arg: ast.unparse(one.value) for one in node.keywords}, node.args


def test_nothing_unpickles():
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {(path.name, one.name.split(".")[0]) for one in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((path.name, node.module.split(".")[0]))
    assert [one for one in names if one[1] in FORBIDDEN] == []
    # Of modules, as in torch.compile, another thing has such a name.
    found = {p.name for p, o, n, _, _ in calls() if n in FORBIDDEN and o in ("", "builtins")}
    # export_code tries the code that it has just made.
    assert found == {"code.py"}


def test_torch_reads_plain_values_and_numpy_no_objects():
    loads = [(path.name, kw) for path, owner, name, kw, _ in calls() if (owner, name) == ("torch", "load")]
    assert len(loads) >= 2
    assert all(kw.get("weights_only") == "True" for _, kw in loads)
    arrays = [
        kw for _, owner, name, kw, _ in calls() if owner == "np" and name in ("load", "fromfile", "memmap")
    ]
    assert all(kw.get("allow_pickle", "False") == "False" for kw in arrays)


def test_no_file_says_what_is_imported():
    for path, _, name, _, given in calls():
        if name == "import_module":
            # The command line and export_code import the module that their user names.
            assert path.name in ("inputs.py", "code.py") or isinstance(given[0], ast.Constant), path
