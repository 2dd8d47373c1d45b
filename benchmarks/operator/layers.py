"""What one layer costs: all norms of a network by themselves, forward and then backward, without the convolutions.

The difference between two networks, one of them without norms, over their number would be one between two large times
that each vary, and of two networks that differ in more. So the norms are run alone, as many, as wide and in the order
of the network, each on a tensor of its own.

    host    tensors of [2, C, 2, 2]: for how long the host is busy with a layer. The GPU follows at once, so that is
            the host's work, and its waits if the layer makes it wait
    layer   tensors as the network has them at so many images: the time of a layer, the host's or the GPU's, whichever
            is the slower, as nothing else is there to hide either
"""

from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import nn

from benchmarks.measure import timing
from benchmarks.measure.records import Result
from benchmarks.measure.timing import Step, Times
from benchmarks.operator.forced import TorchSyncBatchNorm
from syncbn import SyncBatchNorm

Shape = tuple[int, ...]


def with_relu(kind: type[nn.Module]) -> Callable[[int], nn.Module]:
    return lambda channels: nn.Sequential(kind(channels), nn.ReLU(inplace=True))


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "nn.BatchNorm2d": nn.BatchNorm2d,
    "torch": TorchSyncBatchNorm,
    "syncbn": SyncBatchNorm,
    "nn.BatchNorm2d, ReLU": with_relu(nn.BatchNorm2d),
    "torch, ReLU": with_relu(TorchSyncBatchNorm),
    "syncbn, ReLU": with_relu(SyncBatchNorm),
    "syncbn fused ReLU": lambda channels: SyncBatchNorm(channels, activation="relu"),
}


def shapes(model: str, images: int, size: int) -> list[Shape]:
    """What each batch norm of a torchvision model is given, in the order of calls."""
    given: list[Shape] = []
    with torch.device("meta"):
        network, x = torchvision.models.get_model(model), torch.empty(images, 3, size, size)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda layer, inputs, y: given.append(tuple(y.shape)))
    network(x)
    return given


def stack(make: Callable[[int], nn.Module], shapes: list[Shape], device: str) -> Step:
    """Forward through a layer for each shape, then backward."""
    layers = nn.ModuleList(make(shape[1]) for shape in shapes).to(device)
    x, dy = ([tensor(shape, device) for shape in shapes] for _ in range(2))
    wanted = [*(t.requires_grad_() for t in x), *layers.parameters()]

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad([layer(t) for layer, t in zip(layers, x, strict=True)], wanted, dy)

    return step


def tensor(shape: Shape, device: str) -> torch.Tensor:
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return x.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def measure(model: str, images: int, size: int, device: str, seconds: float) -> Iterator[Result]:
    """us of one layer of the stack, and the ratio to torch's: with a ReLU to those with one."""
    real = shapes(model, images, size)
    tiny = [(2, channels, 2, 2) for _, channels, *_ in real]
    kinds = {name: make for name, make in KINDS.items() if device == "cuda" or not name.startswith("torch")}
    on_gpu = timing.gpu_clock(2, queued=False) if device == "cuda" else timing.host_ms
    tables = {"host, tiny tensors": (tiny, timing.enqueue_ms), f"layer, {images} images": (real, on_gpu)}
    for title, (given, clock) in tables.items():
        times = timing.turns({kind: stack(make, given, device) for kind, make in kinds.items()}, seconds, clock)
        yield from rows(title, times, len(given))


def rows(title: str, times: Times, layers: int) -> Iterator[Result]:
    """Of the ms of a whole stack."""
    us = {kind: [1e3 * ms / layers for ms in values] for kind, values in times.items()}
    for kind, values in us.items():
        theirs = "torch, ReLU" if "ReLU" in kind else "torch"
        of_torch = timing.ratio(us, kind, theirs) if theirs in us else None
        wanted = 0.6 if kind == "syncbn" else None
        figures = {"us a layer": timing.spread(values), "of torch": of_torch, "wanted": wanted}
        yield Result(title, {"kind": kind, "layers": layers}, figures)
