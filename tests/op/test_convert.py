"""convert and revert lose nothing, and say what they did."""

import copy
import io
import pickle
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from syncbn import LazySyncBatchNorm, SyncBatchNorm, convert, revert
from syncbn.convert import SyncBatchNormAct
from tests.op.conversions import BatchNormAct2d, Double, conversion_of, state, tensors
from tests.op.steps import EXACT
from tests.ranks import run_ranks

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LAZY = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class OwnMethod(nn.BatchNorm2d):
    def freeze(self):
        self.eval()


class FrozenBatchNorm2d(nn.Module):
    """Detectron2's and torchvision's, as far as convert can tell."""


class RunningNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))


def step(model, x, run=lambda model, x: model(x)):
    """One training step: y, the gradients of x and of the parameters, the buffers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = run(model, x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, [p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]]


def net(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 2, 1), norm(2)))


def image(dtype=torch.float64):
    return torch.randn(4, 3, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))


def resnet18():
    return pytest.importorskip("torchvision").models.resnet18(num_classes=5)


def test_convert_and_revert_change_classes_and_nothing_else():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Sequential(shared, nn.BatchNorm1d(5)), nn.GroupNorm(2, 4))
    model[1].note = "kept"
    model[1].weight.requires_grad_(False)
    model[2].eval()
    before = state(model)

    assert convert(model) is model
    assert [type(m) for m in (model[1], model[2][0], model[2][1])] == [SyncBatchNorm] * 3
    assert model[1] is model[2][0]
    assert model[1].note == "kept"
    assert [kept for _, _, *kept in state(model)] == [kept for _, _, *kept in before]

    assert revert(model) is model
    assert state(model) == before


@pytest.mark.parametrize("dims", BATCH_NORMS)
def test_a_batch_norm_itself_converts(dims):
    layer = BATCH_NORMS[dims](3)
    assert conversion_of(convert, layer).changed == ("",)
    assert type(layer) is SyncBatchNorm
    assert conversion_of(revert, layer).changed == ("",)
    assert type(layer) is BATCH_NORMS[dims]


@pytest.mark.parametrize(
    "make",
    [net, lambda: net(BatchNormAct2d), lambda: net(nn.SyncBatchNorm), resnet18],
    ids=["2d", "act", "sync", "resnet"],
)
def test_in_one_process_a_model_computes_as_before(make):
    model = make().double()
    x = image()
    want, reverted = step(copy.deepcopy(model), x), copy.deepcopy(model)

    assert_close(step(convert(model), x), want)
    assert_close(step(revert(convert(reverted)), x), want, rtol=0, atol=0)
    assert_close(model.eval()(x), revert(model)(x))


@pytest.mark.parametrize("reduction", ["all_reduce", "gather"])
def test_the_options_reach_the_layers(reduction):
    layer = convert(net(), group=[2, 5], reduction=reduction)[1]
    assert (layer.group, layer.reduction) == ([2, 5], reduction)


def test_after_training_nothing_of_ours_remains():
    model = net().double()
    before = state(model)

    step(convert(model), image(), lambda model, x: checkpoint(model, x, use_reentrant=False))
    model[1].witness = None
    assert "witness" in vars(model[1])

    assert state(revert(model)) == before


def test_hooks_fire():
    model, fired = net(nn.BatchNorm2d), []
    model[1].register_forward_pre_hook(lambda *_: fired.append("before"))
    model[1].register_forward_hook(lambda *_: fired.append("after"))
    model[1].register_full_backward_hook(lambda *_: fired.append("backward"))
    model[1].weight.register_hook(lambda *_: fired.append("weight"))

    step(convert(model), image(torch.float32))

    assert sorted(fired) == ["after", "backward", "before", "weight"]


def test_state_dicts_go_both_ways():
    torch_model, model = net(), convert(net())
    step(torch_model, image(torch.float32))

    model.load_state_dict(torch_model.state_dict(), strict=True)
    assert_close(model.state_dict(), torch_model.state_dict(), rtol=0, atol=0)

    step(model, image(torch.float32))
    torch_model.load_state_dict(model.state_dict(), strict=True)
    assert_close(model.state_dict(), torch_model.state_dict(), rtol=0, atol=0)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "torch.save"])
def test_a_copy_of_a_converted_model_is_converted_and_reverts(duplicate):
    model = convert(net(), group=2, reduction="gather")
    step(model, image(torch.float32))

    other = duplicate(model)

    assert type(other[1]) is SyncBatchNorm
    assert (other[1].group, other[1].reduction) == (2, "gather")
    assert_close(step(other, image(torch.float32)), step(model, image(torch.float32)), rtol=0, atol=0)
    assert type(revert(other)[1]) is nn.BatchNorm2d
    assert type(model[1]) is SyncBatchNorm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_half_precision_buffers_are_float32_while_converted(dtype, device):
    model = net().to(dtype).to(device)
    identities = {name: identity[0] for name, identity in tensors(model).items()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    for layer in (convert(model)[1], model[3][1]):
        assert (layer.running_mean.dtype, layer.running_var.dtype) == (torch.float32, torch.float32)
        assert layer.weight.dtype == dtype
    assert {name: identity[0] for name, identity in tensors(model).items()} == identities

    revert(model)
    assert {name: identity[0] for name, identity in tensors(model).items()} == identities
    assert {name: b.dtype for name, b in model.named_buffers()} == {name: b.dtype for name, b in buffers.items()}
    if device == "cpu":
        assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
        model(image(dtype))


def test_drop_and_act_of_timm_run_in_order():
    model = nn.Sequential(BatchNormAct2d(3, drop=nn.Hardtanh(-2, -1)))
    convert(model)
    assert type(model[0]) is SyncBatchNormAct
    assert torch.equal(model(image(torch.float32)), torch.zeros(4, 3, 6, 6))
    assert type(revert(model)[0]) is BatchNormAct2d


# Parametrisations


def parametrized(layer, name="weight"):
    return parametrize.register_parametrization(layer, name, Double())


def test_a_parametrised_layer_stays_parametrised():
    model = nn.Sequential(parametrized(nn.BatchNorm2d(3))).double()
    nn.init.uniform_(model[0].parametrizations.weight.original)
    before, want = state(model), step(copy.deepcopy(model), image())

    layer = convert(model)[0]
    assert isinstance(layer, SyncBatchNorm)
    assert type(layer).__name__ == "ParametrizedSyncBatchNorm"
    assert torch.equal(layer.weight, 2 * layer.parametrizations.weight.original)
    assert_close(step(model, image()), want, **EXACT)
    assert type(copy.deepcopy(layer)) is type(layer)

    kind, *rest = state(revert(model))[1]
    assert (kind.__name__, kind.__bases__) == ("ParametrizedBatchNorm2d", (nn.BatchNorm2d,))
    assert rest == list(before[1][1:])


def test_parametrisations_can_be_removed_after_convert():
    model = convert(nn.Sequential(parametrized(parametrized(nn.BatchNorm2d(3)), "bias")))
    original = model[0].parametrizations.weight.original

    parametrize.remove_parametrizations(model[0], "weight")
    assert model[0].weight is original
    assert torch.equal(model[0].weight, torch.ones(3))
    assert parametrize.is_parametrized(model[0], "bias")

    parametrize.remove_parametrizations(model[0], "bias")
    assert type(model[0]) is SyncBatchNorm
    assert type(revert(model)[0]) is nn.BatchNorm2d


def test_parametrisations_can_be_added_after_convert():
    model = convert(nn.Sequential(nn.BatchNorm2d(3)))
    parametrized(model[0])

    layer = revert(model)[0]
    assert type(layer).__bases__ == (nn.BatchNorm2d,)
    assert torch.equal(layer.weight, torch.ones(3))
    assert type(parametrize.remove_parametrizations(layer, "weight")) is nn.BatchNorm2d


# Lazy layers


@pytest.mark.parametrize("dims", LAZY)
def test_a_lazy_layer_becomes_lazy_and_then_ours(dims):
    x = torch.randn(4, 3, *[2] * dims)
    model = nn.Sequential(LAZY[dims](eps=0.1))
    before = state(model)
    want = LAZY[dims](eps=0.1)(x)

    assert type(convert(model, group=1)[0]) is LazySyncBatchNorm
    assert state(revert(model)) == before

    convert(model, group=1)
    weight = model[0].weight
    assert_close(model(x), want)
    assert type(model[0]) is SyncBatchNorm
    assert model[0].weight is weight
    assert (model[0].num_features, model[0].group) == (3, 1)
    assert vars(revert(model)[0]).keys() == vars(BATCH_NORMS[dims](3)).keys()
    assert type(model[0]) is BATCH_NORMS[dims]


def test_the_dtype_of_a_lazy_layer_is_kept():
    layer = nn.LazyBatchNorm2d(dtype=torch.float16)
    before = state(layer)
    assert {b.dtype for b in convert(layer).buffers()} == {torch.float32, torch.int64}
    assert state(revert(layer)) == before

    convert(layer)(image(torch.float16))
    assert (layer.weight.dtype, layer.running_var.dtype) == (torch.float16, torch.float32)
    revert(layer)(image(torch.float16))


OPTIONS = {
    "default": {},
    "no bias": {"bias": False},
    "not affine": {"affine": False},
    "no buffers": {"track_running_stats": False},
    "half": {"dtype": torch.float16},
    "double": {"dtype": torch.float64},
    "cumulative": {"momentum": None, "eps": 0.1, "group": 3, "reduction": "gather"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_lazy_sync_batch_norm_becomes_the_one_it_would_have_been(options):
    x = torch.randn(4, 3, 5, dtype=options.get("dtype"))
    mask = torch.tensor([True, True, True, False])
    want, lazy = SyncBatchNorm(3, **options), LazySyncBatchNorm(**options)

    assert torch.equal(lazy(x, None, mask), want(x, None, mask))
    assert type(lazy) is SyncBatchNorm
    assert repr(lazy) == repr(want)
    assert vars(lazy).keys() == vars(want).keys()
    assert_close(lazy.state_dict(), want.state_dict(), rtol=0, atol=0)
    assert [p is None or p.requires_grad for p in (lazy.weight, lazy.bias)] == [True, True]


def test_a_lazy_layer_takes_mask_by_name():
    x, mask = torch.randn(4, 3, 5), torch.tensor([True, True, True, False])
    assert torch.equal(LazySyncBatchNorm()(input=x, mask=mask), SyncBatchNorm(3)(x, mask=mask))


@pytest.mark.parametrize("make", [LazySyncBatchNorm, nn.LazyBatchNorm2d])
def test_a_lazy_layer_takes_its_channels_from_a_checkpoint(make):
    checkpoint = {name: b + 2 for name, b in SyncBatchNorm(3).state_dict().items()}
    layer = make()
    layer.load_state_dict(checkpoint)
    convert(layer, report=lambda _: None)

    layer.eval()(image(torch.float32))
    assert (type(layer), layer.num_features) == (SyncBatchNorm, 3)
    assert_close(layer.state_dict(), checkpoint, rtol=0, atol=0)


def test_a_lazy_layer_trusts_its_checkpoint_more_than_its_input():
    layer = LazySyncBatchNorm()
    layer.load_state_dict(SyncBatchNorm(3).state_dict())
    with pytest.raises(ValueError, match=r"must be \[N, 3, "):
        layer(torch.randn(4, 5))


def test_a_lazy_layer_refuses_an_input_without_channels():
    with pytest.raises(ValueError, match=r"shape \(3,\): it must be \[N, C"):
        LazySyncBatchNorm()(torch.randn(3))


# What is left alone


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(nn.BatchNorm2d(3))


def patched():
    layer = nn.BatchNorm2d(3)
    layer.forward = types.MethodType(lambda self, x: x, layer)
    return layer


LEFT = {
    "forward": (lambda: OwnForward(3), "OwnForward is a subclass with a forward of its own"),
    "method": (lambda: OwnMethod(3), "OwnMethod is a subclass that adds to its base"),
    "parametrised": (lambda: parametrized(OwnMethod(3)), "OwnMethod is a subclass that adds to its base"),
    "frozen": (FrozenBatchNorm2d, "FrozenBatchNorm2d is frozen"),
    "script": (scripted, "TorchScript"),
    "patched": (patched, "BatchNorm2d had its forward replaced"),
    "stranger": (RunningNorm, "RunningNorm has running statistics"),
}


@pytest.mark.parametrize("make, reason", LEFT.values(), ids=LEFT)
def test_what_cannot_convert_is_left_alone_with_a_reason(make, reason):
    model = nn.Sequential(make(), nn.BatchNorm1d(3))
    kind = type(model[0])

    report = conversion_of(convert, model)

    assert report.changed == ("1",)
    assert list(report.left) == ["0"]
    assert reason in report.left["0"]
    assert type(model[0]) is kind
    assert conversion_of(revert, model).left == {}


@pytest.mark.parametrize("base", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d])
def test_subclasses_are_left_alone(base):
    kind = type("Own", (base,), {})
    model = nn.Sequential(kind() if base is nn.LazyBatchNorm2d else kind(3))
    assert list(conversion_of(convert, model).left) == ["0"]
    assert type(model[0]) is kind


def test_other_norms_are_counted_but_not_left():
    instance_norm = nn.InstanceNorm1d(3, track_running_stats=True)
    container = type("PreNorm", (nn.Sequential,), {})
    model = nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), container(nn.LayerNorm(3)), instance_norm)
    report = conversion_of(convert, model)
    assert (report.changed, report.left) == ((), {})
    assert report.others == {"GroupNorm": 1, "LayerNorm": 2, "InstanceNorm1d": 1}


def test_a_layer_that_is_ours_keeps_its_group():
    model = nn.Sequential(SyncBatchNorm(3, group=2), nn.BatchNorm1d(3))
    report = conversion_of(convert, model, group=4)
    assert (model[0].group, model[1].group) == (2, 4)
    assert (report.changed, report.left) == (("1",), {})

    report = conversion_of(revert, model)
    assert type(model[0]) is SyncBatchNorm
    assert report.changed == ("1",)
    assert "built as SyncBatchNorm" in report.left["0"]


def test_nothing_to_convert_is_warned_of():
    with pytest.warns(UserWarning, match=r"nothing to convert[^$]*1 FrozenBatchNorm2d, 1 GroupNorm"):
        convert(nn.Sequential(FrozenBatchNorm2d(), nn.GroupNorm(1, 3)))


def test_there_is_no_warning_where_none_is_due():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.Sequential(nn.GroupNorm(1, 3)), report=lambda _: None)
        convert(convert(net()))
        convert(nn.Sequential(OwnMethod(3), nn.BatchNorm1d(3)))


def test_a_report_reads_well(capsys):
    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(9)], FrozenBatchNorm2d(), FrozenBatchNorm2d())
    convert(model, report=print)
    assert capsys.readouterr().out == (
        "changed 9 (0, 1, 2, 3, 4, 5, ...)\n"
        f"left 2 (9, 10): {__name__}.FrozenBatchNorm2d is frozen: it takes no statistics of the batch\n"
        "normalisation layers as they were: 2 FrozenBatchNorm2d\n"
    )
    convert(nn.BatchNorm1d(3), report=print)
    assert capsys.readouterr().out.startswith("changed 1 (the model itself)\n")


# Part of a model


def named():
    shared = nn.BatchNorm2d(4)
    stage = lambda: nn.ModuleDict({"bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)})  # noqa: E731
    return nn.ModuleDict({"body": stage(), "head": stage(), "shared": shared, "again": shared, "fc": nn.Linear(2, 2)})


SELECTIONS = {
    "all": ({}, ["body.bn1", "body.bn2", "head.bn1", "head.bn2", "shared"]),
    "include": ({"include": "body.*"}, ["body.bn1", "body.bn2"]),
    "include several": ({"include": ["body.bn1", "head.*"]}, ["body.bn1", "head.bn1", "head.bn2"]),
    "exclude": ({"exclude": "*.bn1"}, ["body.bn2", "head.bn2", "shared"]),
    "exclude several": ({"exclude": ("*.bn1", "*.bn2")}, ["shared"]),
    "both": ({"include": "body.*", "exclude": "*.bn1"}, ["body.bn2"]),
    "another name includes": ({"include": "again"}, ["shared"]),
    "another name excludes": ({"include": "shared", "exclude": "again"}, []),
    "none": ({"include": []}, []),
}


@pytest.mark.parametrize("options, want", SELECTIONS.values(), ids=SELECTIONS)
def test_patterns_select_layers_by_name(options, want):
    model = named()
    report = conversion_of(convert, model, **options)
    assert list(report.changed) == want
    assert report.left == {}
    assert [name for name, m in model.named_modules() if isinstance(m, SyncBatchNorm)] == want


def test_parts_of_a_model_have_groups_of_their_own():
    model = convert(convert(named(), group=2, include="body.*"), group="node", exclude=["body.*", "head.bn1"])
    groups = {name: m.group for name, m in model.named_modules() if isinstance(m, SyncBatchNorm)}
    assert groups == {"body.bn1": 2, "body.bn2": 2, "head.bn2": "node", "shared": "node"}
    assert type(model["head"]["bn1"]) is nn.BatchNorm2d


REFUSED = {
    "include": ({"include": ["body.*", "boddy.*"]}, r"'boddy\.\*' matches none of .* 6 \(body\.bn1, body\.bn2, "),
    "exclude": ({"exclude": "fc"}, "'fc' matches none"),
    "group": ({"group": "universe"}, "group is 'universe'"),
    "reduction": ({"reduction": "sum"}, "reduction is 'sum'"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_wrong_options_change_nothing(options, message):
    model = named()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        convert(model, **options)
    assert state(model) == before


def test_a_process_group_without_this_rank_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3, process_group=-100))  # new_group's answer to others
    before = state(model)
    with pytest.raises(ValueError, match="this rank is not in the process group that it was given"):
        convert(model)
    assert state(model) == before


# Export


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_a_reverted_model_exports(norm):
    model = net(norm)
    convert(model)
    step(model, image(torch.float32))
    want = model.eval()(image(torch.float32))

    exported = torch.export.export(revert(model), (image(torch.float32),))

    assert_close(exported.module()(image(torch.float32)), want)


# Among ranks


def group_of_a_torch_layer(rank):
    pair = dist.new_group([0, 1])
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=pair), nn.SyncBatchNorm(3))
    before = state(model)

    convert(model)
    groups = [layer.group for layer in model]
    assert groups[0] is pair
    assert groups[1] == "world"
    step(model, torch.randn(2, 3, 2))
    assert copy.deepcopy(model)[0].group is pair
    with pytest.warns(UserWarning, match=r"0: of its process_group a pickle kept the ranks alone, \(0, 1\)"):
        loaded = revert(pickle.loads(pickle.dumps(model)))
    assert loaded[0].process_group is None
    assert state(revert(model)) == before

    assert convert(model, group=1)[0].group == 1
    assert revert(model)[0].process_group is pair


def test_a_torch_layer_keeps_its_process_group():
    run_ranks(group_of_a_torch_layer, 2)


def step_of_a_wrapped_model(rank, model, x):
    wrapped = DistributedDataParallel(model)
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    convert(wrapped)
    wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    optimiser.step()
    return revert(wrapped).module.state_dict()


def test_convert_after_ddp_trains_on_the_whole_batch():
    model, x = net().double(), image()
    ranks = run_ranks(step_of_a_wrapped_model, 2, copy.deepcopy(model), x)

    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimiser.step()
    assert_close(ranks, [model.state_dict()] * 2, **EXACT)
