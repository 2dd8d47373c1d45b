"""Beside other tools: torch.fx and torchvision's feature extractor, torch's own conversion, and the modes of DDP."""

import copy

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import syncbn
from syncbn import SyncBatchNorm, convert, reference, revert
from syncbn.convert import SyncBatchNormAct
from syncbn.trainer.norms.renorm import BatchRenorm
from tests.op.steps import EXACT, batch
from tests.ranks import run_ranks

# torch.fx: a layer is one call in a trace, as torch's own are


def resnet(fuse):
    torch.manual_seed(0)
    return convert(torchvision.models.resnet18(num_classes=4), fuse=fuse, report=lambda _: None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_traced_network_calls_the_layers_and_computes_the_same(fuse, training):
    net, x = resnet(fuse).train(training), torch.randn(2, 3, 64, 64)
    traced = fx.symbolic_trace(copy.deepcopy(net))

    layers = {name for name, m in net.named_modules() if isinstance(m, SyncBatchNorm)}
    assert {node.target for node in traced.graph.nodes if node.op == "call_module"} >= layers
    y = traced(x)
    assert torch.equal(y, net(x))
    assert_close(dict(traced.named_buffers()), dict(net.named_buffers()), rtol=0, atol=0)


def test_a_trace_may_be_reverted():
    """torch's layer in the place of ours takes an input alone, so a trace may hand on no more than was given."""
    net, x = syncbn.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))), torch.randn(6, 3)
    traced = syncbn.revert(fx.symbolic_trace(copy.deepcopy(net)))
    assert not isinstance(traced.get_submodule("1"), SyncBatchNorm)
    assert_close(traced(x), net(x))


@pytest.mark.parametrize("fuse", [False, True])
def test_torchvision_extracts_features(fuse):
    net, x = resnet(fuse).eval(), torch.randn(2, 3, 64, 64)
    wanted, seen = ["layer1.0.bn1", "layer2.0.downsample.1", "layer4.1.bn2"], {}
    assert set(get_graph_node_names(net)[1]) >= set(wanted)
    for name in wanted:
        net.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: seen.update({name: y.clone()}))

    features = create_feature_extractor(copy.deepcopy(net), wanted)(x)

    net(x)
    assert_close(features, seen, rtol=0, atol=0)


class Calls(nn.Module):
    """All that a layer's call takes."""

    def __init__(self, layer):
        super().__init__()
        self.norm = layer

    def forward(self, x, mask):
        return self.norm(input=self.norm(x, x, mask=mask), residual=x)


@pytest.mark.parametrize("kind", [SyncBatchNorm, BatchRenorm])
def test_residual_and_mask_are_in_the_trace(kind):
    net, x, mask = Calls(kind(3)), torch.randn(6, 3), torch.arange(6) != 2
    traced = fx.symbolic_trace(copy.deepcopy(net))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["norm", "norm"]
    assert torch.equal(traced(x, mask), net(x, mask))


def test_a_layer_with_an_activation_of_its_own_is_one_call():
    """timm's layer calls drop and act after it: looked into, they would be applied twice."""
    layer = SyncBatchNorm(3)
    layer.__class__, layer.drop, layer.act = SyncBatchNormAct, nn.Identity(), nn.Hardtanh(-0.1, 0.1)
    traced = fx.symbolic_trace(nn.Sequential(copy.deepcopy(layer)))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0"]
    x = torch.randn(6, 3)
    assert torch.equal(traced(x), layer(x))


# torch.nn.SyncBatchNorm.convert_sync_batchnorm, which Lightning's sync_batchnorm=True calls


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"affine": False}], ids=str)
def test_torchs_conversion_of_ours_is_refused(options):
    """It would build its own layer of the same size, and lose the activation without a word."""
    model = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3, **options))
    with pytest.raises(TypeError, match=r"leave that call out.*or take syncbn\.revert\(model\) first"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is SyncBatchNorm


def test_torchs_conversion_takes_a_reverted_model():
    model = revert(convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), report=lambda _: None))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]) is nn.SyncBatchNorm
    assert model[1].affine is True


