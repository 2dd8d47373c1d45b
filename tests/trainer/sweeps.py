"""Sweeps whose points take no time: the real doors, Hydra, sweepers and launchers, and a stand-in for the training."""

import json
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from syncbn.trainer.config import as_dict, typed
from syncbn.trainer.errors import Ended, RanksFailed, UserError
from syncbn.trainer.job import launch, one_run, sweep
from syncbn.trainer.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]


def quick(composed):
    """A run without ranks: its objective follows from its config, and so does how it ends."""
    config = one_run.named(typed(composed))
    folder = RunFolder(config.run)
    folder.refuse_other(as_dict(config))
    if folder.finished(as_dict(config)):
        print(f"{folder.path} is finished")
        return one_run.objective(folder)
    if config.norm.name == "torch":
        raise UserError("norm=torch on cpu: it needs GPUs")
    if config.seed == 13:
        raise RanksFailed("rank 0 failed with exit code 1", 1, "ZeroDivisionError: seed 13")
    if config.seed == 75:
        raise Ended("ended by SIGINT", 130)
    if config.seed == 2:
        raise KeyboardInterrupt
    print(f"trains {folder.path}")
    folder.create(as_dict(config))
    value = {"sync": 0.9, "local": 0.8}[config.norm.name] + 0.01 * config.seed - abs(config.optim.lr - 0.1)
    folder.result.write_text(json.dumps({"objective": value}))
    return value


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def main(config):
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.one_point(config, quick)
    return quick(config)


if __name__ == "__main__":
    launch.enter(main)
