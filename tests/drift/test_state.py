"""A monitor that is resumed from its state reads, bit for bit, what one reads that was never interrupted."""

import io
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import syncbn
from syncbn import collectives
from syncbn.drift import DriftMonitor, observer
from tests.drift.shards import CHANNELS, images, net
from tests.ranks import run_ranks

READ_AT = {5, 9, 14, 40, 44, 48, 53}
LAST = 57
# 19 forwards after a reading some are added up already, and some are not
INTERRUPTIONS = {"before-the-first": 2, "after-a-reading": 14, "in-a-window": 12, "after-many-forwards": 33}


class Case(NamedTuple):
    sync: bool = True
    level: str = "image"
    options: dict | None = None
    horizon: int = 3
    eps: float = 1e-5
    compiled: bool = False


def opened(case, horizon=None):
    model = net(case.sync, **(case.options or {}))
    model.bn1.eps = model.bn2.eps = case.eps
    # As of a model that is not small, so that forwards are added up before they are read
    with patch.object(observer, "_MANY_SLOTS", 16):
        monitor = DriftMonitor(model, level=case.level, horizon=horizon or case.horizon)
    if case.compiled:
        torch._dynamo.reset()
        model.bn1.compile(fullgraph=True, backend="aot_eager")
    return model, monitor


def train(model, monitor, rank, steps):
    """The readings of these steps, on shards that differ; some steps run a layer twice, and batches are uneven."""
    readings = []
    for step in steps:
        y = model(images(rank, step, 2 + (rank + step) % 2, shift=1.0 * rank))
        if step % 3 == 0:
            model.bn2(y)
        if step in READ_AT:
            readings.append(monitor.read())
    return readings


def saved(model, monitor):
    """What is left of a training in a file, as torch.load takes it that trusts none: "shared" is rank 0's."""
    state = monitor.state_dict()
    state["shared"] = collectives.gather_objects(state["shared"], collectives.everyone())[0]
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "drift": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(case, state, horizon=None):
    model, monitor = opened(case, horizon)
    model.load_state_dict(state["model"])
    monitor.load_state_dict(state["drift"])
    return model, monitor


def interrupted(rank, case, at):
    """Readings after a step: of a training resumed there, of one that only wrote its state, and of one left alone."""
    alone = opened(case)
    train(*alone, rank, range(at + 1))
    want = train(*alone, rank, range(at + 1, LAST))
    writing = opened(case)
    train(*writing, rank, range(at + 1))
    state = saved(*writing)
    others = [train(*one, rank, range(at + 1, LAST)) for one in (writing, resumed(case, state))]
    return [[bits(one) for one in readings] for readings in (*others, want)]


def bits(reading):
    """A reading, equal to another only if every bit is."""
    figures = {layer: {name: value.hex() for name, value in f.items()} for layer, f in reading.layers.items()}
    return figures, {layer: [z.hex() for z in zs] for layer, zs in reading.rank_z.items()}, reading.verdicts


@pytest.mark.plain(
    "sync-image-in-a-window", "sync-rank-after-a-reading", "local-image-before-the-first", "local-rank-in-a-window"
)
@pytest.mark.parametrize("at", INTERRUPTIONS.values(), ids=INTERRUPTIONS)
@pytest.mark.parametrize("level", ["rank", "image"])
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "local"])
def test_resumed_it_reads_what_it_would_have_read(sync, level, at):
    for wrote, got, want in run_ranks(interrupted, 2, Case(sync, level), at):
        assert len(want) >= 4
        assert any(verdicts for *_, verdicts in want)
        assert got == want
        assert wrote == want, "to write a state disturbs nothing"


@pytest.mark.plain("eps-0-12", "one-rank-33", "gather-12")
@pytest.mark.parametrize("at", [12, 33])
@pytest.mark.parametrize(
    ("ranks", "case"),
    [(3, Case(options={"reduction": "gather"})), (4, Case(options={"group": 2})), (2, Case(eps=0.0)), (1, Case())],
    ids=["gather", "groups", "eps-0", "one-rank"],
)
def test_so_it_does_in_other_circumstances(ranks, case, at):
    for wrote, got, want in run_ranks(interrupted, ranks, case, at):
        assert got == wrote == want
        assert all("kl" in figures["bn2"] for figures, *_ in want)


