"""The inspection daemon: frames in, exactly one verdict a part out."""

import sys

__version__ = "0.1.0"

# OpenVINO's conversion tools report each `import openvino` to its makers: over the network, from a forked process, with
# files in the home folder. Nothing here converts, and OpenVINO goes on without what cannot be imported.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]
