"""Processes at the edges of the line. They speak only the wire protocol."""
