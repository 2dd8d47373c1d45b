"""What a task measures of batches: sums, added over ranks in one message, and rows, gathered in the samples' order."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.trainer.errors import UserError
from syncbn.trainer.world import World


class Totals:
    """Named sums over batches, kept on the device in float64; reading them is the only wait.

    shapes: of each sum, by name, the same on every rank.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], world: World):
        self.shapes, self.world = dict(shapes), world
        sizes = sum(math.prod(shape) for shape in self.shapes.values())
        self.values = torch.zeros(sizes, dtype=torch.float64, device=world.device)
        self.bad_steps = torch.zeros((), dtype=torch.float64, device=world.device)
        self.images = self.skipped = self.steps = 0

    def add(self, sums: dict[str, Tensor], images: int, skipped: int = 0, bad: Tensor | None = None) -> None:
        """Add the sums of a batch, unless it was part of a bad step; its images, and those it had to do without."""
        values = torch.cat([sums[name].double().reshape(-1) for name in self.shapes])
        self.values += values if bad is None else values.masked_fill(bad, 0.0)
        self.images += images
        self.skipped += skipped

    def add_step(self, bad: Tensor) -> None:
        """Count one optimiser step, which came to nothing if bad, [] bool; the same on every rank."""
        self.bad_steps += bad
        self.steps += 1

    def reduce(self) -> "Reduced":
        """The sums over all ranks; then start again. Collective."""
        counts = self.values.new_tensor([self.images, self.skipped])
        message = self.world.sum(torch.cat([self.values, counts, self.bad_steps.view(1)])).cpu()
        values, (images, skipped, bad_steps) = message[:-3], message[-3:].tolist()
        pieces = values.split([math.prod(shape) for shape in self.shapes.values()])
        sums = {name: piece.view(self.shapes[name]) for name, piece in zip(self.shapes, pieces, strict=True)}
        reduced = Reduced(sums, images, skipped, bad_steps / self.world.size, self.steps)
        self.values.zero_()
        self.bad_steps.zero_()
        self.images = self.skipped = self.steps = 0
        return reduced

    def state_dict(self) -> dict[str, Any]:
        """What this rank has added since it last started again."""
        counts = {"images": self.images, "skipped": self.skipped, "steps": self.steps}
        return {"values": self.values, "bad_steps": self.bad_steps, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values.copy_(state["values"])
        self.bad_steps.copy_(state["bad_steps"])
        self.images = state.get("images", 0)  # checkpoints had none before 2026-11-28
        self.skipped, self.steps = state["skipped"], state["steps"]


class Reduced(NamedTuple):
    """Sums over batches and ranks, float64 on the CPU, and how much they are of; skipped: images."""

    sums: dict[str, Tensor]
    images: float
    skipped: float
    bad_steps: float
    steps: int


class Gathered:
    """Rows of each sample, kept in float64 where they are until all ranks give each other theirs.

    shapes: of one row, by name, the same on every rank; [n, *shape] is what a sample has, n as it likes.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], world: World):
        self.shapes, self.world = dict(shapes), world
        self.places: list[int] = []
        self.rows: dict[str, list[Tensor]] = {name: [] for name in self.shapes}

    def add(self, places: Sequence[int], rows: Mapping[str, Sequence[Tensor]]) -> None:
        """Add the rows of a batch, whose samples have these places in the data set."""
        for name, shape in self.shapes.items():
            if len(rows[name]) != len(places) or any(each.shape[1:] != shape for each in rows[name]):
                shapes = ", ".join(str([*each.shape]) for each in rows[name][:3])
                raise UserError(
                    f"the task's rows {name!r} of {len(places)} samples are {len(rows[name])} tensors ({shapes}, ...): "
                    f"give one of [{', '.join(['n', *map(str, shape)])}] for each sample"
                )
            self.rows[name] += [each.detach().to(self.world.device, torch.float64) for each in rows[name]]
        self.places += places

    def gather(self) -> dict[str, list[Tensor]]:
        """By name a tensor [n, *shape] for each sample, in the order of the data set, on the CPU. Collective."""
        if not self.shapes:
            return {}
        of_place: dict[int, dict[str, Tensor]] = {}
        for message in self.world.each(self._packed()):
            of_place |= self._unpacked(message.cpu())
        return {name: [of_place[place][name] for place in sorted(of_place)] for name in self.shapes}

    def _packed(self) -> Tensor:
        """One vector: how many samples, their places, how many rows of each name they have, and all the rows."""
        lengths = [len(each) for rows in self.rows.values() for each in rows]
        head = torch.tensor([len(self.places), *self.places, *lengths], dtype=torch.float64, device=self.world.device)
        return torch.cat([head, *(each.reshape(-1) for rows in self.rows.values() for each in rows)])

    def _unpacked(self, message: Tensor) -> dict[int, dict[str, Tensor]]:
        samples = int(message[0])
        places, lengths, values = message[1:].split(
            [samples, samples * len(self.shapes), len(message) - 1 - samples * (1 + len(self.shapes))]
        )
        of_place: dict[int, dict[str, Tensor]] = {int(place): {} for place in places}
        begin = 0
        for (name, shape), of_name in zip(self.shapes.items(), lengths.view(len(self.shapes), samples), strict=True):
            for place, length in zip(of_place, of_name.long().tolist(), strict=True):
                end = begin + length * math.prod(shape)
                of_place[place][name] = values[begin:end].view(length, *shape)
                begin = end
        return of_place
