"""The layer as a module: precision of its buffers, and what it says to bad input, on every rank."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from syncbn import SyncBatchNorm, sync_batch_norm
from tests.op.steps import EXACT, batch, joined, layer_of, train_layer, whole_batch
from tests.ranks import run_ranks

BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_running_buffers_are_never_in_half_precision(dtype):
    built = SyncBatchNorm(3, dtype=dtype)
    cast = SyncBatchNorm(3)
    cast.running_mean += 1 / 3
    kept = cast.running_mean.clone()
    nn.Sequential(cast).to(dtype)

    for layer in built, cast, copy.deepcopy(cast).to(dtype):
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert torch.equal(cast.running_mean, kept)
    assert cast.double().running_mean.dtype == torch.float64
    assert SyncBatchNorm(3, dtype=dtype, track_running_stats=False).half().running_mean is None
    assert SyncBatchNorm(3, device="meta").half().to_empty(device="cpu").running_var.dtype == torch.float32


def test_options_and_names_are_those_of_batch_norm():
    ours, torchs = SyncBatchNorm(3), nn.BatchNorm2d(3)
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(ours, nn.SyncBatchNorm)
    assert "group='world')" in repr(ours)
    assert "group=2, reduction='gather'" in repr(SyncBatchNorm(3, group=2, reduction="gather"))
    ours.reset_running_stats()
    with pytest.raises(TypeError):
        SyncBatchNorm(3, 1e-5, 0.1, True, True, "world")


def test_training_with_a_frozen_layer_uses_its_buffers_and_sends_nothing():
    x, dy = batch((3, 4, 2))
    layer = layer_of(3)
    layer.running_mean += 5

    for got, share, gradient in zip(run_ranks(frozen, 2, layer, x, dy), x.split(4), dy.split(4), strict=True):
        assert_close(got, frozen_alone(layer, share, gradient), **EXACT)


def frozen(rank, layer, x, dy):
    from tests.messages import recorded

    with recorded() as sent:
        got = frozen_alone(nn.Sequential(layer).train(), x.split(4)[rank], dy.split(4)[rank])
    assert sent == []
    return got


def frozen_alone(layer, x, dy):
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if isinstance(module, SyncBatchNorm):
            module.eval()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, [p.grad for p in layer.parameters()], [b.clone() for b in layer.buffers()]


def refused(rank, x, named, weight, reduction):
    """What a rank with these arguments is told, then a good step: nobody was left waiting, nothing is spoilt."""
    layer = SyncBatchNorm(3, reduction=reduction)
    if weight is not None:
        layer.weight = nn.Parameter(weight)
    try:
        layer(x[rank], **named if rank == 0 else {})
        refusal = None
    except (ValueError, TypeError) as error:
        refusal = str(error)
    good, dy = batch((3, 4), torch.float32)
    return refusal, train_layer(rank, SyncBatchNorm(3), good.split(4), dy.split(4)), layer.num_batches_tracked.item()


GOOD = torch.randn(2, 3, 4)
# x, other arguments, weight, what is said
BAD = {
    "channels": (torch.zeros(2, 4, 3), {}, None, "x has shape (2, 4, 3): it must be [N, 3, *S]"),
    "one-dimension": (torch.zeros(3), {}, None, "x has shape (3,): it must be [N, 3, *S]"),
    "no-dimension": (torch.zeros(()), {}, None, "x has shape (): it must be [N, 3, *S]"),
    "integers": (torch.zeros(2, 3, dtype=torch.int64), {}, None, "x has dtype torch.int64: batch norm takes a float"),
    "complex": (torch.zeros(2, 3, dtype=torch.complex64), {}, None, "x has dtype torch.complex64"),
    "no-pixels": (torch.zeros(2, 3, 0, 4), {}, None, "x has shape (2, 3, 0, 4): a spatial size of 0 holds no values"),
    "no-tensor": ([[1.0, 2.0, 3.0]], {}, None, "x is a list: it must be a Tensor [N, C, *S]"),
    "weight": (GOOD, {}, torch.ones(4), "x has 3 channels but weight has 4: they must match"),
    "mask-dtype": (GOOD, {"mask": torch.ones(2)}, None, "mask has dtype torch.float32: it must be bool"),
    "mask-shape": (GOOD, {"mask": torch.ones(3).bool()}, None, "but mask (3,): mask must be [N] or [N, 1, *S]"),
    "mask-per-channel": (GOOD, {"mask": torch.ones(2, 3, 4).bool()}, None, "but mask (2, 3, 4): mask must be [N] or"),
    "mask-no-tensor": (GOOD, {"mask": [True, False]}, None, "mask is a list: it must be a Tensor"),
    "mask-elsewhere": (GOOD, {"mask": torch.ones(2, device="meta").bool()}, None, "x is on cpu but mask on meta: they"),
    "residual-shape": (GOOD, {"residual": torch.ones(2, 3, 1)}, None, "(2, 3, 4) but residual (2, 3, 1): they must be"),
    "residual-no-tensor": (GOOD, {"residual": 1.0}, None, "residual is a float: it must be a Tensor"),
    "activation": (GOOD, {"activation": "gelu"}, None, "activation is 'gelu': it must be 'relu' or None"),
}
IN_EVAL = [name for name in BAD if name.startswith(("mask", "residual", "activation", "channels", "no-tensor"))]


@pytest.mark.parametrize("reduction", ["all_reduce", "gather"])
@pytest.mark.parametrize(("x", "named", "weight", "error"), BAD.values(), ids=BAD)
def test_bad_input_of_one_rank_is_an_error_on_every_rank(x, named, weight, error, reduction):
    ranks = run_ranks(refused, 2, [x, GOOD], named, weight, reduction)

    assert error in ranks[0][0]
    if weight is None:
        assert "another rank of the group refused its input to this layer" in ranks[1][0]
    good, dy = batch((3, 4), torch.float32)
    assert_close(joined([r[1] for r in ranks]), whole_batch(SyncBatchNorm(3), good, dy))
    assert [r[2] for r in ranks] == [0, 0]


def refused_compiled(rank, x, named, weight):
    torch._dynamo.reset()
    layer = SyncBatchNorm(3)
    layer(GOOD)  # the group is formed here
    if weight is not None and rank == 0:
        layer.weight = nn.Parameter(weight)
    layer.compile(fullgraph=True, backend="aot_eager")
    try:
        layer(x[rank], **named if rank == 0 else {})
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize(("x", "named", "weight", "error"), BAD.values(), ids=BAD)
def test_bad_input_of_one_rank_is_an_error_on_every_rank_where_compiled(x, named, weight, error):
    """An error in the making of the graph left the peers waiting for a message."""
    refuser, peer = run_ranks(refused_compiled, 2, [x, GOOD], named, weight, timeout_s=60)
    assert error in refuser
    assert "another rank of the group refused its input to this layer" in peer


@pytest.mark.parametrize("name, training", [(name, True) for name in BAD] + [(name, False) for name in IN_EVAL])
def test_bad_input_alone(name, training):
    x, named, weight, error = BAD[name]
    with pytest.raises((ValueError, TypeError)) as raised:
        refused_alone(x, named, weight, training)
    assert error in str(raised.value)


def refused_alone(x, named, weight, training):
    layer = SyncBatchNorm(3).train(training)
    if weight is not None:
        layer.weight = nn.Parameter(weight)
    layer(x, **named)


def lone_value(rank, xs, masks):
    layer = SyncBatchNorm(3)
    try:
        layer(xs[rank], mask=masks[rank])
    except ValueError as error:
        return str(error), layer.running_var


@pytest.mark.parametrize(
    ("xs", "masks"),
    [
        ([torch.randn(1, 3), torch.randn(0, 3)], [None, None]),
        ([torch.randn(1, 3, 1, 1), torch.randn(0, 3, 7, 7)], [None, None]),
        ([torch.randn(4, 3), torch.randn(4, 3)], [torch.arange(4) == 2, torch.zeros(4).bool()]),
    ],
    ids=["NC", "1x1", "mask"],
)
def test_one_value_in_the_whole_batch_is_an_error_on_every_rank(xs, masks):
    for error, var in run_ranks(lone_value, 2, xs, masks):
        assert "the whole batch has one value per channel: a variance needs more" in error
        assert torch.equal(var, torch.ones(3))


def test_one_value_alone():
    with pytest.raises(ValueError, match="one value per channel"):
        SyncBatchNorm(3)(torch.zeros(1, 3))


def test_the_function_checks_too():
    with pytest.raises(ValueError, match="x has 3 channels but bias has 2"):
        sync_batch_norm(torch.zeros(4, 3), torch.ones(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"x has shape \(4,\): it must be \[N, C, \*S\]"):
        sync_batch_norm(torch.zeros(4))
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        sync_batch_norm(torch.randn(4, 3), reduction="mean")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_eval_without_running_statistics_uses_the_batch(momentum):
    x = batch((3, 4))[0]
    layer = layer_of(3, track_running_stats=False, momentum=momentum).eval()
    assert_close(layer(x), whole_batch(layer, x, x)["y"])


def test_eval_refuses_wrong_channels():
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\): it must be \[N, 3, \*S\]"):
        SyncBatchNorm(3).eval()(torch.zeros(2, 4))


def test_turning_track_running_stats_off_leaves_the_buffers():
    """As torch's layers have it: virtual adversarial training, distillation and the like turn it off for a forward."""
    ours, theirs = SyncBatchNorm(3), nn.BatchNorm1d(3)
    for track in True, False, True:
        x = torch.randn(6, 3)
        for layer in ours, theirs:
            layer.track_running_stats = track
            layer(x)
        assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.num_batches_tracked == 2
    ours.momentum = theirs.momentum = 0.5
    ours.eps = theirs.eps = 0.1
    x = torch.randn(6, 3)
    assert_close(ours(x), theirs(x))
    assert_close(ours.state_dict(), theirs.state_dict())


