"""What the drift monitor says of CIFAR-10 on ranks with two images each: of good shards, and of five kinds of bad ones.

torchrun --nproc-per-node 8 -m benchmarks drift FOLDER [--scenarios iid sorted ...]

FOLDER/train/<class>/*.jpg. Each scenario trains a ResNet-20 anew, reads the monitor every 10 steps, and tells when it
first said what.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as TF

import syncbn
from benchmarks.measure.records import Result
from syncbn.trainer.environment import schedule_as_batch
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.world import BROADCAST_BUFFERS

IMAGES, EVERY = 2, 10
MEAN, STD = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])


class Shards:
    """Random batches of this rank, of all classes or of one alone."""

    def __init__(self, folder: Path, classes: list[int], rank: int, change: Callable[[Tensor], Tensor]):
        names = sorted(path.name for path in (folder / "train").iterdir())
        self.files = [
            (path, label) for label in classes for path in sorted((folder / "train" / names[label]).iterdir())
        ]
        self.random, self.change = random.Random(rank), change

    def batch(self) -> tuple[Tensor, Tensor]:
        chosen = self.random.sample(self.files, IMAGES)
        images = torch.stack([TF.pil_to_tensor(Image.open(path)) for path, _ in chosen])
        return self.change(images.float() / 255), torch.tensor([label for _, label in chosen])


def normalised(images: Tensor) -> Tensor:
    return TF.normalize(images, MEAN, STD)


def inverted(images: Tensor) -> Tensor:
    return normalised(1 - images)


def as_they_are(images: Tensor) -> Tensor:
    return images


class Scenario(NamedTuple):
    """steps: of training; after `frozen` of them nothing moves, and what enters the last layer is measured.

    classes: of a rank. change: a rank, and what becomes of its images. plant: in the model, at a step.
    """

    steps: int
    classes: Callable[[int], list[int]] = lambda rank: list(range(10))
    change: tuple[int, Callable[[Tensor], Tensor]] | None = None
    plant: Callable[[int, int, nn.Module], None] | None = None
    sync: bool = True
    frozen: int | None = None


class Bias:
    """Of what enters a layer: variances of each rank's batch and of all ranks', against that of everything."""

    def __init__(self, layer: nn.Module):
        self.local: list[Tensor] = []
        self.synced: list[Tensor] = []
        self.rows: list[Tensor] = []
        layer.register_forward_pre_hook(self.see)

    @torch.no_grad()
    def see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mine = inputs[0].detach().double().transpose(0, 1).flatten(1)  # [C, n]
        count = torch.full((len(mine),), float(mine.size(1)), dtype=torch.float64)
        row = torch.stack([count, mine.sum(1), mine.square().sum(1)])
        self.local.append(variance(row))
        dist.all_reduce(row)
        self.synced.append(variance(row))
        self.rows.append(row)

    def shares(self) -> dict[str, float]:
        """Mean over channels of the average running_var of each kind, which is unbiased for independent values."""
        local = torch.stack(self.local).mean(0)
        dist.all_reduce(local)
        true = variance(torch.stack(self.rows).sum(0))
        synced = torch.stack(self.synced).mean(0)
        return {
            "local": float((local / dist.get_world_size() / true).mean()),
            "synced": float((synced / true).mean()),
        }


def variance(row: Tensor) -> Tensor:
    count, total, squares = row
    return (squares - total.square() / count) / (count - 1)


def nudge(step: int, rank: int, model: nn.Module) -> None:
    """One of rank 2's running variances is a tenth too large after step 94."""
    if step == 94 and rank == 2:
        model.blocks[4].bn1.running_var[3] *= 1.1  # pyright: ignore


SCENARIOS = {
    "iid": Scenario(1000),
    "sorted": Scenario(200, classes=lambda rank: [rank]),
    "inverted": Scenario(100, change=(5, inverted)),
    "unnormalised": Scenario(100, change=(3, as_they_are)),
    "desync": Scenario(120, plant=nudge),
    "local": Scenario(100, sync=False),
    "bias": Scenario(200, frozen=100),
}


def train(scenario: Scenario, folder: Path, rank: int) -> tuple[list[dict[str, Any]], float, dict[str, float]]:
    """What was read, the seconds of a step, and the bias if it is measured."""
    torch.manual_seed(0)
    model: nn.Module = SmallResNet(20, 10)
    if scenario.sync:
        syncbn.convert(model)
    wrapped = DistributedDataParallel(model, **{BROADCAST_BUFFERS: False})  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    changed = scenario.change if scenario.change and scenario.change[0] == rank else (rank, normalised)
    shards = Shards(folder, scenario.classes(rank), rank, changed[1])
    readings, bias, began = [], None, time.perf_counter()
    with syncbn.DriftMonitor(model) as monitor:
        for step in range(1, scenario.steps + 1):
            images, labels = shards.batch()
            nn.functional.cross_entropy(wrapped(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == scenario.frozen:
                optimizer.param_groups[0]["lr"] = 0.0
                model.eval()  # a norm before the last layer would level the batches
                bias = Bias(model.blocks[-1].bn2)  # pyright: ignore
            if scenario.plant:
                scenario.plant(step, rank, model)
            if step % EVERY == 0:
                reading = monitor.read()
                readings.append({"step": step, **reading._asdict()})
    step_s = (time.perf_counter() - began) / scenario.steps
    return readings, step_s, bias.shares() if bias else {}


def verdicts(scenario: str, readings: list[dict[str, Any]], step_s: float) -> Iterator[Result]:
    """A row for each kind of verdict, of its first and its last; one alone if there was none."""
    said: dict[str, list[tuple[int, str]]] = {}
    for reading in readings:
        for verdict in reading["verdicts"]:
            said.setdefault(verdict.kind, []).append((reading["step"], verdict.text))
    for kind, texts in (said or {"ok": [(readings[-1]["step"], "ok")] * len(readings)}).items():
        (first, text), (last, last_text) = texts[0], texts[-1]
        figures = {"from step": first, "first": text, "last at step": last, "last": last_text}
        counts = {"readings": len(texts), "of": len(readings), "ms a step": 1e3 * step_s}
        yield Result("verdicts", {"scenario": scenario, "kind": kind}, {**figures, **counts})


def depths(scenario: str, readings: list[dict[str, Any]]) -> Iterator[Result]:
    """What the last reading has of each layer, from input to output."""
    layers = readings[-1]["layers"]
    for figure in ("f", "icc", "n_eff", "n_eff_synced", "dmean_z", "dlogvar_z", "lag", "lag_logvar"):
        values = [round(figures[figure], 2) for figures in layers.values() if figure in figures]
        if values:
            yield Result("by depth, at the end", {"scenario": scenario, "figure": figure}, {"layers": values})


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="CIFAR-10 as an image folder")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))


def measure(options: argparse.Namespace) -> Iterator[Result]:
    torch.set_num_threads(1)
    schedule_as_batch()
    dist.init_process_group("gloo")
    for name in options.scenarios:
        readings, step_s, bias = train(SCENARIOS[name], options.folder, dist.get_rank())
        yield from verdicts(name, readings, step_s)
        yield from depths(name, readings)
        for kind, share in bias.items():
            yield Result("running_var at the last layer", {"scenario": name, "statistics": kind}, {"of σ²": share})
    dist.destroy_process_group()
