"""A forward and a backward in one call of C each: they leave what their passes leave one by one."""

import time
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from syncbn import DriftMonitor, SyncBatchNorm, collectives, kernels, shared_memory
from tests.ranks import run_ranks

cpu = pytest.importorskip("syncbn.kernels.cpu", exc_type=OSError)

SIZES = {"NC": (7, 5), "NCHW": (3, 5, 4, 3), "small": (4, 16, 8, 8), "large": (4, 32, 40, 40), "empty": (0, 5, 2, 2)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def trained(rank, size, dtype, options, in_one_call, level=None, late_s=0.0):
    """All that two steps of a layer leave, and what a DriftMonitor of that level reads of them."""
    torch.manual_seed(rank)
    images, channels, *space = size
    layer = SyncBatchNorm(channels, momentum=options.get("momentum", 0.1), affine=options.get("affine", True))
    shape = (images and images + rank, channels, *space)
    x, dy, residual = (torch.randn(shape).add(3).to(dtype).requires_grad_() for _ in range(3))
    if options.get("last"):
        x, dy, residual = (t.detach().contiguous(memory_format=torch.channels_last) for t in (x, dy, residual))
    if options.get("gaps"):
        x, residual = (torch.stack([t.detach()] * 2, -1)[..., 0] for t in (x, residual))
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    mask = torch.rand(shape[0], 1, *shape[2:]) > 0.3 if options.get("mask") else None
    beside = {"residual": residual} if options.get("residual") else {}
    monitor = DriftMonitor(nn.Sequential(layer), level=level) if level else None
    left = []
    with patch.object(cpu, "WHOLE", cpu.WHOLE if in_one_call else None):
        for _ in range(2):
            time.sleep(late_s * rank)
            y = layer(x, mask=mask, activation=options.get("activation"), **beside)
            time.sleep(late_s * rank)
            wanted = [x, *layer.parameters(), *beside.values()]
            left += [y, *torch.autograd.grad(y, wanted, dy.detach())]
        left += layer.buffers()
    if monitor is not None:
        left.append(monitor.read().layers)
        monitor.close()
    return left


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu"},
        {"activation": "relu", "residual": True},
        {"mask": True},
        {"momentum": None, "affine": False, "gaps": True},
        {"activation": "relu", "residual": True, "mask": True, "gaps": True},
    ],
    ids=str,
)
def test_it_leaves_the_bits_of_its_passes(options, dtype):
    for size in SIZES.values():
        for last in [False] + [True] * (len(size) == 4):
            rows = {**options, "last": last}
            alone = size if size[0] else (2, *size[1:])
            for ranks, of in (1, alone), (2, size):
                passes = run_ranks(trained, ranks, of, dtype, rows, False)
                assert_close(run_ranks(trained, ranks, of, dtype, rows, True), passes, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("level", ["rank", "image"])
@pytest.mark.parametrize("options", [{}, {"mask": True}], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_observer_is_told_the_same(ranks, options, level):
    for size in SIZES["NCHW"], SIZES["NC"], SIZES["large"]:
        passes = run_ranks(trained, ranks, size, torch.float32, options, False, level)
        assert run_ranks(trained, ranks, size, torch.float32, options, True, level)[0][-1] == passes[0][-1]
        unseen = run_ranks(trained, ranks, size, torch.float32, options, True)
        seen = run_ranks(trained, ranks, size, torch.float32, options, True, level)
        assert_close([left[:-1] for left in seen], unseen, rtol=0, atol=0)


@pytest.mark.parametrize("level", [None, "image"])
def test_a_message_that_takes_longer_than_c_waits_is_gone_on_with(level):
    """C waits for a slice of 50 ms, and leaves the rest to Python."""
    size, options = SIZES["NCHW"], {"activation": "relu", "residual": True}
    late = run_ranks(trained, 2, size, torch.float32, options, True, level, 0.15)
    in_time = run_ranks(trained, 2, size, torch.float32, options, True, level)
    for one, other in zip(late, in_time, strict=True):
        assert one.pop() == other.pop() if level else True
        assert_close(one, other, rtol=0, atol=0)


def refused_in_between(rank, level):
    """Readings of a layer, one of whose calls was refused by rank 1, and of one that had no such call."""
    read = []
    for refused in False, True:
        torch.manual_seed(rank)
        layer = SyncBatchNorm(3)
        with DriftMonitor(nn.Sequential(layer), level=level) as monitor:
            layer(torch.randn(4, 3, 2, 2))
            if refused:
                with pytest.raises(ValueError, match="residual" if rank else "another rank of the group refused"):
                    layer(100 + torch.ones(9, 3, 2, 2), residual=torch.ones(1) if rank else None)
            layer(torch.randn(4, 3, 2, 2))
            read.append((monitor.read().layers, layer.state_dict()))
    return read


@pytest.mark.parametrize("level", ["rank", "image"])
def test_a_refused_call_leaves_nothing_with_an_observer_or_in_the_buffers(level):
    for (figures, state), (figures_of_refused, state_of_refused) in run_ranks(refused_in_between, 2, level):
        assert figures == figures_of_refused
        assert_close(state, state_of_refused, rtol=0, atol=0)


def one_value(rank):
    layer = SyncBatchNorm(3)
    with pytest.raises(ValueError, match="the whole batch has one value per channel"):
        layer(torch.ones(1 - rank, 3))
    return layer.num_batches_tracked.item()


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_value_is_refused_before_the_buffers_move(ranks):
    assert run_ranks(one_value, ranks) == [0] * ranks


def sent_by_c(rank, channels, options):
    """Whether C sent the message forward, and that backward."""
    layer, real, by_c = SyncBatchNorm(channels, **options), collectives.line, []

    def line(*arguments):
        one = real(*arguments)
        by_c.append(one is not None)
        return one

    with patch.object(collectives, "line", line):
        layer(torch.randn(2, channels, 3, requires_grad=True)).sum().backward()
    return by_c


@pytest.mark.parametrize(
    "channels, options, expected",
    [
        (4, {}, [True, True]),
        (4095, {}, [True, True]),
        (4096, {}, [False, True]),
        (4097, {}, [False, False]),
        (4, {"reduction": "gather"}, [False, False]),
        (4, {"reduction": "all_reduce"}, [False, False]),
    ],
    ids=str,
)
@pytest.mark.skipif(not shared_memory.available(), reason="mailbox.c was not built here")
def test_which_messages_c_sends_itself(channels, options, expected):
    """The 2 C + 1 values forward, and the 2 C backward, must fit a slot of 8192."""
    assert run_ranks(sent_by_c, 2, channels, options) == [expected] * 2


def test_the_make_in_c_is_that_which_layers_use():
    assert kernels.choose(torch.empty(0)).WHOLE is not None
