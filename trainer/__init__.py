"""Builds engine bundles offline, from good images. Needs the extra [train]."""

import daemon  # noqa: F401 - before anything imports OpenVINO or NumPy, see there
