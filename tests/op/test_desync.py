"""Ranks that run different layers are named: by check where they go on, by the watchdog where they hang."""

import copy
import os
import pickle
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import DesyncError, DesyncMonitor, SyncBatchNorm, collectives, convert
from tests.messages import recorded
from tests.ranks import run_ranks

PATIENCE_S = 1.0


def two_layers(**options):
    torch.manual_seed(0)
    return nn.ModuleDict({"a": SyncBatchNorm(3, **options), "b": SyncBatchNorm(3, **options)})


def step(model, order, backward=""):
    """A step through layers one after the other; or, with backward, side by side, their backwards in that order."""
    x = torch.randn(4, 3, 2, requires_grad=True)
    if backward:
        ys = {name: model[name](x) for name in order}
        for name in backward:
            ys[name].square().sum().backward()
        return
    for name in order:
        x = model[name](x)
    x.square().sum().backward()


def complaint(monitor):
    """What check raises, as text."""
    try:
        monitor.check()
    except DesyncError as error:
        return str(error)


def complaints(rank, steps, odd_one, options):
    """What check says of a good step, of one in which odd_one runs other layers, and of a good one again."""
    usual, odd = steps
    model = two_layers(**options)
    with DesyncMonitor(model) as monitor:
        heard = []
        for order in usual, odd if rank == odd_one else usual, usual:
            step(model, *order)
            heard.append(complaint(monitor))
        return heard


@pytest.mark.parametrize("options", [{}, {"reduction": "gather"}], ids=["all_reduce", "gather"])
@pytest.mark.parametrize(
    ("steps", "first"),
    [
        ([("ab",), ("ba",)], "message 1 since the last check: rank 1 ran b (forward) where rank 0 ran a (forward). "),
        ([("aab",), ("abb",)], "message 2 since the last check: rank 1 ran b (forward) where rank 0 ran a (forward). "),
        (
            [("ab", "ab"), ("ab", "ba")],
            "message 3 since the last check: rank 1 ran b (backward) where rank 0 ran a (backward). ",
        ),
    ],
    ids=["swapped", "one-twice", "backward-alone"],
)
def test_layers_of_equal_size_run_in_another_order_are_named(steps, first, options):
    for good, bad, good_again in run_ranks(complaints, 2, steps, 1, options):
        assert bad.startswith(first)
        assert good is good_again is None


def test_the_odd_one_is_told_from_the_others():
    want = "message 1 since the last check: rank 2 ran b (forward) where ranks 0, 1, 3 ran a (forward). "

    for _, bad, _ in run_ranks(complaints, 4, [("ab",), ("ba",)], 2, {}):
        assert bad.startswith(want)


def compiled_complaint(rank):
    torch._dynamo.reset()
    model = two_layers()
    model["a"].compile(fullgraph=True, backend="aot_eager")
    with DesyncMonitor(model) as monitor:
        step(model, "ab")
        good = complaint(monitor)
        step(model, "ab" if rank else "ba")
        return good, complaint(monitor)


def test_a_compiled_layer_carries_the_fingerprint():
    for good, bad in run_ranks(compiled_complaint, 2, timeout_s=300):
        assert good is None
        assert bad.startswith("messages of a, b met those of other layers since the last check, ")


def pairs(rank, odd_one):
    """Each pair of ranks has an order, and a number of layers, of its own."""
    model = two_layers(group=2)
    with DesyncMonitor(model) as monitor:
        step(model, "ab" if rank < 2 else "bab" if rank != odd_one else "bba")
        return complaint(monitor)


def test_ranks_of_different_groups_may_run_different_layers():
    assert run_ranks(pairs, 4, None) == [None] * 4


def test_what_differs_inside_a_group_is_told_to_all():
    want = "message 2 since the last check of ranks 2, 3: rank 3 ran b (forward) where rank 2 ran a (forward). "

    for complaint in run_ranks(pairs, 4, 3):
        assert complaint.startswith(want)


