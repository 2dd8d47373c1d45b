"""Messages through memory that the ranks of a host share: what they add up to, who agrees on it, and who died."""

import ctypes
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from syncbn import collectives, shared_memory
from syncbn.collectives import memory as memory_of_groups
from syncbn.shared_memory import agreement
from tests.launch.hosts import needs_namespaces, two_hosts
from tests.messages import LEADERS, recorded
from tests.op.steps import EXACT, batch, joined, layer_of, train_layer, whole_batch
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not shared_memory.available(), reason="mailbox.c was not built here")

# Those from 8193 on take more than one slot
LENGTHS = [513, 1, 7, 512, 0, 4099, 8192, 8193, 20_000, 2]


def test_where_there_is_a_compiler_the_library_is_built():
    assert shared_memory.available() or shutil.which("cc") is None


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_no_race_and_no_byte_out_of_place(tmp_path, sanitizer):
    """x86 keeps the order of stores whatever they ask for; the sanitizer goes by what they ask for."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no compiler")
    source, program = Path(__file__).with_name("mailbox_threads.c"), tmp_path / "threads"
    flags = ["-std=gnu11", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    if subprocess.run([compiler, *flags, "-o", program, source], capture_output=True, check=False).returncode:
        subprocess.run([compiler, "-std=gnu11", "-pthread", "-o", program, source], check=True)
        pytest.skip("this compiler has no such sanitizer")
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("this kernel lays memory out as the sanitizer does not expect")
    assert (ran.returncode, ran.stdout) == (0, "0 wrong\n"), ran.stderr


def fresh_group():
    """All ranks, who have agreed on nothing yet."""
    return dist.new_group(range(dist.get_world_size()))


def mailbox_of(group):
    collectives.resolve_once(group, 0)
    return memory_of_groups.memories[group].mailbox


def row_of(rank, turn, length):
    return torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * turn + rank))


def by_pairs(rows):
    """Two hosts of two ranks come to (0 + 1) + (2 + 3) too."""
    if len(rows) == 1:
        return rows[0]
    left = 1 << (len(rows) - 1).bit_length() - 1
    return by_pairs(rows[:left]) + by_pairs(rows[left:])


def many_messages(rank, lengths, turns):
    """The turns in which what was read is not each bit of the ranks' rows, or of their sum by pairs."""
    ranks, mailbox = range(dist.get_world_size()), mailbox_of(fresh_group())
    wrong = []
    for turn in range(turns):
        rows = [row_of(r, turn, lengths[turn % len(lengths)]) for r in ranks]
        in_order = by_pairs(rows)
        message = rows[rank].clone()
        mailbox.add(message)
        if not (torch.equal(message, in_order) and torch.equal(mailbox.gather(rows[rank]), torch.stack(rows))):
            wrong.append(turn)
    return wrong


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_every_rank_reads_every_row_and_adds_them_up_in_the_order_of_ranks(world_size):
    assert run_ranks(many_messages, world_size, LENGTHS, 60) == [[]] * world_size


def late_ranks(rank, turns):
    """As many_messages, while ranks come late in turn, so that others are ahead by as much as they can be."""
    mailbox = mailbox_of(fresh_group())
    wrong = []
    for turn in range(turns):
        if turn % dist.get_world_size() == rank:
            time.sleep(0.002)
        message = torch.full((600,), float(turn * (rank + 1)), dtype=torch.float64)
        mailbox.add(message)
        if not message.eq(turn * sum(range(1, dist.get_world_size() + 1))).all():
            wrong.append(turn)
    return wrong


@pytest.mark.parametrize("world_size", [2, 4])
def test_nobody_overwrites_what_a_late_rank_has_yet_to_read(world_size):
    assert run_ranks(late_ranks, world_size, 300) == [[]] * world_size


