"""Another layer in a batch norm's place: the object stays, and with it all that refers to it."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_EVERY_MODULES = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def plain(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norm layers whose place another can take, each once, by name; those that a builder converted too."""
    syncbn.revert(model)
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in PLAIN and "forward" not in vars(layer)  # a subclass does something else, who knows what
    }  # pyright: ignore[reportReturnType]


def each(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> None:
    """Make each of the layers what `make` returns for it."""
    for layer in plain(model).values():
        become(layer, make(layer))


def become(layer: nn.Module, new: nn.Module) -> None:
    """Make layer what new is, in place: with its own weight, bias, eps, mode and hooks, wherever it is in the model."""
    for name in "weight", "bias":
        setattr(new, name, getattr(layer, name))
    vars(new).update(eps=layer.eps, affine=layer.affine)
    stays = {name: value for name, value in vars(layer).items() if name in _EVERY_MODULES}
    vars(layer).clear()
    vars(layer).update(vars(new) | stays)
    layer.__class__ = type(new)


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """v [C] as it meets x [N, C, *S]."""
    return v.view(-1, *[1] * (x.dim() - 2))


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x * weight + bias, by channel."""
    x = x if weight is None else x * per_channel(weight, x)
    return x if bias is None else x + per_channel(bias, x)
