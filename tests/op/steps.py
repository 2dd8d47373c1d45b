"""One training step of a layer, on ranks and on the whole batch, as things to compare."""

import torch
from torch import nn

from syncbn import SyncBatchNorm, reference

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def train_layer(rank, layer, xs, dys):
    """One training step of the layer on this rank's share: y, dx, dweight, dbias and the buffers."""
    x = xs[rank].clone().requires_grad_()
    layer.train()
    y = layer(x)
    y.backward(dys[rank])
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": layer.weight.grad if layer.affine else torch.zeros(0),
        "dbias": layer.bias.grad if layer.affine else torch.zeros(0),
        "buffers": {name: b.clone() for name, b in layer.named_buffers()},
    }


def batch(shape, dtype=torch.float64, n=8):
    """x with a mean far from zero, and a gradient for y."""
    generator = torch.Generator().manual_seed(0)
    x = 100 + 3 * torch.randn(n, *shape, dtype=dtype, generator=generator)
    return x, torch.randn(x.shape, dtype=dtype, generator=generator)


def layer_of(channels, dtype=torch.float64, **options):
    layer = SyncBatchNorm(channels, dtype=dtype, **options)
    if layer.affine:
        nn.init.uniform_(layer.weight)
        nn.init.uniform_(layer.bias)
    return layer


def whole_batch(layer, x, dy):
    x = x.clone().requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()] or [None, None]
    y = reference.batch_norm(x, *parameters, layer.eps)
    y.backward(dy)
    mean, var = reference.running(x, torch.zeros(x.size(1), dtype=x.dtype), torch.ones(x.size(1), dtype=x.dtype))
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": parameters[0].grad if layer.affine else torch.zeros(0),
        "dbias": parameters[1].grad if layer.affine else torch.zeros(0),
        "buffers": {"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(1)},
    }


def joined(ranks):
    """What the ranks hold together; that their buffers are the same bits is checked on the way."""
    for other in ranks[1:]:
        for name, buffer in other["buffers"].items():
            assert torch.equal(buffer, ranks[0]["buffers"][name]), f"{name} differs between ranks"
    return {
        "y": torch.cat([r["y"] for r in ranks]),
        "dx": torch.cat([r["dx"] for r in ranks]),
        "dweight": sum(r["dweight"] for r in ranks),
        "dbias": sum(r["dbias"] for r in ranks),
        "buffers": ranks[0]["buffers"],
    }
