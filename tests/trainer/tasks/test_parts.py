"""A task that optimises several parts of a model in turn, each by a loss of its own."""

import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from syncbn.trainer import norms
from syncbn.trainer.config import typed
from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.batch_size import stepper
from syncbn.trainer.rank.build import build
from syncbn.trainer.training import loop
from syncbn.trainer.training.bad_steps import Guard
from syncbn.trainer.training.loop import optimiser_step
from syncbn.trainer.training.options import TrainConfig
from syncbn.trainer.training.state import Training
from syncbn.trainer.training.totals import Totals
from tests.ranks import run_ranks
from tests.trainer.tasks import adversarial
from tests.trainer.tasks.adversarial import Adversarial, Pair
from tests.trainer.tasks.given import Given
from tests.trainer.trained import ranks_world

NAMES = {"task": {"name": f"{adversarial.__name__}:Adversarial"}, "model": {"name": f"{adversarial.__name__}:Pair"}}


def steps_of(rank, batches, accumulate=1):
    """The weights after steps of SGD at a rate of 1/8 on this rank's images of each step."""
    world = ranks_world(rank)
    torch.manual_seed(0)
    model, _ = norms.convert(Pair(1), norms.NormConfig(), norms.Place(world.device, world.size))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5, fused=True)
    data = Given(sum(len(images) for images in batches[0]) // accumulate)
    training = Training(ddp, Adversarial(None, None), data, optimizer, None, Guard(model, optimizer), Totals({}, world))
    for step in batches:
        micros = step[rank].chunk(accumulate)
        optimiser_step(training, TrainConfig(accumulate=accumulate), world, [Batch(each, None) for each in micros])
    return model.state_dict()


def by_hand(batches):
    """The same with an optimiser for each part, on the whole batch of each step."""
    torch.manual_seed(0)
    model = Pair(1)
    optimizers = {
        name: torch.optim.SGD(model.get_submodule(name).parameters(), lr=0.125, momentum=0.5)
        for name in ("critic", "generator")
    }
    task = Adversarial(None, None)
    for images in batches:
        for name, loss_of in task.parts.items():
            model.zero_grad()
            loss = loss_of(model, Batch(images, None))
            (loss.total / loss.weight).backward()
            optimizers[name].step()
    return model.state_dict()


@pytest.mark.parametrize("split", [[6], [4, 2], [3, 0, 3]], ids=str)
def test_each_part_is_optimised_by_its_own_loss_as_on_one_rank(split):
    torch.manual_seed(1)
    batches = [torch.randn(6, 3, 8, 8) for _ in range(3)]

    want = by_hand(batches)

    for weights in run_ranks(steps_of, len(split), [images.split(split) for images in batches]):
        assert_close(weights, want, rtol=1e-10, atol=1e-12)


def test_each_part_sees_all_batches_of_a_step():
    """Without batch norm's batch, two halves are the whole."""
    torch.manual_seed(1)
    half = torch.randn(3, 3, 8, 8)
    twice = [[torch.cat([half, half])]]
    (once,), (accumulated,) = run_ranks(steps_of, 1, [[half]]), run_ranks(steps_of, 1, twice, 2)
    moved = {name for name in once if "num_batches" not in name and "running" not in name}
    assert_close({n: accumulated[n] for n in moved}, {n: once[n] for n in moved}, rtol=1e-10, atol=1e-12)


class Infinite(Adversarial):
    """The critic's loss is not finite."""

    def critic_loss(self, model, batch):
        loss = super().critic_loss(model, batch)
        return loss._replace(total=loss.total * math.inf)


def bad_part(rank):
    world = ranks_world(rank)
    config = typed({**NAMES, "train": {"steps": 5, "log_every": 1, "max_bad_steps": 2}})
    training = assemble(build(config, world), config, world)
    training.task = Infinite(None, None)
    before = {name: tensor.clone() for name, tensor in training.model.module.state_dict().items()}
    try:
        loop.fit(training, config.train, world)
    except UserError as error:
        moved = {n for n, t in training.model.module.state_dict().items() if not torch.equal(t, before[n])}
        return str(error), moved
    return None


def test_a_part_that_is_bad_stays_as_it_was_and_the_step_counts_as_bad():
    for error, moved in run_ranks(bad_part, 2):
        assert "the loss or the gradient is not finite from step 1 to step 3" in error
        assert any(name.startswith("generator.") for name in moved)
        assert not any(name.startswith("critic.") for name in moved)


def trained(rank, settings):
    world = ranks_world(rank)
    config = typed({**NAMES, **settings})
    training = assemble(build(config, world), config, world)
    return loop.fit(training, config.train, world)


def test_it_trains_with_every_figure_of_both_parts():
    settings = {"train": {"steps": 6, "log_every": 2, "ema": 0.5, "clip_norm": 1.0}}
    first, second = run_ranks(trained, 2, settings)
    assert first == second
    assert math.isfinite(first["eval/gap"])


def refused(rank, settings):
    with pytest.raises(UserError) as error:
        trained(rank, settings)
    return str(error.value)


def test_a_model_that_lacks_a_part_is_refused():
    (text,) = run_ranks(refused, 1, {"model": {"name": "resnet8"}})
    assert "optimises critic, generator, and model.name=resnet8 has no critic, generator: give a model" in text


def no_graph(rank):
    config = typed(NAMES)
    parts = build(config, ranks_world(rank))
    config.train.cuda_graph = True  # on a GPU, where it can be
    with pytest.raises(UserError) as error:
        assemble(parts, config, ranks_world(rank))
    return str(error.value)


def test_several_parts_in_a_cuda_graph_are_refused():
    (text,) = run_ranks(no_graph, 1)
    assert "which optimises critic, generator in turn" in text
    assert text.endswith("train.cuda_graph=false")


def test_the_probe_of_a_batch_takes_a_step_of_each_part():
    (calls,) = run_ranks(probed, 1)
    assert calls == ["critic", "generator"]


def probed(rank):
    config, world, calls = typed({**NAMES}), ranks_world(rank), []
    parts = build(config, world)
    for name in ("critic", "generator"):
        hook = lambda _, name=name: calls.append(name)  # noqa: E731
        next(parts.model.get_submodule(name).parameters()).register_post_accumulate_grad_hook(hook)
    stepper(parts, config, world)(4)
    return calls
