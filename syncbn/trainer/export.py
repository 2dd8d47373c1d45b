"""A checkpoint made into files that need nothing of ours: weights for torchvision, a program for torch alone."""

import argparse
import io
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

import syncbn
from syncbn.trainer import models, norms, tasks
from syncbn.trainer.display.screen import Screen
from syncbn.trainer.errors import USER_ERROR, UserError, first_line, some
from syncbn.trainer.models import ModelConfig
from syncbn.trainer.norms import NormConfig
from syncbn.trainer.runs.metric import in_words
from syncbn.trainer.training import resume
from syncbn.trainer.training.state import State, best_weights

MOST_CLASSES = 10  # told by name in one line
NO_PROGRAM = "the model returns more than a tensor, a detector a dict of boxes, labels and scores for each image"


def export(source: Path, folder: Path | None = None, *, size: int | None = None, best: bool = False) -> dict[str, str]:
    """Write weights.pt, program.pt2 and model.json; what to tell of them, a line each.

    weights.pt is a state_dict, of the average if there is one, that the model by the same name loads, torchvision's or
    ours, with nn.BatchNorm layers, or those of its norm, where that is no batch norm. program.pt2 is a torch.export
    program of the model in eval mode, from float32 images [N, 3, H, W] to scores [N, classes], for any N; of a
    segmentation to scores [N, classes, H, W], for any H and W where the model allows it; a detector, which gives a dict
    for each image, has none. model.json tells what to feed them.

    Args:
        source: a checkpoint, or a run's folder for its latest.
        folder: to write into; None: `export` in the run's folder.
        size: side of the images in pixels; None: as they were in training.
        best: the checkpoint with the best evaluation of a run's folder, in place of the latest.

    Raises UserError.
    """
    if size is not None and size < 1:
        raise UserError(f"--size {size}: give a side of images in pixels, 1 or more")
    path, state = resume.load_checkpoint(source / "checkpoints" / "best" if best else source)
    task, model = task_of(state), plain_model(state, path)
    facts = described(state, task, model, size)
    has_program, any_size = task.targets not in tasks.BOXES and task.exported(model) is not None, False
    if folder is None:
        folder = (path.parent.parent if path.parent.name == "checkpoints" else path.parent) / "export"
    weights, program, card = (folder / name for name in ("weights.pt", "program.pt2", "model.json"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights)
        card.write_text(json.dumps(facts, indent=1) + "\n")
        if has_program:
            height, width = facts["size"]
            exported, any_size = traced(task, model, height, width, weights)
            torch.export.save(exported, program)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where it cannot write
        raise UserError(f"{folder} cannot be written ({first_line(error)}): give another folder with -o") from None
    return {
        "checkpoint": f"{path}, step {facts['step']}",
        "weights": f"{weights}, a state_dict of {facts['model']} with "
        + ("plain batch norm" if is_plain(norm_of(state)) else f"norm={facts['norm']}"),
        "program": f"{program}, for torch.export.load" if has_program else f"none: {NO_PROGRAM}",
        "facts": str(card),
        **(fed_to_detector(facts) if task.targets in tasks.BOXES else fed(facts, any_size)),
        "classes": f"{len(facts['classes'])}: {some(facts['classes'], MOST_CLASSES)}",
        **in_words(facts["eval"], task.metrics),
    }


def fed(facts: Mapping[str, Any], any_size: bool) -> dict[str, str]:
    """What a model takes, a line each."""
    sides = "H, W" if any_size else ", ".join(map(str, facts["size"]))
    return {
        "images": f"float32 [N, 3, {sides}], pixels in 0..1, then (pixel - mean) / std",
        "mean, std": f"{facts['mean']}, {facts['std']}",
    }


def fed_to_detector(facts: Mapping[str, Any]) -> dict[str, str]:
    lines = {"images": "a list of float32 [3, H, W], pixels in 0..1; the model normalises and resizes them itself"}
    if "mean" in facts:
        lines["mean, std"] = f"{facts['mean']}, {facts['std']}, the model's own"
        lines["scores"] = facts["scores"]
    return lines


def described(state: State, task: tasks.Task, model: nn.Module, size: int | None) -> dict[str, Any]:
    """What one has to know of a model to use it."""
    figures = state["figures"] if state["evaluated"] == state["step"] else {}  # else of other weights
    return {
        "model": state["config"]["model"]["name"],
        "norm": norm_of(state).name,
        "classes": state["classes"],
        **(of_detector(state, model, size) if task.targets in tasks.BOXES else of_images(state, size)),
        "step": state["step"],
        "eval": {name: value for name, value in figures.items() if name.startswith("eval/")},
    }


def of_images(state: State, size: int | None) -> dict[str, Any]:
    """What a model's images have to be."""
    data = state["config"]["data"]
    if size is None and state["image_shape"] is None:
        raise UserError("the checkpoint is from before the first image: give the side of images in pixels, --size N")
    return {
        "size": state["image_shape"][1:] if size is None else [size, size],  # height, width
        "mean": coloured(data["mean"]),
        "std": coloured(data["std"]),
    }


def of_detector(state: State, model: nn.Module, size: int | None) -> dict[str, Any]:
    """What a detector makes of its images by itself, and the keys that it was built with."""
    config = ModelConfig(**state["config"]["model"])
    if size is not None:
        raise UserError(f"--size {size}: model.name={config.name} resizes images of any size by itself; leave it out")
    frozen = norms.frozen_batch_norms(model)
    return {
        "labels": "those of boxes: 1 for the first class; 0 is the background",
        **models.card(model),
        **({"eps_of_frozen_norms": getattr(frozen[0], "eps", None)} if frozen else {}),
        "built_with": {key: getattr(config, key) for key in ("image_size", "anchor_sizes", "anchor_ratios", "options")},
    }


def plain_model(state: State, path: Path) -> nn.Module:
    """The model of a checkpoint in eval mode, on the CPU, its batch norm torch's; another norm is as it was trained."""
    config, norm = ModelConfig(**state["config"]["model"]), norm_of(state)
    model = models.build_blank(config, task_of(state).outputs or len(state["classes"]))
    if is_plain(norm):
        model = syncbn.revert(model)  # a user's own builder may have converted it
    else:
        model, _ = norms.convert(model, norm, norms.Place(torch.device("cpu")))
    models.load_all(model, best_weights(state), config.name, path)
    return model.eval()


def task_of(state: State) -> tasks.Task:
    return tasks.build(tasks.TaskConfig(**state["config"]["task"]), state["classes"])


def norm_of(state: State) -> NormConfig:
    return NormConfig(**state["config"]["norm"])


def is_plain(norm: NormConfig) -> bool:
    """Whether a model with the norm is one with nn.BatchNorm, in eval."""
    return norms.NORMS[norm.name].running


def traced(
    task: tasks.Task, model: nn.Module, height: int, width: int, weights: Path
) -> tuple[torch.export.ExportedProgram, bool]:
    """A program for any number of images, and whether it takes those of any size, or of this one. Raises UserError."""
    exported = task.exported(model)
    assert exported is not None, "it is asked for where there is one"
    try:
        with torch.no_grad(), silence():
            if task.any_size and (program := of_any_size(exported, height, width)):
                return program, True
            return program_of(exported, torch.zeros(2, 3, height, width), {}), False
    except Exception as error:  # whatever the model's code raises in it
        raise UserError(
            f"torch.export can make no program of the model for images of {height}×{width} ({first_line(error)}): "
            f"another --size, or {weights} alone, which is written"
        ) from None


def of_any_size(model: nn.Module, height: int, width: int) -> torch.export.ExportedProgram | None:
    """A program for images of any size, shown this one and tried on another; None if the model has no such."""
    auto = torch.export.Dim.AUTO
    try:
        program = program_of(model, torch.zeros(2, 3, height, width), {2: auto, 3: auto})
        program.module()(torch.zeros(1, 3, height + 3, width + 5))
    except Exception:  # whatever the model's code raises in it
        return None
    return program


def program_of(model: nn.Module, images: torch.Tensor, sizes: Mapping[int, Any]) -> torch.export.ExportedProgram:
    """The model as a program for any number of images. sizes: dimensions that vary besides."""
    varies = {0: torch.export.Dim("batch", min=1), **sizes}
    return torch.export.export(model, (images,), dynamic_shapes=(varies,))


@contextmanager
def silence() -> Iterator[None]:
    """A block that says nothing on stderr: torch prints its graphs there where it can make no program."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def coloured(values: list[float]) -> list[float]:
    """One number for each of three colours; a grey image has three alike."""
    return values * 3 if len(values) == 1 else values


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: its exit code."""
    parser = argparse.ArgumentParser(
        "python -m syncbn.trainer.export", description="Make files of a checkpoint that torch alone can use."
    )
    parser.add_argument(
        "source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder, such as runs/NAME, or a checkpoint"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: export, in the run's folder")
    parser.add_argument("--size", type=int, metavar="N", help="side of the images in pixels; default: as in training")
    parser.add_argument("--best", action="store_true", help="the best evaluation's checkpoint, not the latest")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        lines = export(given.source, given.output, size=given.size, best=given.best)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    Screen(0).close(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
