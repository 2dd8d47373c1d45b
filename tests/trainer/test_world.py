"""How many ranks a machine can take."""

import pytest
import torch

from syncbn.trainer import world
from syncbn.trainer.errors import UserError
from syncbn.trainer.world import LaunchConfig


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_ranks_than_gpus_are_refused(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert world.ranks_to_start(LaunchConfig("auto", device)) == 2
    with pytest.raises(UserError, match=r"3 ranks and 2 GPUs on this machine: launch.nproc=2, or launch.device=cpu"):
        world.ranks_to_start(LaunchConfig(3, device))
    assert world.ranks_to_start(LaunchConfig(3, "cpu")) == 3
