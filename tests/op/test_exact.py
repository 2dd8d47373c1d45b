"""Ranks together are one batch: output, every gradient and every buffer, against reference.py."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from syncbn import SyncBatchNorm, reference
from tests.cases import SHAPES, SPLITS
from tests.op.steps import EXACT, batch, joined, layer_of, train_layer, whole_batch
from tests.ranks import run_ranks


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
    from syncbn.collectives import Spec, resolve

    group = resolve(Spec("world"))
    return group is not torch.distributed.group.WORLD, group is resolve(Spec("world")), group.size()


def test_messages_have_a_communicator_of_their_own():
    assert run_ranks(own_communicator, 2, None) == [(True, True, 2)] * 2


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
        (torch.zeros(1, 3), "the whole batch has one value per channel"),
    ],
    ids=["channels", "one-dimension", "integers", "one-value"],
)
def test_bad_input_says_what_is_wanted(x, error):
    with pytest.raises((ValueError, TypeError)) as raised:
        SyncBatchNorm(3)(x)
    assert error in str(raised.value)


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
