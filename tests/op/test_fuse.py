"""convert(fuse=True): what is fused computes the same, and what cannot be fused is left alone and says why."""

import copy
import inspect
import io
import pickle
import random
from collections import OrderedDict, defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, convert, has_hooks, recalibrate, revert
from tests.op.conversions import BatchNormAct2d, Double, conversion_of, state
from tests.ranks import run_ranks

torchvision = pytest.importorskip("torchvision")
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.densenet import DenseNet  # noqa: E402
from torchvision.models.googlenet import Inception  # noqa: E402
from torchvision.models.mobilenetv2 import InvertedResidual  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402

from syncbn.trainer.models.residual import SmallResNet  # noqa: E402


def chain():
    relu = nn.ReLU(inplace=True)
    pair = lambda i, o: (nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), relu)  # noqa: E731
    return nn.Sequential(*pair(3, 4), nn.Sequential(*pair(4, 4)), nn.Conv2d(4, 2, 1), relu, nn.BatchNorm2d(2))


def backbone():
    return IntermediateLayerGetter(ResNet(BasicBlock, [1, 1, 1, 1]), {"layer1": "fine", "layer3": "coarse"})


def inception():
    return nn.Sequential(nn.Conv2d(3, 8, 3), Inception(8, 4, 4, 4, 4, 4, 4))


# name: a net, its number of BN→ReLU and of BN→add→ReLU
NETS = {
    "basic": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), 5, 4),
    "bottleneck": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=8), 9, 4),
    "small": (lambda: SmallResNet(8, num_classes=5, width=4), 4, 3),
    "chain": (chain, 2, 0),
    "backbone": (backbone, 4, 3),
    "inception": (inception, 6, 0),
    "mobilenet": (lambda: nn.Sequential(InvertedResidual(3, 3, 1, 2), nn.ReLU()), 0, 0),
    "densenet": (lambda: DenseNet(4, (2, 2), num_init_features=8, num_classes=5), 2, 0),
}


def made(name):
    """A net that normalises by other figures than those it was born with."""
    torch.manual_seed(0)
    net = NETS[name][0]().double()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
    return net


def images(n, size=16):
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def outputs(y):
    return list(y.values()) if isinstance(y, dict) else [y]


def results(model, x):
    """Of a step in training and a look in eval: all that there is to compare."""
    x = x.clone().requires_grad_()
    ys = outputs(model.train()(x))
    sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in ys).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        seen = outputs(model.eval()(x))
    return {"y": ys, "eval": seen, "dx": x.grad, "gradients": gradients, "state": dict(model.state_dict())}


def counts(report):
    return report.fused.get("BN→ReLU", 0), report.fused.get("BN→add→ReLU", 0)


@pytest.mark.parametrize("name", NETS)
def test_a_fused_net_computes_the_same(name):
    net, x = made(name), images(3)
    before = state(net)
    plain = convert(copy.deepcopy(net))

    report = conversion_of(convert, net, fuse=True)

    assert counts(report) == NETS[name][1:]
    assert net.state_dict().keys() == plain.state_dict().keys()
    want = results(plain, x)
    assert_close(results(net, x), want)
    net.zero_grad()
    plain.zero_grad()
    revert(net).train()
    revert(plain).train()
    assert [kept for kept, _, *_ in state(net)] == [kept for kept, _, *_ in before]
    assert_close(results(net, x), results(plain, x))


# Each with its number of modules that cannot be traced
ZOO = {
    "resnet18": (9, 8, 0),
    "resnet50": (1 + 2 * 16, 16, 0),
    "resnext50_32x4d": (33, 16, 0),
    "wide_resnet50_2": (33, 16, 0),
    "googlenet": (59, 0, 0),
    "mobilenet_v2": (0, 0, 0),
    "densenet121": (4, 0, 58),
}


