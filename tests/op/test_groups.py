"""Which ranks form one batch: every way to say it, and what is said where it cannot be."""

import copy
import io
import multiprocessing
import pickle
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from syncbn import SyncBatchNorm, check_group, collectives, group_size, sync_batch_norm
from syncbn.groups import Place, divide, plain
from tests.op.steps import EXACT, batch, joined, layer_of, train_layer, whole_batch
from tests.ranks import run_ranks

SPLIT = [3, 1, 0, 4]
PAIRS = [(0, 1), (2, 3)]
WORLD = [(0, 1, 2, 3)]


def in_group(rank, group, layer, xs, dys):
    """A step of the layer in the group that is named, or is made on the spot."""
    from unittest.mock import patch

    if group == "process-group":
        group = [dist.new_group(pair) for pair in PAIRS][rank // 2]
    elif group == "mesh":
        group = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "data"))["data"]
    elif group == "lists":
        group = PAIRS[rank // 2]
    layer.group = group
    with patch("socket.gethostname", return_value=f"host{rank // 2}"):
        return train_layer(rank, layer, xs, dys)


@pytest.mark.parametrize(
    ("group", "members"),
    [
        ("world", WORLD),
        ("node", PAIRS),
        (1, [(0,), (1,), (2,), (3,)]),
        (2, PAIRS),
        (4, WORLD),
        ("lists", PAIRS),
        ([3, 1, 0, 2], WORLD),
        ("process-group", PAIRS),
        ("mesh", PAIRS),
        ({"samples": 4}, PAIRS),
        ({"samples": 7}, WORLD),
    ],
    ids=str,
)
def test_a_group_forms_a_batch_of_its_own(group, members):
    x, dy = batch((3, 4, 2), n=12)
    layer = layer_of(3)
    split = [4, 2, 1, 5] if group != {"samples": 4} else [3, 1, 0, 8]

    ranks = run_ranks(in_group, 4, group, layer, x.split(split), dy.split(split))

    xs, dys = x.split(split), dy.split(split)
    for group_ranks in members:
        want = whole_batch(layer, torch.cat([xs[r] for r in group_ranks]), torch.cat([dys[r] for r in group_ranks]))
        assert_close(joined([ranks[r] for r in group_ranks]), want, **EXACT)


def two_groups(rank, x):
    pair, world = layer_of(3, group=2), layer_of(3)
    pair.load_state_dict(world.state_dict())
    nn.Sequential(pair, world)(x[rank]).sum().backward()
    return pair.running_mean.clone(), world.running_mean.clone()


def test_layers_of_one_model_may_differ_in_group():
    x = batch((3, 4), n=16)[0].chunk(4)

    ranks = run_ranks(two_groups, 4, x)

    for rank, (pair, world) in enumerate(ranks):
        mine = torch.cat(x[:2] if rank < 2 else x[2:])
        assert_close(pair, 0.1 * mine.mean((0, 2)), **EXACT)
        assert_close(world, ranks[0][1], rtol=0, atol=0)


def functional(rank, x):
    y, moments = sync_batch_norm(x[rank], group=2)
    return y, moments.count


def test_the_function_takes_the_same_groups():
    x = batch((3, 4), n=16)[0].chunk(4)

    ranks = run_ranks(functional, 4, x)

    for first, pair in (0, x[:2]), (2, x[2:]):
        want, _ = sync_batch_norm(torch.cat(pair))
        assert_close(torch.cat([ranks[first][0], ranks[first + 1][0]]), want, **EXACT)
        assert ranks[first][1] == 32


def error_of(rank, groups, x):
    try:
        SyncBatchNorm(3, group=groups[rank])(x)
    except (ValueError, TypeError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ([3] * 4, "group is 3: it must divide the number of ranks, 4"),
        ([[0, 1]] * 4, "group is [0, 1] on rank 2, which it leaves out"),
        ([[0, 1, 7]] * 4, "group is [0, 1, 7] on rank 0: the ranks are 0 to 3"),
        ([[0, 1], [0, 1], [1, 2], [3]], "rank 2 forms a batch with ranks [1, 2], but rank 1 with [0, 1]"),
        (["world", "world", 2, 2], "rank 0 forms a batch with ranks [0, 1, 2, 3], but rank 2 with [2, 3]"),
    ],
    ids=["does-not-divide", "left-out", "no-such-rank", "overlap", "ranks-disagree"],
)
def test_groups_that_do_not_fit_are_one_error_on_every_rank(groups, error):
    errors = run_ranks(error_of, 4, groups, torch.randn(2, 3))

    assert len(set(errors)) == 1
    assert error in errors[0]


