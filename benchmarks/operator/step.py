"""What a training step of ResNet-50 costs on a GPU with batch norm of each kind, bf16 and channels_last.

    python -m benchmarks step [--json FILE]
    python -m benchmarks step --device cpu --model resnet18 --images 2 --size 64 --seconds 1

    local   nn.BatchNorm2d          torch   torch.nn.SyncBatchNorm, made to send though alone: forced.py
    syncbn  syncbn.convert(model)   fused   syncbn.convert(model, fuse=True); both made to send, too

each eager; "graph" is the whole step, SGD included, replayed from a CUDA graph, "compile" is
torch.compile(fullgraph=True) of the model, at --compile's numbers of images, as it takes its time; it refuses
torch.nn.SyncBatchNorm, which breaks the graph at every layer. One process, no DDP; autocast, parameters in float32, SGD
with momentum, one batch of random images that stays in place. Contestants take turns; `of local` is of one turn of
local's eager step. On a CPU, one thread.

    memory      the most that is allocated in a step, with the model and its optimiser, MiB; of a graph, in its capture
    kernels     kernels, copies and fills that the GPU runs in a step
    waits       of the host for the GPU in a step, by torch.cuda.set_sync_debug_mode("warn"); wanted of ours: 0
    messages    collectives that a step hands to its process group; a graph replays those that were captured
    cosine      between the first gradient, in float32 and not compiled, and that with local

Before them what one layer costs, by itself: layers.py. Of FILE `python -m benchmarks scale --kernels FILE` reads the
steps of local.
"""

import argparse
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F

import syncbn
from benchmarks.measure import timing
from benchmarks.measure.records import Result
from benchmarks.measure.timing import Step, Times
from benchmarks.operator import forced, layers

Convert = Callable[[nn.Module], nn.Module]
NORMS: dict[str, Convert] = {"local": lambda model: model, "torch": forced.to_torch, "syncbn": syncbn.convert}
NORMS["fused"] = partial(syncbn.convert, fuse=True)
CLASSES = 1000
WARM_UP = 3


class Contestant(NamedTuple):
    norm: str
    how: str = "eager"

    def __str__(self) -> str:
        return self.norm if self.how == "eager" else f"{self.norm} {self.how}"


class Figures(NamedTuple):
    """What is counted in one step; None where it cannot be."""

    memory_mib: float | None
    kernels: int | None
    waits: int | None
    messages: int
    gradient: Tensor


class Built(NamedTuple):
    """A contestant's step, and what was seen while it was built: the most memory, the first gradient.

    sending: the step whose messages are counted; a graph's are those of the step that it captured.
    """

    step: Step
    sending: Step
    memory_mib: float | None
    gradient: Tensor


class Training:
    """A model, its batch and its optimiser; calling it is one step."""

    def __init__(self, model: nn.Module, images: int, size: int, device: str, compiled: bool = False):
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.parameters = list(model.parameters())
        self.eager = model
        self.model: Any = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)
        generator = torch.Generator(device).manual_seed(1)
        x = torch.randn(images, 3, size, size, device=device, generator=generator)
        self.x = x.to(torch.bfloat16, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.labels = torch.randint(CLASSES, (images,), device=device, generator=generator)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, torch.bfloat16):
            y = self.model(self.x)
        F.cross_entropy(y.float(), self.labels).backward()
        self.optimizer.step()

    def gradient(self) -> Tensor:
        """[all parameters] of this batch in float32, not compiled, on the CPU."""
        loss = F.cross_entropy(self.eager(self.x.float()), self.labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)]).cpu()


def contestants(images: int, compiled: Sequence[int], device: str) -> list[Contestant]:
    eager = [Contestant(norm) for norm in NORMS if device == "cuda" or norm != "torch"]
    graphs = [Contestant(norm, "graph") for norm in NORMS] if device == "cuda" else []
    return [*eager, *graphs, *([Contestant("syncbn", "compile")] if images in compiled else [])]


