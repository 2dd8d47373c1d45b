"""Folders as runs leave them, made without training: as many layers, log lines and ranks as a test wants."""

import json
import math
import random
from dataclasses import asdict

import torch
import yaml

from syncbn.trainer.config import Config, as_dict
from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.runs.pictures import PNG, Matrix, Pictures, write_pictures
from syncbn.trainer.tasks import Picture
from syncbn.trainer.tasks.coco import Precision, metrics_of, precision_recall

SHARDS = {
    "text": "shards differ (ICC 0.21 at layer2.0.bn1, rank 3)",
    "kind": "shards",
    "layer": "layer2.0.bn1",
    "rank": 3,
    "first_step": 30,
    "last_step": 600,
}
DEAD = {
    "text": "dead channels (4 at layer1.0.bn2)",
    "kind": "dead",
    "layer": "layer1.0.bn2",
    "rank": None,
    "first_step": 200,
    "last_step": 200,
}


def layer_names(number):
    return ["bn1", *(f"layer{1 + i // 16}.{i % 16 // 2}.bn{1 + i % 2}" for i in range(number - 1))]


def make_run(path, *, layers=20, logs=60, ranks=8, verdicts=(), finished=True, seed=0, drift=True, config=None):
    """Write a run's folder: a tenth of the log lines have an evaluation after them; drift rises with depth."""
    path.mkdir(parents=True)
    settings = as_dict(Config())
    settings["run"] |= {"name": path.name, "root": str(path.parent)}
    settings["seed"] = seed
    for key, value in (config or {}).items():
        section, _, name = key.partition(".")
        settings[section][name] = value
    (path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    draw = random.Random(seed)
    names = layer_names(layers) if drift else []
    lines = []
    for i in range(1, logs + 1):
        lines.append(log_line(10 * i, i / logs, draw, names, [v["text"] for v in verdicts] if drift else None))
        if i % max(1, logs // 10) == 0:
            lines.append(eval_line(10 * i, i / logs, draw, names, ranks))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        last = lines[-1] if lines else {}
        figures = {key: value for key, value in last.items() if key.startswith("eval/")}
        result = {
            "objective": figures.get("eval/accuracy", 0.0),
            "metrics": figures,
            "ranks": ranks,
            "duration_s": 61.5,
        }
        if drift:
            result["drift"] = {"verdicts": list(verdicts)}
        (path / "result.json").write_text(json.dumps(result))
    return path


def log_line(step, done, draw, names, verdicts):
    line = {
        "step": step,
        "time_s": step / 10,
        "epoch": 10 * done,
        "train/loss": 2.3 * math.exp(-3 * done) + 0.1 * draw.random(),
        "train/accuracy": min(1.0, 0.1 + 0.85 * (1 - math.exp(-4 * done)) + 0.05 * draw.random()),
        "train/lr": 0.1 * (1 - done),
        "train/images_per_s": 240 + 20 * draw.random(),
        "train/step_ms": 30.0,
        "train/data_wait_share": 0.02,
        "train/skipped_images": 0.0,
    }
    for depth, name in enumerate(names):
        deep = depth / len(names)
        icc = max(0.0, 0.3 * deep**3 * min(1, 3 * done) + draw.gauss(0, 0.01))
        line |= {f"drift/{name}/{figure}": value for figure, value in layer_figures(icc, deep, draw).items()}
    if verdicts is not None:
        line["drift/verdicts"] = verdicts
    return line


def layer_figures(icc, deep, draw):
    return {
        "f": 1 + 4 * icc,
        "icc": icc,
        "n_eff": 4000 * math.exp(-6 * deep) * (1 + 0.1 * draw.random()),
        "dmean_z": abs(draw.gauss(1, 0.2)),
        "dlogvar_z": abs(draw.gauss(1, 0.2)),
        "lag": 0.02 + 0.1 * deep,
        "kl": 0.01 + 0.2 * deep,
        "dead": float(deep > 0.9),
        "conditioning": 2 + 10 * deep,
    }


def eval_line(step, done, draw, names, ranks):
    line = {
        "step": step,
        "time_s": step / 10 + 0.5,
        "epoch": 10 * done,
        "eval/loss": 2 * math.exp(-3 * done) + 0.15 + 0.02 * draw.random(),
        "eval/accuracy": min(1.0, 0.2 + 0.75 * (1 - math.exp(-4 * done))),
        "eval/images": 360.0,
        "eval/skipped_images": 0.0,
    }
    if names:
        line["drift/rank_z"] = {
            name: [
                abs(draw.gauss(1, 0.3)) + (5 * i / len(names) if rank == min(3, ranks - 1) else 0)
                for rank in range(ranks)
            ]
            for i, name in enumerate(names)
        }
        line |= {
            "eval/recalibrated_accuracy": line["eval/accuracy"] + 0.01,
            "eval/recalibrated_loss": line["eval/loss"] - 0.02,
        }
        line |= {f"drift/{name}/gap": 0.01 * i for i, name in enumerate(names)}
    return line


def rewrite(file, change):
    """Put what change makes of a file's text in its place."""
    file.write_text(change(file.read_text()))


def make_segmentation(path, classes, absent=(), size=(64, 64)):
    """A run's folder that has an IoU for each class but the absent ones, a picture of three panels, and a chart."""
    make_run(path)
    ious = {name: i / len(classes) for i, name in enumerate(classes) if name not in absent}

    def by_class(line):
        figures = json.loads(line)
        kept = {key: value for key, value in figures.items() if "accuracy" not in key}
        if "eval/loss" in figures:
            kept |= {"eval/miou": 0.5} | {f"eval/iou_{name}": iou for name, iou in ious.items()}
        return json.dumps(kept)

    rewrite(path / "metrics.jsonl", lambda text: "\n".join(map(by_class, text.splitlines())))
    rewrite(path / "result.json", lambda text: text.replace("eval/accuracy", "eval/miou"))
    metrics = [Metric("miou", "%", headline=True), Metric("loss", better="less")]
    metrics += [Metric(f"iou_{name}", "%", detail=name) for name in classes]
    (path / "metric_names.json").write_text(json.dumps([asdict(metric) for metric in metrics]))
    draw = random.Random(0)
    shares = [[None if row in absent else draw.random() ** (1 if row == x else 9) for x in classes] for row in classes]
    confusion = Matrix("confusion", classes, classes, shares, "%", "truth", "prediction", "Of each class's pixels.")
    image = torch.full((3, size[0], 3 * size[1] + 4), 120, dtype=torch.uint8)
    picture = PNG(Picture(image).png(), "90% of the pixels right", ("image", "truth", "prediction"))
    legend = {name: f"#{0x10101 * (i % 256):06x}" for i, name in enumerate(classes)}
    write_pictures(path / "pictures", Pictures(600, 8 * [picture], [confusion], legend))
    return path


def make_detection(path, pictures, classes, legend):
    """A run's folder that has an AP for each class, pictures with boxes, and curves of precision."""
    make_run(path)

    def by_class(line):
        figures = json.loads(line)
        kept = {key: value for key, value in figures.items() if "accuracy" not in key}
        if "eval/loss" in figures:
            kept |= {"eval/ap": 0.5} | {f"eval/class_ap_{name}": i / len(classes) for i, name in enumerate(classes)}
        return json.dumps(kept)

    rewrite(path / "metrics.jsonl", lambda text: "\n".join(map(by_class, text.splitlines())))
    rewrite(path / "result.json", lambda text: text.replace("eval/accuracy", "eval/ap"))
    (path / "metric_names.json").write_text(json.dumps([asdict(metric) for metric in metrics_of(classes)]))
    draw = random.Random(0)
    reached = {name: (0.3 + 6 * draw.random(), draw.randint(40, 100)) for name in classes}
    curves = {
        name: [(x / 100, max(0.0, 1 - (x / 100) ** power) if x <= end else 0.0) for x in range(101)]
        for name, (power, end) in reached.items()
    }
    write_pictures(path / "pictures", Pictures(600, pictures, precision_recall(Precision({}, curves)), legend))
    return path
