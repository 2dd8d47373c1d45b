"""torch.compile: one graph, the same numbers, and no recompilation that its peers would wait for."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from syncbn import convert, sync_batch_norm
from tests.op.steps import EXACT, assert_near, batch, joined, layer_of, train_layer, whole_batch
from tests.ranks import run_ranks


def compiled_step(rank, layer, backend, *args):
    torch._dynamo.reset()
    layer.compile(fullgraph=True, backend=backend)
    return train_layer(rank, layer, *args)


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "gather"}, {"momentum": None}, {"affine": False}, {"group": 2}, {"group": {"samples": 5}}],
    ids=str,
)
def test_compiles_as_one_graph(options):
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, **options)

    ranks = run_ranks(compiled_step, 2, layer, "aot_eager", x.split([6, 2]), dy.split([6, 2]), timeout_s=300)

    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)


def test_compiles_with_a_mask():
    x, dy = batch((3, 4, 2))
    masks = [torch.rand(n, 1, 4, 2, generator=torch.Generator().manual_seed(n)) < 0.7 for n in (6, 2)]
    layer = layer_of(3)
    arguments = layer, x.split([6, 2]), dy.split([6, 2]), masks

    eager = run_ranks(train_layer, 2, *arguments)
    compiled = run_ranks(compiled_step, 2, layer, "aot_eager", *arguments[1:], timeout_s=300)

    assert_close(compiled, eager, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_code_that_inductor_makes_keeps_the_digits(dtype):
    x, dy = batch((3, 4, 2), dtype, mean=3e4 if dtype == torch.float32 else 0.0)
    layer = layer_of(3, torch.float32)

    ranks = run_ranks(compiled_step, 2, layer, "inductor", x.split([6, 2]), dy.split([6, 2]), timeout_s=300)

    want = whole_batch(layer, x.double(), dy.double())
    assert_near(joined(ranks), want, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def compiled_function(rank, group, x):
    torch._dynamo.reset()
    if group == "process-group":
        group = dist.new_group([0, 1])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def normalised(x):
        return sync_batch_norm(x, group=group)[0]

    return normalised(x.split([6, 2])[rank])


@pytest.mark.parametrize("group", ["world", 2, (0, 1), "process-group"], ids=str)
def test_the_function_compiles_too(group):
    x = batch((3, 4, 2))[0]

    shares = run_ranks(compiled_function, 2, group, x, timeout_s=300)

    assert_close(torch.cat(shares), sync_batch_norm(x)[0], **EXACT)


def small_net():
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())]
    return convert(nn.Sequential(*[layer for block in blocks for layer in block]).double())


def trained(rank, how, xs):
    """Three steps of a small net; each step's gradients, and the state at the end."""
    torch._dynamo.reset()
    net = small_net()
    model = net
    if how == "compile(DDP)":
        model = torch.compile(DistributedDataParallel(net), backend="aot_eager")
    elif how == "DDP(compile)":
        model = DistributedDataParallel(torch.compile(net, fullgraph=True, backend="aot_eager"))
    elif how == "DDP":
        model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x in xs:
        # Summed over ranks and averaged by DDP: per rank twice its share of the mean over the batch
        share = x.chunk(2)[rank] if dist.is_initialized() else x
        loss = model(share).square().sum() * (2 / len(x) if dist.is_initialized() else 1 / len(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: t.clone() for name, t in net.state_dict().items()}


@pytest.mark.parametrize("how", ["DDP", "compile(DDP)", "DDP(compile)"])
def test_with_ddp_in_either_order(how):
    xs = [batch((3, 8, 8), n=n, mean=1.0)[0] for n in (7, 7, 7)]  # shares of 4 and 3

    want = trained(0, "alone", xs)
    for state in run_ranks(trained, 2, how, xs, timeout_s=300):
        assert_close(state, want, rtol=1e-10, atol=1e-10)


def many_batch_sizes(rank, sizes):
    """Compile for two batch sizes, then allow no compilation any more."""
    torch._dynamo.reset()
    net = small_net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, size in enumerate(sizes[rank]):
        x = batch((3, 8, 8), n=size, mean=1.0)[0]
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            compiled(x).square().sum().backward()
    return {name: t.clone() for name, t in net.state_dict().items()}


def test_batches_of_any_size_are_one_compilation():
    sizes = [[4, 2, 9, 300], [5, 7, 2, 3]]

    first, second = run_ranks(many_batch_sizes, 2, sizes, timeout_s=300)

    assert_close(first, second, rtol=0, atol=0)
    assert first["1.num_batches_tracked"] == 4


def checkpointed(rank, compiled, xs):
    torch._dynamo.reset()
    net = small_net()

    def forward(x):
        return net[3:](checkpoint(net[:3], x, use_reentrant=False))

    run = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    x = xs[rank].clone().requires_grad_()
    run(x).square().sum().backward()
    return x.grad, {name: t.clone() for name, t in net.state_dict().items()}


def test_a_compiled_checkpoint_moves_the_buffers_once():
    xs = batch((3, 8, 8), mean=1.0)[0].split([5, 3])

    eager, compiled = (run_ranks(checkpointed, 2, one, xs, timeout_s=300) for one in (False, True))

    assert_close(compiled, eager, **EXACT)
