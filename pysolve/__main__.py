"""``python -m pysolve``."""

from pysolve.cli import main

main()
