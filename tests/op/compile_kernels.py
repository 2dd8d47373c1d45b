"""Compile the kernels for a GPU that need not be there, and print what each uses.

python -m tests.op.compile_kernels [--capability 90]     as ResNet-50 has them, a line each
python -m tests.op.compile_kernels --all                 every variant there is, degenerate shapes too: does it compile?

A line: kernel, registers, bytes of stack and of local memory a thread, instructions in all and in the loop over tiles,
how many of these go to memory for what the registers do not hold (SPILLED), and how wide the loads are. It ends with an
error if a kernel does not compile.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from syncbn.kernels import Affine, Running
from syncbn.kernels import triton as kernels
from tests.op.kernel_steps import CASES, inputs, step

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
# What an H100 or H200 has
MULTIPROCESSORS = 132
DEGENERATE = [(1, 1), (5, 3), (3, 130), (9001, 2), (70_001, 1), (4, 3, 5), (1, 1, 40_001), (3, 5, 7, 3), (9, 37, 2, 2)]
DEGENERATE += [(1, 3, 4, 4), (1, 64, 1, 1), (2, 3, 4, 5, 3), (0, 3, 4, 2)]
HALVES = [torch.float64, torch.float16, torch.bfloat16]


class NoGPU:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiler:
    """Stands in for `kernels.launch.start`: what would have been launched is compiled once, and told.

    A key that stands for two variants, or two grids, is a failure: the second launch would start the first's.
    """

    def __init__(self, tell: bool):
        self.tell, self.seen, self.failed = tell, set(), []
        self.kept, self.by_key = [], {}

    def __call__(self, runners, device, kernel, programs, key, *arguments):
        try:
            code = kernel.warmup(*arguments, grid=(programs,), **kernels.launch.options(kernel))
        except Exception as error:
            self.failed.append(f"{kernel.__name__} {key}: {type(error).__name__}: {error}")
            return
        self.kept.append(runners)  # so that no other gets its id
        if self.by_key.setdefault((id(runners), key), (code.hash, programs)) != (code.hash, programs):
            self.failed.append(f"{kernel.__name__} {key}: another variant or grid has the same key")
        if code.hash not in self.seen:
            self.seen.add(code.hash)
            if self.tell:
                print(kernel.__name__, *used(code), flush=True)


def used(code: Any) -> list[str]:
    """REG, STACK and LOCAL, instructions, and the widths of loads."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        resources = cuobjdump("-res-usage", file.name)
        every, of_a_tile, spilled = instructions(cuobjdump("-sass", file.name))
    widths = sorted(set(re.findall(r"ld\.global\S*?((?:v\d\.)?b\d+)", code.asm["ptx"])))
    figures = [f"SASS:{every}", f"TILE:{of_a_tile}", f"SPILLED:{spilled}"]
    return [*re.findall(r"(?:REG|STACK|LOCAL):\d+", resources), *figures, *widths]


def cuobjdump(*words: str) -> str:
    environment = {"PATH": str(BIN)}  # it calls nvdisasm
    return subprocess.run(
        [BIN / "cuobjdump", *words], capture_output=True, text=True, check=True, env=environment
    ).stdout


