"""The training step's benchmark in small on a CPU, and that what it forces to be sent is sent."""

import pytest
import torch
from torch import nn

import syncbn
from benchmarks import runner
from benchmarks.measure import records, timing
from benchmarks.operator import forced, layers, op_gpu, scale, step
from benchmarks.operator.step import Contestant
from syncbn import SyncBatchNorm
from tests.ranks import run_ranks

SMALL = ["--device", "cpu", "--model", "resnet18", "--images", "2", "--size", "64", "--seconds", "0.1"]
NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.nn.SyncBatchNorm refuses CPU tensors")


def net(*norms):
    return nn.Sequential(*[layer for norm in norms for layer in (nn.Conv2d(3, 3, 3, padding=1), norm)])


def sent(rank, model, sending, backend=None):
    """Collectives of a step of the model; the first makes the communicator, and the code if it is compiled."""

    def training_step():
        run(torch.randn(2, 3, 4, 4)).sum().backward()

    run = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    if not sending:
        training_step()
        return forced.messages(training_step)
    with forced.sending():
        training_step()
        return forced.messages(training_step)


@pytest.mark.plain("all_reduce-eager")
@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compile"])
@pytest.mark.parametrize("reduction", ["all_reduce", "gather"])
def test_a_rank_alone_sends_two_messages_a_layer_if_it_is_made_to(reduction, backend):
    model = net(*[SyncBatchNorm(3, reduction=reduction) for _ in range(5)])
    assert run_ranks(sent, 1, model, True, backend, timeout_s=300) == [10]


@pytest.mark.parametrize("norm", [SyncBatchNorm, nn.BatchNorm2d])
def test_nothing_is_sent_otherwise(norm):
    assert run_ranks(sent, 1, net(norm(3)), norm is nn.BatchNorm2d) == [0]
    assert run_ranks(sent, 1, net(SyncBatchNorm(3)), False) == [0]


def test_in_evaluation_nothing_is_sent():
    model = net(SyncBatchNorm(3)).eval()
    assert run_ranks(sent, 1, model, True) == [0]


@pytest.mark.gpu
@NEEDS_A_GPU
def test_torchs_layer_sends_two_messages_and_has_the_same_numbers():
    x = torch.randn(4, 3, 5, 5, device="cuda", requires_grad=True)
    theirs, local = (kind(3).cuda() for kind in (forced.TorchSyncBatchNorm, nn.BatchNorm2d))
    dy = torch.randn_like(x)
    with forced.world_of_one("cuda"):
        assert forced.messages(lambda: torch.autograd.grad(theirs(x), x, dy)) == 2
        theirs.load_state_dict(local.state_dict())
        got = torch.autograd.grad(theirs(x), x, dy)
    torch.testing.assert_close(got, torch.autograd.grad(local(x), x, dy))
    torch.testing.assert_close(theirs.state_dict(), local.state_dict())


def small_options():
    options = runner.parsed("step", step, SMALL)
    options.compile = []
    return options


def small_training(norm, device="cuda"):
    torch.manual_seed(0)
    model = step.NORMS[norm](nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Head()))
    return step.Training(model.to(device), 8, 16, device)


@pytest.mark.gpu
@NEEDS_A_GPU
@pytest.mark.parametrize("norm", step.NORMS)
def test_a_graph_does_what_the_eager_step_does(norm):
    with forced.world_of_one("cuda"):
        eager, graphed = small_training(norm), small_training(norm)
        replay = step.captured(graphed)
        for _ in range(3):
            replay()
        for _ in range(step.WARM_UP + 3):
            eager()
        torch.testing.assert_close(graphed.parameters, eager.parameters, rtol=1e-3, atol=1e-4)
        del replay


@pytest.mark.gpu
@NEEDS_A_GPU
def test_torchs_layer_makes_the_host_wait_and_ours_does_not():
    with forced.world_of_one("cuda"):
        trainings = {norm: small_training(norm) for norm in step.NORMS}
        for training in trainings.values():
            training()
        waits = {norm: step.host_waits(training) for norm, training in trainings.items()}
        assert all(step.kernels(training) > 5 for training in trainings.values())
    assert waits.pop("torch") > 0
    assert set(waits.values()) == {0}


def test_torchs_conversion_makes_layers_that_send():
    model = forced.to_torch(nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm1d(2)), nn.ReLU()))
    assert [type(layer) for layer in (model[0], model[1][0])] == [forced.TorchSyncBatchNorm] * 2


