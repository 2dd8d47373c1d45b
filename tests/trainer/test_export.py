"""What is exported is what was evaluated, for torchvision, and for a process that has torch and nothing of ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from syncbn.trainer import export, models, norms
from syncbn.trainer.errors import UserError
from syncbn.trainer.models import ModelConfig
from syncbn.trainer.norms import NormConfig, Place
from syncbn.trainer.runs.checkpoint import parse_checkpoint, read_checkpoint, write_checkpoint
from syncbn.trainer.tasks.classify import Classify, find_scores
from syncbn.trainer.tasks.segment import Segment
from syncbn.trainer.training.resume import load_checkpoint
from syncbn.trainer.training.state import best_weights
from tests.ranks import run_ranks
from tests.trainer.trained import train

RUNS = {
    "averaged": {"train": {"ema": 0.5}, "norm": {"fuse": True}},
    "no-average": {"norm": {"name": "local"}},
}
SMALL = {
    "data": {"name": "fake", "size": 32, "fake_samples": 16, "batch_per_rank": 2, "mean": [0.4], "std": [0.3]},
    "model": {"name": "resnet18"},
    "optim": {"lr": 0.001},  # or scores of 1e8 come of so short a training
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of runs that were exported, by name."""
    made = {name: tmp_path_factory.mktemp("runs") / name for name in RUNS}
    for name, folder in made.items():
        run_ranks(train, 2, folder, {**SMALL, **RUNS[name]})
        assert export.main([str(folder)]) == 0
    return made


@pytest.fixture
def exported(runs):
    return runs["averaged"]


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the run's checkpoint, to be spoilt."""
    path = tmp_path / "step_000000003.pt"
    path.write_bytes(load_checkpoint(exported)[0].read_bytes())
    return path


def changed(path, **values):
    write_checkpoint(path, {**parse_checkpoint(read_checkpoint(path)), **values})


def evaluated(folder):
    """The model that the run evaluated, made of torchvision's by hand."""
    state = load_checkpoint(folder)[1]
    model = torchvision.models.resnet18(num_classes=10)
    average = state["average"]
    model.load_state_dict({k[7:]: v for k, v in average.items() if k != "n_averaged"} if average else state["model"])
    return model.eval()


@pytest.mark.parametrize("name", RUNS)
def test_the_weights_are_torchvisions_by_name_and_those_that_were_evaluated(runs, name):
    exported = runs[name]
    weights = torch.load(exported / "export" / "weights.pt", weights_only=True)
    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(weights, strict=True)
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model.eval()(images), evaluated(exported)(images))


ALONE = """
import sys
for name in "syncbn", "torchvision", "hydra":
    sys.modules[name] = None
import torch
program, images, scores = sys.argv[1:]
model = torch.export.load(program).module()
batches = torch.load(images, weights_only=True)
torch.save([model(batch) for batch in batches], scores)
"""


def run_alone(program, batches, tmp_path):
    """The scores of batches by the program, in a process with torch alone."""
    images, scores = tmp_path / "images.pt", tmp_path / "scores.pt"
    torch.save(batches, images)
    command = [sys.executable, "-c", ALONE, program, images, scores]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(scores, weights_only=True)


ANOTHER_NORM = [word for word, norm in norms.NORMS.items() if word != "torch"]