# DDP


class Net(nn.Module):
    """Of the second branch nothing reaches the loss on every other step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = (
            nn.Conv1d(3, 3, 1, bias=False, dtype=torch.float64),
            SyncBatchNorm(3, dtype=torch.float64),
        )
        self.side, self.side_norm = (
            nn.Conv1d(3, 3, 1, bias=False, dtype=torch.float64),
            SyncBatchNorm(3, dtype=torch.float64),
        )

    def forward(self, x, both):
        y = self.norm(self.first(x)).relu()
        side = self.side_norm(self.side(x))
        return y + side if both else y


def trained_under(rank, options, xs, steps):
    net = Net()
    model = DistributedDataParallel(net, **options) if dist.is_initialized() else net
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    world = dist.get_world_size() if dist.is_initialized() else 1
    for both in steps:
        optimizer.zero_grad()
        # DDP takes the mean over ranks of gradients
        (model(xs[rank], both).pow(3).sum() * world).backward()
        optimizer.step()
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


MODES = {
    "static_graph": ({"static_graph": True}, [True, True, True]),
    "find_unused_parameters": ({"find_unused_parameters": True}, [True, False, True]),
    "broadcast_buffers": ({"broadcast_buffers": True}, [True, True, True]),
    "no broadcast_buffers": ({"broadcast_buffers": False}, [True, True, True]),
    "gradient_as_bucket_view": ({"gradient_as_bucket_view": True}, [True, True, True]),
}


@pytest.mark.parametrize("options, steps", MODES.values(), ids=MODES)
@pytest.mark.parametrize("split", [[5, 3], [8, 0]], ids=str)
def test_ddp_with_uneven_batches_trains_as_one_process_does(split, options, steps):
    x = batch((3, 4), mean=1.0)[0] / 10
    want = trained_under(0, {}, [x], steps)
    for state in run_ranks(trained_under, 2, options, x.split(split), steps):
        assert_close(state, want, rtol=1e-9, atol=1e-9)


def joined_training(rank, throw):
    """Rank 1 has a batch less."""
    model = DistributedDataParallel(SyncBatchNorm(3))
    steps = 0
    try:
        with model.join(throw_on_early_termination=throw):
            for _ in range(3 - rank):
                model(torch.randn(4, 3)).sum().backward()
                steps += 1
    except RuntimeError as error:
        return steps, str(error)


def test_ddps_join_is_refused_before_anybody_waits():
    for steps, error in run_ranks(joined_training, 2, False, timeout_s=30):
        assert steps == 0
        assert "a SyncBatchNorm within DDP's join()" in error
        assert "join(throw_on_early_termination=True)" in error


def test_a_join_that_ends_with_the_first_rank_goes_on():
    for steps, error in run_ranks(joined_training, 2, True, timeout_s=30):
        assert steps == 2
        assert "exhausted" in error


def joined_in_eval(rank):
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3)))
    model.eval()
    with model.join():
        for _ in range(3 - rank):
            model(torch.randn(4, 3)).sum().backward()
    return True


def test_join_with_frozen_layers_works():
    assert run_ranks(joined_in_eval, 2, timeout_s=30) == [True, True]


def test_the_running_mean_of_ddp_with_uneven_batches_is_that_of_the_whole_batch():
    x = batch((3, 4), mean=1.0)[0]
    mean, _ = reference.running(x, torch.zeros(3).double(), torch.ones(3).double())
    for buffers in run_ranks(ddp_buffers, 2, x.split([7, 1])):
        assert_close(buffers, mean, **EXACT)


def ddp_buffers(rank, xs):
    layer = SyncBatchNorm(3, dtype=torch.float64)
    DistributedDataParallel(layer, broadcast_buffers=True)(xs[rank]).sum().backward()
    return layer.running_mean
