"""One Docker engine, with the image on it, for all tests that ask for it."""

import os
from pathlib import Path

import pytest

from tests.cluster import engine as docker
from tests.cluster.tools import require


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """A Docker engine, for this session; SYNCBN_TEST_ENGINE=FOLDER keeps its images there for the next one."""
    require(*docker.COMMANDS, packages=docker.PACKAGES, root=True)
    kept = os.environ.get("SYNCBN_TEST_ENGINE")
    with docker.engine(Path(kept) if kept else tmp_path_factory.mktemp("engine"), keep=bool(kept)) as started:
        yield started


@pytest.fixture(scope="session")
def image(engine):
    """The image of the Dockerfile, built on a base made here: its name."""
    engine.import_base()
    engine.build()
    return docker.IMAGE


@pytest.fixture
def runs(tmp_path):
    """A folder that the user of the image may write to, to be mounted as its runs."""
    folder = tmp_path / "runs"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    return folder