def refused_models(rank, other):
    try:
        DesyncMonitor(other if rank == 1 else two_layers())
    except DesyncError as error:
        return str(error), len([t for t in threading.enumerate() if t.name == "syncbn"])


@pytest.mark.parametrize(
    ("other", "held"),
    [
        (nn.ModuleDict({"a": SyncBatchNorm(3)}), "none"),
        (nn.ModuleDict({"a": SyncBatchNorm(3), "c": SyncBatchNorm(3)}), "c of 3 channels"),
        (nn.ModuleDict({"a": SyncBatchNorm(3), "b": SyncBatchNorm(4)}), "b of 4 channels"),
    ],
    ids=["one-less", "name", "channels"],
)
def test_models_that_differ_are_refused_on_every_rank(other, held):
    want = f"the ranks' models differ in layer 2: rank 1 registered {held} where rank 0 registered b of 3 channels"

    assert run_ranks(refused_models, 2, other) == [(want, 0)] * 2


def test_a_layer_is_watched_once():
    model = two_layers()
    with DesyncMonitor(model), pytest.raises(ValueError, match="SyncBatchNorm is watched already on rank 0"):
        DesyncMonitor(model["a"])


class Stall:
    """Collects the reports of one stall, and sees to it that the stall ends."""

    def __init__(self, end=None):
        self.texts = []
        self.end = end

    def __call__(self, text):
        self.texts.append(text)
        if self.end is not None:
            self.end()


def one_layer_more(rank, key):
    """Rank 1 runs a layer that rank 0 runs only when rank 1 has complained."""
    store = dist.distributed_c10d._get_default_store().clone()
    model = two_layers()
    stall = Stall(lambda: store.set(key, "reported"))
    with DesyncMonitor(model, patience_s=PATIENCE_S, report=stall) as monitor:
        step(model, "ab")
        if rank == 0:
            store.wait([key], timedelta(seconds=20))
            # Once a stall: there is time for a second report
            time.sleep(PATIENCE_S)
        model["b"](torch.randn(4, 3))
        monitor.check()
    return stall.texts


def test_a_rank_that_runs_fewer_layers_is_named():
    of_late, of_waiting = run_ranks(one_layer_more, 2, f"test/{time.time()}", timeout_s=40)

    assert of_late == []
    (text,) = of_waiting
    start, cause = text.split("; ")
    assert start == "no progress for 1 s: this rank (1) waits in message 5, b (forward)"
    assert re.fullmatch(r"rank 0, last heard of \d s ago, had made 4 messages, the last in a \(backward\)", cause)


def stop(pid):
    """Stop a process. Until the signal has come to all its threads, those go on, and may answer a collective."""
    os.kill(pid, signal.SIGSTOP)
    threads = list(Path(f"/proc/{pid}/task").glob("*/stat"))
    while any(thread.read_text().rpartition(")")[2].split()[0] != "T" for thread in threads):
        time.sleep(0.01)


def stopped_rank(rank, hosts_store):
    """Rank 1, or with hosts_store the rank 0 that serves a TCP store, is stopped until its peer complains of it."""
    pids = collectives.gather_objects(os.getpid(), dist.group.WORLD)
    victim = 0 if hosts_store else 1
    stall = Stall(lambda: os.kill(pids[victim], signal.SIGCONT))
    with patch.object(collectives, "store", tcp_store(rank).clone):
        model = two_layers()
        with DesyncMonitor(model, patience_s=PATIENCE_S, report=stall) as monitor:
            step(model, "ab")
            if rank != victim:
                stop(pids[victim])
            step(model, "ab")
            monitor.check()
    return stall.texts


def tcp_store(rank):
    """One that rank 0 serves: who is stopped inside a file store keeps its lock."""
    port = None
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        port = store.port
    port = collectives.gather_objects(port, dist.group.WORLD)[0]
    return store if rank == 0 else dist.TCPStore("127.0.0.1", port, 2, is_master=False, wait_for_workers=False)


def test_a_stopped_rank_is_named():
    of_stopped, of_waiting = run_ranks(stopped_rank, 2, False, timeout_s=40)[::-1]

    assert of_stopped == []
    (text,) = of_waiting
    assert "this rank (0) waits in message " in text
    assert "; rank 1, last heard of " in text


