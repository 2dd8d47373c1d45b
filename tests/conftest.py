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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test with rows, plain(...) names those of the plain suite: the others are slow."""
    for item in items:
        if (plain := item.get_closest_marker("plain")) and item.callspec.id not in plain.args:
            item.add_marker(pytest.mark.slow)
