"""``python -m pysolve``."""

from pysolve.cli.main import main

main()
