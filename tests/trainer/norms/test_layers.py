"""Each norm that is no batch norm of torch's or ours computes what its paper says."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from syncbn.trainer import norms
from syncbn.trainer.errors import UserError
from syncbn.trainer.norms import NormConfig, Place
from syncbn.trainer.norms.sample import groups_of, standardised

CPU = Place(torch.device("cpu"))
EPS = 1e-3


def converted(model, word, **more):
    return norms.convert(model, NormConfig(word, **more), CPU)[0]


def layer_of(word, channels=8, **more):
    """One layer, with a weight, bias and running statistics that are not what they began as; in float64."""
    layer = nn.BatchNorm2d(channels, eps=EPS, dtype=torch.float64)
    for value in (*layer.parameters(), layer.running_mean, layer.running_var):
        value.data.uniform_(0.5, 2)
    return converted(nn.Sequential(layer), word, **more)[0]


def images(*shape):
    return 2 + 3 * torch.randn(*shape, dtype=torch.float64)


def affine(x, layer):
    return x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)


# Statistics of an image

IN_GROUPS = {
    "group": ({"groups": 4}, 4),
    "group-of-all-but-one": ({"groups": 32}, 4),
    "layer": ({}, 1),
    "instance": ({}, 8),
    "ws_group": ({"groups": 2}, 2),
}


@pytest.mark.parametrize(("more", "groups"), IN_GROUPS.values(), ids=IN_GROUPS)
def test_channels_of_one_image_are_normalised_together(more, groups, request):
    word = request.node.callspec.id.split("-")[0]
    layer, x = layer_of(word, **more), images(3, 8, 4, 5)
    flat = x.view(3, groups, -1)
    flat = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, correction=0, keepdim=True) + EPS).sqrt()
    assert_close(layer(x), affine(flat.view_as(x), layer))
    assert_close(layer.eval()(x[:1]), layer(x)[:1])


@pytest.mark.parametrize(
    ("channels", "most", "groups"), [(64, 32, 32), (16, 32, 8), (24, 32, 12), (7, 32, 1), (1, 32, 1), (96, 10, 8)]
)
def test_there_are_as_many_groups_as_divide_the_channels_and_leave_two_in_each(channels, most, groups):
    assert groups_of(channels, most) == groups


def test_torchs_own_instance_norm_is_the_same():
    x, torchs = images(3, 8, 4, 5), nn.InstanceNorm2d(8, eps=EPS, affine=True, dtype=torch.float64)
    layer = layer_of("instance")
    torchs.load_state_dict(layer.state_dict())
    assert_close(layer(x), torchs(x))


def test_without_a_norm_weight_and_bias_are_left():
    layer, x = layer_of("none"), images(2, 8, 3, 3)
    assert_close(layer(x), affine(x, layer))
    bare = converted(nn.Sequential(nn.BatchNorm2d(8, affine=False)), "none")
    assert_close(bare(x), x)


# Weight standardisation


def test_filters_have_mean_0_and_variance_1():
    conv = converted(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)), "ws_group"
    )[0]
    x = torch.randn(2, 3, 6, 6)
    weight = conv.weight.flatten(1)
    want = (weight - weight.mean(1, keepdim=True)) / weight.std(1, correction=0, keepdim=True)
    assert_close(standardised(conv.weight).flatten(1), want)
    assert_close(conv(x), F.conv2d(F.pad(x, [1] * 4, "reflect"), want.view_as(conv.weight), conv.bias))


def test_convolutions_keep_their_names_and_those_of_one_weight_a_filter_stay():
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=4))
    names = {name for name in plain.state_dict() if "running" not in name and "num_batches" not in name}
    net = converted(plain, "ws_group")
    assert net.state_dict().keys() == names
    assert type(net[2]) is nn.Conv2d
    assert type(net[0]) is not nn.Conv2d


def test_a_filter_of_zeros_gives_zeros_and_a_finite_gradient():
    weight = torch.zeros(2, 3, 3, 3, requires_grad=True)
    out = standardised(weight)
    out.sum().backward()
    assert not out.any()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_a_model_without_batch_norm_keeps_its_convolutions():
    assert type(converted(nn.Sequential(nn.Conv2d(3, 4, 3)), "ws_group")[0]) is nn.Conv2d


# Ghost batches, and none


@pytest.mark.parametrize(("images_", "parts"), [(6, [2, 2, 2]), (5, [2, 2, 1]), (2, [2]), (1, [1])])
def test_ghost_batches_are_batches_of_their_own_one_after_the_other(images_, parts):
    layer, x = layer_of("ghost", sub_batch=2, momentum=0.3), images(images_, 8, 3, 3)
    plain = nn.BatchNorm2d(8, eps=EPS, momentum=0.3, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    want = torch.cat([plain(part) for part in x.split(parts)])
    assert_close(layer(x), want)
    assert_close(layer.state_dict(), plain.state_dict())
    assert layer.num_batches_tracked == len(parts)
    assert_close(layer.eval()(x), plain.eval()(x))


def test_a_frozen_layer_is_in_eval_whatever_is_asked():
    layer = layer_of("frozen")
    plain = nn.BatchNorm2d(8, eps=EPS, dtype=torch.float64).eval()
    plain.load_state_dict(layer.state_dict())
    x = images(4, 8, 3, 3).requires_grad_()
    net = nn.Sequential(layer).train()
    y = net(x)
    y.sum().backward()
    assert_close(y, plain(x))
    assert x.grad is not None
    assert [p.grad for p in layer.parameters()] == [None, None]
    assert_close(layer.state_dict(), plain.state_dict())


def test_a_layer_without_running_statistics_cannot_be_frozen():
    net = converted(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "frozen")
    assert type(net[0]) is nn.BatchNorm2d


# Norms that are the activation too


def evonorm(x, layer, groups):
    flat = x.view(len(x), groups, -1)
    std = (flat.var(2, correction=0, keepdim=True) + EPS).sqrt()
    return affine((flat / std).view_as(x) * torch.sigmoid(layer.v.view(-1, 1, 1) * x), layer)


def frn(x, layer):
    return affine(x / (x.square().mean((2, 3), keepdim=True) + EPS).sqrt(), layer)


def alone(word, **more):
    layer = nn.BatchNorm2d(8, eps=EPS, dtype=torch.float64)
    chain = converted(nn.Sequential(layer, nn.SiLU(inplace=True)), word, **more)
    for p in chain.parameters():
        p.data.uniform_(0.5, 2)
    return chain


@pytest.mark.parametrize("groups", [1, 4])
def test_evonorm_is_a_gate_over_the_deviation_of_a_group(groups):
    chain, x = alone("evonorm_s0", groups=groups), images(3, 8, 4, 5)
    assert type(chain[1]) is nn.Identity
    assert_close(chain(x), evonorm(x, chain[0], groups))


def test_frn_divides_by_the_root_mean_square_and_cuts_at_its_own_threshold():
    chain, x = alone("frn"), images(3, 8, 4, 5)
    assert_close(chain(x), torch.maximum(frn(x, chain[0]), chain[0].tau.view(-1, 1, 1)))
    assert (chain(x) == chain[0].tau.view(-1, 1, 1)).any()


def test_what_they_begin_as():
    assert layer_of("frn").tau is None
    assert converted(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), "frn")[0].tau.tolist() == [0] * 3
    assert converted(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), "evonorm_s0")[0].v.tolist() == [1] * 3


def test_before_no_activation_they_have_the_form_without():
    x = images(3, 8, 4, 5)
    layer = layer_of("evonorm_s0")
    assert_close(layer(x), affine(x, layer))
    layer = layer_of("frn")
    assert_close(layer(x), frn(x, layer))


@pytest.mark.parametrize("word", ["group", "layer", "ws_group", "evonorm_s0", "frn", "none", "instance"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_out_and_is_near(word, dtype):
    chain = converted(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), word)
    x = torch.randn(2, 8, 4, 4)
    want, got = chain(x), chain.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert_close(got.float(), want, rtol=0.05, atol=0.05)  # 8 bits of mantissa


@pytest.mark.parametrize("word", [w for w in norms.NORMS if w not in ("torch", "local", "ghost")])  # torch's own
def test_an_empty_rank_takes_part(word):
    chain = converted(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), word)
    y = chain(torch.randn(0, 8, 4, 4))
    y.sum().backward() if y.requires_grad else None
    assert y.shape == (0, 8, 4, 4)


# A batch of one value


class OneByOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.blocks(x)


@pytest.mark.parametrize("word", ["local", "sync", "ghost", "batch_renorm", "instance"])
def test_one_value_a_channel_is_refused(word):
    net = converted(OneByOne(), word)
    with pytest.raises(ValueError, match=r"(more than 1|one) value per channel"):
        net(torch.randn(1, 3, 3, 3))


def test_maps_of_one_pixel_have_no_instance_norm_however_many_images():
    with pytest.raises(ValueError, match="more than 1 value per channel and image"):
        converted(OneByOne(), "instance")(torch.randn(4, 3, 3, 3))


def test_an_unknown_norm_is_refused():
    with pytest.raises(UserError, match="norm=batch: choose one of sync, local, torch, group"):
        NormConfig("batch")


SOME = ["resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "googlenet", "efficientnet_b0"]


@pytest.mark.plain("resnet18-frn", "mobilenet_v2-evonorm_s0", "googlenet-batch_renorm")
@pytest.mark.parametrize("word", [w for w in norms.NORMS if w not in ("local", "torch")])
@pytest.mark.parametrize("name", SOME)
def test_models_of_torchvision_convert_and_run(name, word):
    """On no device: shapes alone, forward and backward."""
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        net = torchvision.models.get_model(name, num_classes=10, **options)
        x = torch.randn(2, 3, 64, 64)
    net, (changed, layers, _) = norms.convert(net, NormConfig(word), Place(torch.device("meta")))
    assert changed == layers > 0
    if word == "instance":
        net.eval()
        return  # maps of 1×1
    y = net(x)
    y.sum().backward()
    assert y.shape == (2, 10)
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
