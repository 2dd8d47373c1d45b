"""The step that every make of the kernels computes, its cases, and the same in float64."""

import importlib
import shutil

import pytest
import torch
from torch.testing import assert_close

from syncbn.kernels import Affine, eager, unpacked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAKES = ["triton", "eager"] if DEVICE == "cuda" else ["triton", "cpu", "eager"]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
CASES = {
    "plain": {},
    "no-parameters": {"affine": False},
    "relu": {"relu": True},
    "residual": {"residual": True},
    "residual+relu": {"residual": True, "relu": True},
    "mask": {"mask": "element"},
    "mask-of-images": {"mask": "image", "relu": True},
}


def make(name):
    """The kernels of that name; those in C need a compiler, in the installation, and the GPU's Triton."""
    if name == "cpu" and not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    if name == "triton":
        pytest.importorskip("syncbn.kernels.triton", reason="needs Triton")
    return importlib.import_module(f"syncbn.kernels.{name}")


def inputs(shape, dtype=torch.float32, mean=10.0, *, affine=True, relu=False, residual=False, mask=None):
    """x, dy and what else a case has, on the kernels' device."""
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, channels = (mean + 3 * random(*shape)).to(dtype), shape[1]
    place = (shape[0], 1, *shape[2:]) if mask == "element" else (shape[0], *[1] * (len(shape) - 1))
    case = {
        "x": x,
        "dy": (random(*shape) + 0.3 * (x - mean)).to(dtype),
        "weight": random(channels).to(dtype) if affine else None,
        "bias": random(channels).to(dtype) if affine else None,
        "residual": random(*shape).to(dtype) if residual else None,
        "mask": torch.rand(place, generator=generator) < 0.6 if mask else None,
    }
    return {name: None if t is None else t.to(DEVICE) for name, t in case.items()} | {"relu": relu}


def step(kernel, x, dy, weight, bias, residual, mask, relu, form="message"):
    """All that a rank alone computes in one training step."""
    # A program for each image, of thousands, is too much for the interpreter
    local = kernel.moments(x, mask, form, len(x) < 10)
    affine = Affine(weight, bias, relu, 1e-5)
    shared = local.packed if form == "message" else local.packed[None]
    y, stats = kernel.normalize(x, shared, affine, residual, None, local.work)
    moments, invstd = unpacked(stats)
    needs_y = relu and (kernel.NEEDS_Y or residual is not None)
    sums = kernel.grad_sums(dy, x, stats, affine, y if needs_y else None)
    past_relu = affine._replace(relu=relu and not needs_y)
    dx = kernel.grad_input(sums.g, x, stats, past_relu, sums.packed, mask)
    results = {
        "between_images": local.between_images,
        "mean": moments.mean,
        "var": moments.var,
        "count": moments.count,
        "invstd": invstd,
        "y": y,
        "sums": sums.packed,
        "dweight": sums.dweight,
        "dbias": sums.dbias,
        "dresidual": sums.g if residual is not None else None,
        "dx": dx,
    }
    return {name: t for name, t in results.items() if t is not None}


def in_float64(case, form="message"):
    """The step as it should be, by the eager kernels."""
    exact = {name: t.double() if isinstance(t, torch.Tensor) and name != "mask" else t for name, t in case.items()}
    return step(eager, **exact, form=form)


def assert_steps_agree(got, want, relative):
    """Within relative times the largest element, or times 1, as gradients are differences of such numbers."""
    assert got.keys() == want.keys()
    for name in got:
        exact = "mean", "var", "count", "invstd", "between_images", "sums"
        assert got[name].dtype == torch.float64 or name not in exact
        largest = max([1.0, *want[name].abs().flatten().tolist()])
        assert_close(
            got[name].double(), want[name], rtol=0, atol=relative * largest, msg=lambda m, name=name: f"{name}: {m}"
        )
