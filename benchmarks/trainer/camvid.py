"""The study of streets: what each norm comes to at one image a rank, on CamVid over 8 ranks of this machine.

    python -m benchmarks camvid DATA [--runs FOLDER] [--plot FILE] [WORD ...]

It takes an hour on two cores; the same command goes on. DATA holds {train,val}/{images,masks}/ and classes.txt, as
data=mask_folder has it. Each point is a run of `experiment=camvid`. The tables have, as mean ± standard deviation over
seeds, the mean IoU at native size, with running statistics and with exact ones of 8 training batches, what the drift
monitor saw at the end of training, of the worst layer, and the IoU of each class.
"""

from functools import partial

from benchmarks.trainer import norms
from benchmarks.trainer.norms import metric
from benchmarks.trainer.study import image_folder, worst

STUDY = norms.Study(
    "camvid",
    "CamVid, 8 ranks of one image",
    {
        "val mIoU, %": metric("miou"),
        "with exact statistics, %": metric("recalibrated_miou"),
        "pixel accuracy, %": metric("pixel_accuracy"),
        "effective batch of the worst layer": worst("n_eff", min),
        "dead channels of the worst layer": worst("dead", max),
    },
    ("IoU of each class, %", "iou_"),
    {
        "val mIoU, %": "Mean IoU on CamVid, %",
        "effective batch of the worst layer": "Effective batch size of the worst layer",
    },
)

add_options = partial(norms.add_options, STUDY, image_folder)
measure = partial(norms.measure, STUDY)
