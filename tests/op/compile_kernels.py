"""Compile every kernel for a GPU that need not be there, and print what each uses: registers, stack, local memory.

python -m tests.op.compile_kernels 90     (compute capability 9.0)
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from syncbn.kernels import triton as kernels
from tests.op.test_kernels import CASES, inputs, step


class NoGPU:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
compiled = set()


def compile_only(kernel, x, programs, *arguments):
    code = kernel.warmup(*arguments, grid=(programs,), num_warps=8, enable_fp_fusion=True)
    if code.hash in compiled:
        return
    compiled.add(code.hash)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        used = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    loads = sorted(set(re.findall(r"ld\.global\S*?((?:v\d\.)?b\d+)", code.asm["ptx"])))
    print(kernel.__name__, *re.findall(r"(?:REG|STACK|LOCAL):\d+", used), *loads)


if __name__ == "__main__":
    driver.set_active(NoGPU())
    kernels._launch = compile_only
    for dtype, memory_format in (torch.bfloat16, torch.channels_last), (torch.float32, torch.contiguous_format):
        for name in "plain", "relu", "residual+relu", "mask":
            case = inputs((32, 64, 28, 28), dtype, **CASES[name])
            case["x"] = case["x"].contiguous(memory_format=memory_format)
            step(kernels, **case)
    kernels._between_images(torch.zeros(64, 129, dtype=torch.float64), 32, 2)
    buffers = torch.zeros(64), torch.ones(64), torch.tensor(0)
    moments, _ = kernels.statistics(torch.zeros(300, 129, dtype=torch.float64), 0.1)
    kernels.update_running(*buffers, moments, 0.1)
    kernels.update_running(*buffers, moments, None)
