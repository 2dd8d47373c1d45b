"""Batch renormalisation over ranks is that of the whole batch: forward, every gradient, every buffer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.trainer import norms
from syncbn.trainer.norms import NormConfig, Place
from tests.cases import SHAPES, SPLITS
from tests.ranks import run_ranks

STEPS, EPS, MOMENTUM = 3, 1e-3, 0.3
CPU = Place(torch.device("cpu"))


def layer_of(steps, group="world", channels=3, word="batch_renorm"):
    layer = nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM, dtype=torch.float64)
    layer.weight.data.copy_(torch.tensor([0.5, -1.5, 2.0]))
    layer.bias.data.copy_(torch.tensor([0.1, 0.2, -0.3]))
    # Near enough to the batch that r and d are clipped in some channels and steps, and not in others
    layer.running_mean.copy_(torch.tensor([90.0, 100.0, 104.0]))
    layer.running_var.copy_(torch.tensor([0.1, 9.0, 25.0]))
    keys = {"renorm_steps": steps, "group": group} if word == "batch_renorm" else {"group": group}
    return norms.convert(nn.Sequential(layer), NormConfig(word, **keys), CPU)[0][0]


def formula(x, weight, bias, running_mean, running_var, r_max, d_max):
    """Algorithm 1 of the paper on the whole batch, and the running statistics after it."""
    dims, channel = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
    mean, var = x.mean(dims), x.var(dims, correction=0)
    std, running_std = (var + EPS).sqrt(), (running_var + EPS).sqrt()
    r = (std / running_std).detach().clamp(1 / r_max, r_max)
    d = ((mean - running_mean) / running_std).detach().clamp(-d_max, d_max)
    y = (x - mean.view(channel)) / std.view(channel) * r.view(channel) + d.view(channel)
    y = y * weight.view(channel) + bias.view(channel)
    n = x.numel() / x.size(1)
    return y, running_mean.lerp(mean.detach(), MOMENTUM), running_var.lerp(var.detach() * n / (n - 1), MOMENTUM)


def whole(xs, dys, steps):
    """y and dx of each step, the gradients of weight and bias, and the running statistics in the end."""
    layer = layer_of(steps)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    mean, var, steps_made = layer.running_mean, layer.running_var, []
    for step, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        ramp = min(1, step / steps)
        x = x.clone().requires_grad_()
        y, mean, var = formula(x, weight, bias, mean, var, 1 + 2 * ramp, 5 * ramp)
        y.backward(dy)
        steps_made.append((y.detach(), x.grad))
    return steps_made, [weight.grad, bias.grad], [mean, var]


def on_rank(rank, xs, dys, steps, group="world"):
    layer, steps_made = layer_of(steps, group), []
    for x, dy in zip(xs, dys, strict=True):
        x = x[rank].clone().requires_grad_()
        y = layer(x)
        y.backward(dy[rank])
        steps_made.append((y.detach(), x.grad))
    assert layer.num_batches_tracked == len(xs)
    return steps_made, [layer.weight.grad, layer.bias.grad], [layer.running_mean, layer.running_var]


def batches(shape):
    scale = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    xs = [100 + step + scale * torch.randn(8, *shape, dtype=torch.float64) for step in range(STEPS)]
    return xs, [torch.randn_like(x) for x in xs]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("shape", [SHAPES["NC"], SHAPES["NCHW"]], ids=["NC", "NCHW"])
def test_ranks_together_equal_the_whole_batch(split, shape):
    xs, dys = batches(shape)
    want = whole(xs, dys, steps=2)

    ranks = run_ranks(on_rank, len(split), *([t.split(split) for t in ts] for ts in (xs, dys)), 2)

    for step in range(STEPS):
        for which in range(2):
            assert_close(torch.cat([steps_made[step][which] for steps_made, _, _ in ranks]), want[0][step][which])
    for which in range(2):
        assert_close(sum(gradients[which] for _, gradients, _ in ranks), want[1][which])
        for _, _, buffers in ranks:
            assert_close(buffers[which], want[2][which])


def test_the_case_has_clipped_values_and_others():
    xs, _ = batches(SHAPES["NCHW"])
    layer = layer_of(2)
    r = (xs[0].var((0, 2, 3), correction=0) + EPS).sqrt() / (layer.running_var + EPS).sqrt()
    d = (xs[0].mean((0, 2, 3)) - layer.running_mean) / (layer.running_var + EPS).sqrt()
    assert ((r > 3).tolist(), (d.abs() > 5).tolist()) == ([True, False, False], [True, False, False])


def test_pairs_are_batches_of_their_own():
    xs, dys = batches(SHAPES["NCHW"])
    split = [t.split(2) for t in xs], [t.split(2) for t in dys]
    ranks = run_ranks(on_rank, 4, *split, 2, 2)
    for pair in range(2):
        half = slice(4 * pair, 4 * pair + 4)
        want, _, buffers = whole([x[half] for x in xs], [dy[half] for dy in dys], steps=2)
        for step in range(STEPS):
            assert_close(torch.cat([ranks[2 * pair + i][0][step][0] for i in range(2)]), want[step][0])
        assert_close(ranks[2 * pair][2], buffers)


def test_before_the_ramp_and_in_eval_it_is_sync_batch_norm():
    xs, _ = batches(SHAPES["NCHW"])
    renorm, sync = layer_of(10**9), layer_of(1, word="sync")
    for x in xs:
        assert_close(renorm(x), sync(x), rtol=1e-6, atol=1e-6)  # r and d are as small as the ramp, not 0
    assert_close(renorm.state_dict(), sync.state_dict())
    assert_close(renorm.eval()(xs[0]), sync.eval()(xs[0]))
    assert_close(renorm(xs[0], xs[1], activation="relu"), sync(xs[0], xs[1], activation="relu"))


def test_unclipped_training_is_eval():
    """What the paper is for: r and d undo the batch's own statistics."""
    layer = layer_of(1)
    layer.num_batches_tracked.fill_(1)
    x = layer.running_mean.view(-1, 1, 1) + layer.running_var.sqrt().view(-1, 1, 1) * torch.randn(4, 3, 5, 5).double()
    assert_close(layer(x), copy.deepcopy(layer_of(1)).eval()(x))


