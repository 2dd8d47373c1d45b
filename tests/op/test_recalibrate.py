"""recalibrate leaves the statistics of the whole stream, the same on every rank, and nothing else changed."""

import gzip
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, convert, recalibrate, reference
from tests.op.steps import EXACT
from tests.ranks import run_ranks

SIZES = [6, 4, 5, 7]
DIGITS = Path(__file__).parents[2] / "syncbn/trainer/data/sets/digits.csv.gz"


def stream(dtype=torch.float64):
    """Batches with a mean at 100 standard deviations from zero, each batch's its own."""
    generator = torch.Generator().manual_seed(0)
    return [100 + i + torch.randn(n, 2, 5, 4, dtype=dtype, generator=generator) for i, n in enumerate(SIZES)]


def share(batches, rank, world):
    """This rank's part of each: one element for all ranks but the last, and of the second batch nothing."""
    parts = [[*[1] * (world - 1), len(x) - world + 1] for x in batches]
    parts[1] = [*[0] * (world - 1), len(batches[1])]
    return [x.split(part)[rank] for x, part in zip(batches, parts, strict=True)]


def small_net(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.BatchNorm2d(2, dtype=dtype),
            nn.Conv2d(2, 4, 3, dtype=dtype),
            nn.BatchNorm2d(4, momentum=None, dtype=dtype),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(4, 3, 2, dtype=dtype),
            nn.BatchNorm2d(3, affine=False, dtype=dtype),
        )


def whole_stream(net, batches):
    """Mean and unbiased variance of what enters each batch norm when every batch is whole, from the formula."""
    entering = {}
    for x in batches:
        for name, module in net.named_children():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                entering.setdefault(name, []).append(x.detach())
                weight, bias = (None, None) if module.weight is None else (module.weight, module.bias)
                x = reference.batch_norm(x, weight, bias, module.eps)
            elif not isinstance(module, nn.Dropout):
                x = module(x)
    statistics = {}
    for name, xs in entering.items():
        values = torch.cat([x.double().movedim(1, 0).flatten(1) for x in xs], dim=1)
        statistics[name] = values.mean(1), values.var(1, correction=1)
    return statistics


def statistics_of(net):
    return {
        name: (m.running_mean.double().clone(), m.running_var.double().clone())
        for name, m in net.named_modules()
        if getattr(m, "running_mean", None) is not None
    }


def everything_else(model):
    """All that must be as it was: modes, hooks, parameters, gradients, other buffers, the random state."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "tensors": {n: (id(t), t.detach().clone()) for n, t in tensors.items() if "running_" not in n},
        "grads": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        "random": torch.get_rng_state(),
    }


def same(got, want):
    assert_close(got, want, rtol=0, atol=0)


def recalibrated(rank, net, shares, **options):
    """The statistics after, and the populations told; that nothing else changed is checked on the way."""
    before = everything_else(net)
    population = recalibrate(net, shares[rank], **options)
    same(everything_else(net), before)
    return statistics_of(net), population


def error_of(rank, net, shares):
    """What is raised, as text; that nothing changed is checked on the way."""
    before = everything_else(net), statistics_of(net)
    error = "nothing was raised"
    try:
        recalibrate(net, shares[rank]() if callable(shares[rank]) else shares[rank])
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    same((everything_else(net), statistics_of(net)), before)
    return error


def on_ranks(world, fn, net, batches):
    shares = [share(batches, rank, world) for rank in range(world)]
    return run_ranks(fn, world, net, shares) if world > 1 else [fn(0, net, shares)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_number_of_ranks_gives_the_statistics_of_the_whole_stream(world, dtype):
    net, batches = convert(small_net(dtype)).train(), stream(dtype)
    want = whole_stream(deepcopy(net).double(), [x.double() for x in batches])

    ranks = on_ranks(world, recalibrated, net, batches)

    # Layers between round what enters the later ones to 6e-8 each; the first is told of the data itself
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    for statistics, population in ranks:
        assert_close(statistics, want, **tolerance)
        same((statistics, population), ranks[0])
        first = population["0"]
        assert_close((first.mean, first.unbiased_var), want["0"], **EXACT)
        assert first.count == sum(SIZES) * 20
        assert_close(
            {n: (p.mean.to(dtype).double(), p.unbiased_var.to(dtype).double()) for n, p in population.items()},
            statistics,
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("group", [None, 1], ids=["nn.BatchNorm", "group=1"])
def test_the_stream_is_that_of_all_ranks_whomever_a_layer_normalises_with(group):
    net = small_net() if group is None else convert(small_net(), group=group)
    batches = stream()
    batches[1] = batches[1][:0]  # each rank alone has enough for a variance, or nothing

    ranks = on_ranks(2, recalibrated, net, batches)

    for statistics, population in ranks:
        assert_close(statistics["0"], whole_stream(net, batches)["0"], **EXACT)
        same((statistics, population), ranks[0])


def test_torchs_own_synchronised_layer_is_one_too():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(small_net())

    statistics, _ = recalibrated(0, net, [stream()])

    assert_close(statistics, whole_stream(net, stream()), **EXACT)


def frozen_in_ddp(rank, net, shares):
    """As recalibrated; the frozen layer's buffers differ between ranks, and DDP broadcasts buffers."""
    net[2].eval().running_mean.fill_(rank)
    model = DistributedDataParallel(net)
    model(shares[rank][0]).sum().backward()
    frozen = net[2].running_mean.fill_(rank).clone(), net[2].running_var.clone()
    statistics, population = recalibrated(rank, model, shares)
    same(statistics.pop("module.2"), frozen)
    assert list(population) == list(statistics) == ["module.0", "module.6"]
    return statistics