@pytest.mark.slow
def test_a_small_run_prints_every_table_and_records_what_the_model_of_scale_reads(tmp_path, capsys):
    file = tmp_path / "step.jsonl"

    runner.run("step", [*SMALL, "--layer-images", "2", "--json", str(file)])

    printed = capsys.readouterr().out
    assert "torch 2." in printed
    assert "torch: left out, torch.nn.SyncBatchNorm refuses CPU tensors; graph: left out, it needs a GPU" in printed
    rows = records.read(file)
    assert scale.read_steps(str(file)).keys() == {2}
    steps = {row["case"]["contestant"]: row["figures"] for row in rows if row["table"] == "step"}
    ours = ["syncbn", "fused"]
    assert {name: row["messages"] for name, row in steps.items()} == {"local": 0} | dict.fromkeys(ours, 40)
    assert steps["local"]["cosine"] == pytest.approx(1)
    assert all(steps[name]["cosine"] > 0.999 for name in ours)
    assert {row["case"]["images"] for row in rows if row["table"] == "step"} == {2}
    assert {row["case"]["layers"] for row in rows if "layer" in row["table"]} == {20}
    assert "syncbn fused ReLU" in printed
    assert not torch.distributed.is_initialized()


def test_every_norm_has_the_gradient_of_local_batch_norm():
    with forced.world_of_one("cpu"):
        trainings = {norm: small_training(norm, "cpu") for norm in step.NORMS if norm != "torch"}
        first = {norm: training.gradient() for norm, training in trainings.items()}
        for training in trainings.values():
            training()
        second = {norm: training.gradient() for norm, training in trainings.items()}
    for norm in trainings:
        assert step.cosine(first[norm], first["local"]) > 1 - 1e-6
        assert step.cosine(second[norm], second["local"]) > 0.999  # the step between was in bf16
        assert step.cosine(first[norm], second[norm]) < 1 - 1e-5


class Head(nn.Module):
    """What ends a network: a class for each image."""

    def __init__(self):
        super().__init__()
        self.classes = nn.Linear(8, step.CLASSES)

    def forward(self, x):
        return self.classes(x.mean([2, 3]))


def test_on_a_gpu_every_kind_is_eager_and_a_graph_and_one_is_compiled():
    here = {str(one) for one in step.contestants(32, [32], "cuda")}
    assert here == {*step.NORMS, *(f"{norm} graph" for norm in step.NORMS), "syncbn compile"}
    assert {"local", "torch", "syncbn"} <= step.NORMS.keys()
    assert Contestant("syncbn", "compile") not in step.contestants(8, [32], "cuda")


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        runner.run("step", [])
    assert "there is no GPU: give --device cpu" in capsys.readouterr().err


def test_the_layers_are_those_of_the_network_in_the_order_of_calls():
    shapes = layers.shapes("resnet50", 8, 224)
    assert [shape[1] for shape in shapes] == scale.channels()
    assert shapes[0] == (8, 64, 112, 112)
    assert shapes[-1] == (8, 2048, 7, 7)


def test_the_operator_is_compared_and_timed():
    cases = [((2, 16, 5, 4), torch.float32, "NHWC"), ((4, 20, 9, 7), torch.bfloat16, "NCHW")]
    for case in cases:
        rows = list(
            op_gpu.checked(row for chain in op_gpu.FLOORS for row in op_gpu.rows(case, chain, 0.05, "cpu", 10.0))
        )
        assert [row.case["chain"] for row in rows[::2]] == [*op_gpu.FLOORS]
        assert [row.case["contestant"] for row in rows] == ["cudnn", "syncbn"] * 3
        assert all(row.figures["right"] == "yes" for row in rows)


def test_a_contestant_that_computes_something_else_is_wrong(monkeypatch):
    forward = SyncBatchNorm.forward
    monkeypatch.setattr(SyncBatchNorm, "forward", lambda *inputs: 1.02 * forward(*inputs))
    rows = op_gpu.checked(op_gpu.rows(((2, 16, 5, 4), torch.float32, "NCHW"), "BN", 0.05, "cpu", None))
    assert (next(rows).figures["right"], next(rows).figures["right"]) == ("yes", "WRONG")
    with pytest.raises(SystemExit, match="some contestants are WRONG"):
        next(rows)


