"""Train a network: `python train.py --help` lists every key, README.md has examples."""

import hydra
from omegaconf import DictConfig

from syncbn.trainer import launch


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    return launch.run_job(config)


if __name__ == "__main__":
    launch.enter(main)
