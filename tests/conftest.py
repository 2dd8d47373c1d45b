"""Where there is no GPU, Triton's kernels run in Triton's interpreter, on CPU tensors."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when kernels are defined, here and in the processes of ranks
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded():
    """What is drawn at random is the same in every run; run_ranks does it on its ranks."""
    torch.manual_seed(0)
