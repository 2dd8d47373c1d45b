"""What synchronised batch norm costs from 2 to 16 384 GPUs: a model, not a measurement, of a ResNet-50 training step.

    python -m benchmarks scale [--kernels FILE] [--plot FILE]

    torch   torch.nn.SyncBatchNorm: forward all_gather of 2C + 1 float32 from each of W GPUs and a merge of the W rows
            on each; backward all_reduce of 2C float32
    ours    syncbn: forward all_reduce of 2C + 1 float64, backward all_reduce of 2C float64
    node    ours with group="node": a batch for each node of 8 GPUs, messages by NVLink alone

Times of messages are those of nccl.py. Every message is on the critical path: the layer can do nothing before it has
come. FILE of --kernels is what `python -m benchmarks step --json FILE` wrote, or a JSON object, images per GPU to
milliseconds of a step with local batch norm, {"2": 4.1, "32": 23.5}; without it the step is assumed.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from benchmarks.measure.records import Result
from benchmarks.operator import nccl

WORLDS = [2**power for power in range(1, 15)]
IMAGES = (2, 8, 32)
GPU_GB_PER_S = 4300  # an H200's memory, read and write together
# torch reads and writes the W rows to drop empty ranks, then reads them to merge (torch/nn/modules/_functions.py)
MERGE_PASSES = 3


def torch_forward_us(channels: int, world: int) -> float:
    row = 4 * (2 * channels + 1)
    merge = MERGE_PASSES * world * row / (1e3 * GPU_GB_PER_S)
    return nccl.all_gather_us(world, row) + merge


def torch_us(channels: int, world: int) -> float:
    return torch_forward_us(channels, world) + nccl.all_reduce_us(world, 4 * 2 * channels)


def ours_us(channels: int, world: int) -> float:
    return nccl.all_reduce_us(world, 8 * (2 * channels + 1)) + nccl.all_reduce_us(world, 8 * 2 * channels)


def node_us(channels: int, world: int) -> float:
    return ours_us(channels, min(world, nccl.GPUS_PER_NODE))


FORMS: dict[str, Callable[[int, int], float]] = {"torch": torch_us, "ours": ours_us, "node": node_us}


@cache
def resnet50() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.resnet50()


@cache
def channels() -> list[int]:
    """C of each of ResNet-50's batch norm layers."""
    return [layer.num_features for layer in resnet50().modules() if isinstance(layer, nn.BatchNorm2d)]


def messages_ms(form: str, world: int) -> float:
    """Time that a form's messages add to a step of ResNet-50 on so many GPUs."""
    return sum(layers * FORMS[form](c, world) for c, layers in Counter(channels()).items()) / 1e3


def crossover() -> int:
    """The fewest GPUs from which on ours is faster than torch's form, in whole nodes above one."""
    node = nccl.GPUS_PER_NODE
    worlds = [*range(2, node), *range(node, WORLDS[-1] + 1, node)]
    slower = [world for world in worlds if messages_ms("ours", world) >= messages_ms("torch", world)]
    return worlds[worlds.index(slower[-1]) + 1] if slower else worlds[0]


class Work(NamedTuple):
    """Of one image's forward and backward: flops of the convolutions, bytes in bfloat16; kernels of a step."""

    flops: float
    size: float
    kernels: int


ASSUMED_TFLOP_PER_S = 500  # half of what an H200's data sheet gives for dense bfloat16
ASSUMED_KERNEL_MS = 0.005


def work() -> Work:
    """ResNet-50 at 224 × 224, layer by layer, none fused: what each reads and writes, forward and backward."""
    flops = elements = kernels = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        nonlocal flops, elements, kernels
        match layer:
            case nn.Conv2d():
                flops += 3 * 2 * y.numel() * layer.weight[0].numel()
                elements += 3 * (inputs[0].numel() + y.numel())
                kernels += 3
            case nn.BatchNorm2d():
                elements += 8 * y.numel()
                kernels += 4
            case nn.ReLU():
                elements += 5 * y.numel()
                kernels += 2
            case Bottleneck():
                elements += 3 * y.numel()
                kernels += 1

    hooks = [layer.register_forward_hook(count) for layer in resnet50().modules()]
    resnet50()(torch.empty(1, 3, 224, 224, device="meta"))
    for hook in hooks:
        hook.remove()
    return Work(flops, 2 * elements, kernels)


def assumed_step_ms(images: int) -> float:
    """A step with local batch norm by its arithmetic and traffic, no shorter than its kernels take to start."""
    flops, size, kernels = work()
    busy = images * (flops / (1e9 * ASSUMED_TFLOP_PER_S) + size / (1e6 * GPU_GB_PER_S))
    return max(busy, kernels * ASSUMED_KERNEL_MS)


