"""One training step of a layer, on ranks and on the whole batch, as things to compare."""

import torch
from torch import nn
from torch.testing import assert_close

from syncbn import SyncBatchNorm, reference

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def train_layer(rank, layer, xs, dys, masks=None):
    """One training step of the layer on this rank's share: y, dx, the parameters' gradients and the buffers."""
    x = xs[rank].detach().requires_grad_()
    layer.train()
    y = layer(x) if masks is None else layer(x, mask=masks[rank])
    y.backward(dys[rank])
    return results(layer, x, y)


def results(layer, x, y):
    return {
        "y": y.detach(),
        "dx": x.grad,
        "gradients": {name: p.grad for name, p in layer.named_parameters()},
        "buffers": {name: b.clone() for name, b in layer.named_buffers()},
    }


def batch(shape, dtype=torch.float64, n=8, mean=100.0):
    """x with standard deviation 3 about a mean, and a gradient for y that is correlated with x."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    dy = torch.randn(noise.shape, dtype=torch.float64, generator=generator) + 0.5 * noise + 0.2
    return (mean + 3 * noise).to(dtype), dy.to(dtype)


def layer_of(channels, dtype=torch.float64, **options):
    layer = SyncBatchNorm(channels, dtype=dtype, **options)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter)
    return layer


def whole_batch(layer, x, dy):
    """What train_layer gives for the whole batch in one process, by reference.py, in x's dtype."""
    x = x.clone().requires_grad_()
    parameters = {name: p.detach().to(x.dtype).requires_grad_() for name, p in layer.named_parameters()}
    y = reference.batch_norm(x, parameters.get("weight"), parameters.get("bias"), layer.eps)
    y.backward(dy)
    buffers = {}
    if layer.track_running_stats:
        start = torch.zeros(x.size(1), dtype=x.dtype), torch.ones(x.size(1), dtype=x.dtype)
        mean, var = reference.running(x, *start, momentum=1.0 if layer.momentum is None else layer.momentum)
        buffers = {"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(1)}
    gradients = {name: p.grad for name, p in parameters.items()}
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, "buffers": buffers}


def joined(ranks):
    """What the ranks hold together; that their buffers are the same bits is checked on the way."""
    for other in ranks[1:]:
        for name, buffer in other["buffers"].items():
            message = f"{name} differs between ranks: {{}}".format
            assert_close(buffer, ranks[0]["buffers"][name], rtol=0, atol=0, equal_nan=True, msg=message)
    return {
        "y": torch.cat([r["y"] for r in ranks]),
        "dx": torch.cat([r["dx"] for r in ranks]),
        "gradients": {name: sum(r["gradients"][name] for r in ranks) for name in ranks[0]["gradients"]},
        "buffers": ranks[0]["buffers"],
    }


def assert_near(got, want, relative):
    """Every tensor of got is within relative times want's largest element of it."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            assert_near(got[name], want[name], relative)
    else:
        largest = want.abs().max().item() if want.numel() else 0
        assert_close(got.double(), want.double(), rtol=0, atol=relative * largest)
