"""`python -m daemon` is the command `inspectd`."""

from daemon.needs import demand

demand()  # before the imports that would fail

from daemon.cli import main  # noqa: E402

main()
