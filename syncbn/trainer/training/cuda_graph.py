"""A training step as one CUDA graph: recorded once, then launched whole, so that the host no longer holds up a GPU."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from syncbn.trainer.data import Batch
from syncbn.trainer.data.structure import mapped, tensors
from syncbn.trainer.errors import UserError
from syncbn.trainer.tasks import Sums

Done = tuple[Tensor, list[tuple[Sums, int, int]]]
"""What an optimiser step leaves to be read: whether it was bad, [] bool, and of each batch the sums, the images, and
those that it did without."""

Step = Callable[[Iterable[Batch]], Done]
Capture = Callable[[Callable[[], Done]], Callable[[], Done]]

WARM_UP = 11  # steps of DDP's own before a capture: in the first ten it times itself, and waits for that


def prepare(device: torch.device) -> None:
    """Leave the default stream for good, before anything is built: DDP must be at home on the one to be captured.

    Raises UserError on a device without CUDA graphs.
    """
    if device.type != "cuda":
        raise UserError(f"train.cuda_graph=true on {device.type}: only GPUs have CUDA graphs; train.cuda_graph=false")
    torch.cuda.set_stream(torch.cuda.Stream(device))


def cuda_graph(work: Callable[[], Done]) -> Callable[[], Done]:
    """Record work without doing it. What is returned does it, and gives the same tensors each time, written anew."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: the threads that pin batches and watch over NCCL may go on meanwhile
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        outputs = work()

    def replay() -> Done:
        graph.replay()
        return outputs

    return replay


class Captured:
    """A step that is taken as it is WARM_UP times, then captured, and replayed from then on.

    Args:
        step: works on the device alone, never waits for it, and does the same for any batches of the same shapes.
        optimizer: what step steps, with fused=True; its rates may change between steps.
        capture: as cuda_graph.

    What a call returns is overwritten by the next one. Every rank captures at the same step, as NCCL wants it. The
    graph lives as long as this object, which must go before the process group: NCCL waits for it.

    Source: torch's notes on CUDA semantics, "Usage with DistributedDataParallel".
    """

    def __init__(self, step: Step, optimizer: Optimizer, capture: Capture = cuda_graph):
        self.step, self.optimizer, self.capture = step, optimizer, capture
        self.steps = 0
        self.batches: list[Batch] = []  # the memory that the graph reads
        self.rates: list[Tensor] = []
        self.replay: Callable[[], Done] | None = None

    def __call__(self, batches: Iterable[Batch]) -> Done:
        self.steps += 1
        if self.steps <= WARM_UP:
            return self.step(batches)
        if not self.batches:
            batches = list(batches)
            self.batches = [mapped(torch.empty_like, batch) for batch in batches]
            # float32, as the fused optimisers read it
            device = next(tensor.device for _, tensor in tensors(self.batches))
            self.rates = [torch.empty((), device=device) for _ in self.optimizer.param_groups]
        self._fill(batches)
        if self.replay is None:
            self.replay = self._record()
        return self.replay()

    def _fill(self, batches: Iterable[Batch]) -> None:
        for kept, batch in zip(self.batches, batches, strict=True):
            for (name, tensor), (_, into) in zip(tensors(batch), tensors(kept), strict=True):
                _copy(name, tensor, into)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])

    def _record(self) -> Callable[[], Done]:
        try:
            return self.capture(self._work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"train.cuda_graph=true and a step that cannot be captured ({str(error).splitlines()[0]}): model and "
                "task must not read a tensor's value (.item(), print, if), or train.cuda_graph=false",
                on_every_rank=True,
            ) from error

    def _work(self) -> Done:
        with _rates_from(self.rates, self.optimizer):
            return self.step(self.batches)


@contextmanager
def _rates_from(rates: list[Tensor], optimizer: Optimizer) -> Iterator[None]:
    """Have the optimiser read its rates from tensors: of a number, a graph would keep today's value."""
    numbers = [dict(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(lr=rate, capturable=True)
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, numbers, strict=True):
            group.clear()
            group.update(before)


def _copy(name: str, tensor: Tensor, into: Tensor) -> None:
    # copy_ alone would stretch a smaller batch over the larger memory
    if (tensor.shape, tensor.dtype) != (into.shape, into.dtype):
        raise UserError(
            f"train.cuda_graph=true and {name} {_kind(tensor)} after {_kind(into)}: one shape is all a graph takes; "
            "data.size=N makes images alike, or train.cuda_graph=false"
        )
    into.copy_(tensor)


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
