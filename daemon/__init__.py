"""The inspection daemon: frames in, exactly one verdict a part out."""

import os
import sys

__version__ = "0.1.0"

# OpenVINO's conversion tools report each `import openvino` to its makers: over the network, from a forked process, with
# files in the home folder. Nothing here converts, and OpenVINO goes on without what cannot be imported.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]

# Read when NumPy is first imported. Its small products need no threads of their own beside OpenVINO's: waiting for
# cores that those hold, a postprocessing of 0.1 ms took 20 on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
