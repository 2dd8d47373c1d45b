"""Where there is no GPU, Triton's kernels run in Triton's interpreter, on CPU tensors."""

import os

import torch

if not torch.cuda.is_available():
    # Read when kernels are defined, here and in the processes of ranks
    os.environ.setdefault("TRITON_INTERPRET", "1")