def test_a_store_that_falls_silent_is_reported():
    of_stopped, of_waiting = run_ranks(stopped_rank, 2, True, timeout_s=40)

    assert of_stopped == []
    (text,) = of_waiting
    assert "this rank (1) waits in message " in text
    assert "; no rank can be heard, as the process group's store has not answered for " in text


def silent_elsewhere(rank):
    """Rank 1 is stopped while rank 0 is out of any layer."""
    pids = collectives.gather_objects(os.getpid(), dist.group.WORLD)
    reported = threading.Event()
    stall = Stall(reported.set)
    model = two_layers()
    with DesyncMonitor(model, patience_s=PATIENCE_S, report=stall) as monitor:
        step(model, "ab")
        if rank == 0:
            # The other has seen its own last message, and is stopped for so long that it may think the store silent
            time.sleep(PATIENCE_S / 2)
            stop(pids[1])
            reported.wait(20)
            time.sleep(1.5)
            os.kill(pids[1], signal.SIGCONT)
        monitor.check()
    return stall.texts


def test_a_rank_that_has_fallen_silent_is_named_wherever_the_others_are():
    of_stopped, of_other = run_ranks(silent_elsewhere, 2, timeout_s=40)[::-1]

    assert of_stopped == []
    (text,) = of_other
    assert "this rank (0) last sent message 4, a (backward); rank 1, last heard of " in text


def without_syncbn(rank, steps, before):
    """Rank 1 is stopped in a model that makes no message, after so many steps, until rank 0 complains of it."""
    pids = collectives.gather_objects(os.getpid(), dist.group.WORLD)
    stall = Stall(lambda: os.kill(pids[1], signal.SIGCONT))
    with (
        patch.object(collectives, "store", tcp_store(rank).clone),
        DesyncMonitor(nn.BatchNorm1d(3), patience_s=PATIENCE_S, report=stall) as monitor,
    ):
        for step in range(steps):
            monitor.alive(step)
            dist.barrier()
        if rank == 0:
            # The other has told of its last step
            time.sleep(PATIENCE_S / 2)
            if before:
                monitor.alive(steps)
            stop(pids[1])
        dist.barrier()
        cause = monitor.stall
        monitor.alive(steps + 1)
        time.sleep(PATIENCE_S)
        left = monitor.stall
        monitor.check()
    return stall.texts, cause, left


@pytest.mark.plain("in-a-step")
@pytest.mark.parametrize(
    ("steps", "before", "here", "there"),
    [
        (0, False, "has made no message", "had made 0 messages"),
        (0, True, "has made no message, in step 0", "had made 0 messages"),
        (3, False, "has made no message, in step 2", "had made 0 messages, and was in step 2"),
        (3, True, "has made no message, in step 3", "had made 0 messages, and was in step 2"),
    ],
    ids=["at-once", "in-the-first-step", "between-steps", "in-a-step"],
)
def test_a_rank_that_stops_is_named_without_any_message(steps, before, here, there):
    (texts, cause, left), (of_stopped, *_) = run_ranks(without_syncbn, 2, steps, before, timeout_s=60)

    (text,) = texts
    silent = r"rank 1, last heard of \d s ago, "
    assert re.fullmatch(rf"no progress for \d s: this rank \(0\) {here}; {silent}{there}", text)
    assert cause == text, "whoever catches an error of the collective can tell the cause"
    assert left is None, "it is over"
    assert of_stopped == []


def late_for_a_step(rank, key):
    """Rank 1 waits for its batch of step 2, and its threads go on, until rank 0 has complained."""
    store = dist.distributed_c10d._get_default_store().clone()
    stall = Stall(lambda: store.set(key, "reported"))
    with DesyncMonitor(nn.BatchNorm1d(3), patience_s=PATIENCE_S, report=stall) as monitor:
        for step in range(4):
            if (rank, step) == (1, 2):
                store.wait([key], timedelta(seconds=20))
            monitor.alive(step)
            dist.barrier()
    return stall.texts


