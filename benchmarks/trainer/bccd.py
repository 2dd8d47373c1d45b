"""The study of blood cells: what each norm comes to at two images a rank, on BCCD over 4 ranks of this machine.

    python -m benchmarks bccd DATA [--runs FOLDER] [--plot FILE] [WORD ...]

It takes an hour on two cores; the same command goes on. DATA holds VOCdevkit/VOC2007, as data=voc_detection has it.
Each point is a run of `experiment=bccd` with two images on each of 4 ranks in place of one on each of 8. The tables
have, as mean ± standard deviation over seeds, COCO's average precisions, AP50 with running statistics and with exact
ones of training batches, what the drift monitor saw at the end of training, of the worst layer, and the AP of each
class.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.measure.records import Result
from benchmarks.trainer import norms
from benchmarks.trainer.norms import metric
from benchmarks.trainer.study import worst

STUDY = norms.Study(
    "bccd",
    "BCCD, 4 ranks of two images",
    {
        "val AP50, %": metric("ap50"),
        "with exact statistics, %": metric("recalibrated_ap50"),
        "val AP, %": metric("ap"),
        "effective batch of the worst layer": worst("n_eff", min),
    },
    ("AP of each class, %", "class_ap_"),
    {
        "val AP50, %": "AP50 on BCCD, %",
        "effective batch of the worst layer": "Effective batch size of the worst layer",
    },
)
TWO_IMAGES = ("launch.nproc=4", "data.batch_per_rank=2")


def voc_folder(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{folder} is no folder")
    return folder


add_options = partial(norms.add_options, STUDY, voc_folder)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    options.words = [*TWO_IMAGES, *options.words]
    yield from norms.measure(STUDY, options)
