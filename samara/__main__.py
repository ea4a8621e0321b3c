"""``python -m samara``: the command line."""

from samara.cli import main

main()
