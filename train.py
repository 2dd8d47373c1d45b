"""Train a network: `python train.py --help` lists every key, README.md has examples."""

import os
import signal
import sys
from typing import NoReturn

ENDED, EXIT_CODE = "error: ended by SIGINT", 128 + signal.SIGINT


def end(*_: object) -> NoReturn:
    """End at once, whatever is being imported."""
    os.write(2, f"{ENDED}\n".encode())
    os._exit(EXIT_CODE)


if __name__ == "__main__":
    # Ctrl-C would show where in an import it came
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, end)
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("syncbn: starting, some seconds", file=sys.stderr, flush=True)

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from syncbn.trainer.job import launch  # noqa: E402


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    return launch.run_job(config)


if __name__ == "__main__":
    try:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        launch.enter(main)
    except KeyboardInterrupt:
        print(ENDED, file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
