"""Measurements with their own make targets; the results are committed as JSON with machine and commit."""

import daemon  # noqa: F401 - before anything imports NumPy, see there
