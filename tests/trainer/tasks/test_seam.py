"""The seam between a task and the trainer: a task of one's own needs one file, and a loss is exact for any split."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.trainer import tasks
from syncbn.trainer.data import Batch
from syncbn.trainer.data.structure import mapped, repeated, tensors
from syncbn.trainer.errors import UserError
from syncbn.trainer.report import comparison
from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.runs.sweep_folder import Point, Sweep
from syncbn.trainer.tasks import Loss, Task
from syncbn.trainer.training.bad_steps import Guard
from syncbn.trainer.training.loop import optimiser_step
from syncbn.trainer.training.options import TrainConfig
from syncbn.trainer.training.state import Training
from syncbn.trainer.training.totals import Totals
from tests.launch.jobs import PYTHON, ROOT, finished, job
from tests.ranks import run_ranks
from tests.trainer.tasks.given import Given
from tests.trainer.trained import ranks_world

OWN = ["task.name=tests.trainer.tasks.brightness:Brightness", "launch.nproc=2", "wandb.mode=disabled", "optim.lr=0.3"]
OWN += ["schedule.warmup_epochs=0"]


@pytest.mark.ci
@pytest.mark.slow
def test_a_task_of_ones_own_trains_resumes_shows_reports_and_sweeps(tmp_path):
    lasts = ["train.steps=200", "train.eval_every=20", "run.name=r"]
    with job(PYTHON, *OWN, *lasts, root=tmp_path) as started:
        started.until(lambda: (tmp_path / "r" / "checkpoints" / "latest").exists())
        started.process.send_signal(signal.SIGTERM)
        assert started.wait() == 75
    code, said = finished(PYTHON, *OWN, *lasts, root=tmp_path)
    assert code == 0, said
    assert "going on from step" in said
    assert re.search(r"eval error \d+\.\d{4} pp  bright +\d+\.\d\d%", said), said
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["objective"] == result["metrics"]["eval/error"] < 12
    assert "error, pp" in (tmp_path / "r" / "report.html").read_text()
    assert not (tmp_path / "r" / "pictures").exists()
    code, said = finished(PYTHON, "task=evaluate", f"checkpoint={tmp_path / 'r'}", root=tmp_path / "none")
    assert (code, f"eval/error           {result['objective']:.4g} pp" in said) == (0, True), said
    exporting = [sys.executable, "-m", "syncbn.trainer.export", str(tmp_path / "r")]
    done = subprocess.run(exporting, cwd=ROOT, capture_output=True, text=True, check=True)
    assert " pp" in done.stdout
    program = torch.export.load(tmp_path / "r" / "export" / "program.pt2").module()
    assert program(torch.zeros(3, 3, 8, 8)).shape == (3, 1)
    code, said = finished(PYTHON, "-m", *OWN, "train.steps=4", "seed=0,1", root=tmp_path)
    assert code == 0, said
    (folder,) = tmp_path.glob("sweep-*")
    sweep = json.loads((folder / "sweep.json").read_text())
    assert (sweep["metric"], sweep["unit"], sweep["better"]) == ("error", "pp", "less")
    assert " pp" in said


def test_of_settings_the_one_with_the_least_error_is_the_best():
    errors = {"sync": 3.0, "none": 7.0}
    points = [Point({"norm": name}, state="finished", objective=error) for name, error in errors.items()]
    settings = comparison.settings(Sweep(["norm"], 2, "error", 0.0, points, "px", "less"))
    assert [setting.best for setting in settings] == [True, False]
    assert [comparison.spread(setting, Metric("error", "px")) for setting in settings] == ["3 px", "7 px"]


def test_a_task_that_cannot_be_imported_is_told(tmp_path):
    code, said = finished(PYTHON, "task.name=nowhere.tasks:Own", "run.name=r", root=tmp_path)
    assert code == 2
    assert "error: task.name=nowhere.tasks:Own: No module named 'nowhere'; it must be package.module:builder" in said
    assert not (tmp_path / "r").exists()


class Own(Task):
    weighs, outputs, shapes = "values", 1, {"loss": ()}

    def __init__(self, config, classes):
        self.metrics = (Metric("loss", headline=True),)

    def loss(self, model, batch): ...
    def evaluate(self, model, batch): ...
    def figures(self, sums): ...


class TwoHeadlines(Own):
    def __init__(self, config, classes):
        self.metrics = (Metric("loss", headline=True), Metric("error", headline=True))


class NoHeadline(Own):
    def __init__(self, config, classes):
        self.metrics = (Metric("loss"),)


class WeighsPixels(Own):
    weighs = "pixels"


class LearnsDepths(Own):
    targets = "depths"


class SumsAndRows(Own):
    rows = {"loss": (2,)}  # noqa: RUF012


class Bare(Own):
    def __init__(self, config, classes):
        pass


def nothing(config, classes):
    return None


NO_TASKS = {
    "nothing": "returned NoneType, which does not inherit from syncbn.trainer.tasks.Task: docs/tasks.md",
    "Bare": "returned Bare, without metrics: docs/tasks.md",
    "TwoHeadlines": "has 2 headlines among its metrics (loss, error): give headline=True to the one it is judged by",
    "NoHeadline": "has 0 headlines among its metrics (loss): give headline=True",
    "WeighsPixels": "has weighs='pixels': choose one of images, values",
    "LearnsDepths": "has targets='depths': choose one of classes",
    "SumsAndRows": "has loss among its shapes and its rows: give each a name of its own",
}


@pytest.mark.parametrize(("name", "said"), NO_TASKS.items(), ids=NO_TASKS)
def test_what_is_no_task_is_told_in_a_line(name, said):
    assert tasks.build(tasks.TaskConfig(f"{__name__}:Own")).outputs == 1
    with pytest.raises(UserError) as refused:
        tasks.build(tasks.TaskConfig(f"{__name__}:{name}"))
    assert str(refused.value).startswith(f"task.name={__name__}:{name} {said}")


class Counted(Own):
    """Squared values that count, where a mask says so."""

    def __init__(self):
        pass

    def loss(self, model, batch):
        total = model(batch.images).flatten().square().mul(batch.labels).sum()
        return Loss(total, batch.labels.sum(), {"loss": total.detach()})


class CountedImages(Counted):
    """As Counted, where the images themselves count."""

    weighs = "images"


def gradient_of(rank, shares, accumulate, lacks=0):
    """The weights after a step of SGD at a rate of 1 on this rank's batches, in float64."""
    world = ranks_world(rank)
    torch.manual_seed(0)
    model = nn.Linear(3, 1, dtype=torch.float64)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    before = [p.detach().clone() for p in model.parameters()]
    images = sum(len(x) for batches in shares for x, _ in batches) // accumulate
    task, data = (CountedImages(), Given(images + lacks, skips=True)) if lacks else (Counted(), Given(images))
    training = Training(ddp, task, data, optimizer, None, Guard(model, optimizer), Totals({}, world))
    config = TrainConfig(accumulate=accumulate)
    optimiser_step(training, config, world, [Batch(x, mask) for x, mask in shares[rank]])
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


