"""Segmentation: exact for any share of the pixels that count, over any number of ranks."""

import json
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from syncbn.trainer import norms
from syncbn.trainer.config import typed
from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.models.unet import UNet
from syncbn.trainer.rank.build import build
from syncbn.trainer.tasks.colours import in_hex
from syncbn.trainer.tasks.objective import Objective, dice_losses, rarity
from syncbn.trainer.tasks.segment import IGNORED, Segment
from syncbn.trainer.training.bad_steps import Guard
from syncbn.trainer.training.evaluation import evaluate
from syncbn.trainer.training.loop import optimiser_step
from syncbn.trainer.training.options import TrainConfig
from syncbn.trainer.training.state import Training
from syncbn.trainer.training.totals import Totals
from tests.launch.jobs import PYTHON, finished
from tests.ranks import run_ranks
from tests.trainer.tasks.given import Given
from tests.trainer.trained import ranks_world

CLASSES = ["ground", "tree", "sky"]


def samples(ignored):
    """Images of 9×7 pixels with masks, of which so many pixels each count for nothing."""
    torch.manual_seed(1)
    images = torch.randn(len(ignored), 3, 9, 7, dtype=torch.float64)
    masks = torch.randint(3, (len(ignored), 9, 7), dtype=torch.uint8)
    for mask, number in zip(masks, ignored, strict=True):
        mask.view(-1)[:number] = IGNORED
    return images, masks


class TwoHeads(nn.Module):
    """Scores named out, and of a head that helps in training, as torchvision's models have them."""

    def __init__(self):
        super().__init__()
        self.net, self.aux = UNet(3, depth=2, width=2), nn.Conv2d(3, 3, 1)

    def forward(self, images):
        return {"out": self.net(images), "aux": self.aux(images[..., ::2, ::2])}


def step(rank, images, masks, objective):
    """The weights after a step of SGD at a rate of 1 on this rank's images."""
    world = ranks_world(rank)
    torch.manual_seed(0)
    model, _ = norms.convert(TwoHeads().double(), norms.NormConfig(), norms.Place(world.device, 3))
    nn.init.normal_(model.net.head.weight)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    task, data = Segment(CLASSES, objective), Given(sum(map(len, images)))
    if objective.class_weights == "auto":
        task.class_weights = rarity(torch.tensor([50, 7, 6]))
    training = Training(ddp, task, data, optimizer, None, Guard(model, optimizer), Totals(task.shapes, world))
    _, [(sums, _, _)] = optimiser_step(training, TrainConfig(), world, [Batch(images[rank], masks[rank])])
    return model.state_dict(), sums


IGNORES = {"unevenly": [5, 60, 0], "one-rank-wholly": [0, 63, 20], "all": [63, 63, 63]}
OBJECTIVES = {
    "plain": Objective(aux_weight=0.0),
    "aux": Objective(aux_weight=0.4),
    "weights": Objective(class_weights="auto"),
    "dice": Objective(dice=0.7, class_weights="auto"),
    "ohem": Objective(ohem=0.4, dice=0.5),
    "smooth": Objective(label_smoothing=0.1),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_ranks_of_one_image_equal_one_rank_with_all(objective):
    for ignored in IGNORES.values():
        images, masks = samples(ignored)
        ((want, whole),) = run_ranks(step, 1, [images], [masks], objective)

        ranks = run_ranks(step, 3, images.split(1), masks.split(1), objective)

        for weights, _ in ranks:
            torch.testing.assert_close(weights, want, rtol=1e-10, atol=1e-12)
        assert torch.equal(sum(sums["matrix"] for _, sums in ranks), whole["matrix"])
        assert whole["matrix"].sum() == 3 * 63 - sum(ignored)


def test_a_step_is_that_of_torchs_mean_over_all_pixels_that_count():
    images, masks = samples([5, 60, 0])
    torch.manual_seed(0)
    model = TwoHeads().double()
    nn.init.normal_(model.net.head.weight)
    F.cross_entropy(model(images)["out"], masks.long(), ignore_index=IGNORED).backward()
    want = {name: (p if p.grad is None else p - p.grad).detach() for name, p in model.named_parameters()}

    for weights, _ in run_ranks(step, 3, images.split(1), masks.split(1), Objective(aux_weight=0.0)):
        torch.testing.assert_close({name: weights[name] for name in want}, want, rtol=1e-10, atol=1e-12)


def loss_of(scores, masks, objective, class_weights=None):
    task = Segment(CLASSES, objective)
    task.class_weights = class_weights
    loss = task.loss(lambda _: scores, Batch(torch.zeros(len(masks), 3, 9, 7), masks))
    return loss.total / loss.weight


def test_the_loss_is_torchs_weighted_mean_over_the_pixels_that_count():
    _, masks = samples([5, 60, 0])
    scores = torch.randn(3, 3, 9, 7, dtype=torch.float64)
    for weights in None, torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64):
        want = F.cross_entropy(scores, masks.long(), weights, ignore_index=IGNORED)
        torch.testing.assert_close(loss_of(scores, masks, Objective(), weights), want)


