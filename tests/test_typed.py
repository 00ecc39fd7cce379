"""``Any`` is the type of users' objects that only pass through, and of little else."""

import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "pysolve"


def test_few_lines_name_any():
    paths = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]
    lines = [line for path in paths for line in path.read_text().splitlines()]
    assert sum(bool(re.search(r"\bAny\b", line)) for line in lines) <= 120