def read_steps(name: str) -> dict[int, float]:
    """ms of a step by images per GPU, from --kernels' FILE. Raises ArgumentTypeError."""
    try:
        text = Path(name).read_text()
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    try:
        steps = {int(images): float(ms) for images, ms in steps_of(text).items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        steps = {}
    if not steps or min(steps) < 1 or not all(0 < ms < float("inf") for ms in steps.values()):
        raise argparse.ArgumentTypeError(
            f'{name} holds {text[:80]!r}: it must be images per GPU to ms, as {{"2": 4.1, "32": 23.5}}, '
            "or what the benchmark step has recorded"
        )
    return steps


def steps_of(text: str) -> dict[Any, Any]:
    """The object itself; or of records the medians of local's steps, of which the last count."""
    lines = [json.loads(line) for line in text.splitlines()]
    if lines and "benchmark" not in lines[0]:
        return json.loads(text)
    local = [row for row in lines if row["table"] == "step" and row["case"]["contestant"] == "local"]
    return {row["case"]["images"]: row["figures"]["ms"]["median"] for row in local}


def share(form: str, world: int, step_ms: float) -> float:
    """Of a step, the part that is messages."""
    messages = messages_ms(form, world)
    return messages / (messages + step_ms)


TITLE = "messages of a step, and the share of the step that they are: torch, ours, node"


def rows(steps: dict[int, float]) -> Iterator[Result]:
    """The model's figures, a row for each world."""
    for world in WORLDS:
        ms = {form: messages_ms(form, world) for form in FORMS}
        figures: dict[str, Any] = {f"{form}, ms": round(value, 2) for form, value in ms.items()}
        figures["torch/ours"] = round(ms["torch"] / ms["ours"], 2)
        for images, step_ms in steps.items():
            figures[f"{images} images a GPU"] = [round(share(form, world, step_ms), 2) for form in FORMS]
        yield Result(TITLE, {"GPUs": world}, figures)


def assumptions(steps: dict[int, float], measured: bool) -> str:
    kind, but = ("measured", " but the step") if measured else ("assumed, not measured", "")
    each = ", ".join(f"{ms:.1f} ms at {images}" for images, ms in steps.items())
    return (
        f"ResNet-50, {len(channels())} layers, {sum(channels())} channels, nodes of {nccl.GPUS_PER_NODE} GPUs: "
        f"a model, nothing measured on GPUs{but}\n"
        f"step without messages, by images a GPU ({kind}): {each}"
    )


def conclusion() -> str:
    first, node = crossover(), nccl.GPUS_PER_NODE
    lost = messages_ms("ours", node) - messages_ms("torch", node)
    return (
        f"ours is faster than torch's form from {first} GPUs ({nccl.nodes_of(first)} nodes) on; "
        f"below, torch's is: by {lost:.2f} ms a step on {node}"
    )


LOOK = {
    "torch": ("torch.nn.SyncBatchNorm", "#b3261e"),
    "ours": ("syncbn", "#1f5fa8"),
    "node": ('syncbn, group="node"', "#0f7b6c"),
}


def plot(steps: dict[int, float], measured: bool, file: Path) -> None:
    """Messages of a step over GPUs, both axes logarithmic, and the rest of the step to compare."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "syncbn", "font.size": 11}  # the same file in every run
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), facecolor="white", layout="constrained")
    blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for images, ms in steps.items():
        alike = " and ".join(str(n) for n, other in steps.items() if other == ms)
        axes.axhline(ms, color="#777777", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if images == max(n for n, other in steps.items() if other == ms):
            text = f"the rest of the step, {alike} images a GPU"
            axes.annotate(
                text, (WORLDS[-1], ms), (0, 4), "data", "offset points", ha="right", size=9, color="#555555", bbox=blank
            )
    for form, (label, colour) in LOOK.items():
        times = [messages_ms(form, world) for world in WORLDS]
        axes.loglog(WORLDS, times, color=colour, linewidth=2.2, marker="o", markersize=4)
        axes.annotate(label, (WORLDS[-1], times[-1]), (9, 0), "data", "offset points", color=colour, va="center")
    first = crossover()
    arrow = {"arrowstyle": "->", "color": "#333333"}
    text = f"syncbn is faster\nfrom {first} GPUs on"
    axes.annotate(
        text, (first, messages_ms("torch", first)), (first, 40), ha="center", arrowprops=arrow, color="#333333"
    )
    axes.set_xticks(WORLDS, [spaced(world) for world in WORLDS], rotation=45)
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1 000"])
    axes.minorticks_off()
    axes.set_xlabel(f"GPUs, {nccl.GPUS_PER_NODE} a node")
    axes.set_ylabel("messages of a step, ms")
    kind = "measured" if measured else "assumed"
    axes.set_title(f"ResNet-50: a model with NCCL's constants, not measured; the rest of the step is {kind}", size=11)
    axes.grid(color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, dpi=150, bbox_inches="tight", pad_inches=0.2, metadata=metadata)
    pyplot.close(figure)


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernels", type=read_steps, metavar="FILE", help="measured steps without messages")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table as well, as .svg or .png")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    steps = options.kernels or {images: assumed_step_ms(images) for images in IMAGES}
    print(f"\n{assumptions(steps, bool(options.kernels))}")
    yield from rows(steps)
    print(f"\n{conclusion()}")
    if options.plot:
        plot(steps, bool(options.kernels), options.plot)
