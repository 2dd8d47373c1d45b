"""The processes that load data: deaf to signals of the process group, and gone with their rank."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

RANK = """
import itertools, multiprocessing, signal, time
import torch
from syncbn.trainer import data
from syncbn.trainer.data import DataConfig
from syncbn.trainer.world import World

heard = []
for number in signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2:
    signal.signal(number, lambda number, _: heard.append(number))
built = data.build(DataConfig(workers=2), World(0, 1, torch.device("cpu")), seed=0)
print("ready", flush=True)
batches = iter(built.train)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
while not heard:
    time.sleep(0.01)
held = [batch for part in (built.eval, itertools.islice(batches, 100)) for batch in part]
print(heard[0], len(held), len(multiprocessing.active_children()), flush=True)
"""

FORK = """
import os, time
from syncbn.trainer.data.workers import HeedRankAlone

heed = HeedRankAlone()
print("ready", flush=True)
if worker := os.fork():
    print(worker, flush=True)
while os.getppid() == heed.rank or worker:
    time.sleep(0.01)
heed(0)
time.sleep(60)
"""

started = []


def start(script=RANK):
    """A rank that is about to start its workers, as the leader of its process group."""
    rank = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[3],
    )
    started.append(rank)
    assert rank.stdout.readline() == "ready\n"
    return rank


def workers_of(rank):
    """The workers' ids, once they have given a batch."""
    return [int(word) for word in rank.stdout.readline().split()]


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def no_rank_is_left():
    yield
    for rank in started:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)
    started.clear()


@pytest.mark.slow
def test_a_rank_gets_its_batches_after_signals_to_all_of_its_group():
    rank = start()
    workers = workers_of(rank)
    assert len(workers) == 2
    for number in signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM:
        os.killpg(rank.pid, number)
    said, _ = rank.communicate(timeout=60)
    assert said.split()[1:] == ["102", "4"]  # 2 of eval and 100 of training; 2 workers for each
    assert rank.returncode == 0
    assert not any(map(is_alive, workers))


def test_no_signal_meets_a_worker_before_it_ignores_them():
    rank = start()
    ended = threading.Event()

    def storm():
        while not ended.wait(0.004):
            os.killpg(rank.pid, signal.SIGTERM)

    sender = threading.Thread(target=storm)
    sender.start()
    workers = workers_of(rank)
    ended.set()
    sender.join()
    said, _ = rank.communicate(timeout=60)
    assert len(workers) == 2
    assert said.split()[1:] == ["102", "4"]
    assert rank.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("script", [RANK, FORK], ids=["at-work", "just-started"])
def test_workers_are_gone_with_a_killed_rank(script):
    rank = start(script)
    workers = workers_of(rank)
    assert workers
    assert all(map(is_alive, workers))
    rank.kill()
    rank.wait()
    end = time.monotonic() + 2  # torch's own workers stay for up to 5 s
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_alive, workers))
