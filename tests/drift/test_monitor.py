"""The monitor on real ranks: silent on good shards, and on bad ones it says what is wrong, where, and on which rank."""

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.drift.monitor import DriftMonitor
from tests.drift.shards import CHANNELS, Net, images, net
from tests.messages import recorded
from tests.ranks import run_ranks


def read_all(rank, case, readings=4, every=10):
    """Each reading of a monitor on a case: sync, batch, level, shift (of a rank), group, plant."""
    model = net(case.get("sync", True), **case.get("convert", {}))
    readings_made = []
    with DriftMonitor(model, level=case.get("level", "image")) as monitor:
        for step in range(readings * every):
            shift = case.get("shift", {}).get(rank, 0.0)
            if step in case.get("only", range(1000)):
                x = images(rank, step, case.get("batch", 2), shift=shift)
            else:
                x = images(rank, step, case.get("batch", 2))
            model(x)
            if step == case.get("plant") and rank == 1:
                model.bn2.running_var[2] *= 1.5
            if step % every == every - 1:
                readings_made.append(monitor.read())
    return readings_made


@pytest.mark.plain("sync-1-image", "local-3-rank")
@pytest.mark.parametrize("level", ["rank", "image"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "local"])
def test_nothing_is_said_of_good_shards(sync, batch, level):
    ranks = run_ranks(read_all, 4, {"sync": sync, "batch": batch, "level": level}, 12)
    for reading in ranks[0]:
        assert not [v for v in reading.verdicts if v.kind != "batch too small"]
    for other in ranks[1:]:
        assert other == ranks[0], "the same on every rank"


@pytest.mark.plain("sync-1-rank", "sync-2-image", "local-1-image", "local-2-rank")
@pytest.mark.parametrize("level", ["rank", "image"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "local"])
def test_a_rank_whose_images_are_brighter_is_named(sync, batch, level):
    case = {"sync": sync, "batch": batch, "level": level, "shift": {2: 2.0}}

    # Of layers that do not synchronise fewer forwards are seen
    first = 2 if sync else 5
    readings = run_ranks(read_all, 4, case, first + 3)[3]

    assert not any(v.kind == "shards differ" for reading in readings[:2] for v in reading.verdicts), "two are too few"
    for reading in readings[first:]:
        (verdict,) = (v for v in reading.verdicts if v.kind == "shards differ")
        assert verdict.rank == 2
        assert verdict.text.endswith("rank 2)")
        assert ("ICC" in verdict.text) == (batch > 1 and level == "image")
        z = reading.rank_z[verdict.layer]
        assert max(range(4), key=z.__getitem__) == 2
        assert z[2] > 3


def test_ranks_that_all_differ_have_a_high_icc():
    shifts = {rank: rank - 1.5 for rank in range(4)}
    reading = run_ranks(read_all, 4, {"shift": shifts, "batch": 3})[0][-1]
    assert reading.layers["bn1"]["icc"] > 0.3
    assert reading.layers["bn1"]["f"] > 2
    assert reading.verdicts[0].kind == "shards differ"


def test_two_ranks_that_differ_are_not_told_apart():
    reading = run_ranks(read_all, 2, {"shift": {1: 3.0}})[0][-1]
    assert reading.verdicts[0].kind == "shards differ"
    assert reading.verdicts[0].rank is None


@pytest.mark.parametrize("step", [4, 15])
def test_one_bad_step_is_no_verdict(step):
    case = {"shift": {2: 500.0}, "only": [step], "batch": 2}
    for reading in run_ranks(read_all, 4, case, 5)[0]:
        assert not [v for v in reading.verdicts if v.kind == "shards differ"]


def test_a_buffer_that_diverged_is_named_at_the_next_reading():
    readings = run_ranks(read_all, 3, {"plant": 17})[0]
    assert readings[0].verdicts == []
    verdict = readings[1].verdicts[0]
    assert verdict.text == "buffers diverged (bn2.running_var of rank 1)"
    assert (verdict.kind, verdict.layer, verdict.rank) == ("buffers diverged", "bn2", 1)


def test_of_two_ranks_neither_is_blamed_for_a_buffer():
    reading = run_ranks(read_all, 2, {"plant": 17})[0][1]
    assert reading.verdicts[0].text == "buffers diverged (bn2.running_var of ranks 0, 1)"


def test_groups_have_buffers_and_offsets_of_their_own():
    """Ranks 0 and 1, 2 and 3: what differs between groups is meant to."""
    case = {"convert": {"group": 2}, "shift": {2: 3.0, 3: 3.0}, "batch": 6}
    reading = run_ranks(read_all, 4, case)[0][-1]
    assert reading.verdicts == []
    case = {"convert": {"group": 2}, "plant": 37, "batch": 4}
    reading = run_ranks(read_all, 4, case)[0][-1]
    assert reading.verdicts[0].text == "buffers diverged (bn2.running_var of ranks 0, 1)"


