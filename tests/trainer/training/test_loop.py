"""The loop on real ranks: many ranks learn what one learns, eval is exact, a bad loss stops everyone."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from syncbn.trainer.config import Config, typed
from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.training import evaluation, loop
from tests.ranks import run_ranks
from tests.trainer.on_ranks import Log, world_of

# Gradients and weights in float64: what is left of a difference is the order of sums
SAME = {"rtol": 1e-9, "atol": 1e-9}


def train(rank, overrides):
    """Train as the config says; the weights in the end, and what was logged."""
    config: Config = typed(
        {"data": {"augment": {"pad": 1}}, "model": {"name": "tests.trainer.on_ranks:Exact"}, **overrides}
    )
    world, log = world_of(rank), Log()
    training = assemble(build(config, world), config, world)
    figures = loop.fit(training, config.train, world, log, log, save_every=config.checkpoint.every)
    return training.best_model.state_dict(), log.lines, log.saved, figures


def config(batch_per_rank=8, norm="sync", data=None, **train):
    return {
        "data": {"batch_per_rank": batch_per_rank, "augment": {"pad": 1, "mixup": 0.2}, **(data or {})},
        "norm": {"name": norm},
        "model": {"name": "tests.trainer.on_ranks:Exact"},
        "train": {"steps": 6, "log_every": 2, **train},
    }


@pytest.mark.plain("ema-clip-2")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("extra", [{}, {"ema": 0.5, "clip_norm": 0.1}], ids=["plain", "ema-clip"])
def test_many_ranks_learn_what_one_rank_learns(ranks, extra):
    ((want, lines, _, figures),) = run_ranks(train, 1, config(8, **extra))

    together = run_ranks(train, ranks, config(8 // ranks, **extra))

    for weights, _, _, _ in together:
        assert_close(weights, want, **SAME)
    for (step, mine), (_, theirs) in zip(together[0][1], lines, strict=True):
        for name in mine.keys() & {"train/loss", "train/accuracy", "eval/loss", "eval/accuracy"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-9), (step, name)
    assert together[0][3]["eval/images"] == figures["eval/images"] == 360


def test_accumulation_is_the_larger_batch_where_no_norm_looks_at_it():
    frozen = {"model": {"name": f"{__name__}:without_norm"}}
    ((want, *_),) = run_ranks(train, 1, {**config(8), **frozen})
    for weights, *_ in run_ranks(train, 2, {**config(2, accumulate=2), **frozen}):
        assert_close(weights, want, **SAME)


def without_norm(num_classes):
    return nn.Sequential(nn.Flatten(), Double(), nn.Linear(192, num_classes, dtype=torch.float64))


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def weights_at_each_step(rank, overrides):
    """The state after every step, the start first, and the average's in the end."""
    config = typed(overrides)
    world = world_of(rank)
    training = assemble(build(config, world), config, world)
    states = [{k: v.clone() for k, v in training.model.module.state_dict().items()}]

    class Keep(Log):
        def stepped(self, step):
            states.append({k: v.clone() for k, v in training.model.module.state_dict().items()})

    loop.fit(training, config.train, world, Keep())
    return states, training.best_model.state_dict()


def test_the_average_follows_weights_and_buffers():
    ((states, average),) = run_ranks(weights_at_each_step, 1, config(8, steps=3, ema=0.75))
    for name, got in average.items():
        if got.is_floating_point():
            first, second, third = (state[name] for state in states[1:])
            want = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
            assert_close(got, want, msg=name, rtol=1e-6, atol=1e-6)
    assert not torch.equal(average["net.bn1.running_mean"], states[-1]["net.bn1.running_mean"])


def test_a_gradient_is_clipped_to_its_norm():
    plain = {"optim": {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "lr": 1.0, "scaling": "none"}}
    ((states, _),) = run_ranks(weights_at_each_step, 1, {**config(8, steps=1, clip_norm=1e-3), **plain})
    moved = [states[1][k] - v for k, v in states[0].items() if k.endswith(("weight", "bias"))]
    # One step of a warm-up over one step: half the rate
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.5e-3, rel=1e-3)


