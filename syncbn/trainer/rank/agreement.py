"""What must be the same on every rank: packages, code, command line, kind of device, data. What differs is named."""

import hashlib
import json
import platform
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from syncbn.trainer import environment, world
from syncbn.trainer.config import Config
from syncbn.trainer.data import Data
from syncbn.trainer.errors import UserError, some
from syncbn.trainer.redact import redacted
from syncbn.trainer.world import World

ALIKE = "syncbn/alike"  # begins the store's keys: what each rank is, and what rank 0 makes of it
MOST = 3  # parts of what differs, told by name
PATIENCE = timedelta(minutes=10)  # for ranks that are still importing

Trait = str | list[str]
"""What a rank has: a word, or several parts in any order, of which those are told that not all ranks have."""


def alike(find_config: Callable[[], Config]) -> Config:
    """This rank's config, once it is known that the job's ranks can work together. Needs the store alone.

    Collective: every process of the job calls it, before any process group is made.

    Raises UserError, on every rank, if packages, code, conf/, command line or kind of device differ, or if a rank
    cannot do its part.
    """
    config, device, refused = None, "", None
    try:
        config = find_config()
        device = environment.choose_device(config.launch).type
        environment.check_gpus(config.launch, environment.local_size())
    except UserError as error:
        refused = str(error)
    mine = {"host": socket.gethostname(), "refused": refused, "traits": {**traits(), "the device": device}}
    if line := _judged(mine):
        raise UserError(line, on_every_rank=True)
    assert config is not None
    return config


def refuse_other_data(data: Data, ranks: World) -> None:
    """Raise UserError, on every rank, if the ranks have not all found the same data. Collective."""
    own = {f"the data's {name}": str(value) for name, value in data.fingerprint.items()}
    hosts, held = zip(*ranks.everyone((socket.gethostname(), own)), strict=True)
    if line := difference(held, hosts):
        raise UserError(f"the ranks differ in {line}: give every node the same data", on_every_rank=True)


def traits() -> dict[str, Trait]:
    """What this process is made of, and was asked for."""
    script = Path(sys.argv[0]).resolve().parent
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "syncbn's code": _files(Path(__file__).parents[2], "*.py"),
        "conf/": _files(script / "conf", "*.yaml"),
        "the command line": redacted(sys.argv[1:]),
    }


def difference(held: Sequence[Mapping[str, Trait]], hosts: Sequence[str]) -> str | None:
    """In what the ranks differ, and who has what; None if they are alike. held, hosts: [W]."""
    lines = []
    for name in held[0]:
        ranks: dict[str, list[int]] = {}
        for rank, text in enumerate(_distinct([each[name] for each in held])):
            ranks.setdefault(text, []).append(rank)
        if len(ranks) > 1:
            each = [f"{text} on {world.places(holders, hosts)}" for text, holders in ranks.items()]
            lines.append(f"{name}: {', '.join(each)}")
    return "; ".join(lines) or None


def _judged(mine: Mapping[str, Any]) -> str | None:
    """Rank 0's verdict on what all ranks are, on every rank: why they cannot work together."""
    store, rank = world.meet(), environment.rank()
    store.set(f"{ALIKE}/{rank}", json.dumps(mine))
    if rank > 0:
        store.wait([ALIKE], PATIENCE)
        return json.loads(store.get(ALIKE))
    keys = [f"{ALIKE}/{rank}" for rank in range(environment.size())]
    store.wait(keys, PATIENCE)
    everyone = [json.loads(store.get(key)) for key in keys]
    hosts = [each["host"] for each in everyone]
    line = difference([each["traits"] for each in everyone], hosts)
    if line:
        line = f"the ranks differ in {line}: give every node the same packages, code, conf/, command line and devices"
    else:
        line = world.refusals([each["refused"] for each in everyone], hosts)
    store.set(ALIKE, json.dumps(line))
    return line


def _distinct(values: Sequence[Trait]) -> list[str]:
    """Each rank's value as text: of several parts only those that not every rank has."""
    parts = [[value] if isinstance(value, str) else value for value in values]
    common = set.intersection(*map(set, parts))
    return [_some([part for part in each if part not in common]) for each in parts]


def _some(parts: Sequence[str]) -> str:
    return some(parts or ["nothing"], MOST, between=" ")


@cache
def _files(folder: Path, pattern: str) -> list[str]:
    """The files of a folder, each with what is in it: "trainer/rank/train.py (1a2b3c4d)"."""
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob(pattern))}
    return [f"{path.relative_to(folder)} ({digest[:8]})" for path, digest in digests.items()]