def instructions(sass: str) -> tuple[int, int, int]:
    """How many there are; in the loop over tiles; of these, how many read or write what does not fit into registers.

    That loop is the largest that loads and has no float64 in it.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    code = {int(address, 16): text for address, text in lines if not text.startswith("NOP")}
    tile: list[str] = []
    for address, text in code.items():
        target = re.search(r"BRA(?:\.\S+)?\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [code[a] for a in code if int(target[1], 16) <= a <= address]
            words = " ".join(body)
            if "LDG" in words and not re.search(r"\bD(ADD|MUL|FMA)\b", words) and len(body) > len(tile):
                tile = body
    return len(code), len(tile), sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in tile)


def run(case: dict[str, Any]) -> None:
    """All kernels of a step, and those beside it."""
    step(kernels, **case)
    step(kernels, **case, form="row")


def in_turn(shape: tuple[int, ...]) -> None:
    """One tensor with parameters and options that change from call to call, and with inputs that are not aligned."""
    x, channels = torch.zeros(shape, dtype=torch.bfloat16), shape[1]
    odd = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(shape)
    shared = torch.zeros(2 * channels + 1, dtype=torch.float64)
    mask = torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool)
    for dtype in None, torch.bfloat16, torch.float32:
        weight = None if dtype is None else torch.zeros(channels, dtype=dtype)
        for values in x, odd:
            kernels.moments(values, mask if dtype else None, "row" if dtype else "message", values is odd)
            for relu in False, True:
                affine = Affine(weight, weight if relu else None, relu)
                for residual in None, values:
                    _, stats = kernels.normalize(x if residual is odd else values, shared, affine, residual)
                for y in None, values:
                    kernels.grad_sums(values, x, stats, affine, y)
                    kernels.grad_sums(x, values, stats, affine, y)
                kernels.grad_input(values, x, stats, affine, shared[:-1], mask if relu else None)
                kernels.grad_input(x, values, stats, affine, shared[:-1], mask if relu else None)


def beside(channels: int) -> None:
    """What depends on channels and options alone."""
    x, rows = torch.zeros(2, channels), torch.zeros(300, 2 * channels + 1, dtype=torch.float64)
    for dtype in torch.float32, torch.float64:
        for momentum in 0.1, None:
            running = Running(*torch.zeros(2, channels, dtype=dtype), torch.tensor(0), momentum)
            for shared in rows, rows[0], rows[:1]:
                _, stats = kernels.normalize(x, shared, Affine(), None, running)
            kernels.update_running(running, stats)


def budget(heading: Any = print) -> None:
    for dtype, memory_format in (torch.bfloat16, torch.channels_last), (torch.float32, torch.contiguous_format):
        for name in "plain", "relu", "residual+relu", "mask":
            case = inputs((32, 64, 28, 28), dtype, **CASES[name])
            case["x"] = case["x"].contiguous(memory_format=memory_format)
            step(kernels, **case)
            channels = case["x"].size(1)
            running = Running(*torch.zeros(2, channels), torch.tensor(0), 0.1)
            shared = torch.zeros(2 * channels + 1, dtype=torch.float64)
            affine = Affine(case["weight"], case["bias"], case["relu"])
            kernels.normalize(case["x"], shared, affine, case["residual"], running)
    heading("\nof channels and options alone")
    beside(64)
    heading("\nwhere 16 bytes do not divide channels, or planes: narrow loads")
    for shape, memory_format in ((32, 66, 28, 28), torch.channels_last), ((32, 64, 27, 27), torch.contiguous_format):
        case = inputs(shape, torch.bfloat16, relu=True)
        case["x"] = case["x"].contiguous(memory_format=memory_format)
        step(kernels, **case)


def everything() -> None:
    for shape in DEGENERATE:
        for case in CASES.values():
            run(inputs(shape, torch.float32, **case))
    for dtype in HALVES:
        for case in CASES.values():
            for memory_format in torch.contiguous_format, torch.channels_last:
                given = inputs((6, 5, 4, 3), dtype, **case)
                given["x"] = given["x"].contiguous(memory_format=memory_format)
                run(given)
    kernels.plan.plan_of.cache_clear()
    with patch.object(kernels.plan, "INT32", 0):
        run(inputs((8, 64, 28, 28), torch.bfloat16, **CASES["residual+relu"]))
        run(inputs((8, 64, 28, 28), torch.float32, **CASES["mask"]))
    kernels.plan.plan_of.cache_clear()
    for shape in (6, 8, 4, 3), (6, 64, 56, 56):
        in_turn(shape)
    for channels in 1, 5, 64:
        beside(channels)
    budget(heading=lambda text: None)


def other_batches() -> None:
    """The kernels of one network for batches and sizes of images that change from step to step."""
    for images in 10, 11, 15, 16, 17, 33:
        for side in 27, 28, 31, 32:
            for case in "relu", "mask":
                given = inputs((images, 64, side, side), torch.bfloat16, **CASES[case])
                given["x"] = given["x"].contiguous(memory_format=torch.channels_last)
                step(kernels, **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability: 90 is Hopper")
    parser.add_argument("--all", action="store_true", help="compile every variant, print only how many")
    options = parser.parse_args()
    driver.set_active(NoGPU(options.capability))
    compiler = Compiler(tell=not options.all)
    with (
        patch.object(kernels.launch, "start", compiler),
        patch.object(kernels.plan, "multiprocessors", lambda device: MULTIPROCESSORS),
    ):
        everything() if options.all else budget()
        variants = len(compiler.seen)
        if options.all:
            other_batches()
            compiled = f"{variants} variants compiled, {len(compiler.failed)} failed"
            more = len(compiler.seen) - variants
            print(f"Triton {triton.__version__}: {compiled}; {more} more for other batches")
    for line in compiler.failed:
        print(f"FAILED {line}", file=sys.stderr)
    sys.exit(1 if compiler.failed else 0)


if __name__ == "__main__":
    main()
