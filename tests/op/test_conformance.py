"""torch's own samples of batch norm, on this layer: what nn.BatchNorm passes, it passes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from syncbn import SyncBatchNorm
from tests.op.torch_samples import rows

HALVES = (torch.float16, torch.bfloat16)
# Deliberately otherwise than nn.BatchNorm: a constructor's argument that is taken, and what is not compared of a row
TAKEN = {("eps", 0.0): "an eps of 0 has its use, where no channel is constant"}
DIFFERENT = {"zero_batch": ("num_batches_tracked", "a batch that holds nothing is none, or ranks would disagree")}


def pair(name, args, kwargs, dtype=torch.float64):
    """nn's layer and ours, made alike and with the same parameters at random."""
    theirs = getattr(nn, name)(*args, **kwargs, dtype=dtype)
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, -1, 2)
    ours = SyncBatchNorm(*args, **kwargs, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradient(x):
    """A dy, typed as x."""
    return torch.linspace(-1, 2, x.numel()).view(x.shape).to(x.dtype)


def step(layer, x, dy=None):
    """All that a forward and backward leave behind."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(gradient(x) if dy is None else dy)
    return {
        "y": y.detach(),
        "dx": x.grad,
        **{name: p.grad for name, p in layer.named_parameters()},
        **{name: b.clone() for name, b in layer.named_buffers()},
    }


def assert_alike(ours, theirs, row):
    """Within torch's own tolerances, less what DIFFERENT says."""
    if row.x.numel() == 0:
        name, _ = DIFFERENT["zero_batch"]
        ours, theirs = ({n: t for n, t in result.items() if n != name} for result in (ours, theirs))
    assert_close(ours, theirs, msg=lambda m: f"{row}\n{m}")


def assert_no_farther(ours, theirs, exact, row):
    """In half precision neither is exact: ours is as near to the layer in float64 as torch's, or rounded once."""
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, want in exact.items():
        if (row.x.numel() == 0 and name == DIFFERENT["zero_batch"][0]) or want.numel() == 0:
            continue
        assert ours[name].dtype == theirs[name].dtype or "running" in name
        rounding = torch.finfo(row.x.dtype).eps * max(want.abs().max().item(), 1e-3)
        off, torchs = ((result[name].double() - want).abs().max().item() for result in (ours, theirs))
        assert off <= max(torchs, rounding), f"{row}\n{name} is off by {off}, torch's by {torchs}"


def module_rows():
    modules, _, _ = rows()
    return modules


def test_the_tables_are_there():
    modules, errors, ops = rows()
    assert {row.name for row in modules} >= {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}
    assert {row.name for row in ops} >= {"nn.functional.batch_norm", "native_batch_norm"}
    assert len(modules) >= 70
    assert len(errors) >= 6
    assert len(ops) >= 120


def test_modules():
    for row in module_rows():
        theirs, ours = (layer.train(row.training) for layer in pair(row.name, row.args, row.kwargs, row.dtype))
        want = step(theirs, row.x)
        assert_alike(step(ours, row.x), want, row)
        if row.want is not None:
            assert_close(want["y"], row.want)


def test_what_torch_refuses_is_refused():
    _, errors, _ = rows()
    for row in errors:
        with pytest.raises(row.error):
            called(getattr(nn, row.name), row)
        if any(item in TAKEN for item in row.kwargs.items()):
            called(SyncBatchNorm, row)
            continue
        with pytest.raises(row.error):
            called(SyncBatchNorm, row)


def called(kind, row):
    layer = kind(*row.args, **row.kwargs, dtype=torch.float64)
    if row.x is not None:
        layer(row.x)


def layers_of(row, parameters):
    """nn's layer and ours that do what the row's call does; None where there is no such layer."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(row.x.dim())
    if kind is None:
        # Of one dimension: a function takes it, but no layer of torch's
        return None
    options = {
        "eps": row.eps,
        "momentum": row.momentum,
        "affine": row.weight is not None,
        "track_running_stats": row.running_mean is not None,
        "dtype": parameters,
    }
    made = kind(row.x.size(1), **options), SyncBatchNorm(row.x.size(1), **options)
    for layer in made:
        with torch.no_grad():
            for name in "weight", "bias", "running_mean", "running_var":
                if getattr(row, name) is not None:
                    getattr(layer, name).copy_(getattr(row, name))
        layer.train(row.training)
    return made


@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["own", "float32-parameters"])
def test_operators(parameters):
    _, _, ops = rows()
    run = 0
    for row in ops:
        layers = layers_of(row, parameters or row.x.dtype)
        if layers is None or (parameters is not None and row.x.dtype not in HALVES):
            continue
        exact = copy.deepcopy(layers[0]).double()
        theirs, ours = (step(layer, row.x) for layer in layers)
        run += 1
        if row.x.dtype in HALVES:
            assert_no_farther(ours, theirs, step(exact, row.x.double(), gradient(row.x).double()), row)
        else:
            assert_alike(ours, theirs, row)
    assert run >= (60 if parameters else 120)


def small_modules():
    return [row for row in module_rows() if row.dtype == torch.float64]


def test_copies_and_pickles_do_the_same():
    for row in small_modules():
        _, layer = pair(row.name, row.args, row.kwargs)
        layer.train(row.training)
        layer(row.x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
        want = step(layer, row.x)
        for other in others:
            assert type(other) is type(layer)
            assert other.training == row.training
            assert_close(step(other, row.x), want, rtol=0, atol=0)


def test_state_dicts_go_both_ways():
    for row in small_modules():
        theirs, ours = pair(row.name, row.args, row.kwargs)
        for parameter in ours.parameters():
            nn.init.normal_(parameter)
        ours(row.x)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        assert_close(step(theirs.eval(), row.x), step(ours.eval(), row.x))


def test_an_input_may_lie_in_memory_as_it_likes():
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    for row in small_modules():
        _, layer = pair(row.name, row.args, row.kwargs)
        layer.train(row.training)
        start = copy.deepcopy(layer.state_dict())
        want = step(layer, row.x)
        layouts = [row.x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([row.x, row.x], -1)[..., 0]]
        layouts += [row.x.contiguous(memory_format=last[row.x.dim()])] if row.x.dim() in last else []
        for x in layouts:
            layer.load_state_dict(start)
            got = step(layer, x)
            assert_close(got, want)
            if x.dim() in last and x.is_contiguous(memory_format=last[x.dim()]):
                assert got["y"].is_contiguous(memory_format=last[x.dim()])


def as_function(row, layer):
    """layer as a function of x and its parameters."""
    start = {name: b.clone() for name, b in layer.named_buffers()}
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        state = dict(zip(names, parameters, strict=True)) | {name: b.clone() for name, b in start.items()}
        return torch.func.functional_call(layer, state, (x,))

    # A few values are enough, and quick
    x = row.x[:3, :, ...][(..., *[slice(0, 2)] * (row.x.dim() - 2))].clone().requires_grad_()
    return function, (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))


def test_gradients_of_gradients_are_those_of_finite_differences():
    seen = set()
    for row in small_modules():
        what = row.name, row.training, row.args[3:], tuple(row.kwargs), row.x.dim()
        if row.x.numel() == 0 or what in seen:
            continue
        seen.add(what)
        _, layer = pair(row.name, row.args, row.kwargs)
        function, inputs = as_function(row, layer.train(row.training))
        assert gradcheck(function, inputs, fast_mode=True)
        assert gradgradcheck(function, inputs, fast_mode=True)
    assert len(seen) >= 12


def test_a_layer_shows_what_torchs_shows():
    for row in small_modules():
        theirs, ours = pair(row.name, row.args, row.kwargs)
        assert ours.extra_repr().startswith(theirs.extra_repr())
        assert repr(ours) == f"SyncBatchNorm({ours.extra_repr()})"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_a_layer_is_made_where_and_as_asked(device, dtype):
    for row in small_modules():
        layer = SyncBatchNorm(*row.args, **row.kwargs, device=device, dtype=dtype)
        assert all(p.dtype == dtype for p in layer.parameters())
        precise = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        buffers = {name: b for name, b in layer.named_buffers() if name != "num_batches_tracked"}
        assert all(b.dtype == precise for b in buffers.values())
        assert all(t.device.type == device for t in layer.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_a_layer_that_was_converted_does_what_torchs_does(dtype):
    for row in small_modules():
        theirs, ours = (layer.to(dtype).train(row.training) for layer in pair(row.name, row.args, row.kwargs))
        assert all(p.dtype == dtype for p in ours.parameters())
        row = row._replace(x=row.x.to(dtype))
        exact = step(copy.deepcopy(theirs).double(), row.x.double(), gradient(row.x).double())
        theirs, ours = step(theirs, row.x), step(ours, row.x)
        if dtype in HALVES:
            assert_no_farther(ours, theirs, exact, row)
        else:
            assert_alike(ours, theirs, row)
