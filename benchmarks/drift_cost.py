"""What a DriftMonitor costs: the time of training steps with it over that without, its reading at log steps included.

    torchrun --nproc-per-node 2 -m benchmarks.drift_cost [--model resnet20 --size 32] [--device cpu]

Three copies of one net take turns, so that a slow minute of the machine meets all of them: off, and the two levels. A
turn is the steps from one reading to the next, with SGD and DDP. One rank does as well, with nobody to send to.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import syncbn
from benchmarks.timing import Step, gpu_clock, host_ms, machine, quartiles, ratios, turns
from syncbn.trainer import models
from syncbn.trainer.models import ModelConfig
from syncbn.trainer.run import BROADCAST_BUFFERS
from syncbn.trainer.world import schedule_as_batch


def contestant(level: str, options: argparse.Namespace) -> Step:
    """A turn: so many training steps, and a reading if there is a monitor."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    images = torch.randn(options.images, 3, options.size, options.size, device=device)
    labels = torch.zeros(options.images, dtype=torch.int64, device=device)
    net = models.build(ModelConfig(name=options.model), 10).to(device)
    net = syncbn.convert(net.to(memory_format=torch.channels_last))  # pyright: ignore[reportCallIssue]
    images = images.contiguous(memory_format=torch.channels_last)
    model = DistributedDataParallel(net, **{BROADCAST_BUFFERS: False})  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    monitor = None if level == "off" else syncbn.DriftMonitor(net, level=level)  # pyright: ignore[reportArgumentType]

    def turn() -> None:
        for _ in range(options.steps):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if monitor:
            monitor.read()

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--images", type=int, default=8, help="a rank")
    parser.add_argument("--steps", type=int, default=10, help="of a turn, from reading to reading")
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(1)
        schedule_as_batch()
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    steps = {level: contestant(level, options) for level in ("off", "rank", "image")}
    # The same number of turns on every rank
    clock = gpu_clock(1, queued=False) if options.device == "cuda" else host_ms
    times = turns(steps, 0, clock, options.turns)
    if dist.get_rank() == 0:
        print(machine(options.device))
        told = f"{options.images} images of {options.size}², {options.turns} turns of {options.steps} steps"
        print(f"{options.model}, {dist.get_world_size()} ranks × {told}")
        for level in times:
            low, middle, high = quartiles(times[level])
            r_low, r_middle, r_high = ratios(times, level, "off")
            a_step = f"{middle / options.steps:8.2f} ms a step ({low / options.steps:.2f} {high / options.steps:.2f})"
            print(f"{level:<6} {a_step}   of off, turn by turn: {r_middle:.3f} ({r_low:.3f} {r_high:.3f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
