"""`python -m tombola.worker`: the `tombola` command, where scripts are not on PATH."""

from tombola.worker.cli import main

main()
