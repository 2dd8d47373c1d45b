"""One rank of those that torchrun starts on one GPU: its share of given.pt's training step, written to <rank>.pt.

torchrun --standalone --nproc-per-node=2 -m tests.op.nccl_ranks FOLDER; over gloo where there is no GPU.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.op.steps import train_layer


def moved(value, device):
    return {name: moved(t, device) for name, t in value.items()} if isinstance(value, dict) else value.to(device)


def main(folder: Path) -> None:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    layer, xs, dys = torch.load(folder / "given.pt", weights_only=False)
    rank = dist.get_rank()
    answers = train_layer(rank, layer.to(device), *([t.to(device) for t in shares] for shares in (xs, dys)))
    torch.save(moved(answers, "cpu"), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