def test_n_eff_of_a_small_local_batch_is_too_small_and_synchronising_would_help():
    small = run_ranks(read_all, 4, {"sync": False, "batch": 2})[0][-1]
    (verdict,) = small.verdicts
    assert verdict.kind == "batch too small"
    assert verdict.text.endswith("use norm=sync or a larger group")
    for layer in small.layers.values():
        assert layer["n_eff_synced"] == pytest.approx(4 * layer["n_eff"])
    synced = run_ranks(read_all, 4, {"batch": 2})[0][-1]
    assert synced.layers["bn1"]["n_eff"] == pytest.approx(small.layers["bn1"]["n_eff_synced"], rel=0.2)


def lagging(rank, momentum, sync=True):
    model = net(sync)
    for layer in (model.bn1, model.bn2):
        layer.momentum = momentum
    monitor = DriftMonitor(model)
    for step in range(140):
        model(images(rank, step, 4, shift=4.0))
        if step % 10 == 9:
            reading = monitor.read()
    return reading


def test_running_statistics_that_are_late_are_named():
    """At momentum 0.0005 they are hardly on their way after 140 steps."""
    reading = run_ranks(lagging, 2, 0.0005)[0]
    assert reading.verdicts[0].kind == "running statistics lag"
    assert reading.layers["bn1"]["dmean_z"] > 2
    assert reading.verdicts[0].text.endswith(": momentum 0.0005 has seen 140 batches; raise it, or recalibrate")
    reading = run_ranks(lagging, 2, 0.1)[0]
    assert [v for v in reading.verdicts if v.kind == "running statistics lag"] == []
    assert reading.layers["bn1"]["dmean_z"] == pytest.approx(1, abs=0.3)


def test_so_are_those_of_layers_that_are_watched_in_some_forwards_alone():
    reading = run_ranks(lagging, 2, 0.0005, False)[0]
    (text,) = [verdict.text for verdict in reading.verdicts if "lag" in verdict.kind]
    assert text.endswith(": momentum 0.0005 has seen 140 batches; raise it, or recalibrate")


def messages_of(rank, level):
    """The number and length of collectives in three steps and a reading, and what the steps computed."""
    model = net()
    monitor = DriftMonitor(model, level=level) if level else None
    model(images(rank, 99, 2))  # forms the group
    if monitor:
        monitor.read()
    outputs = []
    with recorded() as steps:
        for step in range(3):
            x = images(rank, step, 2).requires_grad_()
            y = model(x)
            y.square().sum().backward()
            outputs += [y.detach(), x.grad]
    with recorded() as reading:
        if monitor:
            monitor.read()
    return *([(name, length) for name, length, _ in sent] for sent in (steps, reading)), outputs


def test_a_step_sends_what_it_sends_without_a_monitor():
    (steps, reading, outputs), _ = run_ranks(messages_of, 2, None)
    assert reading == []
    assert {n for _, n in steps} == {2 * CHANNELS + 1, 2 * CHANNELS}
    for level in "rank", "image":
        (observed, reading, same), _ = run_ranks(messages_of, 2, level)
        assert observed == steps
        assert reading == [("all_reduce", 2 * (11 * CHANNELS + 9)), ("all_gather", 2 * 6)]
        assert_close(same, outputs, rtol=0, atol=0)


def compiled(rank, sync, compile_it):
    model = net(sync)
    if compile_it:
        torch._dynamo.reset()
        model.compile(fullgraph=True)
    model = DistributedDataParallel(model)
    with DriftMonitor(model.module) as monitor:
        for step in range(6 if sync else 1):
            model(images(rank, step, 3)).sum().backward()
        return monitor.read().layers


@pytest.mark.slow
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "local"])
def test_compiled_layers_are_observed_in_one_graph(sync):
    want = run_ranks(compiled, 2, sync, False)[0]
    got = run_ranks(compiled, 2, sync, True, timeout_s=300)[0]
    assert got.keys() == want.keys()
    for layer in want:
        assert got[layer] == pytest.approx(want[layer], rel=1e-3, abs=1e-4)


def accumulated(rank, how):
    """Sums after the same forwards in other circumstances."""
    model = net()
    monitor = DriftMonitor(model)
    for step in range(20):
        x = images(rank, step, 2)
        if how == "checkpointed":
            checkpoint(model, x.requires_grad_(), use_reentrant=step % 2 == 0).sum().backward()
        else:
            model(x)
            if how == "with-eval-between":
                model.eval()(x + 100)
                model.train()
        if how == "read-often" and step % 3 == 2:
            monitor.read()
    return monitor.read().layers


@pytest.mark.parametrize("how", ["checkpointed", "with-eval-between", "read-often"])
def test_each_training_forward_counts_once(how):
    want = run_ranks(accumulated, 2, "plain")[0]
    got = run_ranks(accumulated, 2, how)[0]
    for layer in want:
        assert got[layer] == pytest.approx(want[layer], rel=1e-6, abs=1e-9)


