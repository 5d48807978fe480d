"""Measurements with their own make targets; the results are committed as JSON with machine and commit."""

import os

# As `inspectd run` does, before NumPy is loaded: the benches judge frames in their own process, too. OpenBLAS's threads
# would wait there for cores that OpenVINO's hold: on a busy machine the postprocessing took 20 ms in place of 0.1.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
