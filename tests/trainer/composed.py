"""A config as the command line makes it, without a job."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from syncbn.trainer import config
from syncbn.trainer.errors import UserError

CONF = Path(__file__).parents[2] / "conf"


def composed(*overrides):
    """The config that the command line's overrides make, or the line that they are refused with."""
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return config.typed(compose("config", overrides=list(overrides)))
        except UserError as error:
            return str(error)
        except (HydraException, OmegaConfBaseException) as error:
            return config.explain(error)
