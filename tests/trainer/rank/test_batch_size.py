"""data.batch_per_rank=auto: what it finds on real ranks, whose models take memory, and time by a clock of their own."""

import json
import re

import pytest
import torch
from torch import nn

from syncbn.trainer import data, tasks
from syncbn.trainer.config import typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank import batch_size
from syncbn.trainer.rank.build import Parts
from tests.launch.jobs import PYTHON, differing, figures, finished, state
from tests.ranks import run_ranks
from tests.trainer.trained import ranks_world


class Machine(nn.Module):
    """A model that takes the same time for any batch up to its cores, and has memory for so many images."""

    def __init__(self, cores, memory):
        super().__init__()
        self.fc, self.cores, self.memory, self.now_s = nn.Linear(192, 10), cores, memory, 0.0

    def forward(self, x):
        if len(x) > self.memory:
            raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB")
        self.now_s += 0.01 * max(1, len(x) / self.cores)
        return self.fc(x.flatten(1))


def probed(rank, machines, settings):
    config = typed({**settings, "data": {**settings.get("data", {}), "batch_per_rank": "auto"}})
    world = ranks_world(rank)
    machine = Machine(*machines[rank])
    images = data.build(config.data, world, seed=0, global_batch=world.size)
    parts = Parts(images, machine, 0, tasks.build(config.task))
    try:
        best = batch_size.batch_per_rank(parts, config, world, clock=lambda: machine.now_s)
    except UserError as error:
        return str(error), error.on_every_rank
    return best.batch_per_rank, best.images_per_s


MANY = 10**6
FAKE = {"data": {"name": "fake", "size": 8, "fake_samples": 100}}
CASES = {
    "no-more-is-gained": ([(8, MANY), (8, MANY)], {}, 8),
    "one-rank-has-less-memory": ([(64, 40), (64, 11)], {}, 8),
    "the-smallest": ([(2, MANY), (2, MANY)], {}, 2),
    "all-the-images-there-are": ([(MANY, MANY), (MANY, MANY)], FAKE, 32),  # 50 for each
    "accumulated": ([(MANY, MANY), (MANY, MANY)], {**FAKE, "train": {"accumulate": 2}}, 16),
}


@pytest.mark.parametrize(("machines", "settings", "batch"), CASES.values(), ids=CASES)
def test_it_is_what_every_rank_can_do_and_is_worth_it(machines, settings, batch):
    results = run_ranks(probed, 2, machines, settings)
    assert results[0] == results[1]
    assert results[0][0] == batch
    assert results[0][1] == pytest.approx(2 * batch / 0.01)  # two ranks, each of them so many images in 10 ms


def test_where_nothing_fits_all_ranks_say_so():
    results = run_ranks(probed, 2, [(8, MANY), (8, 1)], {})
    assert results[0] == results[1]
    line, on_every_rank = results[0]
    assert line.startswith("data.batch_per_rank=auto: not even 2 images fit into the memory of each rank")
    assert on_every_rank


@pytest.mark.slow
def test_a_run_trains_with_what_was_found_and_keeps_it(tmp_path):
    words = ["run.name=r", "launch.nproc=2", "train.steps=6", "train.log_every=2", "wandb.mode=disabled"]
    code, said = finished(PYTHON, *words, "data.batch_per_rank=auto", root=tmp_path / "auto")
    assert code == 0, said
    (batch,) = re.findall(r"^data\.batch_per_rank=auto: (\d+) images a rank, \d+ images/s", said, re.M)
    assert f"| 2 × {batch} images on cpu" in said
    assert json.loads((tmp_path / "auto" / "r" / "result.json").read_text())["global_batch"] == 2 * int(batch)

    code, said = finished(PYTHON, *words, f"data.batch_per_rank={batch}", root=tmp_path / "given")
    assert code == 0, said
    assert figures(tmp_path / "auto" / "r") == figures(tmp_path / "given" / "r")
    assert differing(*(state(tmp_path / name / "r") for name in ("auto", "given"))) == []

    # The checkpoint knows it: nothing is tried again
    (tmp_path / "auto" / "r" / "result.json").unlink()
    code, said = finished(PYTHON, *words, "data.batch_per_rank=auto", root=tmp_path / "auto")
    assert (code, "images a rank" in said) == (0, False)
