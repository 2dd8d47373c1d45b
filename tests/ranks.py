"""Run a function on N gloo ranks, each a real process. The processes of a world size are started once and kept."""

import atexit
import itertools
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_worlds: dict[int, "_World"] = {}


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """[fn(rank, *args), ...] in rank order, a default process group of world_size around them.

    fn must be a module's function. What a rank raises is raised here, with its traceback; after that, or a
    timeout, the world is ended and the next call starts a fresh one.
    """
    world = _worlds.get(world_size) or _worlds.setdefault(world_size, _World(world_size))
    try:
        return world.run(fn, args, timeout_s)
    except BaseException:
        _worlds.pop(world_size).end()
        raise


class _World:
    def __init__(self, size: int):
        # A forkserver that has imported torch makes a rank in milliseconds; one thread each, as there are many
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "syncbn"])
        store = Path(tempfile.mkdtemp()) / "store"
        pipes = [context.Pipe() for _ in range(size)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        call = pickle.dumps((fn, args))
        for connection in self.connections:
            connection.send_bytes(call)
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(self.connections):
            waiting = [c for rank, c in enumerate(self.connections) if rank not in answers]
            ready = wait(waiting, deadline - time.monotonic())
            if not ready:
                late = [self.connections.index(c) for c in waiting]
                raise TimeoutError(f"ranks {late} of {len(self.connections)} gave no answer in {timeout_s} s")
            for connection in ready:
                rank = self.connections.index(connection)
                answers[rank], error = pickle.loads(connection.recv_bytes())
                if error is not None:
                    answers[rank].add_note(f"on rank {rank} of {len(self.connections)}:\n{error}")
                    raise answers[rank]
        return [answers[rank] for rank in range(len(answers))]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, size: int, store: Path, connection: Any) -> None:
    import torch
    import torch.distributed as dist

    for call in itertools.count():
        try:
            fn, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        if call == 0:
            timeout = timedelta(seconds=120)
            dist.init_process_group(
                "gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size, timeout=timeout
            )
        torch.manual_seed(rank)
        try:
            answer = fn(rank, *args), None
        except Exception as error:
            answer = error, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


@atexit.register
def _end_all() -> None:
    for world in _worlds.values():
        world.end()