COUNTS = {"1-2-0": [[1], [2], [0]], "all-on-one": [[0], [0], [5]], "none": [[0], [0]], "accumulated": [[1, 4], [0, 2]]}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_ranks_of_any_number_of_values_that_count_equal_one_rank_with_all(counts):
    def batch(count):
        x = torch.randn(5, 3, dtype=torch.float64)
        return x, torch.tensor([1.0] * count + [0.0] * (5 - count), dtype=torch.float64)

    shares = [[batch(count) for count in micros] for micros in counts]
    x, counts_too = (torch.cat([pair[i] for micros in shares for pair in micros]) for i in range(2))
    want = direct(x, counts_too)
    (alone,) = run_ranks(gradient_of, 1, [[(x, counts_too)]], 1)
    for rank in [alone, *run_ranks(gradient_of, len(shares), shares, len(counts[0]))]:
        for mine, wanted in zip(rank, want, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)
    assert all(g.abs().max() > 0 for g in want) == (sum(map(sum, counts)) > 0)


def direct(x, mask):
    """The gradient of the mean over all values that count."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, dtype=torch.float64)
    (model(x).flatten().square().mul(mask).sum() / mask.sum().clamp(min=1)).backward()
    return [p.grad for p in model.parameters()]


def test_images_that_a_rank_lacks_count_for_nothing():
    """data.skip_broken: 5 + 2 of 10 images are left, and each of them weighs as much."""
    shares = [[(torch.randn(n, 3, dtype=torch.float64), torch.ones(n, dtype=torch.float64))] for n in (5, 2)]
    want = direct(*(torch.cat([pair[i] for micros in shares for pair in micros]) for i in range(2)))
    for rank in run_ranks(gradient_of, 2, shares, 1, 3):
        for mine, wanted in zip(rank, want, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)


def test_sums_of_any_shape_are_added_over_ranks():
    for reduced in run_ranks(reduced_on, 3):
        assert reduced.sums["matrix"].tolist() == [[3.0, 6.0], [9.0, 12.0]]
        assert reduced.sums["number"].item() == 6.0
        assert (reduced.images, reduced.skipped) == (9, 3)


def reduced_on(rank):
    assert dist.get_world_size() == 3
    totals = Totals({"matrix": (2, 2), "number": ()}, ranks_world(rank))
    matrix = torch.tensor([[1, 2], [3, 4]])
    totals.add({"matrix": matrix, "number": torch.tensor(2.0)}, images=3, skipped=1)
    return totals.reduce()


STRUCTURES = {
    "tensor": Batch(torch.ones(2, 3), torch.ones(2)),
    "images-of-different-sizes": Batch([torch.ones(3, 4, 5), torch.ones(3, 6, 2)], [{"boxes": torch.ones(0, 4)}] * 2),
    "nested": Batch(torch.ones(2, 3), {"mask": torch.ones(2, 4), "more": (torch.ones(2), "a name", None)}, skipped=1),
}


@pytest.mark.parametrize("batch", STRUCTURES.values(), ids=STRUCTURES)
def test_a_batch_is_any_structure_of_tensors(batch):
    doubled = mapped(lambda tensor: 2 * tensor, batch)
    assert isinstance(doubled, Batch)
    pairs = list(zip(tensors(batch), tensors(doubled), strict=True))
    assert pairs
    assert all(name == other and torch.equal(2 * mine, its) for (name, mine), (other, its) in pairs)
    assert (doubled.skipped, batch.samples, repeated(batch, 5).samples) == (batch.skipped, 2, 5)