def test_residual_activation_and_mask_are_as_in_sync_batch_norm():
    (x, residual, _), _ = batches(SHAPES["NCHW"])
    mask = torch.tensor([True] * 5 + [False] * 3)
    one, other = layer_of(10**12), layer_of(1, word="sync")
    assert_close(one(x, residual, mask, "relu"), other(x, residual, mask, "relu"))
    assert_close(one.running_mean, other.running_mean)


def test_without_weight_or_running_statistics():
    x = torch.randn(4, 3, 2, 2)
    bare = norms.convert(nn.Sequential(nn.BatchNorm2d(3, affine=False)), NormConfig("batch_renorm"), CPU)[0]
    assert_close(bare(x), nn.BatchNorm2d(3)(x), rtol=1e-4, atol=1e-4)
    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    assert_close(norms.convert(untracked, NormConfig("batch_renorm"), CPU)[0](x), nn.BatchNorm2d(3)(x))


def test_half_precision_stays_half_and_buffers_precise():
    layer = layer_of(2).float().bfloat16()
    assert layer(torch.randn(4, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32


def test_recomputing_it_is_refused():
    layer, x = layer_of(2), torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="norm=batch_renorm inside an activation checkpoint"):
        y.sum().backward()


def learn(rank, xs):
    """Weights and buffers of a small net after some steps under DDP, and what is seen of drift."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2)).double()
    net, _ = norms.convert(net, NormConfig("batch_renorm", renorm_steps=2), CPU)
    assert norms.synchronised(net)
    ddp = DistributedDataParallel(net, broadcast_buffers=False)
    with syncbn.DriftMonitor(net) as monitor:
        for x in xs:
            ddp(x[rank]).square().mean().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.05 * p.grad
                    p.grad = None
        figures = monitor.read().layers["1"]
    population = syncbn.recalibrate(net.eval(), [x[rank] for x in xs])
    return net.state_dict(), figures, population


def test_many_ranks_learn_what_one_learns_and_are_watched_and_recalibrated():
    xs = [torch.randn(8, 3, 6, 6, dtype=torch.float64) for _ in range(4)]
    ((want, _, population),) = run_ranks(learn, 1, [[x] for x in xs])
    for state, figures, their_population in run_ranks(learn, 4, [x.split(2) for x in xs]):
        assert_close(state, want)
        assert_close(tuple(their_population["1"]), tuple(population["1"]))
        assert figures["n_eff"] > 0


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    xs, _ = batches(SHAPES["NCHW"])
    eager, compiled = layer_of(2), layer_of(2)
    compiled.compile(fullgraph=True)
    for x in xs:
        assert_close(compiled(x), eager(x))
    assert_close(compiled.state_dict(), eager.state_dict())
