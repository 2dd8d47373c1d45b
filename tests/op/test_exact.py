"""Ranks together are one batch: output, every gradient and every buffer, against reference.py."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from syncbn import SyncBatchNorm, convert, reference, revert
from tests.cases import SHAPES, SPLITS
from tests.ranks import run_ranks

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def train_layer(rank, layer, xs, dys):
    """One training step of the layer on this rank's share: y, dx, dweight, dbias and the buffers."""
    x = xs[rank].clone().requires_grad_()
    layer.train()
    y = layer(x)
    y.backward(dys[rank])
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": layer.weight.grad if layer.affine else torch.zeros(0),
        "dbias": layer.bias.grad if layer.affine else torch.zeros(0),
        "buffers": {name: b.clone() for name, b in layer.named_buffers()},
    }


def batch(shape, dtype=torch.float64, n=8):
    """x with a mean far from zero, and a gradient for y."""
    generator = torch.Generator().manual_seed(0)
    x = 100 + 3 * torch.randn(n, *shape, dtype=dtype, generator=generator)
    return x, torch.randn(x.shape, dtype=dtype, generator=generator)


def layer_of(channels, dtype=torch.float64, **options):
    layer = SyncBatchNorm(channels, dtype=dtype, **options)
    if layer.affine:
        nn.init.uniform_(layer.weight)
        nn.init.uniform_(layer.bias)
    return layer


def whole_batch(layer, x, dy):
    x = x.clone().requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()] or [None, None]
    y = reference.batch_norm(x, *parameters, layer.eps)
    y.backward(dy)
    mean, var = reference.running(x, torch.zeros(x.size(1), dtype=x.dtype), torch.ones(x.size(1), dtype=x.dtype))
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": parameters[0].grad if layer.affine else torch.zeros(0),
        "dbias": parameters[1].grad if layer.affine else torch.zeros(0),
        "buffers": {"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(1)},
    }


def joined(ranks):
    """What the ranks hold together; that their buffers are the same bits is checked on the way."""
    for other in ranks[1:]:
        for name, buffer in other["buffers"].items():
            assert torch.equal(buffer, ranks[0]["buffers"][name]), f"{name} differs between ranks"
    return {
        "y": torch.cat([r["y"] for r in ranks]),
        "dx": torch.cat([r["dx"] for r in ranks]),
        "dweight": sum(r["dweight"] for r in ranks),
        "dbias": sum(r["dbias"] for r in ranks),
        "buffers": ranks[0]["buffers"],
    }


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ranks_together_equal_the_whole_batch(split, shape):
    x, dy = batch(shape)
    layer = layer_of(shape[0])

    ranks = run_ranks(train_layer, len(split), layer, x.split(split), dy.split(split))

    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_lone_process_is_plain_batch_norm(shape):
    x, dy = batch(shape)
    layer = layer_of(shape[0])

    assert_close(train_layer(0, layer, [x], [dy]), whole_batch(layer, x, dy), **EXACT)


def test_without_affine_parameters():
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, affine=False)

    ranks = run_ranks(train_layer, 2, layer, x.split([7, 1]), dy.split([7, 1]))

    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)


def test_ranks_may_differ_in_image_size():
    x, dy = batch((3, 12))
    xs = [x[:, :, :8].reshape(8, 3, 4, 2), x[:, :, 8:].reshape(8, 3, 2, 2)]
    dys = [dy[:, :, :8].reshape(8, 3, 4, 2), dy[:, :, 8:].reshape(8, 3, 2, 2)]
    layer = layer_of(3)

    ranks = run_ranks(train_layer, 2, layer, xs, dys)

    want = whole_batch(layer, x, dy)
    for name in "y", "dx":
        assert_close(torch.cat([r[name].flatten(2) for r in ranks], dim=2), want[name], **EXACT)
    assert_close(ranks[0]["dweight"] + ranks[1]["dweight"], want["dweight"], **EXACT)
    assert_close(ranks[1]["buffers"], want["buffers"], **EXACT)


def test_a_step_in_which_no_rank_has_data_leaves_the_buffers():
    x, dy = batch((3, 4, 2), n=0)

    ranks = run_ranks(train_layer, 2, layer_of(3), [x, x], [dy, dy])

    for rank in ranks:
        want = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(0)}
        assert_close(rank["buffers"], want, check_dtype=False)
        assert rank["y"].shape == rank["dx"].shape == x.shape
        assert not torch.cat([rank["dweight"], rank["dbias"]]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_lower_precisions_round_only_their_own_output(dtype, memory_format):
    x, dy = (t.to(dtype).contiguous(memory_format=memory_format) for t in batch((3, 4, 2)))
    layer = layer_of(3, dtype=torch.float32)

    ranks = run_ranks(train_layer, 2, layer, x.split([7, 1]), dy.split([7, 1]))

    assert all(r[name].is_contiguous(memory_format=memory_format) for r in ranks for name in ("y", "dx"))
    want = whole_batch(layer, x.double(), dy.double())
    # dx is a difference of terms near 1: two roundings of those, not of dx itself
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * max(torch.finfo(dtype).eps, 1e-6)}
    assert_close(joined(ranks), want, check_dtype=False, **tolerance)