def test_the_log_and_the_saves_come_when_they_are_due():
    settings = {**config(4, steps=7, log_every=3, eval_every=4), "checkpoint": {"every": 2}}
    for rank, (_, lines, saved, _) in enumerate(run_ranks(train, 2, settings)):
        assert [step for step, figures in lines if "train/loss" in figures] == [3, 4, 6, 7], rank
        assert [step for step, figures in lines if "eval/loss" in figures] == [4, 7]
        assert saved == [2, 4, 6, 7]  # once where evaluation is due too, and on every rank


class Fixed:
    """Eval batches of given scores and labels; a model that passes them on."""

    def __init__(self, scores, labels, rank, size, batch):
        mine = range(rank, len(labels), size)
        self.batches = [mine[i : i + batch] for i in range(0, len(mine), batch)]
        self.scores, self.labels = scores, labels
        self.most = -(-len(range(0, len(labels), size)) // batch)

    def __iter__(self):
        for indices in self.batches:
            yield Batch(self.scores[list(indices)], self.labels[list(indices)])


def evaluate_fixed(rank, scores, labels):
    from syncbn.trainer.tasks.classify import Classify

    world = world_of(rank)
    batches = Fixed(scores, labels, rank, world.size, batch=5)
    return evaluation.evaluate(nn.Identity(), Classify(), batches, loop.TrainConfig(), world)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("images", [127, 2], ids=["prime", "fewer-than-ranks"])
def test_eval_metrics_are_those_of_every_image_once(ranks, images):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(images, 10, generator=generator)
    labels = torch.randint(10, (images,), generator=generator)

    for figures in run_ranks(evaluate_fixed, ranks, scores, labels):
        assert figures["eval/accuracy"] == (scores.argmax(1) == labels).sum().item() / images
        losses = nn.functional.cross_entropy(scores, labels, reduction="none").double()
        assert figures["eval/loss"] == pytest.approx(math.fsum(losses.tolist()) / images, rel=1e-15)
        assert figures["eval/images"] == images


def evaluate_digits(rank):
    """A network's metrics over the first 127 eval digits."""
    torch.manual_seed(0)
    parts = build(typed({"data": {"eval_batch_per_rank": 16}}), world_of(rank))
    samples, sampler = parts.data.eval.loader.dataset, parts.data.eval.loader.batch_sampler
    sampler.mine = range(rank, 127, dist.get_world_size())
    assert len(samples) == 360
    return evaluation.evaluate(parts.model, parts.task, parts.data.eval, loop.TrainConfig(), world_of(rank))


def test_eval_of_a_network_on_a_prime_number_of_images_is_the_same_on_1_2_3_ranks():
    ((want,), two, three) = (run_ranks(evaluate_digits, ranks) for ranks in (1, 2, 3))
    for figures in two + three:
        assert figures["eval/images"] == want["eval/images"] == 127
        assert figures["eval/accuracy"] == want["eval/accuracy"]
        assert figures["eval/loss"] == pytest.approx(want["eval/loss"], rel=1e-6)  # float32 forwards of other batches


def local_buffers(rank):
    """With norm=local the ranks' own statistics differ; eval takes rank 0's on all of them."""
    config = typed({"norm": {"name": "local"}, "train": {"steps": 3}})
    world = world_of(rank)
    training = assemble(build(config, world), config, world)
    before = loop.fit(training, config.train, world)
    return before, {k: v.clone() for k, v in training.best_model.named_buffers()}


def test_local_norms_are_evaluated_with_rank_0s_statistics():
    (first, buffers), (second, same) = run_ranks(local_buffers, 2)
    assert first == second
    assert_close(buffers, same, rtol=0, atol=0)


def refuse_on_rank_1(rank):
    try:
        with world_of(rank).together():
            if rank == 1:
                raise UserError("data.root=/x is missing")
    except UserError as error:
        return str(error), error.on_every_rank


def test_what_one_rank_refuses_all_refuse():
    assert run_ranks(refuse_on_rank_1, 3) == [("data.root=/x is missing (on rank 1)", True)] * 3
