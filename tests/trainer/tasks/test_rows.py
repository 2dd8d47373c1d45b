"""Rows that a task gives for each sample of an evaluation: gathered over ranks, in order, each sample once."""

import pytest
import torch

from syncbn.trainer.config import typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank.build import build
from syncbn.trainer.tasks import Metric, Task
from syncbn.trainer.training.evaluation import evaluate
from syncbn.trainer.training.options import TrainConfig
from syncbn.trainer.training.totals import Gathered
from tests.ranks import run_ranks
from tests.trainer.trained import ranks_world

SHAPES = {"boxes": (4,), "scores": ()}


def rows_of(place):
    """As many as its place says, which is none at all for the first."""
    values = torch.arange(4 * place, dtype=torch.float32).view(place, 4) / 3 + place
    return {"boxes": values, "scores": values[:, 0] * 1e-7}


def gathered(rank, places):
    """Of this rank's samples, in batches of two."""
    rows = Gathered(SHAPES, ranks_world(rank))
    for begin in range(0, len(places[rank]), 2):
        batch = places[rank][begin : begin + 2]
        rows.add(batch, {name: [rows_of(place)[name] for place in batch] for name in SHAPES})
    return rows.gather()


PLACES = {"one": [[0, 1, 2, 3, 4]], "in-turn": [[0, 2, 4], [1, 3]], "a-rank-has-none": [[4, 0, 3], [], [2, 1]]}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_rows_are_gathered_in_the_order_of_the_data_set_bit_for_bit(places):
    for rows in run_ranks(gathered, len(places), places):
        for name in SHAPES:
            want = [rows_of(place)[name].double() for place in range(5)]
            assert [each.shape for each in rows[name]] == [each.shape for each in want]
            assert all(map(torch.equal, rows[name], want))


def test_nobody_has_rows():
    for rows in run_ranks(gathered, 2, [[], []]):
        assert rows == {"boxes": [], "scores": []}


def test_rows_that_are_not_those_of_the_samples_are_refused():
    (texts,) = run_ranks(refused, 1)
    assert texts == [
        "the task's rows 'boxes' of 2 samples are 1 tensors ([3, 4], ...): give one of [n, 4] for each sample",
        "the task's rows 'boxes' of 2 samples are 2 tensors ([3, 4], [1, 5], ...): give one of [n, 4] for each sample",
    ]


def refused(rank):
    texts = []
    for shapes in [(3, 4)], [(3, 4), (1, 5)]:
        with pytest.raises(UserError) as error:
            Gathered({"boxes": (4,)}, ranks_world(rank)).add([0, 1], {"boxes": [torch.zeros(*s) for s in shapes]})
        texts.append(str(error.value))
    return texts


class Darkest(Task):
    """As many rows of an image as it is of a digit, with its mean pixel: what is found depends on their order."""

    outputs = 1
    metrics = (Metric("mean", headline=True),)
    shapes = {"samples": ()}  # noqa: RUF012
    rows = {"pixels": (1,)}  # noqa: RUF012

    def loss(self, model, batch): ...

    def evaluate(self, model, batch):
        means = batch.images.mean((1, 2, 3))
        rows = [mean.expand(int(label), 1) for mean, label in zip(means, batch.labels, strict=True)]
        return {"samples": torch.tensor(batch.samples), "pixels": rows}

    def figures(self, sums):
        pixels = torch.cat(sums["pixels"]).flatten()
        weights = torch.arange(len(pixels), dtype=torch.float64)
        return {"mean": float(pixels @ weights), "rows": len(pixels), "images": len(sums["pixels"])}


def evaluated(rank):
    world = ranks_world(rank)
    config = typed({"data": {"eval_batch_per_rank": 7}})
    parts = build(config, world)
    return evaluate(parts.model, Darkest(), parts.data.eval, TrainConfig(), world)


def test_figures_of_rows_are_the_same_for_any_number_of_ranks():
    (want,) = run_ranks(evaluated, 1)
    assert want["eval/images"] == 360
    for ranks in 2, 3:
        assert run_ranks(evaluated, ranks) == [want] * ranks