@pytest.mark.parametrize(
    "group", ["galaxy", "", 0, -1, True, 2.0, None, [], [0, 0], ["a"], {}, {"samples": 0}, {"images": 4}], ids=str
)
def test_what_is_no_group_is_refused_at_once(group):
    for refuse in check_group, lambda group: SyncBatchNorm(3, group=group):
        with pytest.raises(ValueError, match=r"group is .*: give 'world', 'node', a number of ranks"):
            refuse(group)


def outside(rank):
    try:
        SyncBatchNorm(3, group=dist.new_group([0, 1]))
    except ValueError as error:
        return str(error)


def test_a_rank_outside_the_process_group_is_told_so():
    *members, other = run_ranks(outside, 3)
    assert members == [None, None]
    assert other.startswith("this rank is not in the process group that it was given")


def test_a_reduction_that_is_none_is_refused():
    with pytest.raises(ValueError, match="reduction is 'sum': it must be 'auto', 'all_reduce', 'gather' or 'one_shot'"):
        SyncBatchNorm(3, reduction="sum")


def whole_mesh(rank):
    try:
        SyncBatchNorm(3, group=dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "data")))
    except ValueError as error:
        return str(error)


def test_a_mesh_of_two_dimensions_is_no_group():
    assert all("DeviceMesh of 2 dimensions: give one of them" in error for error in run_ranks(whole_mesh, 4))


def test_division_of_a_world():
    hosts = [Place("node", host, 0) for host in "abab"]
    assert divide(hosts) == [(0, 2), (1, 3), (0, 2), (1, 3)]
    samples = [Place(plain({"samples": 64}), "a", 16)] * 8
    assert divide(samples) == [(0, 1, 2, 3)] * 4 + [(4, 5, 6, 7)] * 4
    assert divide(samples[:6]) == [tuple(range(6))] * 6  # 4 divides not 6, and 3 are too few
    assert divide([Place(plain({"samples": 64}), "a", 1)] * 2) == [(0, 1)] * 2  # too few in all: all
    uneven = [Place(plain({"samples": 4}), "a", n) for n in (1, 1, 1, 1, 40, 40)]
    assert divide(uneven) == [tuple(range(6))] * 6  # 4 and 2 ranks would do, but 4 divides not 6


SIZES = {
    "world": ("world", {}, 6),
    "node": ("node", {"node_ranks": 2}, 2),
    "k": (3, {}, 3),
    "list": ([3, 5], {}, 2),
    "samples": ({"samples": 5}, {"samples": 2}, 3),
    "too-few-samples": ({"samples": 50}, {"samples": 2}, 6),
}


@pytest.mark.parametrize(("group", "job", "size"), SIZES.values(), ids=SIZES)
def test_a_groups_size_is_known_before_the_job_runs(group, job, size):
    assert group_size(group, 6, **job) == size


@pytest.mark.parametrize(
    ("group", "why"), [(4, "must divide the number of ranks, 6"), ([6], "ranks are 0 to 5"), ("nod", "give 'world'")]
)
def test_a_group_that_does_not_fit_has_no_size(group, why):
    with pytest.raises(ValueError, match=why):
        group_size(group, 6)


@pytest.mark.parametrize("group", ["world", "node", 3, [0, 2], {"samples": 8}], ids=str)
def test_a_group_passes_its_check(group):
    assert check_group(group) is group


def copies(rank, spec, xs, dys):
    """A step of the layer, of its deep copy and of what a pickle makes of it."""
    group = [dist.new_group(pair) for pair in PAIRS][rank // 2] if spec == "process-group" else spec
    layer = layer_of(3, group=group)
    layer.load_state_dict(dict.fromkeys(layer.state_dict(), torch.ones(())) | {"weight": torch.full((3,), 2.0)} | {
        name: torch.ones(3) for name in ("bias", "running_mean", "running_var")
    })  # fmt: skip
    train_layer(rank, layer, xs, dys)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    made = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    answers = []
    for other in [layer, *made]:
        other.zero_grad()
        answers.append(train_layer(rank, other, xs, dys))
    return answers, repr(made[0]), repr(made[1])


@pytest.mark.parametrize("spec", ["world", 2, "process-group"], ids=str)
def test_copies_and_pickles_synchronise_as_their_original(spec):
    x, dy = batch((3, 4, 2))

    for answers, copied, pickled in run_ranks(copies, 4, spec, x.split(SPLIT), dy.split(SPLIT)):
        for other in answers[1:]:
            assert_close(other, answers[0], rtol=0, atol=0)
        if spec == "process-group":
            assert "group=ProcessGroup of ranks [" in copied
            assert pickled.endswith(("group=(0, 1))", "group=(2, 3))"))


def saved(rank, spec, xs):
    net = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3, group=spec, dtype=torch.float32))
    net(xs[rank].float())
    return pickle.dumps(net), net.state_dict()