def test_a_wrapped_model_and_layers_that_are_frozen():
    net = convert(small_net())

    ranks = on_ranks(2, frozen_in_ddp, net, stream())

    assert_close(ranks[0]["module.0"], whole_stream(net, stream())["0"], **EXACT)
    same(ranks[0], ranks[1])


def test_frozen_layers_run_as_in_eval():
    net = small_net()
    net[0].eval().running_mean.fill_(100)

    recalibrated(0, net, [stream()])

    entering = torch.cat([net[1]((x - 100) / (1 + net[0].eps) ** 0.5) for x in stream()])
    assert_close(net[2].running_mean, entering.mean([0, 2, 3]).detach(), **EXACT)


def test_all_layers_of_a_model_in_eval_mode_are_recalibrated():
    net = small_net().eval()

    statistics, _ = recalibrated(0, net, [stream()])

    assert_close(statistics, whole_stream(net, stream()), **EXACT)


def test_the_random_state_stays_whatever_the_stream_draws():
    net = small_net()

    recalibrated(0, net, [(torch.randn(4, 2, 5, 4).double() for _ in range(3))])


def test_batches_are_tensors_or_begin_with_one():
    batches, want = stream(), whole_stream(small_net(), stream())

    for these in [[x, 7] for x in batches], [(x, None) for x in batches], [x.requires_grad_() for x in batches]:
        assert_close(recalibrated(0, small_net(), [these])[0], want, **EXACT)


def forward_image(model, batch):
    assert not model(batch["image"]).requires_grad


def test_batches_of_another_kind_have_a_forward_of_their_own():
    statistics, _ = recalibrated(0, small_net(), [[{"image": x} for x in stream()]], forward=forward_image)

    assert_close(statistics, whole_stream(small_net(), stream()), **EXACT)


