"""What passes through a model without its batch norms taking notice."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Size, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """A block in which each batch norm takes an empty batch of what it is given, and returns zeros of its shape.

    So a rank without a sample takes part in all messages, forward and backward, and adds nothing to any statistics,
    with a model that cannot be called without an image. What the model returns means nothing; a loss of it times 0 has
    a gradient of 0 for each parameter that took part.
    """
    shapes: dict[nn.Module, Size] = {}

    def take_nothing(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        shapes[layer] = next(value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return tuple(map(none_of, args)), {name: none_of(value) for name, value in kwargs.items()}

    def return_zeros(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        # The sum of nothing is 0, and the gradient goes back through it
        return output.new_zeros(shapes.pop(layer)) + output.sum()

    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                stack.enter_context(layer.register_forward_pre_hook(take_nothing, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(return_zeros, with_kwargs=True))
        yield


def none_of(value: Any) -> Any:
    return value[:0] if isinstance(value, Tensor) else value