@pytest.mark.parametrize("name", ZOO)
def test_how_much_of_a_published_net_is_fused(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        net = torchvision.models.get_model(name, **options)
    report = conversion_of(convert, net, fuse=True)
    assert (*counts(report), len(report.unfused)) == ZOO[name]
    assert set(report.unfused.values()) <= {"its forward asks for the type of a value"}


def test_the_forward_of_a_fused_block_can_be_read():
    net = convert(ResNet(Bottleneck, [3, 1, 1, 1]), fuse=True)
    assert type(net.layer1[1]) is type(net.layer1[2]) is not type(net.layer1[0])
    assert repr(net.layer1[1]).startswith("FusedBottleneck(")
    assert inspect.getsource(type(net.layer1[1]).forward).count("activation = 'relu'") == 3


def step_on_ranks(rank, net, shares):
    """The same training step of the net under DDP, plain and fused."""
    both = []
    for model in (convert(copy.deepcopy(net)), net):
        both.append(results(DistributedDataParallel(model, find_unused_parameters=True), shares[rank]))
    return both


@pytest.mark.parametrize("name", ["bottleneck", "small", "chain"])
def test_a_fused_net_computes_the_same_on_ranks(name):
    net = convert(made(name), fuse=True)
    for want, got in run_ranks(step_on_ranks, 2, net, images(5).split([4, 1])):
        assert_close(got, want)


def test_ranks_of_a_fused_net_see_one_batch():
    net, x = convert(made("small"), fuse=True), images(5)
    whole = results(copy.deepcopy(net), x)
    parts = [got for _, got in run_ranks(step_on_ranks, 2, net, x.split([4, 1]))]
    assert_close(torch.cat([part["y"][0] for part in parts]), whole["y"][0])
    for part in parts:
        buffers = {name: part["state"][f"module.{name}"] for name, _ in net.named_buffers()}
        assert_close(buffers, {name: whole["state"][name] for name in buffers})


def test_ranks_and_processes_share_what_they_pickle():
    net = convert(made("small"), fuse=True)
    assert type(pickle.loads(pickle.dumps(net))) is type(net)
    assert type(copy.deepcopy(net).blocks[1]) is type(net.blocks[1]) is not type(net.blocks[0])


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved_and_loaded}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@pytest.mark.parametrize("name", ["bottleneck", "chain", "backbone"])
def test_a_copy_is_fused_and_reverts(name, duplicate):
    net, x = made(name), images(2)
    kinds = [type(m) for m in net.modules()]
    other = duplicate(convert(net, fuse=True))

    assert [type(m) for m in other.modules()] == [type(m) for m in net.modules()] != kinds
    assert_close(results(other, x), results(net, x), rtol=0, atol=0)
    assert [type(m) for m in revert(other).modules()] == kinds


@pytest.mark.parametrize("name", ["bottleneck", "chain", "small"])
def test_convert_again_changes_nothing_and_revert_leaves_nothing(name):
    net = made(name)
    before = state(net)

    first = conversion_of(convert, net, fuse=True)
    fused = state(net)
    second = conversion_of(convert, net, fuse=True)
    conversion_of(convert, net)
    assert state(net) == fused
    assert second.fused == first.fused != {}
    assert second.changed == ()

    assert conversion_of(revert, net).fused == {}
    assert state(net) == before


def test_what_is_converted_can_be_fused_later_and_in_parts():
    net = convert(made("bottleneck"))
    plain = copy.deepcopy(net)
    assert counts(conversion_of(convert, net, fuse=True, include="layer2.*")) == (2, 1)
    assert counts(conversion_of(convert, net, fuse=True, include="layer2.0.bn1")) == (2, 1)
    assert counts(conversion_of(convert, net, fuse=True, include="layer3.0.bn3")) == (2, 2)
    assert counts(conversion_of(convert, net, fuse=True, include="layer3.*")) == (4, 2)
    assert counts(conversion_of(convert, net, fuse=True, exclude="bn1")) == (8, 4)
    assert type(net) is ResNet
    assert_close(results(net, images(2)), results(plain, images(2)))


def test_layers_that_stay_as_they_were_are_not_fused():
    net = made("bottleneck")
    report = conversion_of(convert, net, fuse=True, exclude="layer2.*")
    assert (counts(report), report.unfused) == ((7, 3), {})
    assert type(net.layer2[0]) is Bottleneck


def test_state_dicts_go_both_ways():
    plain, net = made("bottleneck"), convert(made("bottleneck"), fuse=True)
    results(net, images(2))
    plain.load_state_dict(net.state_dict())
    assert_close(plain.eval()(images(2)), net.eval()(images(2)))
    results(plain, images(3))
    net.load_state_dict(plain.state_dict(), strict=True)
    assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)


