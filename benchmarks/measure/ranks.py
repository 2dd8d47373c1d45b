"""Ranks on this machine for benchmarks of messages: gloo processes of one thread each, kept from call to call."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Run = Callable[..., list[Any]]
# After which a rank that waits for one that has failed gives up
PATIENCE = timedelta(seconds=600)


@contextmanager
def started(size: int) -> Iterator[Run]:
    """Within it, run(function, *args) is [function(rank, *args), ...]; function is a module's.

    When run returns, every rank has come to the end of its function.
    """
    # A forkserver that has imported torch makes a rank in milliseconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "syncbn"])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        places = [(rank, size, Path(folder) / "store") for rank in range(size)]
        processes = [stack.enter_context(ProcessPoolExecutor(1, context, join, place)) for place in places]

        def run(function: Callable[..., Any], *args: Any) -> list[Any]:
            answers = [process.submit(function, rank, *args) for rank, process in enumerate(processes)]
            return [answer.result(PATIENCE.total_seconds()) for answer in answers]

        yield run


def join(rank: int, size: int, store: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    of_files = dist.FileStore(str(store), size)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=of_files, rank=rank, world_size=size, timeout=PATIENCE)