def wake_ups(rank, turns):
    """When each message was complete, on the clock that all processes share; the last rank comes late to each."""
    mailbox = mailbox_of(fresh_group())
    times = []
    for _ in range(turns):
        if rank == dist.get_world_size() - 1:
            time.sleep(0.005)
        mailbox.add(torch.zeros(3, dtype=torch.float64))
        times.append(time.monotonic())
    return times


def test_who_sleeps_is_woken_when_the_last_has_come():
    *waiting, last = run_ranks(wake_ups, 4, 40)
    for rank in waiting:
        slept = sorted(mine - its for mine, its in zip(rank, last, strict=True))
        assert slept[len(slept) // 2] < 0.02, "a slice is 50 ms"


def slow_readers(rank, turns):
    """The last rank is stopped for moments anywhere in a message, also while it reads."""
    group = fresh_group()
    mailbox, n = mailbox_of(group), 8192
    pids = collectives.gather_objects(os.getpid(), group)
    stopper = None
    if rank == 0:
        stopper = subprocess.Popen([sys.executable, "-c", STOPPER, str(pids[-1])])
    wrong = []
    for turn in range(turns):
        message = torch.full((n,), float(turn), dtype=torch.float64)
        mailbox.add(message)
        if not message.eq(turn * len(pids)).all():
            wrong.append(turn)
    if stopper is not None:
        stopper.kill()
        stopper.wait()
        os.kill(pids[-1], signal.SIGCONT)
    return wrong


STOPPER = """
import os, signal, sys, time
while True:
    for number in signal.SIGSTOP, signal.SIGCONT:
        os.kill(int(sys.argv[1]), number)
        time.sleep(0.0005)
"""


def test_a_rank_that_is_stopped_while_it_reads_reads_the_same():
    assert run_ranks(slow_readers, 3, 3000) == [[]] * 3


def wrapping(rank):
    """Messages around the one at which 32 bits of counters begin anew."""
    group = fresh_group()
    mailbox, ranks = mailbox_of(group), dist.get_world_size()
    first = 2**32 - 4
    # shared, slots, size, rank, ranks, sequence, read of struct mailbox; arrivals follow a line with the nonce
    words = ctypes.cast(mailbox._box, ctypes.POINTER(ctypes.c_uint32))
    assert (words[6], words[7], words[8], words[9]) == (rank, ranks, 0, 0)
    words[8] = words[9] = first
    shared = ctypes.cast(ctypes.c_void_p.from_address(mailbox._box).value, ctypes.POINTER(ctypes.c_uint32))
    shared[16] = first * ranks % 2**32
    dist.barrier()
    sums = []
    for turn in range(10):
        message = torch.full((3,), float(turn + rank), dtype=torch.float64)
        mailbox.add(message)
        sums.append(message[2].item())
    return sums


def test_counters_may_begin_anew():
    assert run_ranks(wrapping, 3) == [[3.0 * turn + 3 for turn in range(10)]] * 3


def by_memory_alone(rank, layer, *args):
    layer.eval()._process_group(torch.zeros(0))  # forms the group
    refuse = {"side_effect": AssertionError("not through memory")}
    with patch.object(dist.ProcessGroup, "allreduce", **refuse), patch.object(dist, "all_gather_into_tensor", **refuse):
        return train_layer(rank, layer, *args)


@pytest.mark.parametrize("split", [[5, 3], [3, 1, 0, 4]], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "gather"}, {"group": 2}], ids=str)
def test_a_step_needs_the_backend_for_nothing(split, options):
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, **options)

    ranks = run_ranks(by_memory_alone, len(split), layer, x.split(split), dy.split(split))

    xs, dys = x.split(split), dy.split(split)
    for first in range(0, len(split), size := options.get("group", len(split))):
        members = slice(first, first + size)
        assert_close(
            joined(ranks[members]), whole_batch(layer, torch.cat(xs[members]), torch.cat(dys[members])), **EXACT
        )


def bits(rank, reduction, xs, dys):
    return train_layer(rank, layer_of(3, torch.float32, reduction=reduction, affine=False), xs, dys)