@pytest.mark.slow
def test_so_it_does_with_a_layer_compiled():
    for wrote, got, want in run_ranks(interrupted, 2, Case(compiled=True), 12, timeout_s=300):
        assert got == wrote == want


@settings(max_examples=25, deadline=None)
@given(
    st.booleans(),
    st.lists(st.sampled_from(["forward", "forward", "forward", "twice", "eval", "read", "resume"]), max_size=40),
)
def test_however_often_it_is_resumed_no_bit_tells(sync, happens):
    case = Case(sync)
    (model, monitor), (other, others) = opened(case), opened(case)
    for step, what in enumerate([*happens, "read"]):
        x = images(0, step, 1 + step % 3)
        if what == "resume":
            other, others = resumed(case, saved(other, others))
        elif what == "read":
            assert bits(others.read()) == bits(monitor.read())
        else:
            for one in model, other:
                one.train(what != "eval")
                y = one(x)
                if what == "twice":
                    one.bn2(y)
                one.train()


def small(rank, resume_at):
    """Whether the batch is called too small: at 10 values it is; at 14 only where it was before."""
    model = nn.Sequential(syncbn.SyncBatchNorm(256))
    monitor, said = DriftMonitor(model, level="rank", horizon=3), []
    for reading in range(7):
        generator = torch.Generator().manual_seed(100 * reading + rank)
        for _ in range(10):
            model(torch.randn(5 if reading < 3 else 7, 256, generator=generator))
        said.append([verdict.kind for verdict in monitor.read().verdicts] == ["batch too small"])
        if reading == resume_at:
            state = saved(model, monitor)["drift"]
            monitor.close()
            monitor = DriftMonitor(model, level="rank", horizon=3)
            monitor.load_state_dict(state)
    return said


@pytest.mark.parametrize("resume_at", [None, 4, 5])
def test_what_was_said_is_taken_back_no_sooner(resume_at):
    assert run_ranks(small, 2, resume_at) == [[False, False, True, True, True, True, True]] * 2


def late(model, monitor, rank, steps):
    """Whether running statistics are said to lag, which they do: momentum is next to none."""
    said = []
    for step in steps:
        model.bn1.momentum = model.bn2.momentum = 0.0005
        model(images(rank, step, 2, shift=4.0))
        if step % 10 == 9:
            said.append("running statistics lag" in [verdict.kind for verdict in monitor.read().verdicts])
    return said


def late_state(rank):
    model, monitor = opened(Case())
    return late(model, monitor, rank, range(115)), saved(model, monitor)


def in_another_world(rank, state):
    """What is said by a monitor of other ranks, though it was used before, and by one without a state."""
    said = []
    for drift in {"shared": state["drift"]["shared"], "own": None}, None:
        model, monitor = opened(Case())
        model.load_state_dict(state["model"])
        if drift is not None:
            late(model, monitor, rank, range(33))
            model.load_state_dict(state["model"])
            monitor.load_state_dict(drift)
        said.append(late(model, monitor, rank, range(120, 160)))
    return said


def test_of_another_number_of_ranks_only_how_long_it_trained_is_known():
    (said, state), _ = run_ranks(late_state, 2)
    assert not any(said[:-1])

    for resumed_there, afresh in run_ranks(in_another_world, 3, state):
        assert resumed_there == [False, False, True, True], "from the third reading on"
        assert afresh == resumed_there, "the layers have counted the batches that they saw before"


def tuned(resume_at):
    """What is said of layers that come with the counts and statistics of another training, reading by reading."""

    def begun(batches):
        model = net()
        for layer in model.bn1, model.bn2:
            layer.momentum = 0.01
            layer.num_batches_tracked.fill_(batches)
        return model, DriftMonitor(model)

    (model, monitor), said = begun(100_000), []
    for step in range(140):
        model(images(0, step, 4, shift=4.0))
        if step % 10 == 9:
            said += [verdict.text.partition(": ")[2] for verdict in monitor.read().verdicts if "lag" in verdict.kind]
        if step == resume_at:
            state = saved(model, monitor)
            model, monitor = begun(0)
            model.load_state_dict(state["model"])
            monitor.load_state_dict(state["drift"])
    return said


@pytest.mark.parametrize("resume_at", [None, 45, 109])
def test_batches_count_from_when_they_were_watched(resume_at):
    because = "momentum 0.01 has seen {} batches; raise it, or recalibrate"
    assert tuned(resume_at) == [because.format(n) for n in (110, 120, 130, 140)]