def build(contestant: Contestant, options: argparse.Namespace, images: int) -> Built:
    """A contestant's step, warmed up."""
    device, on_gpu = options.device, options.device == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    torch.manual_seed(0)
    model = NORMS[contestant.norm](torchvision.models.get_model(options.model, num_classes=CLASSES))
    training = Training(model.to(device), images, options.size, device, contestant.how == "compile")
    gradient = training.gradient()
    for _ in range(WARM_UP):
        training()
    if not on_gpu:
        return Built(training, training, None, gradient)
    step = training
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    if contestant.how == "graph":
        step = captured(training)
    else:
        step()
    peak = torch.cuda.max_memory_allocated() - before
    return Built(step, training, peak / 2**20, gradient)


def count(built: Built, on_gpu: bool) -> Figures:
    """What there is in a step. After all are timed: once it has run, the profiler slows every launch."""
    on_the_gpu = (kernels(built.step), host_waits(built.step)) if on_gpu else (None, None)
    return Figures(built.memory_mib, *on_the_gpu, forced.messages(built.sending), built.gradient)


def captured(training: Training) -> Step:
    """The step as a CUDA graph, made as torch's documentation says: warmed up aside, gradients in the graph's pool."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            training()
    torch.cuda.current_stream().wait_stream(aside)
    training.optimizer.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    # The process group has a thread of its own that asks after events
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        training()

    def replay() -> Training:
        graph.replay()
        return training  # whose tensors the graph reads and writes, so they must live as long

    return replay


def kernels(step: Step) -> int:
    """Kernels, copies and fills that the GPU runs in a step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == DeviceType.CUDA and not e.is_user_annotation for e in profile.events() or ())


def host_waits(step: Step) -> int:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def timed(options: argparse.Namespace, images: int) -> tuple[Times, dict[str, Figures]]:
    """ms of a step of each contestant, turn by turn, and what was counted in one."""
    torch.compiler.reset()
    built: dict[str, Built] = {}
    for contestant in contestants(images, options.compile, options.device):
        name = str(contestant)
        try:
            built[name] = build(contestant, options, images)
        except Exception as error:
            if name == "local":
                raise
            print(f"{name}: left out, {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    on_gpu = options.device == "cuda"
    clock = timing.gpu_clock(5, queued=False) if on_gpu else timing.host_ms
    times = timing.turns({name: one.step for name, one in built.items()}, options.seconds, clock)
    return times, {name: count(one, on_gpu) for name, one in built.items()}


def rows(images: int, times: Times, counted: dict[str, Figures]) -> Iterator[Result]:
    for name, figures in timing.compared(times, "local"):
        counts = counted[name]._asdict()
        own = {"images/s": 1e3 * images / figures["ms"].median, "torch over it": None}
        if "torch" in times:
            own["torch over it"] = timing.ratio(times, "torch", name)
        own["cosine"] = cosine(counts.pop("gradient"), counted["local"].gradient)
        wanted = WANTED_AT_32.get(name) if images == 32 else None
        yield Result("step", {"images": images, "contestant": name}, {**figures, **own, **counts, "wanted": wanted})


WANTED_AT_32: dict[str, str] = dict.fromkeys(("syncbn graph", "fused graph"), "of local at most 1.03")
WANTED_AT_32 |= {"syncbn": "torch over it at least 1.15, less memory"}
WANTED_AT_32 |= {"fused": "of local at most 1.03, torch over it at least 1.15, less memory"}


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double(), b.double(), dim=0).item()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="resnet50", help="of torchvision")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 8, 32], help="in a batch, each by itself")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--seconds", type=float, default=8, help="time for the turns of each number of images")
    parser.add_argument("--compile", type=int, nargs="*", help="numbers of images to compile for; GPU: 32")
    parser.add_argument("--layer-images", type=int, default=8, help="of the tables of layers")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    on_gpu = options.device == "cuda"
    torch.backends.cudnn.benchmark = True
    if options.compile is None:
        options.compile = [32] if on_gpu else []
    if not on_gpu:
        torch.set_num_threads(1)
        print("torch: left out, torch.nn.SyncBatchNorm refuses CPU tensors; graph: left out, it needs a GPU")
    with forced.world_of_one(options.device):
        if on_gpu:
            # What cuBLAS and cuDNN keep from their first step is no contestant's memory
            build(Contestant("local"), options, options.images[0])
        yield from layers.measure(options.model, options.layer_images, options.size, options.device, options.seconds)
        for images in options.images:
            yield from rows(images, *timed(options, images))