class Twice(nn.Module):
    """A layer that is called twice, the second time by name and with a mask; and one that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.norm, self.unused = SyncBatchNorm(2, dtype=torch.float64), nn.BatchNorm1d(2)

    def forward(self, x):
        y = self.norm(x, None, mask_of(x)[0])
        return y + self.norm(mask=mask_of(x)[1], input=2 * x)


def mask_of(x):
    """A mask of samples and one of positions, both true of one value at least."""
    return torch.arange(len(x)) % 3 != 1, x[:, :1] > x[:, :1].mean()


def test_a_layer_counts_each_of_its_calls_and_only_what_the_mask_lets_in():
    net = Twice()

    statistics, population = recalibrated(0, net, [stream()])

    values = []
    for x in stream():
        samples, positions = mask_of(x)
        values += [x[samples].movedim(1, 0).flatten(1), (2 * x).movedim(1, 0)[:, positions[:, 0]]]
    values = torch.cat(values, dim=1)
    assert_close(statistics["norm"], (values.mean(1), values.var(1, correction=1)), **EXACT)
    assert population["norm"].count == values.size(1)
    assert population["unused"].count == 0
    same(statistics["unused"], (torch.zeros(2).double(), torch.ones(2).double()))


def test_plain_layers_are_called_by_name_too():
    layer = nn.BatchNorm2d(2, dtype=torch.float64)

    statistics, _ = recalibrated(0, layer, [stream()], forward=lambda model, x: model(input=x))

    assert_close(statistics[""], whole_stream(nn.Sequential(layer), stream())["0"], **EXACT)


class Checkpointed(nn.Sequential):
    reentrant: bool

    def forward(self, x):
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_with_activation_checkpointing(reentrant):
    net = Checkpointed(*convert(small_net()))
    net.reentrant = reentrant

    ranks = on_ranks(2, recalibrated, net, stream())

    for statistics, _ in ranks:
        assert_close(statistics, whole_stream(net, stream()), **EXACT)


def test_a_compiled_model():
    net = nn.Sequential(nn.BatchNorm2d(2, dtype=torch.float64))
    torch._dynamo.reset()
    model = torch.compile(net, backend="eager")
    with torch.no_grad():
        model(stream()[0])  # the code for training mode is made here, and knows no hooks

    statistics, _ = recalibrated(0, model, [stream()])

    assert_close(statistics["_orig_mod.0"], whole_stream(net, stream())["0"], **EXACT)


def messages(rank, net, shares):
    sent = []
    real = dist.all_gather_into_tensor

    def counting(output, message, *args, **kwargs):
        sent.append((message.numel(), message.dtype))
        return real(output, message, *args, **kwargs)

    recalibrate(net, shares[rank])  # the communicators are made here
    with patch.object(dist, "all_gather_into_tensor", counting):
        recalibrate(net, shares[rank])
    return sent


def test_one_word_before_each_batch_and_one_message_for_all_layers():
    for sent in on_ranks(2, messages, convert(small_net()), stream()):
        word, moments = (1, torch.int64), (2 * (2 + 4 + 3) + 3, torch.float64)
        # The first two compare the ranks' layers
        assert sent[2:] == [word] * (len(SIZES) + 1) + [moments]


class Failing:
    """Batches that end in an error."""

    def __init__(self, *batches):
        self.batches = batches

    def __call__(self):
        yield from self.batches
        raise OSError("disk on fire")


class Poisoned(nn.Module):
    def forward(self, x):
        if x.numel() % 7 == 0:
            raise OSError("forward on fire")
        return x


A, B, C, _ = stream()
NONE = A[:0]


@pytest.mark.parametrize(
    ("shares", "errors"),
    [
        ([[A, B], [A]], ["ValueError: ranks [1] of 2 ran out of batches after 1, the others did not"] * 2),
        ([[], [A]], ["ValueError: ranks [0] of 2 ran out of batches after 0, the others did not"] * 2),
        ([[], []], ["ValueError: there are no batches"] * 2),
        (
            [[A, B, C], Failing(A, B)],
            ["RuntimeError: the batches of ranks [1] raised an error after 2", "OSError: disk on fire"],
        ),
        ([[A], Failing(A)], ["RuntimeError: the batches of ranks [1] raised", "OSError: disk on fire"]),
        ([5, [A]], ["TypeError: 'int' object is not iterable", "RuntimeError: the batches of ranks [0] raised"]),
        ([[A, B / 0], [A, NONE]], ["ValueError: what enters '0' is not finite"] * 2),
        ([[A], [A[:, :1]]], ["ValueError: another rank of the group refused", "ValueError: x has shape (6, 1, 5, 4)"]),
    ],
    ids=["uneven", "nothing-here", "nothing", "failing", "failing-at-the-end", "not-iterable", "not-finite", "refused"],
)
def test_every_rank_learns_what_is_wrong_with_the_stream(shares, errors):
    for text, error in zip(run_ranks(error_of, 2, convert(small_net()), shares), errors, strict=True):
        assert text.startswith(error)


def test_a_lone_process_needs_batches_too():
    assert error_of(0, small_net(), [iter([])]).startswith("ValueError: there are no batches")
    assert error_of(0, small_net(), [Failing(A)]) == "OSError: disk on fire"


def test_a_forward_that_fails_leaves_the_model_as_it_was():
    net = nn.Sequential(*small_net(), Poisoned())
    assert error_of(0, net, [[*stream()[3:], A]]) == "OSError: forward on fire"


def told_of_layers(rank, nets):
    return error_of(rank, nets[rank], [[A]] * 2)


def test_every_rank_learns_that_there_is_nothing_to_do_or_not_the_same():
    nothing, frozen, some = (
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)),
        small_net(),
        small_net(),
    )
    for layer in frozen:
        layer.eval()
    some[2].eval()

    for text in run_ranks(told_of_layers, 2, [small_net(), some]):
        assert text.startswith("ValueError: rank 1 recalibrates 2 layers and rank 0 3, and '2' differs")
    assert "has no batch norm layer" in told_of_layers(0, [nothing])
    assert "all 3 batch norm layers are in eval mode" in told_of_layers(0, [frozen])


def digits():
    table = torch.tensor(
        [[float(v) for v in line.split(b",")] for line in gzip.decompress(DIGITS.read_bytes()).split()]
    )
    for_eval = torch.arange(len(table)) % 5 == 0
    return [(part[:, :-1].view(-1, 1, 8, 8) / 16, part[:, -1].long()) for part in (table[~for_eval], table[for_eval])]


def eval_losses(rank, world):
    """The loss of a network for digits, trained in a few steps: by its lagging averages, and recalibrated."""
    (x, labels), (x_eval, labels_eval) = digits()
    torch.manual_seed(0)
    hidden = [(nn.Linear(64, 64), nn.BatchNorm1d(64, momentum=0.01), nn.ReLU()) for _ in range(2)]
    net = nn.Sequential(nn.Flatten(), *hidden[0], *hidden[1], nn.Linear(64, 10))
    for batch in torch.randperm(len(x)).split(64)[:50]:
        net.zero_grad()
        F.cross_entropy(net(x[batch]), labels[batch]).backward()
        for parameter in net.parameters():
            parameter.data.sub_(parameter.grad, alpha=0.2)
    with torch.no_grad():
        lagging = F.cross_entropy(net.eval()(x_eval), labels_eval)
        recalibrate(net, x[rank::world].split(256))
        return lagging, F.cross_entropy(net(x_eval), labels_eval)


def test_a_network_for_digits_is_better_with_them_than_with_a_lagging_average():
    ranks = run_ranks(eval_losses, 2, 2)

    for lagging, exact in ranks:
        assert exact < lagging / 2
    same(ranks[0], ranks[1])