def with_horizons(rank, before, after):
    """Readings with a horizon, after those with another, and what they would be if it had been the same."""
    wide, narrow = (opened(Case(horizon=horizon)) for horizon in (before, after))
    for one in wide, narrow:
        train(*one, rank, range(45))
    later = resumed(Case(), saved(*wide), after)
    return [[bits(one) for one in train(*two, rank, range(45, LAST))] for two in (later, narrow)]


def test_of_more_readings_than_the_horizon_the_newest_count():
    for got, want in run_ranks(with_horizons, 2, 5, 3):
        assert got == want


def sizes_of(rank, sync, at):
    """Bytes in "shared" and "own"."""
    model, monitor = opened(Case(sync))
    train(model, monitor, rank, range(at + 1))
    state = saved(model, monitor)["drift"]
    return [sum(t.untyped_storage().nbytes() for t in tensors_in(state[part])) for part in ("shared", "own")]


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


C, L = 2 * CHANNELS, 2
# bn2 ran oftener than bn1: 4 forwards and 3 wait at 12; 10 and 6 at 33
WAITING = 48 * CHANNELS + 24


@pytest.mark.parametrize(
    ("sync", "at", "own"),
    [
        (True, 14, 0),
        (True, 12, 7 * WAITING),
        (True, 33, 88 * C + 64 * L + 16 * WAITING),
        (False, 14, 0),
        (False, 33, 4 * (40 * C + 16 * L)),
    ],
)
def test_a_state_is_as_small_as_it_says(sync, at, own):
    windows = len([step for step in READ_AT if step <= at])
    want = [windows * (88 * C + 88 * L) + 8 * L, windows * (8 * C + 24 * L) + own]

    assert run_ranks(sizes_of, 2, sync, at) == [want, want]


def other_channels():
    model = net()
    model.bn2 = syncbn.SyncBatchNorm(CHANNELS + 1)
    return model


@pytest.mark.parametrize(
    ("model", "level", "says"),
    [
        (other_channels, "image", "the state is of bn2 of 6 channels where the model holds bn2 of 7 channels"),
        (lambda: nn.Sequential(net().bn1), "image", "the state is of bn1 of 6 channels where the model holds 0 of 6"),
        (lambda: nn.ModuleDict({"bn1": net().bn1}), "image", "bn2 of 6 channels where the model holds no more layers"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "image", "of bn1 of 6 channels where the model holds no more layers"),
        (net, "rank", "level is 'rank', and 'image' in the state: it must be the same"),
    ],
    ids=["channels", "names", "fewer", "none", "level"],
)
def test_a_state_of_another_model_is_refused(model, level, says):
    state = DriftMonitor(net()).state_dict()

    with pytest.raises(ValueError, match=says):
        DriftMonitor(model(), level=level).load_state_dict(state)


def test_the_own_part_of_another_number_of_ranks_is_refused():
    (_, state), _ = run_ranks(late_state, 2)

    with pytest.raises(ValueError, match="own is of one of 2 ranks where there are 1: give None for it"):
        DriftMonitor(net()).load_state_dict(state["drift"])


def test_a_model_without_batch_norm_has_a_state_too():
    model = nn.Sequential(nn.Linear(2, 2))
    DriftMonitor(model).load_state_dict(DriftMonitor(model).state_dict())


def written_again(rank, case, at):
    """A state, and that of the monitor that was given it, though it was used before."""
    model, monitor = opened(case)
    train(model, monitor, rank, range(at + 1))
    state = saved(model, monitor)
    used, other = opened(case)
    train(used, other, rank, range(at + 2))
    other.load_state_dict(state["drift"])
    return state["drift"], saved(used, other)["drift"]


@pytest.mark.parametrize("at", [12, 14, 33])
@pytest.mark.parametrize(
    ("case", "form"),
    [(Case(), "message"), (Case(options={"reduction": "gather"}), "row"), (Case(sync=False), None)],
    ids=["sync", "gather", "local"],
)
def test_a_monitor_says_again_what_it_was_told(case, form, at):
    for loaded, said in run_ranks(written_again, 2, case, at):
        assert str(said) == str(loaded)
        assert_close(tensors_in(said), tensors_in(loaded), rtol=0, atol=0, equal_nan=True)
        assert form is None or [layer["form"] for layer in loaded["own"]["layers"]] == [form] * 2
