"""What the config says of training and evaluating."""

from dataclasses import dataclass

from syncbn.trainer.errors import UserError
from syncbn.trainer.option import option


@dataclass
class TrainConfig:
    epochs: float = option(10.0, "passes over the training images ...")
    steps: int | None = option(None, "... or, if given, optimiser steps")
    accumulate: int = option(
        1, "forwards and backwards per optimiser step; the batch of a norm stays that of one forward"
    )
    precision: str = option("fp32", "fp32, or bf16 or fp16 (autocast: parameters and statistics stay fp32)")
    channels_last: bool = option(False, "memory format of images and convolutions")
    compile: bool = option(False, "torch.compile, the whole model in one graph")
    cuda_graph: bool = option(False, "GPUs only: each step after the 11th is one CUDA graph, launched at once")
    find_unused_parameters: bool = option(
        False, "for a model that leaves some out in some steps; it costs each step time"
    )
    ema: float = option(0.0, "decay per step of an average of all weights and buffers, used in eval; 0: none")
    clip_norm: float = option(0.0, "largest norm of the gradient; 0: any")
    max_bad_steps: int = option(
        10, "a step whose loss or gradient is not finite is left out; more in a row end the run"
    )
    log_every: int = option(10, "steps")
    eval_every: int | None = option(None, "steps; none: each epoch. A checkpoint is written at each eval")

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise UserError(f"train.precision={self.precision}: choose one of fp32, bf16, fp16")
        if not self.epochs > 0:
            raise UserError(f"train.epochs={self.epochs}: give more than 0")
        for name in "steps", "accumulate", "log_every", "eval_every":
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name}={value}: give 1 or more")
        if self.cuda_graph and self.find_unused_parameters:
            raise UserError(
                "train.cuda_graph=true with train.find_unused_parameters=true: a graph does the same in each step, and "
                "cannot look for what was left out; choose one of the two"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema={self.ema}: give a decay from 0 up to 1, such as 0.999")
        if self.max_bad_steps < 0:
            raise UserError(f"train.max_bad_steps={self.max_bad_steps}: give 0 (the first ends the run) or more")
        if self.clip_norm < 0:
            raise UserError(f"train.clip_norm={self.clip_norm}: give 0 (off) or more")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps or max(1, round(self.epochs * steps_per_epoch))


@dataclass
class EvalConfig:
    recalibrate: int = option(
        0, "training batches per rank whose exact statistics each eval is also done with (PreciseBN)"
    )

    def __post_init__(self) -> None:
        if self.recalibrate < 0:
            raise UserError(f"eval.recalibrate={self.recalibrate}: give 0 (off) or more batches")
