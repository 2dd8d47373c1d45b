"""What a figure was measured on: hardware, versions, commit, and what other guests took of the machine meanwhile."""

import json
import os
import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


@cache
def hardware() -> dict[str, Any]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "instructions": instructions, "cores": os.cpu_count(), "gpu": _gpu()}


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,power.limit"
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which(command[0]) else ""
    size_gib = gpu.total_memory / 2**30
    return (
        f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, {size_gib:.0f} GiB, "
        f"{query}: {answer.strip() or 'unknown'}"
    )


@cache
def versions() -> dict[str, str]:
    """Python's, torch's, and of what else there is."""
    all_of_them = {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}
    if torch.cuda.is_available():
        from torch.cuda import nccl

        all_of_them |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
        all_of_them["nccl"] = ".".join(map(str, nccl.version()))
    return {name: version for name, version in all_of_them.items() if version}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The commit, marked where files differ from it; None without git or a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    if not shutil.which("git"):
        return None
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def fields() -> dict[str, Any]:
    """What a record says of the machine."""
    return {"hardware": hardware(), "versions": versions(), "commit": commit()}


def described(hardware: dict[str, Any], versions: dict[str, str]) -> str:
    """All of it in a line, or two where there is a GPU."""
    cpu = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['instructions']}"
    line = ", ".join([cpu, *(f"{name} {version}" for name, version in versions.items())])
    return "\n".join(part for part in (hardware["gpu"], line) if part)


def stolen(before: tuple[int, int] | None = None) -> Any:
    """(steal, all) ticks since the machine started, or the share of steal since before."""
    if not Path("/proc/stat").exists():
        return (0, 1) if before is None else 0.0
    ticks = [int(tick) for tick in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    now = ticks[7], sum(ticks)
    return now if before is None else (now[0] - before[0]) / max(1, now[1] - before[1])


if __name__ == "__main__":
    print(json.dumps(fields()))