def test_a_rank_at_an_earlier_step_is_late_though_it_can_be_heard():
    (text,), of_late = run_ranks(late_for_a_step, 2, f"test/{time.time()}", timeout_s=40)

    assert of_late == []
    assert "this rank (0) has made no message, in step 2; rank 1, last heard of " in text
    assert text.endswith("had made 0 messages, and was in step 1")


def long_pauses(rank, signs):
    """Pauses before the first step and after some, in which ranks say unlike often that they are alive."""
    reports = []
    with DesyncMonitor(nn.BatchNorm1d(3), patience_s=0.5, report=reports.append) as monitor:
        time.sleep(1.5)
        for step in range(3):
            monitor.alive(step)
            dist.barrier()
            for _ in range(signs[rank]):
                time.sleep(0.1)
                monitor.alive()
            time.sleep(1.5)
            dist.barrier()
        return reports, monitor.stall


@pytest.mark.plain("uneven")
@pytest.mark.parametrize("signs", [(0, 0), (2, 5)], ids=["silent", "uneven"])
def test_a_pause_of_all_ranks_is_no_hang(signs):
    assert run_ranks(long_pauses, 2, signs) == [([], None)] * 2


def busy(rank):
    """Rank 0 goes on for long in a step, and rank 1 waits for it."""
    reports = []
    with DesyncMonitor(nn.BatchNorm1d(3), patience_s=0.5, report=reports.append) as monitor:
        monitor.alive(0)
        for _ in range(20 if rank == 0 else 0):
            time.sleep(0.1)
            monitor.alive()
        dist.barrier()
    return reports


def test_a_rank_that_takes_longer_at_the_same_step_is_not_late():
    assert run_ranks(busy, 2) == [[], []]


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.bn(self.conv(x)).relu()


class Net(nn.Module):
    """A residual net with a block under checkpointing, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = Block(3), Block(3), Block(3)

    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=False)
        return self.last(self.twice(self.twice(x)))


def clean_run(rank):
    """Some steps of accumulation, an evaluation that takes long, and what was sent before, during and after."""
    reports = []
    model = convert(Net())
    sent = [lengths(model)]
    with DesyncMonitor(model, patience_s=0.5, report=reports.append) as monitor:
        sent.append(lengths(model))
        for _ in range(3):
            for _ in range(2):
                model(torch.randn(2 + rank, 3, 4, 4)).square().sum().backward()
            monitor.check()
        model.eval()(torch.randn(2, 3, 4, 4))
        time.sleep(1.5)
        monitor.check()
        model.train()
    sent.append(lengths(model))
    left = [t.name for t in threading.enumerate() if t.name == "syncbn"]
    return reports, left, [name for name, layer in model.named_modules() if "witness" in vars(layer)], sent


def lengths(model):
    """Of the first and last message of a step."""
    with recorded() as sent:
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    lengths = [length for name, length, _ in sent if name == "all_reduce"]  # the first step forms the group as well
    return lengths[0], lengths[-1]


def test_a_clean_run_raises_and_reports_nothing():
    for reports, threads, watched, sent in run_ranks(clean_run, 2):
        assert reports == threads == watched == []
        assert sent == [(7, 6), (9, 8), (7, 6)]


def test_without_a_process_group_there_is_nothing_to_notice():
    model = two_layers()
    with DesyncMonitor(model) as monitor:
        step(model, "ab")
        step(model, "ba")
        monitor.alive(1)
        monitor.check()
        assert monitor.stall is None


def test_copies_are_not_watched():
    model = two_layers()
    with DesyncMonitor(model):
        for copied in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
            assert all(layer.witness is None for layer in copied.values())
        assert all(layer.witness is not None for layer in model.values())
    assert all("witness" not in vars(layer) for layer in model.values())


def test_patience_must_be_positive():
    with pytest.raises(ValueError, match="patience_s is 0: it must be positive"):
        DesyncMonitor(two_layers(), patience_s=0)