def cumulative_average(rank, xs):
    layer = SyncBatchNorm(3, momentum=None, dtype=torch.float64)
    for x in xs:
        layer(x.chunk(2)[rank])
    return layer.running_mean, layer.running_var


def test_momentum_none_is_the_average_over_batches():
    xs = [batch((3, 4), n=n)[0] for n in (4, 6, 8)]
    each = [reference.running(x, torch.zeros(3).double(), torch.zeros(3).double(), momentum=1.0) for x in xs]

    for mean, var in run_ranks(cumulative_average, 2, xs):
        assert_close(mean, sum(m for m, _ in each) / 3, **EXACT)
        assert_close(var, sum(v for _, v in each) / 3, **EXACT)


def count_messages(rank, x):
    """Bytes and dtype of every all_reduce of one step."""
    from unittest.mock import patch

    import torch.distributed as dist

    sent = []
    real = dist.all_reduce
    layer = SyncBatchNorm(3, dtype=x.dtype)
    x = x.clone().requires_grad_()
    layer(x).sum()  # the communicator is made here

    def counting(tensor, *args, **kwargs):
        sent.append((tensor.numel(), tensor.dtype))
        return real(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", counting):
        layer(x).sum().backward()
    return sent


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_message_each_way_whatever_the_dtype(dtype):
    x = batch((3, 4, 2))[0].to(dtype)

    for sent in run_ranks(count_messages, 2, x):
        assert sent == [(2 * 3 + 1, torch.float64), (2 * 3, torch.float64)]


def own_communicator(rank, x):
    from syncbn import collectives

    group = collectives.resolve("world")
    return group is not torch.distributed.group.WORLD, group is collectives.resolve("world"), group.size()


def test_messages_have_a_communicator_of_their_own():
    assert run_ranks(own_communicator, 2, None) == [(True, True, 2)] * 2


def double_backward(rank, x):
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(SyncBatchNorm(3, dtype=x.dtype)(x).pow(3).sum(), x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        return str(error)


def test_second_order_gradients_are_refused_not_wrong():
    assert all("once_differentiable" in message for message in run_ranks(double_backward, 2, batch((3, 4))[0]))


def compiled_step(rank, layer, xs, dys):
    torch._dynamo.reset()
    layer.compile(fullgraph=True, backend="aot_eager")
    return train_layer(rank, layer, xs, dys)


def test_compiles_as_one_graph():
    x, dy = batch((3, 4, 2))
    layer = layer_of(3)

    ranks = run_ranks(compiled_step, 2, layer, x.split([7, 1]), dy.split([7, 1]), timeout_s=300)

    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(2, 4, 3), "x has shape (2, 4, 3): it must be [N, 3, *S]"),
        (torch.zeros(3), "x has shape (3,): it must be [N, 3, *S]"),
        (torch.zeros(2, 3, dtype=torch.int64), "x has dtype torch.int64"),
        (torch.zeros(1, 3), "more than one value per channel"),
    ],
    ids=["channels", "one-dimension", "integers", "one-value"],
)
def test_bad_input_says_what_is_wanted(x, error):
    with pytest.raises((ValueError, TypeError)) as raised:
        SyncBatchNorm(3)(x)
    assert error in str(raised.value)


def test_a_group_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"group is 'node': give 'world' or a torch.distributed.ProcessGroup"):
        SyncBatchNorm(3, group="node")(torch.zeros(2, 3))


def halves(rank, layer, xs, dys):
    """A step in which the batch is that of a pair of ranks, not of all four."""
    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    layer.group = pairs[rank // 2]
    return train_layer(rank, layer, xs, dys)


def test_a_process_group_forms_a_batch_of_its_own():
    (x, dy), layer = batch((3, 4, 2)), layer_of(3)
    split = [3, 1, 0, 4]

    ranks = run_ranks(halves, 4, layer, x.split(split), dy.split(split))

    assert_close(joined(ranks[:2]), whole_batch(layer, x[:4], dy[:4]), **EXACT)
    assert_close(joined(ranks[2:]), whole_batch(layer, x[4:], dy[4:]), **EXACT)


def test_eval_uses_the_running_buffers():
    x, _ = batch((3, 4, 2))
    layer = layer_of(3).eval()
    layer.running_mean.fill_(2)
    layer.running_var.fill_(9)
    plain = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    plain.load_state_dict(layer.state_dict())

    assert_close(layer(x), plain(x))


def test_convert_and_revert_change_classes_and_nothing_else():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Sequential(shared, nn.BatchNorm1d(5)), nn.GroupNorm(2, 4))
    model[1].note = "kept"
    before = {id(t) for t in model.state_dict(keep_vars=True).values()}

    assert convert(model) is model
    assert [type(m) for m in (model[1], model[2][0], model[2][1])] == [SyncBatchNorm] * 3
    assert model[1] is model[2][0]
    assert model[1].note == "kept"
    assert {id(t) for t in model.state_dict(keep_vars=True).values()} == before

    assert revert(model) is model
    assert (type(model[1]), type(model[2][1])) == (nn.BatchNorm2d, nn.BatchNorm1d)
    assert {id(t) for t in model.state_dict(keep_vars=True).values()} == before


@pytest.mark.parametrize("base", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_subclasses_with_a_forward_of_their_own_are_left_alone(base):
    class Own(base):
        pass

    model = convert(nn.Sequential(Own(3)))
    assert type(model[0]) is Own
