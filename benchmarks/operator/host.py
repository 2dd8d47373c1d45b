"""What a layer costs the host, forward and backward, with a GPU that takes no time: any machine, no GPU.

    python -m benchmarks host [--seconds 5]

A step of few images on a GPU is as long as the host needs to tell the GPU what to do, and a network has tens of layers.
Here the tensors are on the CPU, and whatever would start work on a GPU does nothing: Triton's driver is one that starts
no kernel, torch's CUDA operators for SyncBatchNorm return empty tensors, and messages go to torch's "fake" process
group of 8 ranks, which sends nothing. All else is as in training: Python, dispatch, autograd, checks, allocation.

    torch      torch.nn.SyncBatchNorm (forced.py calls its autograd function, as its layer refuses a CPU)
    syncbn     SyncBatchNorm with Triton's kernels       fused   the same with ReLU

Times are the thread's own, of one layer of a chain; ratios are of one turn, with quartiles. Left out on either side:
the driver's start of a kernel (2 to 4 us each; ours has 4, torch's about 20), torch's three waits for the GPU, and of
ours the look at the current device and stream, some 2 us.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.measure import timing
from benchmarks.measure.records import Result
from benchmarks.measure.timing import Step, Times
from benchmarks.operator.forced import TorchSyncBatchNorm
from syncbn import SyncBatchNorm, checks, kernels
from syncbn.collectives import log_time

RANKS = 8
# One after the other, as in a network: what a call of backward costs by itself is no layer's
LAYERS = 16
# Of ResNet-50's first stage at 8 images: in parts that are merged, as most of its layers are
SHAPE = (8, 256, 56, 56)
WANTED = 0.6


class NoDriver:
    """Triton's driver for a Hopper that is not there: kernels are compiled, and started by doing nothing."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            return 1, 2, 64, 0, 1024

    def __init__(self) -> None:
        self.launches = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch


def as_on_a_gpu(shared: Tensor, shape: Sequence[int], enough: bool) -> None:
    """checks.check_count where x is on a GPU and has more than one value a channel."""
    assert enough


def empty_vectors(count: int) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x, *_: tuple(torch.empty(SHAPE[1]) for _ in range(count))


def gathered(output: Tensor, *_: Any, **__: Any) -> None:
    # Counts that torch may divide by
    output.fill_(1.0)


@contextmanager
def no_gpu() -> Iterator[NoDriver]:
    """Within it, work for a GPU is given to nobody."""
    nobody, before = NoDriver(), driver._active
    with ExitStack() as stack:
        from syncbn.kernels.triton import plan

        driver.set_active(nobody)  # pyright: ignore[reportArgumentType]
        stack.callback(setattr, driver, "_active", before)
        operators: dict[str, Any] = {
            "batch_norm_stats": empty_vectors(2),
            "batch_norm_gather_stats_with_counts": empty_vectors(2),
            "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
            "batch_norm_backward_reduce": empty_vectors(4),
            "batch_norm_backward_elemt": lambda dy, *_: torch.empty_like(dy),
        }
        for name, operator in operators.items():
            stack.enter_context(patch.object(torch, name, operator))
        for name in "all_gather_into_tensor", "all_gather_single":
            if hasattr(dist, name):
                stack.enter_context(patch.object(dist, name, gathered))
        stack.enter_context(patch.object(plan, "multiprocessors", lambda device: 132))
        stack.enter_context(patch.object(checks, "check_count", as_on_a_gpu))
        stack.enter_context(patch.object(log_time, "gather_objects", lambda value, group: [value] * RANKS))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
        stack.callback(dist.destroy_process_group)
        yield nobody


def step_of(make: Callable[[int], nn.Module], x: Tensor, chosen: Any = None) -> Step:
    """Forward and backward through a chain of layers, by those kernels."""
    layers = nn.Sequential(*(make(x.size(1)) for _ in range(LAYERS)))
    wanted, dy = [x, *layers.parameters()], torch.empty_like(x)

    def step() -> Sequence[Tensor]:
        return torch.autograd.grad(layers(x), wanted, dy)

    if chosen is None:
        return step

    def by_chosen() -> Sequence[Tensor]:
        with patch.object(kernels, "choose", lambda x: chosen):
            return step()

    return by_chosen


def layer_us(step: Step) -> float:
    """The thread's own time for one of a step's layers: others on the machine do not count."""
    began = time.thread_time()
    step()
    return (time.thread_time() - began) / LAYERS * 1e6


def timed(seconds: float) -> tuple[Times, dict[str, int]]:
    """us of a layer of each contestant, turn by turn; kernels of a layer that Triton's driver was to start."""
    from syncbn.kernels import triton as ours

    x = torch.empty(SHAPE, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()  # pyright: ignore[reportCallIssue]
    with no_gpu() as nobody:
        steps = {
            "torch": step_of(TorchSyncBatchNorm, x),
            "syncbn": step_of(SyncBatchNorm, x, ours),
            "fused": step_of(lambda channels: SyncBatchNorm(channels, activation="relu"), x, ours),
        }
        launches = {}
        for name, step in steps.items():
            step()
            before = nobody.launches
            step()
            launches[name] = (nobody.launches - before) // LAYERS
        return timing.turns(steps, seconds, layer_us), launches


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=5, help="time for the turns")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    torch.set_num_threads(1)
    times, launches = timed(options.seconds)
    for name, figures in timing.compared(times, "torch", "us a layer"):
        wanted = WANTED if name == "syncbn" else None
        title = f"{SHAPE}, bf16, channels_last, {RANKS} ranks, turns of {LAYERS} layers"
        yield Result(title, {"contestant": name}, {**figures, "wanted": wanted, "launches": launches[name]})
