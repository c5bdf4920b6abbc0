"""Train a large image classifier, distil it into a small one, prove it, export it and serve it."""

import os

__version__ = "0.1.0"

# From 1.29 on ONNX Runtime tells its maker of every session, unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