@pytest.mark.plain("evonorm_s0", "batch_renorm")
@pytest.mark.parametrize("word", ANOTHER_NORM)
def test_a_checkpoint_of_any_norm_is_exported(tmp_path, word, capsys):
    """Weights, and a program of those that scores as the model did that was trained."""
    # Maps of 2×2 in the end
    run_ranks(train, 2, tmp_path / "r", {"data": {"batch_per_rank": 2}, "norm": {"name": word}})
    capsys.readouterr()
    assert export.main([str(tmp_path / "r")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"resnet8 with {'plain batch norm' if norms.NORMS[word].running else f'norm={word}'}" in printed
    model = models.build(ModelConfig("resnet8"), 10)
    if not norms.NORMS[word].running:
        model, _ = norms.convert(model, NormConfig(word), Place(torch.device("cpu")))
    weights = torch.load(tmp_path / "r" / "export" / "weights.pt", weights_only=True)
    model.load_state_dict(weights, strict=True)
    assert_close(weights, load_checkpoint(tmp_path / "r")[1]["model"])
    images = torch.randn(3, 3, 8, 8)
    program = torch.export.load(tmp_path / "r" / "export" / "program.pt2").module()
    assert_close(program(images), model.eval()(images), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "r" / "export" / "model.json").read_text())["norm"] == word


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_program_runs_with_torch_alone_on_any_number_of_images(runs, name, tmp_path):
    exported = runs[name]
    batches = [torch.randn(n, 3, 32, 32) for n in (1, 2, 7)]
    with torch.no_grad():
        wanted = [evaluated(exported)(batch) for batch in batches]
    assert_close(run_alone(exported / "export" / "program.pt2", batches, tmp_path), wanted)


def test_no_norm_of_ours_is_left(exported):
    path, state = load_checkpoint(exported)
    kinds = {type(m) for m in export.plain_model(state, path).modules() if "Norm" in type(m).__name__}
    assert kinds == {nn.BatchNorm2d}


def test_the_facts_say_what_images_to_give(exported):
    facts = json.loads((exported / "export" / "model.json").read_text())
    figures = facts.pop("eval")
    assert facts == {
        "model": "resnet18",
        "norm": "sync",
        "classes": [str(i) for i in range(10)],
        "size": [32, 32],
        "mean": [0.4, 0.4, 0.4],
        "std": [0.3, 0.3, 0.3],
        "step": 3,
    }
    assert figures == load_checkpoint(exported)[1]["figures"]


def test_figures_of_other_weights_are_left_out(copy):
    changed(copy, evaluated=2)
    path, state = load_checkpoint(copy)
    assert export.described(state, export.task_of(state), export.plain_model(state, path), None)["eval"] == {}


def test_what_is_printed_names_every_file(exported, tmp_path, capsys):
    assert export.main([str(exported), "-o", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr().out
    for name in "weights.pt", "program.pt2", "model.json":
        assert (tmp_path / "new" / "folder" / name).is_file()
        assert str(tmp_path / "new" / "folder" / name) in printed
    assert "float32 [N, 3, 32, 32]" in printed
    assert "[0.4, 0.4, 0.4], [0.3, 0.3, 0.3]" in printed


SCENES = {
    "data": {"name": "digit_scenes", "scenes": 8, "size": 64, "mean": [0.4] * 3, "std": [0.3] * 3, "batch_per_rank": 1},
    "task": {"name": "segment"},
    "train": {"steps": 1},
}
SEGMENTERS = {
    "unet": {"name": "unet", "options": {"depth": 2, "width": 4}},
    "lraspp": {"name": "lraspp_mobilenet_v3_large"},
}


@pytest.mark.plain("unet")
@pytest.mark.parametrize("model", SEGMENTERS.values(), ids=SEGMENTERS)
def test_a_segmentation_gives_scores_at_the_size_of_any_image(tmp_path, model, capsys):
    run_ranks(train, 2, tmp_path / "r", {**SCENES, "model": model})
    capsys.readouterr()
    assert export.main([str(tmp_path / "r")]) == 0
    assert "float32 [N, 3, H, W], pixels in 0..1" in capsys.readouterr().out
    eager = models.build(ModelConfig(**model), 11).eval()
    eager.load_state_dict(torch.load(tmp_path / "r" / "export" / "weights.pt", weights_only=True), strict=True)
    program = torch.export.load(tmp_path / "r" / "export" / "program.pt2").module()
    for shape in (1, 3, 64, 64), (3, 3, 75, 90):
        images = torch.randn(shape)
        with torch.no_grad():
            scores = find_scores(eager(images))
            assert_close(program(images), scores)
        assert scores.shape == (shape[0], 11, *shape[2:])


class Strided(nn.Module):
    """Scores of a quarter of the image's sides, in a dict beside others."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3, stride=4, padding=1)

    def forward(self, x):
        return {"aux": x.mean(), "out": self.conv(x)}


class Sized(nn.Module):
    """For images of 16×16 alone."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3 * 256, num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))[:, :, None, None]


@pytest.mark.parametrize(("model", "any_size"), [(Strided, True), (Sized, False)])
def test_a_program_takes_other_sizes_where_its_model_does(model, any_size):
    model, task = model(3).eval(), Segment(["a", "b", "c"])
    program, takes_any = export.traced(task, model, 16, 16, Path("weights.pt"))
    assert takes_any == any_size
    images = torch.randn(2, 3, *((19, 30) if any_size else (16, 16)))
    with torch.no_grad():
        want = nn.functional.interpolate(find_scores(model(images)), images.shape[2:], mode="bilinear")
        assert_close(program.module()(images), want)


def test_a_classification_is_for_images_of_its_size():
    program, takes_any = export.traced(Classify(), models.build(ModelConfig("resnet8"), 3), 16, 16, Path("weights.pt"))
    assert not takes_any
    with pytest.raises(Exception, match="Guard failed"):
        program.module()(torch.zeros(1, 3, 20, 20))


@pytest.mark.slow
def test_another_size_can_be_given(exported, tmp_path):
    export.export(exported, tmp_path, size=40)
    assert json.loads((tmp_path / "model.json").read_text())["size"] == [40, 40]
    images = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        assert_close(torch.export.load(tmp_path / "program.pt2").module()(images), evaluated(exported)(images))


def test_a_run_is_exported_from_within_its_own_folder(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(exported)
    assert export.main([".", "-o", str(tmp_path)]) == 0
    assert (tmp_path / "weights.pt").read_bytes() == (exported / "export" / "weights.pt").read_bytes()


def test_the_best_is_what_the_pointer_says(exported, copy, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step in 1, 2:
        changed(copy, step=step, evaluated=step)
        (checkpoints / f"step_{step}.pt").write_bytes(copy.read_bytes())
    (checkpoints / "best").write_text("step_1.pt")
    export.export(tmp_path / "run", best=True)
    assert json.loads((tmp_path / "run" / "export" / "model.json").read_text())["step"] == 1


DETECTORS = {
    "ssdlite": {"name": "ssdlite320_mobilenet_v3_large"},
    "anchors": {"name": "ssdlite320_mobilenet_v3_large", "image_size": 96, "anchor_sizes": [8, 16, 24, 32, 48, 64, 96]},
    "frozen": {"name": "fasterrcnn_mobilenet_v3_large_320_fpn", "weights": "COCO_V1"},
}


@pytest.mark.parametrize("model", DETECTORS.values(), ids=DETECTORS)
def test_a_detector_is_exported_for_torchvision_without_a_program(copy, model, capsys):
    trained, config = models.build_blank(ModelConfig(**model), 4), parse_checkpoint(read_checkpoint(copy))["config"]
    config = {**config, "model": model, "task": {"name": "detect"}}
    classes = ["cat", "dog", "bird"]
    changed(copy, model=trained.state_dict(), average=None, config=config, classes=classes, image_shape=None)
    assert export.main([str(copy)]) == 0

    printed = " ".join(capsys.readouterr().out.split())
    assert "program none: the model returns more than a tensor, a detector a dict of boxes" in printed
    assert "images a list of float32 [3, H, W], pixels in 0..1; the model normalises and resizes them itself" in printed
    assert not (copy.parent / "export" / "program.pt2").exists()
    card = json.loads((copy.parent / "export" / "model.json").read_text())
    assert card["classes"] == classes
    assert json.loads(json.dumps(models.card(trained))).items() <= card.items()  # size, mean, std, anchors, scores
    assert card["built_with"]["anchor_sizes"] == model.get("anchor_sizes", [])
    assert card.get("eps_of_frozen_norms") == (1e-5 if "weights" in model else None)

    theirs = torchvision.models.get_model_builder(model["name"])(weights=None, weights_backbone=None, num_classes=4)
    theirs.load_state_dict(torch.load(copy.parent / "export" / "weights.pt", weights_only=True), strict=True)
    if not card["built_with"]["image_size"]:
        images = [torch.rand(3, 60, 70)]
        with torch.no_grad():
            assert_close(theirs.eval()(images), trained.eval()(images))


def test_a_detector_takes_no_size(copy):
    config = parse_checkpoint(read_checkpoint(copy))["config"]
    model, own = {"name": "ssdlite320_mobilenet_v3_large"}, {"name": "detect"}
    state = models.build_blank(ModelConfig(**model), 11).state_dict()
    changed(copy, model=state, average=None, config={**config, "model": model, "task": own})
    with pytest.raises(UserError, match=r"--size 64: model.name=ssdlite.* resizes images of any size by itself"):
        export.export(copy, size=64)


def spoil(path):
    path.write_bytes(path.read_bytes()[:-100])


def give_another_model(path):
    config = parse_checkpoint(read_checkpoint(path))["config"]
    changed(path, config={**config, "model": {**config["model"], "name": "resnet34"}})


def give_a_model_that_branches(path):
    state = parse_checkpoint(read_checkpoint(path))
    weights = {"fc.weight": torch.zeros(10, 192), "fc.bias": torch.zeros(10)}
    model = {"name": "tests.launch.nets:Branching", "weights": None}
    changed(path, model=weights, average=None, config={**state["config"], "model": model}, image_shape=[3, 8, 8])


BAD = {
    "nothing-there": (lambda path: path.unlink(), [], "cannot be read (No such file or directory): give a checkpoint"),
    "damaged": (spoil, [], "is damaged: its checksum is"),
    "another-model": (give_another_model, [], "does not fit model.name=resnet34"),
    "no-size": (lambda path: changed(path, image_shape=None), [], "--size N"),
    "size-0": (lambda path: None, ["--size", "0"], "--size 0: give a side of images in pixels, 1 or more"),
    "best-of-a-file": (lambda path: None, ["--best"], "cannot be read (Not a directory)"),
    "output-is-a-file": (lambda path: None, ["-o", __file__], "cannot be written"),
    "no-program": (give_a_model_that_branches, [], "torch.export can make no program of the model for images of 8×8"),
}


@pytest.mark.parametrize(("spoil", "options", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_exported_is_told_in_one_line(copy, capfd, spoil, options, said):
    spoil(copy)
    assert export.main([str(copy), *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_where_no_program_can_be_made_the_weights_are_written(copy):
    give_a_model_that_branches(copy)
    with pytest.raises(UserError, match=r"weights\.pt alone, which is written"):
        export.export(copy)
    assert torch.load(copy.parent / "export" / "weights.pt", weights_only=True).keys() == {"fc.weight", "fc.bias"}


def test_the_best_weights_are_the_averages_by_the_models_names():
    average = {"n_averaged": torch.tensor(3), "module.module.weight": torch.ones(2)}
    state = {"model": {"module.weight": torch.zeros(2)}, "average": average}
    assert best_weights(state).keys() == {"module.weight"}
    assert best_weights(state)["module.weight"].sum() == 2
    assert best_weights({**state, "average": None}) is state["model"]
