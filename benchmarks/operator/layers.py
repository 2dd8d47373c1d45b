"""What one layer costs: all norms of a network by themselves, forward and then backward, without the convolutions.

The difference between two networks, one of them without norms, over their number would be one between two large times
that each vary, and of two networks that differ in more. So the norms are run alone, as many, as wide and in the order
of the network, each on a tensor of its own.

    host    tensors of [2, C, 2, 2]: for how long the host is busy with a layer. The GPU follows at once, so that is
            the host's work, and its waits if the layer makes it wait
    layer   tensors as the network has them at so many images: the time of a layer, the host's or the GPU's, whichever
            is the slower, as nothing else is there to hide either
"""

from collections.abc import Callable

import torch
import torchvision
from torch import nn

from benchmarks import timing
from benchmarks.forced import TorchSyncBatchNorm
from benchmarks.timing import Step, Times
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
    found: list[Shape] = []
    with torch.device("meta"):
        network, x = torchvision.models.get_model(model), torch.empty(images, 3, size, size)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda layer, inputs, y: found.append(tuple(y.shape)))
    network(x)
    return found


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


def measure(model: str, images: int, size: int, device: str, seconds: float) -> dict[str, Times]:
    """ms of a whole stack, by the names of the two tables."""
    real = shapes(model, images, size)
    tiny = [(2, channels, 2, 2) for _, channels, *_ in real]
    kinds = {name: make for name, make in KINDS.items() if device == "cuda" or not name.startswith("torch")}
    on_gpu = timing.gpu_clock(2, queued=False) if device == "cuda" else timing.host_ms
    tables = {"host": (tiny, timing.enqueue_ms), "layer": (real, on_gpu)}
    return {
        name: timing.turns({kind: stack(make, given, device) for kind, make in kinds.items()}, seconds, clock)
        for name, (given, clock) in tables.items()
    }


def table(tables: dict[str, Times], count: int, images: int) -> str:
    """Times of one of `count` layers, and their ratio to torch's: with a ReLU to those with one."""
    lines = []
    titles = {"host": "host, tiny tensors", "layer": f"layer, {images} images, wanted of torch: 0.60"}
    for name, times in tables.items():
        lines.append(f"{titles[name]:<46}{'us a layer':>12} {'quartiles':>16}{'of torch':>12} {'quartiles':>14}")
        for kind, ms in times.items():
            low, middle, high = (1e3 * value / count for value in timing.quartiles(ms))
            line = f"    {kind:<42}{middle:12.1f} ({low:6.1f} {high:7.1f})"
            theirs = "torch, ReLU" if "ReLU" in kind else "torch"
            if theirs in times:
                low, middle, high = timing.ratios(times, kind, theirs)
                line += f"{middle:12.2f} ({low:5.2f} {high:6.2f})"
            lines.append(line)
    return "\n".join(lines)
