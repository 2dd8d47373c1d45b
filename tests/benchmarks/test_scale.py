"""The model of many GPUs: its figures are NCCL's own, and what the page about it says is what it prints."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import runner
from benchmarks.operator import nccl, scale

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"

# ResNet-50's forward messages in ms, worked out from NCCL's tuning.cc before this model was written
REFERENCE = {8: ("0.80", "0.58"), 64: ("2.4", "4.7"), 1024: ("4.5", "72"), 16384: ("6.7", "1153")}


def test_the_layers_are_those_of_resnet50():
    assert len(scale.channels()) == 53
    assert sum(scale.channels()) == 26560


@pytest.mark.parametrize("world", REFERENCE)
def test_forward_messages_take_the_reference_times(world):
    reduce = sum(nccl.all_reduce_us(world, 8 * (2 * c + 1)) for c in scale.channels()) / 1e3
    gather = sum(nccl.all_gather_us(world, 4 * (2 * c + 1)) for c in scale.channels()) / 1e3
    for figure, want in zip((reduce, gather), REFERENCE[world], strict=True):
        digits = len(want.partition(".")[2])
        assert f"{figure:.{digits}f}" == want


def test_a_tree_takes_what_nccl_printed_for_it(monkeypatch):
    # 3 nodes of 8 H100, Intel hosts, 128 bytes, Tree and LL: github.com/NVIDIA/nccl/issues/1453
    monkeypatch.setattr(nccl, "LL_GB_PER_S", (141.0, 39.0, 20.4))
    assert nccl.all_reduce_us(24, 128) == pytest.approx(25.214764, abs=1e-5)


def test_torchs_form_is_faster_up_to_two_nodes_and_ours_from_three_on():
    assert scale.crossover() == 24
    worlds = [2, 3, 4, 5, 6, 7, *range(8, 16385, 8)]
    faster = {world: scale.messages_ms("ours", world) < scale.messages_ms("torch", world) for world in worlds}
    assert faster == {world: world >= 24 for world in worlds}


HOSTS = {  # a message's overhead on the network; LL's bandwidths in 1, 2, more nodes: tuning.cc
    "Intel": (1.0, (141.0, 39.0, 20.4), 24, 1233, 13.4),
    "AMD": (2.0, (141.0, 22.5, 19.0), 16, 2005, 13.4),
}


@pytest.mark.parametrize("overhead_us, bandwidths, first, torch_ms, ours_ms", HOSTS.values(), ids=HOSTS)
def test_the_host_moves_the_crossover_by_one_node_at_most(
    monkeypatch, overhead_us, bandwidths, first, torch_ms, ours_ms
):
    monkeypatch.setattr(nccl, "NET_OVERHEAD_US", overhead_us)
    monkeypatch.setattr(nccl, "LL_GB_PER_S", bandwidths)
    assert scale.crossover() == first
    assert round(scale.messages_ms("torch", 16384)) == torch_ms
    assert round(scale.messages_ms("ours", 16384), 1) == ours_ms


def test_doubling_the_gpus_adds_as_much_to_ours_each_time_and_doubles_torchs():
    ours, torchs = ([scale.messages_ms(form, 2**power) for power in range(5, 15)] for form in ("ours", "torch"))
    steps = [after - before for before, after in pairwise(ours)]
    assert steps == pytest.approx([106 * 2 * nccl.TREE_NET_US / 1e3] * 9)
    assert torchs[-1] / torchs[-2] == pytest.approx(2, rel=0.02)


def test_in_node_groups_more_nodes_cost_nothing():
    assert {scale.messages_ms("node", world) for world in (8, 64, 16384)} == {scale.messages_ms("ours", 8)}


def test_one_gpu_sends_nothing():
    assert nccl.all_reduce_us(1, 1000) == nccl.all_gather_us(1, 1000) == 0


def test_a_node_that_is_not_full_is_refused():
    with pytest.raises(ValueError, match="20 GPUs do not fill nodes of 8: give a multiple of 8"):
        nccl.all_reduce_us(20, 1000)


def test_the_assumed_step_has_the_flops_of_resnet50():
    # 4.09 G multiplications and additions in the convolutions of a forward pass: torchvision's model card
    assert scale.work().flops == pytest.approx(3 * 2 * 4.09e9, rel=0.01)


def test_the_page_shows_what_is_printed(capsys):
    runner.run("scale", [])
    _, _, printed = capsys.readouterr().out.partition("\n\n")  # the machine's line matters to no model
    assert printed in PAGE.read_text()


def record(table, contestant, images, ms):
    spread = {"low": ms - 1, "median": ms, "high": ms + 1, "n": 11}
    case, figures = {"images": images, "contestant": contestant}, {"ms": spread}
    return json.dumps({"benchmark": "step", "table": table, "case": case, "figures": figures})


RECORDS = [
    ("layer", "local", 2, 1.0),
    ("step", "local", 2, 10.0),
    ("step", "syncbn", 2, 9.0),
    ("step", "local", 64, 50.5),
]
MEASURED = {"object": json.dumps({"2": 10, "64": 50.5}), "records": "\n".join(record(*row) for row in RECORDS)}


@pytest.mark.parametrize("text", MEASURED.values(), ids=MEASURED)
def test_measured_steps_are_read(text, tmp_path, capsys):
    file = tmp_path / "steps.json"
    file.write_text(text)
    runner.run("scale", ["--kernels", str(file)])
    printed = capsys.readouterr().out
    assert "by images a GPU (measured): 10.0 ms at 2, 50.5 ms at 64\n" in printed
    eight = next(line for line in printed.splitlines() if line.startswith("| 8 "))
    shares = [cell.split() for cell in eight.strip("| ").split("|")[5:]]
    assert shares == [["0.12", "0.14", "0.14"], ["0.03", "0.03", "0.03"]]  # 1.38, 1.60, 1.60 ms beside 10 and 50.5


@pytest.mark.parametrize("text", ["{}", "[1]", '{"two": 3}', '{"2": 0}', '{"0": 3}', '{"2": NaN}', '{"2": null}', "{"])
def test_other_files_are_refused(text, tmp_path, capsys):
    file = tmp_path / "steps.json"
    file.write_text(text)
    with pytest.raises(SystemExit):
        runner.run("scale", ["--kernels", str(file)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(file) in message
    assert "images per GPU to ms" in message


def test_the_plot_names_each_line(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "scale.svg"
    runner.run("scale", ["--plot", str(file)])
    drawn = file.read_text()
    for label in ("torch.nn.SyncBatchNorm", "syncbn, group=", "from 24 GPUs on", "2 and 8 images a GPU"):
        assert label in drawn
