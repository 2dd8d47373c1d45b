"""What an error in the middle of a run means to its user."""

import re
import resource

import torch
import torch.distributed as dist
from torch import nn

from syncbn.trainer import norms, world
from syncbn.trainer.config import Config
from syncbn.trainer.data.workers import no_shared_memory
from syncbn.trainer.errors import UserError, some
from syncbn.trainer.tasks import BOXES
from syncbn.trainer.training.loop import BadSteps
from syncbn.trainer.training.state import Training

# What DDP says of parameters, by their places among those that train
UNUSED = re.compile(r"[Pp]arameter indices which did not receive grad for rank \d+: ([\d ]+)")


class LostRank(RuntimeError):
    """Another rank did not come; the text says which, if that is known."""


def explained(error: BaseException, training: Training, config: Config, rank: int) -> BaseException:
    """The error as the user can act on it, or as it is."""
    if isinstance(error, BadSteps):
        return diverged(error)
    if no_room := config.data.workers and no_shared_memory(error):
        return no_room
    if "Too many open files" in str(error):  # torch has its own error for it, too
        return too_many_files(config)
    if is_out_of_memory(error):
        return out_of_memory(error, config, rank)
    if isinstance(error, ValueError) and re.search("(more than 1|one) value per channel", str(error)):
        return one_value(error, training, config)
    if config.train.compile and (broken := graph_break(error)):
        return broken
    if isinstance(error, RuntimeError) and (left_out := UNUSED.search(str(error))):
        return unused(left_out[1], training)
    if lost_another(error):
        stall = training.desync and training.desync.stall  # of a network that is cut, the store's too
        return LostRank(stall or (world.reported_failure() if rank == 0 else None) or reason(error))
    return error


def diverged(error: BadSteps) -> UserError:
    mend = "try a lower optim.lr, a longer schedule.warmup_epochs or train.clip_norm=1"
    return UserError(
        f"{error}: every rank has stopped, and the last checkpoint is from before; {mend}", on_every_rank=True
    )


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def out_of_memory(error: BaseException, config: Config, rank: int) -> UserError:
    asked = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
    return UserError(
        f"rank {rank} has no memory left{f' ({asked[0].lower()})' if asked else ''}: lower "
        f"data.batch_per_rank={config.data.batch_per_rank}, and raise train.accumulate={config.train.accumulate} to "
        "keep the images of a step; train.precision=bf16 takes less too"
    )


def too_many_files(config: Config) -> UserError:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    mend = f"ulimit -n 4096, or lower data.workers={config.data.workers}"
    return UserError(f"a rank may open {most} files and needs more: {mend}")


def one_value(error: ValueError, training: Training, config: Config) -> UserError:
    """What to say where a norm was given one value per channel, of which there is no variance."""
    norm, scope = config.norm.name, norms.NORMS[config.norm.name].scope
    more_images = f"raise data.batch_per_rank={config.data.batch_per_rank}"
    mends = [] if scope == "image" else [more_images]  # each image is taken by itself, so more are no help
    if scope in ("rank", "sub-batch"):
        mends.append("take norm=sync, over all ranks")
    name, shape = at_layer(error, training.model.module)
    if not is_pooled(name, training.model.module):
        key = "model.image_size" if training.task.targets in BOXES else "data.size"
        mends.append(f"give larger images ({key}=)")
    where = (f", at {name}" if name else "") + (f", whose input is {shape}" if shape else "")
    return UserError(
        f"norm={norm} has one value per channel to take a variance of{where}: {', '.join([*mends, 'or norm=group'])}",
        # Else a rank may have fewer images than the others
        on_every_rank=training.data.even and not training.data.skips,
    )


def unused(places: str, training: Training) -> UserError:
    """What to say where DDP waits for gradients that do not come."""
    trained = [name for name, parameter in training.model.module.named_parameters() if parameter.requires_grad]
    names = [trained[int(place)] for place in places.split()]
    return UserError(
        f"{len(names)} of the model's parameters took no part in the loss of a step ({some(names, 4)}): "
        "remove them, freeze them (requires_grad=False), or "
        "train.find_unused_parameters=true, if it is meant so"
    )


def at_layer(error: BaseException, model: nn.Module) -> tuple[str, str]:
    """In which layer of the model the error was raised, the innermost, and the shape that it tells; "" if unknown."""
    names = {module: name for name, module in model.named_modules() if name}
    layer, frame = "", error.__traceback__
    while frame:
        module = frame.tb_frame.f_locals.get("self")
        layer = names.get(module, layer) if isinstance(module, nn.Module) else layer
        frame = frame.tb_next
    shape = re.search(r"[\[(]\d[\d, ]*[\])]", str(error))
    return layer, shape[0] if shape else ""


def is_pooled(layer: str, model: nn.Module) -> bool:
    """Whether the layer stands behind a pooling to one size, whatever that of the images: as in DeepLabv3's."""
    around = model.get_submodule(layer.rpartition(".")[0])
    return any(isinstance(module, nn.AdaptiveAvgPool2d) for module in around.children())


def graph_break(error: BaseException) -> UserError | None:
    """What to say if torch.compile cannot make one graph of the model."""
    from torch._dynamo.exc import Unsupported  # takes seconds, and is there already where a model was compiled

    if not isinstance(error, Unsupported):
        return None
    text = str(error)
    frames = re.findall(r'File "(.+)", line (\d+), in .*\n *(.+)', text.partition("from user code")[2])
    where = "at {}:{}, {!r}".format(*frames[-1]) if frames else "somewhere"
    return UserError(
        f"train.compile=true makes one graph of the model, and it breaks {where} ({text.splitlines()[0].rstrip('.')}): "
        "write that without a graph break, or train.compile=false",
        on_every_rank=True,
    )


def lost_another(error: BaseException) -> bool:
    """Whether a collective failed, as one does when another rank has died or does not come."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def reason(error: BaseException) -> str:
    """The first sentence, without the place in a C++ source that it begins with."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", line).partition(". ")[0]
