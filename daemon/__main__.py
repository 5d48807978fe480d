"""`python -m daemon` is the command `inspectd`."""

from daemon.cli import main

main()
