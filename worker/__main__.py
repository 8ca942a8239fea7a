"""`python -m worker`: the `tombola` command, where scripts are not on PATH."""

from worker.cli import main

main()