def compiled_steps(rank, net, shares):
    torch._dynamo.reset()
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for model in (compiled, eager):
        model(shares[rank]).square().sum().backward()
    return dict(net.named_buffers()), [p.grad for p in net.parameters()], [p.grad for p in eager.parameters()]


def test_a_fused_net_compiles_as_one_graph():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), BasicBlock(4, 4)).double()
    assert counts(conversion_of(convert, net, fuse=True)) == (2, 1)
    (first, *gradients), (second, *others) = run_ranks(
        compiled_steps, 2, net, images(5, 6).split([3, 2]), timeout_s=300
    )
    assert_close(first, second, rtol=0, atol=0)
    for got, want in (gradients, others):
        assert_close(got, want)


def test_recalibrate_measures_what_enters_a_fused_layer():
    nets = [convert(made("basic")), convert(made("basic"), fuse=True)]
    first, second = [recalibrate(net, [images(2), images(3)]) for net in nets]
    assert_close({n: tuple(m) for n, m in first.items()}, {n: tuple(m) for n, m in second.items()})


# Sequential


def test_a_fused_sequential_stays_a_sequential():
    net = convert(chain(), fuse=True).double()
    x = images(2, 8)
    assert isinstance(net, nn.Sequential)
    assert len(net) == len(list(net)) == 7

    assert_close(net[3:](net[:2](x)), revert(copy.deepcopy(net))[3:](revert(copy.deepcopy(net))[:2](x)))
    net.append(nn.Hardtanh(-2, -1))
    assert net(x).max() <= -1
    del net[-1]
    assert net(x).max() > -1
    net[2] = nn.Tanh()
    assert_close(net[:3](x), revert(copy.deepcopy(net))[:3](x))


def test_later_hooks_in_a_sequential_fire():
    net, fired = convert(chain(), fuse=True), []
    net[2].register_forward_hook(lambda *_: fired.append("relu"))
    net(images(2, 8).float())
    assert fired == 3 * ["relu"]  # It is there so often


# What a forward may look like


