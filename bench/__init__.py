"""Measurements with their own make targets; the results are committed as JSON with machine and commit."""
