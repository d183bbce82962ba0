"""The command line: `glesam segment / bag / demo / bench`; one module a command."""

import os

# before numpy is loaded: idle threads of OpenBLAS spin, on cores that onnxruntime and the robot need
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
