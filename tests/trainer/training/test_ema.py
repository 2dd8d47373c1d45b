"""The average of a model over its steps."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from syncbn.trainer.training.ema import Average
from tests.trainer.tape import Tape


def models(steps):
    """A model as it is after each of some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for _ in range(steps):
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand(tensor.shape) if tensor.is_floating_point() else 1)
        yield copy.deepcopy(model)


def test_weights_and_buffers_are_averaged_as_torch_does_and_counts_are_copied():
    start, *steps = models(5)
    ours, torchs = Average(start, 0.75), AveragedModel(start, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    for model in steps:
        ours.update_parameters(model)
        torchs.update_parameters(model)
    want = torchs.state_dict()
    want["module.1.num_batches_tracked"] = torch.tensor(5)
    assert_close(ours.state_dict(), want, rtol=0, atol=0)


def test_a_loaded_average_goes_on_where_it_was():
    first, second, third = models(3)
    whole, half = Average(first, 0.75), Average(first, 0.75)
    for average in (whole, half):
        average.update_parameters(first)
        average.update_parameters(second)
    loaded = Average(first, 0.75)
    loaded.load_state_dict(half.state_dict())
    for average in (whole, loaded):
        average.update_parameters(third)
    assert_close(loaded.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_an_update_reads_nothing_back_but_the_first():
    first, second = models(2)
    average = Average(first, 0.75)
    average.update_parameters(first)
    with Tape():
        average.update_parameters(second)
