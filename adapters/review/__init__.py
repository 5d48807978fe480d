"""Rejects before a person's eyes: what was rejected, grouped by look, marked, and brought to the next build."""
