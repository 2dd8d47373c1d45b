"""A job that is asked to end: every rank learns of it after the same step."""

import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.trainer.errors import STOP_SIGNALS
from syncbn.trainer.world import World


class Preempted(Exception):
    """The job was asked to end; all ranks raise it together."""


class Stop:
    """Whether a signal has asked any rank to end.

    The question goes around while the next step is computed: an answer is a step old, and never waited for. It has a
    group of its own, on the CPU, so that it waits for no GPU either.

    Collective: every rank makes one, and asks at the same points.
    """

    def __init__(self, world: World):
        self.heard = False
        self.group = world.control()
        self.asking: tuple[Any, Tensor] | None = None

    def listen(self) -> None:
        """From here on SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask for an end instead of being one."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._hear)

    def asked(self) -> bool:
        """Whether a rank had been asked when all were here the last time. Collective."""
        if self.group is None:
            return self.heard
        answer = False
        if self.asking:
            work, flag = self.asking
            work.wait()
            answer = bool(flag)
        flag = torch.tensor(float(self.heard))
        self.asking = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True), flag
        return answer

    def _hear(self, *_: object) -> None:
        self.heard = True