def test_ohem_takes_the_mean_over_the_pixels_that_are_hard():
    _, masks = samples([5, 60, 0])
    scores = torch.randn(3, 3, 9, 7, dtype=torch.float64)
    losses = F.cross_entropy(scores, masks.long(), ignore_index=IGNORED, reduction="none")
    hard = losses[(masks != IGNORED) & (losses > -math.log(0.4))]
    assert 0 < len(hard) < (masks != IGNORED).sum()
    torch.testing.assert_close(loss_of(scores, masks, Objective(ohem=0.4)), hard.mean())


def test_dice_of_an_image_by_hand():
    """Of two classes that are there; a third is not, and the last pixel counts for nothing."""
    mask = torch.tensor([[[0, 0, 1, IGNORED]]], dtype=torch.uint8)
    shares = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).double()
    scores = shares.T.reshape(1, 3, 1, 4).clamp(min=1e-300).log()
    ground, tree = 2 * (0.6 + 0.8) / (0.6 + 0.8 + 0.5 + 2), 2 * 0.5 / (0.3 + 0.1 + 0.5 + 1)
    torch.testing.assert_close(dice_losses(scores, mask), torch.tensor([1 - (ground + tree) / 2]).double())
    assert dice_losses(scores, torch.full_like(mask, IGNORED)).tolist() == [0.0]


def test_dice_and_an_auxiliary_head_are_added_by_their_weights():
    _, masks = samples([5, 60, 0])
    scores, coarse = torch.randn(3, 3, 9, 7, dtype=torch.float64), torch.randn(3, 3, 9, 7, dtype=torch.float64)
    mean, of_coarse = (F.cross_entropy(each, masks.long(), ignore_index=IGNORED) for each in (scores, coarse))
    pixels = torch.tensor([63 - 5, 63 - 60, 63]).double()
    dice = (dice_losses(scores, masks) * pixels).sum() / pixels.sum()
    torch.testing.assert_close(loss_of(scores, masks, Objective(dice=0.7)), mean + 0.7 * dice)
    heads = {"out": scores, "aux": coarse}
    torch.testing.assert_close(loss_of(heads, masks, Objective(aux_weight=0.4)), mean + 0.4 * of_coarse)


def test_rare_classes_weigh_more_and_pixels_weigh_one_on_average():
    pixels = torch.tensor([900, 90, 10, 0])
    weights = rarity(pixels)
    assert weights.tolist() == sorted(weights.tolist())
    assert float((weights * pixels).sum() / pixels.sum()) == pytest.approx(1)
    assert float(weights[0] / weights[2]) == pytest.approx(math.log(1.02 + 0.01) / math.log(1.02 + 0.9))


def test_figures_by_hand():
    """Two classes are there and a third is only guessed: it has no figure, and spoils those it was taken for."""
    truth = torch.tensor([[[0, 0, 0, 1], [1, 1, IGNORED, IGNORED]]], dtype=torch.uint8)
    taken = torch.tensor([[[0, 0, 1, 1], [1, 2, 0, 2]]])
    task = Segment(CLASSES)
    sums = task.evaluate(lambda _: 9.0 * F.one_hot(taken, 3).permute(0, 3, 1, 2), Batch(torch.zeros(1, 3, 2, 4), truth))
    figures = task.figures(sums)
    assert figures.keys() == {"miou", "pixel_accuracy", "loss", "iou_ground", "iou_tree"}
    assert (figures["iou_ground"], figures["iou_tree"]) == (2 / 3, 2 / 4)
    assert figures["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert figures["pixel_accuracy"] == 4 / 6


def test_an_eval_without_a_pixel_that_counts_is_no_error():
    task = Segment(CLASSES)
    model = UNet(3, depth=1, width=2)
    nothing = torch.full((2, 4, 4), IGNORED, dtype=torch.uint8)
    for batch in Batch(torch.zeros(2, 3, 4, 4), nothing), Batch([], []):
        assert task.figures(task.evaluate(model, batch)) == {"miou": 0.0, "pixel_accuracy": 0.0, "loss": 0.0}


def evaluated(rank):
    config = typed(
        {
            "data": {"name": "digit_scenes", "scenes": 68, "size": 64, "mean": [0.5] * 3, "std": [0.3] * 3},
            "task": {"name": "segment"},
            "model": {"name": "unet"},
        }
    )
    world = ranks_world(rank)
    parts = build(config, world)
    torch.manual_seed(0)
    nn.init.normal_(parts.model.head.weight)
    return evaluate(parts.model, parts.task, parts.data.eval, TrainConfig(), world)


def test_figures_are_the_same_to_the_last_digit_for_any_number_of_ranks():
    (want,) = run_ranks(evaluated, 1)
    assert want["eval/images"] == 17
    assert 0 < want["eval/miou"] < 0.2
    for ranks in 2, 3:
        for figures in run_ranks(evaluated, ranks):
            assert {n: v for n, v in figures.items() if n != "eval/loss"} == {
                n: v for n, v in want.items() if n != "eval/loss"
            }
            # Ranks have fewer threads each, and convolutions then add up in another order
            assert figures["eval/loss"] == pytest.approx(want["eval/loss"], rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 9, 7)], ids=["an-image", "other-classes"])
