"""The runner of all benchmarks.

    python -m benchmarks                            their names
    python -m benchmarks NAME [OPTION ...]          run one; --help tells its options
    torchrun --nproc-per-node 2 -m benchmarks NAME  one that trains on several ranks

Each prints its results as Markdown tables, and with --json FILE appends them to a file: benchmarks/measure/records.py
has the form of a line. A figure with quartiles in brackets is a median.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# Large tensors are kept by malloc: or the system's work for new pages is what gets measured
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
QUIET_PROFILER = {"KINETO_LOG_LEVEL": "99"}


class Benchmark(NamedTuple):
    """module has add_options(parser) and measure(options), which yields a `Result` for each row.

    environment: what must be set before torch is imported.
    """

    module: str
    line: str
    environment: Mapping[str, str] = {}


# A module is imported when its benchmark is chosen: what it needs, Hydra say, the others do without
BENCHMARKS = {
    "op": Benchmark("operator.op", "the operator on a CPU, against F.batch_norm", {**KEEP_PAGES, **QUIET_PROFILER}),
    "op_gpu": Benchmark("operator.op_gpu", "the operator on a GPU, against torch.nn.SyncBatchNorm and a copy"),
    "smoke": Benchmark("operator.smoke", "whether the GPU's kernels run, and the bandwidth of each pass"),
    "host": Benchmark("operator.host", "the host's time of a layer, with a GPU that takes none", KEEP_PAGES),
    "step": Benchmark("operator.step", "a training step of ResNet-50 on a GPU with each norm", QUIET_PROFILER),
    "message": Benchmark("operator.message", "a message between CPU ranks, by shared memory and by gloo"),
    "wire": Benchmark("operator.wire", "bytes that a rank really sends, counted by the kernel"),
    "scale": Benchmark("operator.scale", "a model of the messages on 2 to 16 384 GPUs"),
    "trainer": Benchmark("trainer.loops", "the trainer's loop against a bare DDP loop (torchrun)"),
    "drift": Benchmark("trainer.drift", "what the drift monitor says of good shards and of bad ones (torchrun)"),
    "drift_cost": Benchmark("trainer.drift_cost", "what measuring drift costs a training step (torchrun)"),
    "momentum": Benchmark("trainer.momentum", "what norm.momentum=auto gains"),
    "small_batch": Benchmark("trainer.small_batch", "every norm at 1 to 32 images a rank; takes hours"),
    "camvid": Benchmark("trainer.camvid", "segmentation at one image a rank with each norm; takes an hour"),
    "bccd": Benchmark("trainer.bccd", "detection at two images a rank with each norm; takes an hour"),
    "evaluation": Benchmark("trainer.evaluation", "an evaluation, against the forwards of its images (torchrun)"),
}
# What shows records: each has add_options(parser) and show(options)
READERS = {
    "table": Benchmark("measure.tables", "the Markdown tables of files that --json has made"),
    "gpu": Benchmark("gpu", "the table of what `make gpu` has measured"),
}
NAMES = BENCHMARKS | READERS


def main(words: Sequence[str]) -> None:
    """List the names, or run the one that is given, in the environment that it needs."""
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, NAMES)) + 2
        print(__doc__, *(f"    {name:<{width}}{one.line}" for name, one in NAMES.items()), sep="\n")
        return
    name, *rest = words
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        mend = f"did you mean {near[0]}?" if near else "`python -m benchmarks` lists them"
        print(f"There is no benchmark {name}: {mend}", file=sys.stderr)
        sys.exit(2)
    needed = {**os.environ, **NAMES[name].environment}
    if needed != os.environ:
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *words], needed)
    run(name, rest)


def run(name: str, words: Sequence[str]) -> None:
    """Measure, print tables as rows come, and keep the rows; or show what was kept."""
    module = loaded(name)
    options = parsed(name, module, words)
    if name in READERS:
        module.show(options)
        return
    from benchmarks.measure import machine, records, tables

    rows = records.records(name, options, module.measure(options))
    if os.environ.get("RANK", "0") != "0":  # the others take part and say nothing
        deque(rows, maxlen=0)
        return
    print(machine.described(machine.hardware(), machine.versions()), flush=True)
    for line in tables.lines(records.kept(rows, options.json)):
        print(line, flush=True)


def loaded(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"benchmarks.{NAMES[name].module}")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("benchmarks", "syncbn"):
            raise
        sys.exit(f"The benchmark {name} needs the package {package}, which is not installed")


def parsed(name: str, module: ModuleType, words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_options(parser)
    if name in BENCHMARKS:
        parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each result to this file")
    options = parser.parse_intermixed_args(words)
    if vars(options).get("device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no GPU: give --device cpu, and sizes that a CPU can do")
    return options
