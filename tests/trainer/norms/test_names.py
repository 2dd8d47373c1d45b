"""norm= changes what it says and nothing else, counts it, and says why it found nothing."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import syncbn
from syncbn.trainer import norms
from syncbn.trainer.errors import UserError
from syncbn.trainer.norms import NormConfig, Place

CPU = Place(torch.device("cpu"))


def converted(model, word, **more):
    """The model with norm=word, and of how many layers how many were changed."""
    model, (changed, layers, _) = norms.convert(model, NormConfig(word, **more), CPU)
    return model, changed, layers


ANYWHERE = [word for word in norms.NORMS if word != "torch"]
CHANGING = [word for word in ANYWHERE if word != "local"]


@pytest.mark.parametrize("word", CHANGING)
def test_each_word_converts_every_batch_norm(word):
    model, changed, layers = converted(torchvision.models.resnet18(), word)
    assert (changed, layers) == (20, 20)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms.batch_norms(model)) == (20 if norms.NORMS[word].running else 0)


def test_sync_layers_are_the_operators_and_the_same_everywhere():
    model, _, _ = converted(torchvision.models.resnet18(), "sync")
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules()) == 20
    assert norms.synchronised(model)


@pytest.mark.parametrize("word", ANYWHERE)
def test_ranks_have_the_same_buffers_unless_each_takes_its_own_statistics(word):
    model, _, _ = converted(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), word)
    assert norms.synchronised(model) is (word not in ("local", "ghost"))


def test_fusing_converts_as_many_and_computes_the_same():
    plain = torchvision.models.resnet18().double()
    fused = copy.deepcopy(plain)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    assert converted(plain, "sync")[1] == 20
    assert converted(fused, "sync", fuse=True)[1] == 20
    assert type(fused.layer1[0]).__name__ == "FusedBasicBlock"
    torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize(
    ("group", "everywhere_the_same"), [("world", True), ("node", False), (2, False), ({"samples": 8}, False)]
)
def test_layers_of_a_group_are_the_same_on_its_ranks_alone(group, everywhere_the_same):
    model, changed, _ = converted(torchvision.models.resnet18(), "sync", group=group)
    assert changed == 20
    assert all(m.group == group for m in norms.batch_norms(model))
    assert norms.synchronised(model) is everywhere_the_same


@pytest.mark.parametrize(
    ("group", "ranks", "fits"),
    [("world", 3, True), ("node", 3, True), (1, 3, True), (3, 3, True), (2, 3, False), (4, 2, False)],
)
def test_a_group_must_divide_the_ranks(group, ranks, fits):
    if fits:
        norms.refuse_misfit(NormConfig("sync", group), ranks)
    else:
        with pytest.raises(UserError, match=rf"norm.group={group} does not divide the {ranks} ranks") as refused:
            norms.refuse_misfit(NormConfig("sync", group), ranks)
        assert refused.value.on_every_rank


MISFITS = {
    "group": ("local", {"group": 2}, "norm.group=2 with norm=local: only norm=sync, batch_renorm have that"),
    "samples": ("ghost", {"group": {"samples": 2}}, "with norm=ghost: only norm=sync, batch_renorm have that"),
    "fuse": ("torch", {"fuse": True}, "norm.fuse=true with norm=torch: only norm=sync has that; take it"),
    "reduction": (
        "batch_renorm",
        {"reduction": "gather"},
        "norm.reduction=gather with norm=batch_renorm: only norm=sync",
    ),
    "reduction-word": ("sync", {"reduction": "sum"}, "norm.reduction=sum: choose one of auto, all_reduce, gather, one"),
    "groups": ("frn", {"groups": 4}, "norm.groups=4 with norm=frn: only norm=group, ws_group, evonorm_s0 have that"),
    "sub_batch": ("local", {"sub_batch": 2}, "norm.sub_batch=2 with norm=local: only norm=ghost has that"),
    "renorm_steps": ("sync", {"renorm_steps": 2}, "only norm=batch_renorm has that"),
    "unknown": ("bach", {}, "norm=bach: choose one of sync, local, torch, group, layer, instance, batch_renorm, ghost"),
    "samples-0": ("sync", {"group": {"samples": 0}}, "norm.group={'samples': 0}: give world, node, a number of ranks"),
    "images": ("sync", {"group": {"images": 4}}, "norm.group={'images': 4}: give world, node, a number of ranks"),
    "momentum-0": ("sync", {"momentum": 0.0}, "norm.momentum=0.0: give a number above 0 up to 1, auto, or null"),
    "momentum-word": ("sync", {"momentum": "most"}, "norm.momentum=most: give a number above 0 up to 1, auto"),
    "groups-0": ("group", {"groups": 0}, "norm.groups=0: give 1 or more"),
}


@pytest.mark.parametrize(("word", "more", "said"), MISFITS.values(), ids=MISFITS)
def test_what_a_norm_has_not_is_refused_in_a_line(word, more, said):
    with pytest.raises(UserError) as refused:
        NormConfig(word, **more)
    assert said in str(refused.value)


@pytest.mark.parametrize("reduction", ["auto", "all_reduce", "gather"])
def test_ranks_add_up_as_the_config_says(reduction):
    model, _ = norms.convert(nn.Sequential(nn.BatchNorm2d(3)), NormConfig("sync", reduction=reduction), CPU)
    assert model[0].reduction == reduction


def test_local_changes_nothing():
    model, changed, layers = converted(torchvision.models.resnet18(), "local")
    assert (changed, layers) == (0, 20)
    assert not norms.synchronised(model)


def test_torch_is_refused_without_gpus():
    with pytest.raises(UserError, match=r"norm=torch on cpu: .* take norm=sync"):
        norms.convert(nn.BatchNorm2d(3), NormConfig("torch"), CPU)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(2, 2), "the model has no normalisation layer"),
        (
            nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)),
            "the model has LayerNorm ×2, and only batch norm layers that take statistics are converted",
        ),
        (torchvision.ops.FrozenBatchNorm2d(3), "the model has FrozenBatchNorm2d ×1"),
    ],
)
def test_nothing_to_convert_says_why(model, reason):
    assert converted(model, "sync")[1] == 0
    assert reason in norms.nothing_converted(model)


# What stays


class Net(nn.Module):
    """Batch norm in a forward of its own and in a chain, with an activation and without, and a layer used twice."""

    def __init__(self, channels=8, norm=nn.BatchNorm2d, conv=nn.Conv2d):
        super().__init__()
        self.conv1, self.bn1 = conv(3, channels, 3, bias=False), norm(channels, eps=1e-3)
        self.shared = norm(channels)
        self.chain = nn.Sequential(conv(channels, channels, 3, bias=False), self.shared, nn.ReLU(), norm(channels))
        self.again = nn.Sequential(self.shared, nn.ReLU())
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        y = self.again(self.chain(self.bn1(self.conv1(x)).relu()))
        return self.fc(y.flatten(2).mean(2))


@pytest.mark.parametrize("word", CHANGING)
def test_a_layer_keeps_its_weights_eps_device_dtype_hooks_and_sharing(word):
    net = Net().double()
    nn.init.normal_(net.bn1.weight)
    weight, bias, calls = net.bn1.weight, net.bn1.bias, []
    net.bn1.register_forward_hook(lambda *_: calls.append("after"))
    net.bn1.register_forward_pre_hook(lambda *_: calls.append("before"))

    net, changed, layers = converted(net, word)
    y = net(torch.randn(4, 3, 9, 9, dtype=torch.float64))

    assert (changed, layers) == (3, 3)
    assert net.bn1.weight is weight
    assert net.bn1.bias is bias
    assert getattr(net.bn1, "eps", 1e-3) == 1e-3
    assert net.chain[1] is net.again[0]
    assert calls == ["before", "after"]
    assert y.dtype == torch.float64
    assert {p.dtype for p in net.parameters()} == {torch.float64}


@pytest.mark.parametrize("word", CHANGING)
def test_every_parameter_takes_part_and_a_state_fits_a_model_made_anew(word):
    def made():
        return converted(Net(), word)[0]

    net, twin = made(), made()
    x = torch.randn(4, 3, 9, 9)
    net(x).square().sum().backward()
    assert [p.grad is None for p in net.parameters()] == [not p.requires_grad for p in net.parameters()]
    assert all(p.requires_grad for p in net.bn1.parameters()) is (word != "frozen")
    torch.nn.init.normal_(net.bn1.weight)
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin.eval()(x), net.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(net)(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("word", CHANGING)
@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions_convert_too(word, dims):
    kinds = {1: (nn.BatchNorm1d, nn.Conv1d), 3: (nn.BatchNorm3d, nn.Conv3d)}[dims]
    net, changed, _ = converted(Net(8, *kinds), word)
    assert changed == 3
    assert net(torch.randn(2, 3, *[7] * dims)).isfinite().all()


@pytest.mark.parametrize("word", [word for word in CHANGING if word != "instance"])
def test_vectors_are_normalised_too(word):
    net, _, _ = converted(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), word)
    assert net(torch.randn(4, 6)).isfinite().all()


@pytest.mark.parametrize("word", [word for word in norms.NORMS if norms.NORMS[word].running and word != "torch"])
def test_a_batch_norm_by_another_way_has_the_state_of_batch_norm(word):
    plain = Net()
    assert converted(Net(), word)[0].state_dict().keys() == plain.state_dict().keys()


def test_what_a_users_builder_converted_is_converted_back_first():
    net, changed, layers = converted(syncbn.convert(Net()), "group")
    assert (changed, layers) == (3, 3)
    assert not norms.batch_norms(net)


def test_a_subclass_with_a_forward_of_its_own_is_left():
    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    for word in CHANGING:
        net, changed, layers = converted(nn.Sequential(Own(3), nn.BatchNorm2d(3)), word)
        assert (type(net[0]), changed, layers) == (Own, 1, 2)


# Momentum

AUTO = {
    "sync": ({"name": "sync"}, 16),
    "pairs": ({"name": "sync", "group": 2}, 4),
    "node": ({"name": "batch_renorm", "group": "node"}, 8),
    "samples": ({"name": "sync", "group": {"samples": 5}}, 8),
    "more-samples-than-there-are": ({"name": "sync", "group": {"samples": 99}}, 16),
    "local": ({"name": "local"}, 2),
    "ghost": ({"name": "ghost", "sub_batch": 1}, 1),
}


@pytest.mark.parametrize(("config", "images"), AUTO.values(), ids=AUTO)
def test_automatic_momentum_remembers_as_many_images_whatever_the_batch(config, images):
    place = Place(torch.device("cpu"), ranks=8, node_ranks=4, images=16)
    net, _ = norms.convert(Net(), NormConfig(momentum="auto", **config), place)
    for layer in norms.batch_norms(net):
        assert (1 - layer.momentum) ** (32 / images) == pytest.approx(0.9)


def test_automatic_momentum_of_32_images_is_torchs_own():
    assert norms.momentum_of(NormConfig(momentum="auto"), CPU._replace(ranks=4, images=32)) == pytest.approx(0.1)


@pytest.mark.parametrize("word", ["sync", "local", "batch_renorm", "ghost"])
def test_momentum_is_what_is_given_else_the_models_own(word):
    for given, momentum in ((None, 0.25), (0.5, 0.5), (1, 1)):
        net = nn.Sequential(nn.BatchNorm2d(3, momentum=0.25))
        assert converted(net, word, momentum=given)[0][0].momentum == momentum


def test_a_recipe_may_set_the_momentum_of_norms_without_running_statistics():
    assert norms.NormConfig("group", momentum=0.1).momentum == 0.1
