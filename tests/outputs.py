"""What commands print in the guide; ``python tests/outputs.py`` runs them and writes it anew."""

import os
import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parent.parent / "docs/guide.md"
PROGRAM = re.compile(r"```python\n((?:(?!```).)*?if __name__ == \"__main__\":.*?)```", re.DOTALL)
CONSOLE = re.compile(r"(?<=```console\n)(.*?)(?=```)", re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
# Other machines round otherwise, and choose a channel more or less, which small divergences show most.
NEAR, SMALL, NEAR_OF_SMALL = 0.1, 0.1, 0.5


def current(page: str, folder: Path) -> str:
    """The page with what its commands print now; they run in a folder that holds its ``mine.py``."""
    (folder / "mine.py").write_text(PROGRAM.search(page)[1])
    _said(["mine.py"], folder)
    return CONSOLE.sub(lambda block: _block(block[1], folder), page)


def alike(pasted: str, printed: str) -> bool:
    """Whether two texts differ in spaces, times and roundings alone."""
    if _words(pasted) != _words(printed):
        return False
    pairs = zip(_numbers(pasted), _numbers(printed), strict=True)
    return all(abs(a - b) <= (NEAR_OF_SMALL if max(a, b) < SMALL else NEAR) * max(a, b) for a, b in pairs)


def _block(text: str, folder: Path) -> str:
    """A command with its output, as it is where that is alike; what the page leaves out at … stays out."""
    command = re.match(r"\$ .*?(?<!\\)\n", text, re.DOTALL)[0]
    pasted = text[len(command) :].splitlines()
    printed = _said(["-m", *command[2:].replace("\\\n", " ").split()], folder).splitlines()
    if "…" in pasted:
        head = pasted.index("…")
        printed = [*printed[:head], "…", *printed[head + 1 - len(pasted) :]]
    if alike("\n".join(pasted), "\n".join(printed)):
        printed = pasted
    elif len(pasted) == len(printed):
        # Times on a busy machine are no reason to change a line.
        printed = [a if " ms" in a and alike(a, b) else b for a, b in zip(pasted, printed, strict=True)]
    return command + "\n".join(printed) + "\n"


def _said(arguments: list[str], folder: Path) -> str:
    """Output of Python with one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    roots = os.pathsep.join((str(GUIDE.parent.parent), str(folder)))
    environment = os.environ | threads | {"PYTHONPATH": roots, "COLUMNS": "110"}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return run.stdout


def _words(text: str) -> list[str]:
    return NUMBER.sub("0", text).split()


def _numbers(text: str) -> list[float]:
    """All numbers of lines that have no times."""
    lines = (line for line in text.splitlines() if " ms" not in line)
    return [float(number.replace(",", "")) for line in lines for number in NUMBER.findall(line)]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        GUIDE.write_text(current(GUIDE.read_text(), Path(name)))