def test_a_model_with_other_scores_is_refused(shape):
    wanted = rf"gives scores {re.escape(str([*shape]))} for images \[2, 3, 9, 7\]: .* scores \[2, 3, H, W\]"
    with pytest.raises(UserError, match=wanted):
        Segment(CLASSES).loss(lambda _: torch.zeros(shape), Batch(torch.zeros(2, 3, 9, 7), torch.zeros(2, 9, 7)))


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (1, 1), (65, 71)], ids=str)
def test_the_unet_takes_images_of_any_size(size):
    model = UNet(5, depth=3, width=2).eval()
    assert model(torch.zeros(2, 3, *size)).shape == (2, 5, *size)
    assert model(torch.zeros(0, 3, *size)).shape == (0, 5, *size)


def test_pictures_are_image_truth_and_prediction_in_the_colours_of_the_legend():
    task = Segment(CLASSES)
    scores = torch.zeros(1, 3, 4, 6)
    scores[:, 1] = 1.0
    mask = torch.ones(4, 6, dtype=torch.uint8)
    mask[0] = 0
    pixels = [torch.full((3, 4, 6), 7, dtype=torch.uint8)]
    mask[3, 5] = IGNORED
    (picture,) = task.pictures(lambda _: scores, Batch([torch.zeros(3, 4, 6)], [mask]), pixels)
    assert (picture.panels, picture.caption) == (("image", "truth", "prediction"), "74% of the pixels right")
    assert picture.image.shape == (3, 4, 6 * 3 + 2 * 2)
    colours = [[in_hex(tuple(picture.image[:, y, x].tolist())) for x in (0, 13, 21)] for y in range(4)]
    ground, tree, ignored = (task.legend[name] for name in ("ground", "tree", "ignored"))
    assert colours == [["#070707", ground, tree], *[["#070707", tree, tree]] * 2, ["#070707", ignored, tree]]


def test_each_class_has_a_colour_of_its_own():
    legend = Segment([str(i) for i in range(150)]).legend
    assert [*legend] == [*map(str, range(150)), "ignored"]
    assert len(set(legend.values())) == 151


def test_the_chart_has_each_classs_pixels_as_shares_of_it():
    (confusion,) = Segment(CLASSES).charts({"matrix": torch.tensor([[3.0, 1, 0], [0, 0, 0], [2, 2, 4]])})
    assert (confusion.rows, confusion.columns, confusion.unit) == (CLASSES, CLASSES, "%")
    assert confusion.values == [[0.75, 0.25, 0.0], [None] * 3, [0.25, 0.25, 0.5]]


@pytest.mark.ci
@pytest.mark.slow
def test_a_run_leaves_figures_pictures_and_a_program(tmp_path):
    words = ["task=segment", "train.steps=30", "launch.nproc=2", "run.name=r", "data.scenes=60"]
    code, said = finished(PYTHON, *words, root=tmp_path)
    assert code == 0, said
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["objective"] == result["metrics"]["eval/miou"]
    assert math.isfinite(result["metrics"]["eval/loss"])
    assert re.search(r"eval/iou +background: \d+", said)
    assert len(list((tmp_path / "r" / "pictures").glob("*.png"))) == 8
    page = (tmp_path / "r" / "report.html").read_text()
    assert page.count("<span>prediction</span>") == 8
    assert ">confusion, %</text>" in page
    code, said = finished(PYTHON, "task=evaluate", f"checkpoint={tmp_path / 'r'}", root=tmp_path / "none")
    assert (code, f"{result['objective']:.2%}" in said) == (0, True), said
