"""Fuzzing: every parser of what comes from outside, as a function of bytes. `make fuzz` runs them under atheris."""