def uneven(rank):
    """Ranks of 3, 0 and 1 images of unlike size, masks, a layer that not every step reaches."""
    model = net()
    monitor = DriftMonitor(model)
    for step in range(12):
        x = images(rank, step, (3, 0, 1)[rank])[..., : 6 - (rank == 2)]
        if step % 2:
            model.bn1(model.conv1(x), mask=torch.arange(len(x)) != 1)
        else:
            model(x)
    return monitor.read().layers


def test_uneven_and_empty_ranks_are_weighed():
    layers = run_ranks(uneven, 3)[0]
    assert layers["bn1"].keys() >= {"f", "icc", "n_eff", "kl", "dmean_z"}
    assert all(math.isfinite(value) for figures in layers.values() for value in figures.values())


class Hiding(Net):
    """Its second norm sees one image: that of all its pixels."""

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.conv2(x)
        return self.bn2(x.transpose(0, 1).flatten(1).unsqueeze(0).unsqueeze(-1))


def hiding(rank):
    said, model = [], syncbn.convert(Hiding())
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("syncbn").addHandler(handler)
    monitor = DriftMonitor(model)
    for step in range(20):
        model(images(rank, step, 2, shift=3.0 * (rank == 1)))
        if step % 5 == 4:
            reading = monitor.read()
    logging.getLogger("syncbn").removeHandler(handler)
    return reading, said


def test_a_layer_from_which_images_are_hidden_is_judged_by_its_ranks():
    (reading, said), (_, by_another) = run_ranks(hiding, 2)
    assert "f" in reading.layers["bn1"]
    assert not {"f", "icc"} & reading.layers["bn2"].keys()
    assert [text for text in said if text.startswith("bn2 does not see the batch's images")] == said
    assert len(said) == 1
    assert by_another == []


def test_one_process_has_figures_too():
    monitor = DriftMonitor(model := net())
    for step in range(30):
        model(images(0, step, 16))
        if step % 10 == 9:
            reading = monitor.read()
    assert reading.layers["bn1"].keys() >= {"n_eff", "dmean_z", "dlogvar_z", "lag", "kl", "dead", "conditioning"}
    assert "f" not in reading.layers["bn1"]
    assert reading.verdicts == []


def test_a_model_without_batch_norm_is_said_and_read(caplog):
    monitor = DriftMonitor(nn.Sequential(nn.Linear(2, 2)))
    assert "Sequential has no batch norm layer: there is no drift to measure" in caplog.text
    assert monitor.read() == ({}, {}, [])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"level": "off"}, "level is 'off': it must be 'rank' or 'image'"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"horizon": 2}, "horizon is 2: it must be 3 readings or more"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DriftMonitor(net(), **options)


def disagreeing(rank, how):
    model = net()
    if how == "layers" and rank == 1:
        model.bn2 = syncbn.SyncBatchNorm(7)
    if how == "twice" and rank == 1:
        first = model.bn1
        first.observer = object()
    try:
        DriftMonitor(model, level="rank" if how == "level" and rank == 1 else "image")
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "how, says",
    [
        ("layers", "the models of rank 1 and rank 0 hold different layers: bn2 of 6 channels"),
        ("twice", "bn1 is observed already on rank 1: close its monitor first"),
        ("level", "level is 'rank' on rank 1 and 'image' on rank 0: it must be the same"),
    ],
)
def test_ranks_that_disagree_all_hear_of_it(how, says):
    assert run_ranks(disagreeing, 2, how) == [says, says]


def test_a_lazy_layer_is_to_run_first():
    with pytest.raises(ValueError, match="has no channels yet: run one forward"):
        DriftMonitor(nn.Sequential(syncbn.LazySyncBatchNorm()))


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "local"])
def test_closed_it_leaves_nothing_behind_and_copies_are_not_observed(sync):
    model = net(sync)
    before = [dict(vars(module)) for module in model.modules()]
    with DriftMonitor(model):
        if sync:
            twin = copy.deepcopy(model)
            assert twin.bn1.observer is None
            assert pickle.loads(pickle.dumps(model)).bn1.observer is None
    assert [vars(module).keys() for module in model.modules()] == [one.keys() for one in before]
    assert not model.bn1._forward_pre_hooks


def test_a_batch_that_is_not_finite_costs_its_own_window():
    monitor = DriftMonitor(model := net())
    for step in range(40):
        x = images(0, step, 8)
        model(x * math.nan if step == 12 else x)
        if step == 12:
            model.bn1.reset_running_stats(), model.bn2.reset_running_stats()
        if step % 10 == 9:
            reading = monitor.read()
    assert math.isfinite(reading.layers["bn2"]["n_eff"])


def test_what_was_not_finite_spoils_no_slot_that_stays_empty():
    monitor = DriftMonitor(model := net())
    for _ in range(2):
        model(images(0, 0, 3) * math.nan)
    monitor.read()
    model.bn1.reset_running_stats(), model.bn2.reset_running_stats()
    model.bn2(model(images(0, 1, 3)))
    layers = monitor.read().layers
    assert all({"n_eff", "kl"} <= layers[name].keys() for name in ("bn1", "bn2"))
