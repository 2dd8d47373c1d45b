"""What a CUDA graph is, on a CPU: the operations of a step with the memory they were given, to be done again."""

from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Tape(TorchDispatchMode):
    """Keeps each operation with its arguments as it is done, those of DDP and of collectives too."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in HOST_READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace != "profiler":  # a view stays one
            self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def run(self):
        for func, args, kwargs, first in self.operations:
            result = func(*args, **kwargs)
            for kept, again in zip(tree_leaves(first), tree_leaves(result), strict=True):
                if isinstance(again, torch.ScriptObject):
                    dist.Work.unbox(again).wait()
                elif isinstance(kept, torch.Tensor) and kept is not again:
                    kept.copy_(again)


def tape(work):
    """In the place of graph.cuda_graph. Unlike a GPU's, this recording does the work once: for the first replay."""
    recorded = Tape()
    # On a CPU alone the layer reads the count of its batch, to refuse one of one value
    with recorded, patch("syncbn.checks.check_count", lambda *_, **__: None):
        outputs = work()
    replays = 0

    def replay():
        nonlocal replays
        if replays:
            recorded.run()
        replays += 1
        return outputs

    return replay