def test_by_the_backend_it_is_the_same_but_for_the_order_of_addition():
    x, dy = batch((3, 10, 7), torch.float32)
    xs, dys = x.split([3, 1, 0, 4]), dy.split([3, 1, 0, 4])

    memory, again, gloo, gathered = (
        joined(run_ranks(bits, 4, by, xs, dys)) for by in ("auto", "auto", "all_reduce", "gather")
    )

    assert_close(again, memory, rtol=0, atol=0)
    assert_close(gloo, memory, rtol=1e-6, atol=1e-6)
    assert_close(gathered, memory, rtol=1e-6, atol=1e-6)


def two_groups(rank):
    """Sums of messages of two groups by turns, and in the pairs more of them."""
    world, pairs = fresh_group(), [dist.new_group([0, 1]), dist.new_group([2, 3])]
    wide, narrow = mailbox_of(world), mailbox_of(pairs[rank // 2])
    sums = []
    for turn in range(50):
        for box in [narrow] * (1 + rank // 2) + [wide, narrow]:
            message = torch.full((9,), 10.0**rank, dtype=torch.float64)
            box.add(message)
            sums.append((turn, message[4].item()))
    return {total for _, total in sums}


def test_groups_have_memory_of_their_own():
    assert run_ranks(two_groups, 4) == [{11.0, 1111.0}] * 2 + [{1100.0, 1111.0}] * 2


def agreed_when(rank, how):
    """What a group has agreed on, what its members were told, and what a message adds up to all the same."""
    group = fresh_group()
    with warnings.catch_warnings(record=True) as warned, how(rank):
        warnings.simplefilter("always")
        collectives.resolve_once(group, 0)
    message = torch.full((5,), 1.0 + rank, dtype=torch.float64)
    with recorded() as sent:
        collectives.messages.sum_message(message, group, "auto")
    return memory_of_groups.memories[group] is not None, [str(w.message) for w in warned], message[4].item(), len(sent)


def everything_fits(rank):
    return patch.object(agreement, "SPIN_NS", 0)


def another_memory(rank):
    """Rank 1 finds something else where rank 0's memory should be."""
    other = os.memfd_create("other")
    os.truncate(other, 10**6)
    return patch.object(os, "open", lambda *_: other) if rank == 1 else everything_fits(rank)


def another_host(rank):
    return patch.object(agreement, "_host", lambda: (rank,))


def no_library(rank):
    return patch.object(shared_memory.mailbox, "_library", None) if rank == 1 else everything_fits(rank)


def closed_to_peers(rank):
    return patch.object(os, "getpid", lambda: 2**22 + rank)


@contextmanager
def too_small(rank):
    """A file may take so many bytes: in rank 1, or in rank 0, whose memory it is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full(rank):
    with patch.object(os, "posix_fallocate", side_effect=OSError(28, "No space left on device")):
        yield


@pytest.mark.parametrize(
    ("how", "want", "line"),
    [
        (everything_fits, True, None),
        (another_memory, False, "rank 1 has no shared memory: .*Stale"),
        (another_host, False, None),
        (no_library, False, None),
        (closed_to_peers, False, "rank 0 has no shared memory: .*No such file"),
        (too_small, False, "rank 0 has no shared memory: .*File too large"),
        (full, False, "rank 0 has no shared memory: .*No space left on device"),
    ],
)
def test_all_share_memory_or_none_and_one_line_says_why(how, want, line):
    for message_sum, shared, sent in (
        (total, shared, sent) for shared, _, total, sent in run_ranks(agreed_when, 3, how)
    ):
        assert (message_sum, shared, sent) == (6.0, want, 1)
    lines = [text for _, texts, *_ in run_ranks(agreed_when, 3, how) for text in texts]
    assert len(lines) == (line is not None)
    assert line is None or re.fullmatch(f"messages go through gloo, as {line}.*", lines[0])


def one_length_more(rank):
    mailbox, errors = mailbox_of(fresh_group()), []
    for length in (7, 9 if rank == 1 else 7, 7):
        try:
            mailbox.add(torch.zeros(length, dtype=torch.float64))
        except dist.DistError as error:
            errors.append(str(error))
    return errors


def test_ranks_that_send_unlike_messages_are_told_so():
    for first, second in run_ranks(one_length_more, 2):
        assert first == "ranks ran different layers: of the same message rank 0 sent 7, rank 1 sent 9 values"
        assert second.startswith("shared memory was left: ")


def interrupted(rank):
    """What a handler of a signal and an exception out of one do to a rank that waits, and its peer."""
    group = fresh_group()
    mailbox, pids = mailbox_of(group), collectives.gather_objects(os.getpid(), group)
    message, handled = torch.ones(3, dtype=torch.float64), []
    if rank == 1:
        for number in signal.SIGUSR1, signal.SIGUSR2:
            time.sleep(0.3)
            os.kill(pids[0], number)
            if number == signal.SIGUSR1:
                time.sleep(0.3)
                mailbox.add(message)
        # Rank 0 has left its row for this one
        mailbox.add(torch.zeros(3, dtype=torch.float64))
        with pytest.raises(dist.DistError) as error:
            mailbox.add(message)
        return str(error.value), message[0].item()

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGUSR1, lambda *_: handled.append(time.monotonic()))
    signal.signal(signal.SIGUSR2, stop)
    mailbox.add(message)
    late_s = time.monotonic() - handled[0]
    try:
        mailbox.add(torch.ones(3, dtype=torch.float64))
    except KeyboardInterrupt:
        return late_s, message[0].item()


def test_a_rank_that_waits_hears_signals():
    (late_s, total), (error, same) = run_ranks(interrupted, 2)
    assert late_s > 0.2, "the handler has run while the rank waited"
    assert total == same == 2
    assert error == "rank 0 died or left in the middle of a message through shared memory"


def interrupted_between(rank):
    """An exception falls on rank 0 after it has left its row, before Python waits for the others."""
    mailbox, outcomes = mailbox_of(fresh_group()), []
    if rank == 1:
        time.sleep(0.3)
    for turn in range(3):
        falls = patch.object(mailbox, "_finish", side_effect=KeyboardInterrupt)
        try:
            with falls if (rank, turn) == (0, 0) else nullcontext():
                mailbox.add(torch.ones(3, dtype=torch.float64))
            outcomes.append("complete")
        except (KeyboardInterrupt, dist.DistError) as error:
            outcomes.append(str(error))
    return outcomes


def test_a_message_that_was_given_up_is_the_last():
    of_first, of_second = run_ranks(interrupted_between, 2)
    assert of_first[0] == ""
    assert all("shared memory was left" in text for text in of_first[1:])
    assert of_second[0] == "complete"
    assert "rank 0 died or left" in of_second[1]


def forked(rank):
    """What a fork of rank 0 is told, and messages after it has gone."""
    mailbox = mailbox_of(fresh_group())
    message = torch.ones(3, dtype=torch.float64)
    mailbox.add(message)
    answer = b""
    if rank == 0:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                mailbox.add(message)
                os.write(writing, b"it is a rank")
            except dist.DistError as error:
                os.write(writing, str(error).encode())
            finally:
                os._exit(0)
        answer = os.read(reading, 1000)
        os.waitpid(child, 0)
    for _ in range(20):
        mailbox.add(message)
    return answer.decode(), message[0].item()


def test_a_fork_of_a_rank_is_no_rank_and_takes_nothing_with_it():
    (answer, total), (_, same) = run_ranks(forked, 2)
    assert "it is a fork of one" in answer
    assert total == same == 2.0**21


def compiled_here(rank, layer, xs, dys):
    """Rank 0 compiles, rank 1 does not: as after a recompilation too many."""
    torch._dynamo.reset()
    if rank == 0:
        layer.compile(fullgraph=True, backend="aot_eager")
    return train_layer(rank, layer, xs, dys)


@pytest.mark.parametrize("reduction", ["auto", "gather"])
def test_a_rank_that_compiles_meets_one_that_does_not(reduction):
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, reduction=reduction)

    ranks = run_ranks(compiled_here, 2, layer, x.split([5, 3]), dy.split([5, 3]), timeout_s=300)

    for name, buffer in ranks[0]["buffers"].items():
        assert_close(ranks[1]["buffers"][name], buffer, **EXACT)
    got = {key: torch.cat([rank[key] for rank in ranks]) for key in ("y", "dx")}
    want = whole_batch(layer, x, dy)
    assert_close(got, {key: want[key] for key in got}, **EXACT)


# ---- hosts


@contextmanager
def host_of(name):
    with patch("socket.gethostname", return_value=name):
        yield


def on_hosts(rank, hosts, layer, xs, dys):
    """A step of a group over hosts, and the messages that this rank sent."""
    layer.group = fresh_group()
    with host_of(hosts[rank]):
        layer.eval()._process_group(torch.zeros(0))
    with recorded() as sent:
        return train_layer(rank, layer, xs, dys), [(name, n) for name, n, _ in sent]


@pytest.mark.parametrize(
    ("hosts", "here", "leads"),
    [("aabb", [1, 1, 1, 1], [0, 2]), ("abab", [1, 1, 1, 1], [0, 1]), ("aaab", [1, 1, 1, 0], [0, 3])],
)
def test_hosts_add_up_within_and_their_first_ranks_between(hosts, here, leads):
    x, dy = batch((3, 4, 2))
    layer, split = layer_of(3), [3, 1, 0, 4]

    ranks = run_ranks(on_hosts, 4, hosts, layer, x.split(split), dy.split(split))

    for rank, (_, sent) in enumerate(ranks):
        ways = ["all_reduce"] * here[rank] + [LEADERS] * (rank in leads)
        assert sent == [(way, n) for n in (7, 6) for way in ways]
    assert_close(joined([results for results, _ in ranks]), whole_batch(layer, x, dy), **EXACT)


def test_one_rank_a_host_needs_no_memory():
    x, dy = batch((3, 4, 2))
    layer = layer_of(3)

    ranks = run_ranks(on_hosts, 2, "ab", layer, x.split([5, 3]), dy.split([5, 3]))

    assert [sent for _, sent in ranks] == [[("all_reduce", 7), ("all_reduce", 6)]] * 2
    assert_close(joined([results for results, _ in ranks]), whole_batch(layer, x, dy), **EXACT)


def test_over_hosts_rows_are_gathered_by_the_backend():
    x, dy = batch((3, 4, 2))
    layer, split = layer_of(3, reduction="gather"), [3, 1, 0, 4]

    ranks = run_ranks(on_hosts, 4, "aabb", layer, x.split(split), dy.split(split))

    assert_close(joined([results for results, _ in ranks]), whole_batch(layer, x, dy), **EXACT)


def failing_leader(rank):
    group = fresh_group()
    with host_of("aabb"[rank]):
        collectives.resolve_once(group, 0)
    memory = memory_of_groups.memories[group]
    try:
        with patch.object(memory_of_groups, "all_reduce", side_effect=RuntimeError("[gloo] Connection closed by peer")):
            memory.add(torch.zeros(3, dtype=torch.float64))
    except RuntimeError as error:
        return str(error)


def test_a_leader_that_lost_the_others_tells_its_neighbours():
    errors = run_ranks(failing_leader, 4)
    assert errors[::2] == ["[gloo] Connection closed by peer"] * 2
    assert errors[1].startswith("rank 0 died or left")
    assert errors[3].startswith("rank 2 died or left")


IN_A_CONTAINER = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from syncbn import SyncBatchNorm, collectives
rank, world = int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
layer = SyncBatchNorm(1, dtype=torch.float64)
layer(torch.tensor([[0.0], [4.0 * rank]], dtype=torch.float64))
(memory,) = collectives.memory.memories.values()
shared = memory and (memory.hosts, memory.mailbox is not None, memory.leaders is not None)
sys.stdout.write(f"{layer.running_mean.item()} {shared}\\n")
sys.stdout.flush()
dist.barrier()
"""


def said_on(hosts, store, interface):
    """What two ranks on each host say; hosts: what makes a command run there."""
    both = 'for rank in $1 $2; do "$3" -c "$4" "$5" $rank 4 & done; wait'
    environment = {"PYTHONPATH": os.getcwd(), "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    shells = [
        subprocess.Popen(
            [*host, "sh", "-c", both, "sh", str(2 * n), str(2 * n + 1), sys.executable, IN_A_CONTAINER, str(store)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n, host in enumerate(hosts)
    ]
    return [sorted(shell.communicate(timeout=120)[0].splitlines()) for shell in shells]


ON_EACH_HOST = ["0.30000000000000004 (2, True, False)", "0.30000000000000004 (2, True, True)"]


@pytest.mark.ci
@pytest.mark.slow
def test_containers_of_one_name_on_one_machine_are_hosts_of_their_own(tmp_path):
    container = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*container, "true"], check=False).returncode:
        pytest.skip("this user may not make namespaces")
    assert said_on([container] * 2, tmp_path / "store", "lo") == [ON_EACH_HOST] * 2


@pytest.mark.ci
@pytest.mark.slow
@needs_namespaces
def test_hosts_with_a_cable_between_them_add_up_through_memory_and_over_it(tmp_path):
    with two_hosts() as hosts:
        assert said_on([hosts.on(0), hosts.on(1)], tmp_path / "store", "eth0") == [ON_EACH_HOST] * 2


# ---- deaths


@contextmanager
def processes(fn, world_size, path, timeout_s=60):
    """fn(rank, queue) in processes that may die or stop, so each has a queue of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "syncbn"])
    queues = [context.Queue() for _ in range(world_size)]
    ranks = [
        context.Process(target=_serve, args=(fn, rank, world_size, timeout_s, path, queue))
        for rank, queue in enumerate(queues)
    ]
    for rank in ranks:
        rank.start()
    try:
        yield ranks, queues
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()


def _serve(fn, rank, world_size, timeout_s, path, queue):
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world_size, timeout=timeout)
    fn(rank, queue)


def waits_for_ever(rank, queue):
    """All ranks put when they begin; the last never comes, and the others put what they were told of it, and when."""
    mailbox = mailbox_of(collectives.resolve_once("world", 0))
    mailbox.add(torch.zeros(3, dtype=torch.float64))
    dist.barrier()
    queue.put(time.monotonic())
    if rank == dist.get_world_size() - 1:
        time.sleep(600)
    errors = []
    for _ in range(2):
        try:
            mailbox.add(torch.zeros(3, dtype=torch.float64))
        except dist.DistError as error:
            errors.append((str(error), time.monotonic()))
    queue.put(errors)
    time.sleep(600)


def answers(queues):
    return [queue.get(timeout=60) for queue in queues]


def test_a_peer_that_is_killed_is_missed_at_once(tmp_path):
    with processes(waits_for_ever, 3, tmp_path / "store") as (ranks, queues):
        answers(queues)
        time.sleep(0.3)
        killed = time.monotonic()
        ranks[2].kill()
        for (first, when), (second, _) in answers(queues[:2]):
            # The first to be told leaves, and may be missed too
            assert re.fullmatch(r"ranks? [\d, ]*2 died or left in the middle of a message through shared memory", first)
            assert when - killed < 2, "some slices of 50 ms, on a loaded machine"
            assert second.startswith("shared memory was left")


def test_a_peer_that_is_stopped_is_waited_for_as_long_as_the_group_says(tmp_path):
    with processes(waits_for_ever, 2, tmp_path / "store", timeout_s=3) as (ranks, queues):
        begun = max(answers(queues))
        os.kill(ranks[1].pid, signal.SIGSTOP)
        (first, when), (second, again) = queues[0].get(timeout=60)
    assert first == "timed out after 3 s: rank 1 did not come to a message"
    assert 2.5 < when - begun < 8
    assert again - when < 1
    assert second.startswith("shared memory was left")


def dies_anywhere(rank, queue):
    """Rank 1 dies in the middle of the agreement, when memory has been made and not opened."""
    real, calls = collectives.gather_objects, []

    def gather(value, group):
        calls.append(value)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(value, group)

    try:
        with patch.object(collectives.log_time, "gather_objects", gather):
            mailbox_of(fresh_group())
    except RuntimeError as error:
        queue.put(str(error))


def orphaned(rank, queue):
    """Rank 1 has a child that outlives it, as a loader's worker may."""
    if rank == 0:
        waits_for_first(queue)
        return
    mailbox = mailbox_of(fresh_group())
    mailbox.add(torch.zeros(3, dtype=torch.float64))
    if (child := os.fork()) == 0:
        time.sleep(20)
        os._exit(0)
    queue.put(child)
    time.sleep(600)


def waits_for_first(queue):
    mailbox = mailbox_of(fresh_group())
    try:
        for _ in range(2):
            mailbox.add(torch.zeros(3, dtype=torch.float64))
    except dist.DistError as error:
        queue.put((str(error), time.monotonic()))


def test_a_peers_child_does_not_stand_in_for_it(tmp_path):
    with processes(orphaned, 2, tmp_path / "store") as (ranks, queues):
        child = queues[1].get(timeout=60)
        time.sleep(0.2)
        killed = time.monotonic()
        ranks[1].kill()
        error, when = queues[0].get(timeout=60)
        os.kill(child, signal.SIGKILL)
    assert "rank 1 died or left" in error
    assert when - killed < 2


@pytest.mark.parametrize("fn", [waits_for_ever, dies_anywhere])
def test_nothing_is_left_whoever_dies_when(tmp_path, fn):
    with processes(fn, 2, tmp_path / "store") as (_, queues):
        # multiprocessing's own are there with the queues
        before = set(os.listdir("/dev/shm"))
        queues[0].get(timeout=60)
        assert set(os.listdir("/dev/shm")) <= before


def open_memory(rank, turns):
    """How many mappings of ours a rank has, after groups have come and gone."""
    for _ in range(turns):
        group = fresh_group()
        mailbox_of(group).add(torch.zeros(3, dtype=torch.float64))
        dist.destroy_process_group(group)
        del group
    return Path("/proc/self/maps").read_text().count("/memfd:syncbn"), len(
        [fd for fd in os.listdir("/proc/self/fd") if "memfd:syncbn" in _link(fd)]
    )


def _link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_memory_goes_with_its_group():
    few = run_ranks(open_memory, 2, 1)
    assert run_ranks(open_memory, 2, 10) == few


def born_again(rank, queue, path):
    """Two default groups, one after the other."""
    totals = []
    for life in range(2):
        if life:
            dist.destroy_process_group()
            dist.init_process_group("gloo", f"file://{path}-{life}", rank=rank, world_size=2)
        group = collectives.resolve_once("world", 0)
        message = torch.ones(3, dtype=torch.float64)
        collectives.messages.sum_message(message, group, "auto")
        totals.append((message[0].item(), memory_of_groups.memories[group] is not None, len(memory_of_groups.memories)))
    queue.put(totals)


def test_a_new_default_group_has_memory_of_its_own(tmp_path):
    with processes(partial(born_again, path=tmp_path / "again"), 2, tmp_path / "store") as (_, queues):
        assert answers(queues) == [[(2.0, True, 1)] * 2] * 2