class Block(nn.Module):
    """Whatever a forward may need."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.relu, self.relu6, self.drop = nn.ReLU(inplace=True), nn.ReLU6(), nn.Dropout(0.0)
        self.side = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.norms = nn.ModuleDict({"a": nn.ModuleList([nn.BatchNorm2d(3)])})
        self.gate = nn.Parameter(torch.linspace(-1, 1, 3).view(3, 1, 1))
        self.register_buffer("shift", torch.full((1, 3, 4, 4), 0.3))
        self.calls, self.log = 0, []

    def one(self, x):
        return self.bn1(self.conv1(x))

    def two(self, x):
        return self.bn2(self.conv2(x))


def block(forward, base=Block, **more):
    torch.manual_seed(0)
    net = type("Own", (base,), {"forward": forward, **more})().double()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight)
            nn.init.uniform_(layer.bias)
    return net


def add_in_place(self, x):
    y = self.one(x)
    y += x
    return self.relu(y)


def shortcut_later(self, x):
    y = self.bn2(self.conv2(self.relu(self.one(x))))
    shortcut = self.conv1(x)
    y += shortcut
    return self.relu(y) + shortcut.sum()


def inner(self, x):
    y = self.one(x)
    for norm in self.norms["a"]:
        y = F.relu(norm(self.conv2(y)))
    return {"y": [y, (y, None)]}["y"][1][0]


def number(self, x):
    n = x.size(0)
    m = n
    n += 1
    return F.relu(self.one(x)) * (n / m)


def mutated_before(self, x):
    x = x * 1
    y = x
    y += 1
    return F.relu(self.one(x)) + x


def ordered(self, x):
    return OrderedDict(a=F.relu(self.one(x)), b=x)


FUSED = {
    "nn.ReLU": (lambda self, x: self.relu(self.one(x)), 1, 0),
    "F.relu": (lambda self, x: F.relu(self.one(x), inplace=True), 1, 0),
    "torch.relu": (lambda self, x: torch.relu(self.one(x)), 1, 0),
    "torch.relu_": (lambda self, x: torch.relu_(self.one(x)), 1, 0),
    "relu": (lambda self, x: self.one(x).relu(), 1, 0),
    "relu_": (lambda self, x: self.one(x).relu_(), 1, 0),
    "+": (lambda self, x: self.relu(self.one(x) + x), 0, 1),
    "+ from the other side": (lambda self, x: self.relu(x + self.one(x)), 0, 1),
    "+=": (add_in_place, 0, 1),
    "torch.add": (lambda self, x: F.relu(torch.add(self.one(x), x)), 0, 1),
    "alpha=1": (lambda self, x: F.relu(torch.add(x, self.one(x), alpha=1)), 0, 1),
    "add": (lambda self, x: F.relu(x.add(self.one(x))), 0, 1),
    "add_": (lambda self, x: F.relu(self.one(x).add_(x)), 0, 1),
    "add_ of a later": (lambda self, x: F.relu(self.one(x).add_(self.two(x))), 0, 1),
    "two layers": (lambda self, x: self.relu(self.one(x) + self.two(x)), 0, 1),
    "shortcut later": (shortcut_later, 1, 1),
    "shared": (lambda self, x: self.relu(self.one(F.relu(self.one(x)))) + self.one(x), 2, 0),
    "containers": (inner, 1, 0),
    "a number": (number, 1, 0),
    "in place before": (mutated_before, 1, 0),
    "OrderedDict": (ordered, 1, 0),
    "twice relu": (lambda self, x: F.relu(F.relu(self.one(x))), 1, 0),
    "its sum and more": (lambda self, x: self.relu(self.one(x) + x) + x, 0, 1),
}


@pytest.mark.parametrize("forward, relus, adds", FUSED.values(), ids=FUSED)
def test_a_pattern_is_fused_however_it_is_written(forward, relus, adds):
    check(block(forward), (relus, adds), {})


def check(net, number, reasons, x=None, **options):
    """The net fused so often, and not for these reasons, computes the same, and reverts."""
    x = images(4, 4) if x is None else x
    before = state(net)
    plain = convert(copy.deepcopy(net), report=lambda _: None)
    report = conversion_of(convert, net, fuse=True, **options)
    assert counts(report) == number
    assert report.unfused.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.unfused[name]
    runs = []
    for model in (plain, net):
        random.seed(0)
        torch.manual_seed(0)
        y = model(x.clone())
        runs.append((type(y), results(model, x)))
    assert runs[0][0] is runs[1][0]
    assert_close(runs[1][1], runs[0][1])
    assert [type(m) for m in revert(net).modules()] == [kind for kind, *_ in before]
    return report


# What is not fused


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return -dy


class Loud(nn.Identity):
    def __call__(self, x):
        return super().__call__(2 * x)


def without_grad(self, x):
    with torch.no_grad():
        shift = self.conv2(x)
    return F.relu(self.one(x)) + shift


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(self.one(x))


def half_by_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.relu(self.one(x))


def caught(self, x):
    try:
        assert isinstance(x, torch.Tensor)
    except Exception:
        return x
    return F.relu(self.one(x))


def counted(self, x):
    self.calls += 1
    return F.relu(self.one(x))


def logged(self, x):
    self.log.append(x)
    return F.relu(self.one(x))


def kept(self, x):
    self.last = F.relu(self.one(x))
    return self.last


def is_batch(x):
    return isinstance(x, torch.Tensor)


def chosen(self, x):
    return F.relu(self.one(x)) if random.random() < 0.9 else x


def chosen_by_torch(self, x):
    return F.relu(self.one(x)) if torch.rand(1) < 0.9 else x


def written(self, x):
    y = self.one(x)
    y[:, 0] = 0
    return F.relu(y)


def scaled(self, x):
    y = F.relu(self.one(x))
    y *= 2
    return y


def scaled_attribute(self, x):
    y = F.relu(self.one(x))
    s = y.mT
    s *= 2
    return y


def data_set(self, x):
    y = F.relu(self.one(x))
    y.data = y.data * 2
    return y


def grouped(self, x):
    ys = defaultdict(list)
    ys["y"].append(F.relu(self.one(x)))
    return ys


# name: a forward that is not traced, and why
UNTRACEABLE = {
    "dropout": (
        lambda self, x: F.relu(self.one(F.dropout(x, 0.0, self.training))),
        "not the same in training and eval",
    ),
    "flag of a child": (
        lambda self, x: F.relu(self.one(x)) if self.drop.training else x,
        "not the same in training and eval",
    ),
    "branch": (lambda self, x: F.relu(self.one(x)) if x.sum() > 0 else x, "branches on a value"),
    "branch on size": (lambda self, x: F.relu(self.one(x)) if x.size(0) else x, "branches on a value"),
    "branch on buffer": (lambda self, x: F.relu(self.one(x)) if self.shift.sum() else x, "branches on a value"),
    "default": (lambda self, x, skip=None: F.relu(self.one(x) + (x if skip is None else skip)), "just one argument"),
    "more": (lambda self, x, *skip: F.relu(self.one(x) + (skip[0] if skip else x)), "just one argument"),
    "counter": (counted, "changes attributes"),
    "log": (logged, "changes attributes"),
    "last": (kept, "changes attributes"),
    "random": (chosen, "draws random numbers"),
    "torch.rand": (chosen_by_torch, "uses torch.rand of what is no input"),
    "constant": (lambda self, x: F.relu(self.one(x)) + torch.ones(1), "torch.ones"),
    "dtype": (lambda self, x: F.relu(self.one(x.to(next(self.parameters()).dtype))), "dtype"),
    "no_grad": (without_grad, "runs under no_grad"),
    "no autocast": (without_autocast, "runs under no_grad, autocast"),
    "is_grad_enabled": (lambda self, x: F.relu(self.one(x)) if torch.is_grad_enabled() else x, "with and without grad"),
    "is_autocast": (lambda self, x: F.relu(self.one(x)) if torch.is_autocast_enabled() else x, "grad and autocast"),
    "caught": (caught, "type of a value"),
    "loop": (lambda self, x: F.relu(sum(self.one(part) for part in x.split(2))), "iterates over a value"),
    "autocast": (half_by_autocast, "runs under no_grad, autocast"),
    "checkpoint": (
        lambda self, x: checkpoint(lambda x: F.relu(self.one(x)), x, use_reentrant=False),
        "its forward",
    ),  # torch 2.11 and 2.15 differ
    "reentrant": (lambda self, x: checkpoint(lambda x: F.relu(self.one(x)), x, use_reentrant=True), "its forward"),
    "Function": (lambda self, x: Reverse.apply(F.relu(self.one(x))), "has a backward of its own"),
    "isinstance": (lambda self, x: F.relu(self.one(x)) if isinstance(x, torch.Tensor) else x, "type of a value"),
    "is_tensor": (lambda self, x: F.relu(self.one(x)) if torch.is_tensor(x) else x, "type of a value"),
    "asked elsewhere": (lambda self, x: F.relu(self.one(x)) if is_batch(x) else x, "type of a value"),
    "hasattr": (lambda self, x: F.relu(self.one(x)) if hasattr(x, "grad_fn") else x, "type of a value"),
    "item": (written, "cannot be traced: TypeError"),
    "*=": (scaled, "in-place operator"),
    "*= of an attribute": (scaled_attribute, "in-place operator"),
    "data": (data_set, "sets .data"),
    "defaultdict": (grouped, "makes a defaultdict"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("forward, reason", UNTRACEABLE.values(), ids=UNTRACEABLE)
def test_a_forward_that_a_trace_would_change_is_left_alone(forward, reason):
    net = block(forward)
    held = dict(vars(net))
    drawn = torch.get_rng_state()

    report = conversion_of(convert, net, fuse=True)

    assert (report.fused, list(report.unfused)) == ({}, [""])
    assert reason in report.unfused[""]
    assert type(net).__name__ == "Own"
    assert vars(net) == held
    assert net.log == []
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(m.training for m in net.modules())


def replaced(net):
    net.forward = lambda x: x


def scripted(net):
    net.__class__ = type("Own", (type(net),), {"__reduce__": lambda self: (nn.Identity, ())})


def final(net):
    net.__class__ = type("Own", (type(net),), {"__init_subclass__": classmethod(lambda cls, key: None)})


def loud(net):
    net.drop = Loud()


NOT_FUSED = {
    "replaced": (replaced, "", "its forward was replaced"),
    "pickled its own way": (scripted, "", "has its own way to be pickled"),
    "final": (final, "", "no class can be derived from its own"),
    "loud child": (loud, "", "has a __call__ of its own"),
    "hook": (lambda net: net.bn1.register_forward_hook(lambda *_: None), "bn1", "it has hooks"),
    "pre-hook": (lambda net: net.bn1.register_forward_pre_hook(lambda *_: None), "bn1", "it has hooks"),
    "backward hook": (lambda net: net.bn1.register_full_backward_hook(lambda *_: None), "bn1", "it has hooks"),
    "hook of the ReLU": (lambda net: net.relu.register_forward_hook(lambda *_: None), "bn1", "ReLU after it has hooks"),
    "forward of the ReLU": (lambda net: setattr(net.relu, "forward", torch.tanh), "bn1", "or a forward of its own"),
    "lazy": (lambda net: setattr(net, "bn1", nn.LazyBatchNorm2d()), "bn1", "lazy: convert with fuse=True again"),
    "active": (lambda net: setattr(convert(net).bn1, "activation", "relu"), "bn1", "does relu already"),
    "timm": (lambda net: setattr(net, "bn1", BatchNormAct2d(3)), "bn1", "its forward is its own"),
}


HOOKED = {name: change for name, (change, *_) in NOT_FUSED.items() if "hook" in name}


@pytest.mark.parametrize("hook", HOOKED.values(), ids=HOOKED)
def test_a_hook_of_any_kind_is_noticed(hook):
    net = block(lambda self, x: self.relu(self.one(x)))
    assert not any(map(has_hooks, net.children()))
    hook(net)
    assert sum(map(has_hooks, net.children())) == 1


@pytest.mark.parametrize("change, name, reason", NOT_FUSED.values(), ids=NOT_FUSED)
@pytest.mark.parametrize("add", [False, True], ids=["relu", "add"])
def test_a_module_that_is_special_is_left_alone(change, name, reason, add):
    net = block(lambda self, x: self.drop(self.relu(self.one(x) + x if add else self.one(x))))
    net.relu.inplace = False  # torch allows none after a backward hook
    change(net)
    report = conversion_of(convert, net, fuse=True)
    assert report.fused == {}
    assert list(report.unfused) == [name]
    assert reason in report.unfused[name]
    assert f"not fused 1 ({name or 'the model itself'}): " in str(report)
    assert type(net).__name__ == "Own"
    net.double()(images(4, 4))


@pytest.mark.parametrize("change, name, reason", list(NOT_FUSED.values())[4:], ids=list(NOT_FUSED)[4:])
def test_a_pair_that_is_special_is_left_alone_in_a_sequential(change, name, reason):
    net = nn.Sequential(OrderedDict(bn1=nn.BatchNorm2d(3), relu=nn.ReLU())).double()
    change(net)
    report = conversion_of(convert, net, fuse=True)
    assert (report.fused, list(report.unfused)) == ({}, [name])
    assert reason in report.unfused[name]
    assert type(net) is nn.Sequential
    net.double()(images(4, 4))


def input_changed(self, x):
    c = self.conv1(x)
    y = self.bn1(c)
    c.mul_(2)
    return F.relu(y + c)


def input_changed_by_another_name(self, x):
    x = x * 1
    y = self.bn1(self.drop(x))
    return F.relu(y + self.relu(x))


def layer_between(self, x):
    y = self.bn1(self.conv1(x))
    return F.relu(y + self.conv2(self.bn1(x)))


def inside_between(self, x):
    y = self.bn1(self.conv1(x))
    return F.relu(y + self.side(x))


def statistics_between(self, x):
    y = self.bn1(self.conv1(x))
    return F.relu(y + self.bn1.running_mean.view(-1, 1, 1) * x)


def in_place_elsewhere(self, x):
    y = z = x * 1
    y += self.one(x)
    return F.relu(y) + z


def share_bn1(net):
    net.side[1] = net.bn1


MISSED = {
    "output used": (lambda self, x: F.relu(y := self.one(x)) + y, "its output is used elsewhere too"),
    "output used, added": (lambda self, x: F.relu((y := self.one(x)) + x) + y, "its output is used elsewhere too"),
    "sum used": (lambda self, x: F.relu(y := self.one(x) + x) + y, "the sum is used before the ReLU too"),
    "added to itself": (lambda self, x: F.relu((y := self.one(x)) + y), "it is added to itself"),
    "number": (lambda self, x: F.relu(self.one(x) + 1), "is a number, a parameter or a buffer"),
    "parameter": (lambda self, x: F.relu(self.one(x) + self.gate), "is a number, a parameter or a buffer"),
    "buffer": (lambda self, x: F.relu(self.shift + self.one(x)), "is a number, a parameter or a buffer"),
    "in place": (lambda self, x: F.relu((x * 1).add_(self.one(x))), "added in place to what others may see"),
    "+= elsewhere": (in_place_elsewhere, "added in place to what others may see"),
    "layer between": (layer_between, "uses it too"),
    "inside between": (inside_between, "uses it too"),
    "statistics between": (statistics_between, "uses it too"),
}


@pytest.mark.parametrize("forward, reason", MISSED.values(), ids=MISSED)
def test_what_would_compute_something_else_is_not_fused(forward, reason):
    net = block(forward)
    if forward is inside_between:
        share_bn1(net)
    check(net, (0, 0), {"bn1": reason})


@pytest.mark.parametrize("forward", [input_changed, input_changed_by_another_name])
def test_an_input_that_may_change_is_read_before(forward):
    net, x = block(forward).eval(), images(4, 4)
    plain = convert(copy.deepcopy(net))
    assert "might change its input" in conversion_of(convert, net, fuse=True).unfused["bn1"]
    with torch.no_grad():  # As autograd forbids it
        assert_close(net(x), plain(x))


OTHER = {
    "ReLU6": lambda self, x: self.relu6(self.one(x)),
    "alpha": lambda self, x: F.relu(torch.add(self.one(x), x, alpha=2)),
    "subtraction": lambda self, x: F.relu(self.one(x) - x),
    "no ReLU": lambda self, x: self.one(x) + x,
    "ReLU of the input": lambda self, x: self.one(F.relu(x)),
}


@pytest.mark.parametrize("forward", OTHER.values(), ids=OTHER)
def test_what_is_no_pattern_needs_no_reason(forward):
    check(block(forward), (0, 0), {})


def test_terms_of_different_shapes_are_refused():
    net = convert(block(lambda self, x: F.relu(self.one(x) + x.mean((2, 3), keepdim=True))), fuse=True)
    with pytest.raises(ValueError, match="shape"):
        net(images(4, 4))


# What is done to a fused model later


def test_a_layer_that_is_called_by_others_stays_a_plain_batch_norm():
    net, x = made("basic"), images(2)
    want = convert(copy.deepcopy(net)).layer1[0].bn2(torch.zeros(2, 64, 3, 3).double() - 9)
    assert_close(convert(net, fuse=True).layer1[0].bn2(torch.zeros(2, 64, 3, 3).double() - 9), want)
    assert want.min() < 0 or want.max() > 0
    assert net.layer1[0].bn2.activation is None
    assert net(x).shape == (2, 5)


@pytest.mark.parametrize("change", [lambda net: revert(net.bn1), lambda net: setattr(net, "bn1", nn.Identity())])
def test_a_fused_layer_that_went_is_missed_aloud(change):
    net = convert(made("basic"), fuse=True)
    change(net)
    with pytest.raises(TypeError, match="activation"):
        net(images(2))


def test_modules_may_be_replaced_by_name():
    net = convert(made("basic"), fuse=True)
    net.fc = nn.Linear(512, 2).double()
    assert net(images(2)).shape == (2, 2)


def test_a_parametrised_module_is_fused_and_reverts():
    net, x = block(lambda self, x: F.relu(self.one(x)) * self.gate), images(4, 4)
    parametrize.register_parametrization(net, "gate", Double())
    plain = convert(copy.deepcopy(net))
    assert counts(conversion_of(convert, net, fuse=True)) == (1, 0)
    assert_close(results(net, x), results(plain, x))
    assert type(revert(net)).__name__ == "ParametrizedOwn"
    assert type(parametrize.remove_parametrizations(net, "gate")).__name__ == "Own"


def test_a_module_parametrised_after_it_was_fused_reverts():
    net = convert(block(lambda self, x: F.relu(self.one(x)) * self.gate), fuse=True)
    parametrize.register_parametrization(net, "gate", Double())
    assert [type(revert(net)).__name__, type(net).__bases__[0].__name__] == ["ParametrizedOwn", "Own"]


def test_a_lazy_layer_is_fused_once_it_knows_its_channels():
    net = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()).double()
    assert "lazy" in conversion_of(convert, net, fuse=True).unfused["0"]
    net(images(2, 4))
    assert counts(conversion_of(convert, net, fuse=True)) == (1, 0)
    assert type(net[0]) is SyncBatchNorm