def test_turns_are_paired():
    calls = []
    times = timing.turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0)
    assert len(times["a"]) == len(times["b"]) == 11
    assert calls[8:] == ["a", "b"] * 11
    assert timing.ratio({"a": [2.0, 4.0, 6.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == (2, 2, 2, 3)


def test_syncbn_is_as_it_was_after_sending():
    before = syncbn.collectives.resolve
    with forced.world_of_one("cpu"):
        assert syncbn.collectives.resolve is not before
    assert syncbn.collectives.resolve is before


ROUNDS = {"local": [10.0, 10.0, 20.0], "torch": [12.0, 12.0, 24.0], "syncbn": [10.0, 10.0, 20.0]}
ROUNDS |= {"fused": [10.5, 10.5, 21.0], "syncbn graph": [10.2, 10.2, 20.4]}


def figures(memory_mib):
    return step.Figures(memory_mib, 900, 0, 106, torch.ones(3))


def test_what_is_wanted_stands_beside_what_is_measured():
    counted = {name: figures(100.0 if name == "torch" else 90.0) for name in ROUNDS}
    rows = {row.case["contestant"]: row.figures for row in step.rows(32, ROUNDS, counted)}
    assert rows["torch"]["of local"] == (1.2, 1.2, 1.2, 3)
    assert (rows["torch"]["images/s"], rows["torch"]["memory_mib"]) == (pytest.approx(32e3 / 12), 100)
    assert rows["fused"]["of local"].median == 1.05
    assert rows["syncbn graph"]["of local"].median == pytest.approx(1.02)
    assert rows["syncbn"]["torch over it"].median == 1.2
    assert "of local at most 1.03" in rows["fused"]["wanted"]
    assert "torch over it at least 1.15" in rows["fused"]["wanted"]
    assert all(row.figures["wanted"] is None for row in step.rows(8, ROUNDS, counted))


def test_times_of_layers_stand_beside_torchs_with_a_relu_where_there_is_one():
    times = {name: [2.0, 2.0, 4.0] for name in layers.KINDS}
    times |= {"torch": [4.0, 4.0, 8.0], "syncbn fused ReLU": [1.0, 1.0, 2.0]}
    rows = {row.case["kind"]: row.figures for row in layers.rows("layer", times, 20)}
    assert rows.keys() == layers.KINDS.keys()
    assert rows["syncbn fused ReLU"]["us a layer"][:3] == (50, 50, 100)
    assert rows["syncbn fused ReLU"]["of torch"] == (0.5, 0.5, 0.5, 3)
    assert rows["syncbn"]["of torch"] == (0.5, 0.5, 0.5, 3)


def test_the_share_of_a_copy_is_that_of_the_fewest_passes(monkeypatch):
    # 2 GB in bf16, so 10 of them are 20 GB, and in 10 ms 2 TB/s
    case = (1000, 100, 100, 100), torch.bfloat16, "NHWC"
    ms = {"cudnn": 30.0, "torch": 30.0, "syncbn": 10.0}
    monkeypatch.setattr(op_gpu, "inputs", lambda *_: None)
    monkeypatch.setattr(op_gpu, "contestants", lambda *_: dict.fromkeys(ms))
    monkeypatch.setattr(op_gpu, "errors", lambda *_: dict.fromkeys(ms, 1e-3))
    monkeypatch.setattr(timing, "turns", lambda *_: {name: [value] * 3 for name, value in ms.items()})
    rows = {row.case["contestant"]: row.figures for row in op_gpu.rows(case, "BN+add+ReLU", 1, "cpu", 4000.0)}
    assert rows["syncbn"]["of copy"] == 0.5
    assert rows["syncbn"]["wanted"] == "of copy at least 0.85"
    assert rows["torch"]["of syncbn"] == (3, 3, 3, 3)
    assert rows["torch"]["wanted"] == "of syncbn at least 1.5"


def test_all_are_timed_before_the_profiler_has_run(monkeypatch):
    """Once it has, every launch takes longer."""
    order, turns, count = [], timing.turns, step.count
    monkeypatch.setattr(timing, "turns", lambda *given: order.append("time") or turns(*given))
    monkeypatch.setattr(step, "count", lambda *given: order.append("count") or count(*given))
    monkeypatch.setattr(step, "build", lambda *_: step.Built(lambda: None, lambda: None, None, torch.ones(3)))
    step.timed(small_options(), 2)
    assert order == ["time", *["count"] * 3]


def test_a_contestant_that_fails_is_left_out_with_its_reason(monkeypatch, capsys):
    def build(contestant, options, images):
        if contestant.norm == "syncbn":
            raise RuntimeError("no such kernel\nand more of it")
        return step.Built(lambda: None, lambda: None, None, torch.ones(3))

    monkeypatch.setattr(step, "build", build)
    times, counted = step.timed(small_options(), 2)
    assert "syncbn" not in times.keys() | counted.keys()
    assert capsys.readouterr().out == "syncbn: left out, RuntimeError: no such kernel\n"