def loaded(rank, whole, state, xs):
    net = pickle.loads(whole)
    net[1].group = "world"
    net(xs[rank].float()).sum().backward()
    fresh = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3))
    fresh.load_state_dict(state)
    fresh(xs[rank].float()).sum().backward()
    assert_close(dict(net.state_dict()), dict(fresh.state_dict()), rtol=0, atol=0)
    return fresh[1].running_mean


@pytest.mark.parametrize("spec", ["world", 2, (0, 1, 2, 3)], ids=str)
def test_a_layer_of_four_ranks_goes_on_with_two_or_one(spec):
    x = batch((3,))[0]
    whole, state = run_ranks(saved, 4, spec, x.split(2))[0]

    first, second = run_ranks(loaded, 2, whole, state, x.split(4))
    assert_close(first, second, rtol=0, atol=0)
    assert_close(loaded(0, whole, state, [x]), first)


def destroyed(path):
    """In a process of its own: train over a process group, destroy it, train again."""
    dist.init_process_group("gloo", f"file://{path}", rank=0, world_size=1)
    fresh, given = SyncBatchNorm(3), SyncBatchNorm(3, group=dist.new_group([0]))
    x = torch.randn(4, 3)
    for layer in fresh, given:
        layer(x)
    dist.destroy_process_group()
    errors = []
    for layer in fresh, given:
        try:
            layer(x)
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_a_process_group_that_is_gone(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        errors = pool.apply(destroyed, [tmp_path / "store"])

    assert len(errors) == 1  # alone in its world, "world" needs nobody
    assert "the process group of this layer was destroyed" in errors[0]


def outlived(rank, path, queue):
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    layer(x)
    first = layer.process_group()
    dist.destroy_process_group()
    try:
        layer(x)
    except RuntimeError as error:
        queue.put(str(error))
    layer.eval()(x)  # sends nothing, needs nobody
    dist.init_process_group("gloo", f"file://{path}-again", rank=rank, world_size=2)
    layer.train()(x)
    assert layer.process_group() is not first
    queue.put(layer.num_batches_tracked.item())
    dist.destroy_process_group()


def test_a_layer_that_lost_its_peers_says_so_and_finds_new_ones(tmp_path):
    import torch.multiprocessing as mp

    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(outlived, (tmp_path / "store", queue), nprocs=2)

    answers = [queue.get() for _ in range(4)]
    assert sum(answer == 2 for answer in answers) == 2
    assert sum("was destroyed: initialise one" in str(answer) for answer in answers) == 2


def agreements(rank, x):
    """How often ranks agree on a group: once for a model that was converted, and never again."""
    from unittest.mock import patch

    from syncbn import convert

    with patch.object(collectives.log_time, "gather_objects", wraps=collectives.gather_objects) as agree:
        net = convert(nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(4)]), group=2)
        for model in net, copy.deepcopy(net):
            model(x[rank])
    return sum(isinstance(call.args[0], Place) for call in agree.call_args_list)


def test_a_model_agrees_on_its_group_once():
    assert run_ranks(agreements, 2, torch.randn(2, 8, 3)) == [1, 1]


def alone_in(rank, path, together, queue):
    """Rank 0 puts what it raises, and after how many seconds, when rank 1 comes to one forward less."""
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2, timeout=timeout)
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    if together:
        layer(x)
    dist.barrier()
    if rank == 1:
        time.sleep(60)
    begun = time.monotonic()
    try:
        layer(x)
    except RuntimeError as error:
        queue.put((str(error), time.monotonic() - begun))


TIMEOUT_S = 5


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False], ids=["late", "never-came"])
def test_a_layer_waits_for_its_peers_as_long_as_the_default_group(tmp_path, together):
    """torch's new_group would wait for 30 minutes, whatever init_process_group was told."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    args = tmp_path / "store", together, queue
    ranks = [context.Process(target=alone_in, args=(rank, *args), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        error, waited_s = queue.get(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
    assert re.search("timed out|timeout", error, re.IGNORECASE)
    assert TIMEOUT_S - 1 < waited_s < TIMEOUT_S + 10


@pytest.mark.skipif(not dist.is_nccl_available(), reason="a torch that has no NCCL")
def test_a_group_of_nccl_is_asked_for_with_the_same_timeout():
    """There is no GPU to time it on: what new_group is given, which makes its own options of it."""
    from unittest.mock import patch

    timeout = timedelta(seconds=TIMEOUT_S)
    with (
        patch.object(dist, "get_backend", return_value="nccl"),
        patch.object(collectives.process_groups, "timeout_of", return_value=timeout),
        patch.object(dist, "new_group") as new_group,
    ):
        collectives.process_groups.new_group((0, 1))
    given = new_group.call_args.kwargs
    assert given["timeout"] == timeout
    assert given.get("pg_options") is None
