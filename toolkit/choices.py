"""What may be chosen by name, on the command line, in recipes and in Python. A leaf: every package may import it."""

from typing import Literal

Stage = Literal["train", "distill"]
Role = Literal["teacher", "student"]
Views = Literal["flip", "flip_and_shift"]  # of test-time augmentation
Balance = Literal["none", "weights", "sampling"]
Precision = Literal["fp32", "fp16", "int8"]  # of an artifact
Provider = Literal["auto", "cuda", "tensorrt", "cpu"]  # of ONNX Runtime
Sampling = Literal["random", "grid", "optuna"]
Scheduling = Literal["none", "asha"]