def state_but(layer, missing):
    """The buffers; not a count of batches that nothing uses."""
    return {name: b for name, b in layer.named_buffers() if "running_mean" not in missing}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("missing", [["num_batches_tracked"], BUFFERS[:2], BUFFERS])
def test_buffers_that_were_set_to_none_stay_so_and_the_others_move(missing, momentum):
    ours, theirs = SyncBatchNorm(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    x = torch.randn(6, 3)
    for layer in ours, theirs:
        for name in missing:
            setattr(layer, name, None)
        for _ in range(2):
            layer(2 + x)
        layer.eval()
    assert_close(state_but(ours, missing), state_but(theirs, missing))
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_one_of_the_running_statistics_alone_is_refused(name, training):
    layer = SyncBatchNorm(3).train(training)
    setattr(layer, name, None)
    with pytest.raises(ValueError, match="one of running_mean and running_var is None"):
        layer(torch.randn(6, 3))


def test_the_input_is_called_input():
    """Wrappers call a batch norm by that name: it is that of torch's."""
    x = torch.randn(6, 3)
    for training in True, False:
        layer = SyncBatchNorm(3).train(training)
        assert_close(layer(input=x), layer(x))


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
def test_an_eps_below_0_is_refused_in_training(eps):
    with pytest.raises(ValueError, match="it must not be below 0"):
        SyncBatchNorm(3, eps=eps)(torch.randn(4, 3))


class Sees:
    """An observer that keeps the running mean as it is when it is told of a batch."""

    per_image = False

    def __init__(self, layer):
        self.layer, self.seen = layer, []

    def slot(self, form):
        return None

    def observe(self, packed, form, between_images, stats):
        self.seen.append(self.layer.running_mean.clone())


def test_an_observer_is_told_of_a_batch_before_the_running_buffers_move():
    """It compares the batch with what was known before it."""
    layer, x = SyncBatchNorm(3), 5 + torch.randn(6, 3)
    layer.observer = Sees(layer)

    layer(x)
    layer(x)

    first, second = layer.observer.seen
    assert_close(first, torch.zeros(3))
    assert_close(second, 0.1 * x.mean(0))
    assert_close(layer.running_mean, 0.19 * x.mean(0))
