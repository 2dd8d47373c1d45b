"""How many ranks a machine can take, and how they are named."""

import pytest
import torch

from syncbn.trainer import environment, world
from syncbn.trainer.environment import LaunchConfig
from syncbn.trainer.errors import UserError


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_ranks_than_gpus_are_refused(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert environment.ranks_to_start(LaunchConfig("auto", device)) == 2
    with pytest.raises(UserError, match=r"3 ranks and 2 GPUs on this machine: launch.nproc=2, or launch.device=cpu"):
        environment.ranks_to_start(LaunchConfig(3, device))
    assert environment.ranks_to_start(LaunchConfig(3, "cpu")) == 3


REFUSED = {
    "nobody": ([None, None], "aa", None),
    "all": (["no x"] * 3, "aab", "no x"),
    "one": ([None, "no x"], "aa", "no x (on rank 1)"),
    "one-host": ([None, "no x", "no x"], "abb", "no x (on ranks 1, 2 of host b)"),
    "each-its-own": (["no x", "no y", None], "abb", "no x (on rank 0 of host a); no y (on rank 1 of host b)"),
}


@pytest.mark.parametrize(("texts", "hosts", "line"), REFUSED.values(), ids=REFUSED)
def test_what_ranks_refuse_is_told_with_who_does(texts, hosts, line):
    assert world.refusals(texts, hosts) == line


PLACES = {
    "run": ([0, 1, 2, 3], "a" * 5, "ranks 0 to 3"),
    "gap": ([0, 2, 3], "a" * 5, "ranks 0, 2, 3"),
    "hosts": ([0, 1, 2, 4], "aaabb", "ranks 0 to 2 of host a, rank 4 of host b"),
    "many": ([*range(5)], "abcde", "rank 0 of host a, rank 1 of host b, rank 2 of host c and 2 more hosts"),
}


@pytest.mark.parametrize(("ranks", "hosts", "words"), PLACES.values(), ids=PLACES)
def test_ranks_are_named_by_their_hosts(ranks, hosts, words):
    assert world.places(ranks, hosts) == words
