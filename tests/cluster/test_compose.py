"""launch/compose.yaml on a real engine: nodes on a network of their own train as one, are lost, stopped, and go on."""

import os
import signal
from contextlib import contextmanager

import pytest
import yaml

from tests.cluster.engine import until
from tests.launch.jobs import ROOT, differing, figures, saved_steps, state

pytestmark = pytest.mark.cluster

FILE = ROOT / "launch" / "compose.yaml"
STEPS = 60
RUN = [
    "run.name=r", "wandb.mode=disabled", "launch.timeout_s=60", "train.log_every=5", "train.eval_every=1000",
    "checkpoint.every=5", f"train.steps={STEPS}",
]  # fmt: skip


class Project:
    """What docker-compose makes of the file: two nodes of two ranks, and the rendezvous."""

    def __init__(self, engine, name, runs):
        self.engine, self.name, self.runs = engine, name, runs
        self.settings = {"IMAGE": "syncbn:test", "NODES": "2", "NPROC": "2", "SHM_SIZE": "256mb"}
        self.settings |= {"ARGS": " ".join(RUN), "RUNS": str(runs)}

    def compose(self, *words):
        return self.engine.ask(
            "docker-compose", f"--file={FILE}", f"--project-name={self.name}", "--profile=cpu", *words, **self.settings
        )

    @property
    def nodes(self):
        return [f"{self.name}_node_{i}" for i in (1, 2)]

    def tell(self):
        return self.compose("logs", "--no-color")

    def until_past(self, step):
        """Wait until the checkpoint of the step, or of a later one, is there."""
        until(lambda: max(saved_steps(self.runs / "r"), default=0) >= step, log=self.tell)

    def end(self, timeout_s=240.0):
        """Wait until no node runs, or is started again: their exit codes."""
        until(lambda: {self.state(node) for node in self.nodes} == {"exited"}, timeout_s, log=self.tell)
        return [self.engine.inspect(node, ".State.ExitCode") for node in self.nodes]

    def state(self, container):
        return self.engine.inspect(container, ".State.Status")

    def lose(self, container):
        """Kill all of a container at once, as a crash of its machine does; to the engine it is no wish of ours."""
        os.kill(self.engine.inspect(container, ".State.Pid"), signal.SIGKILL)

    def holder_of_rank_0(self):
        return next(node for node in self.nodes if " images on cpu" in self.engine.docker("logs", node))


@contextmanager
def project(engine, name, runs):
    made = Project(engine, name, runs)
    try:
        made.compose("up", "--detach")
        yield made
    finally:
        made.compose("down", "--volumes", "--timeout=5")


@pytest.fixture(scope="module")
def undisturbed(engine, image, tmp_path_factory):
    """The runs of as many ranks in one container."""
    runs = tmp_path_factory.mktemp("undisturbed")
    os.chown(runs, 1000, 1000)
    engine.docker("run", "--rm", "--network=here", f"--volume={runs}:/app/runs", image, *RUN, "launch.nproc=4")
    return runs


def assert_same_run(runs, undisturbed):
    assert differing(state(runs / "r"), state(undisturbed / "r")) == []
    assert figures(runs / "r") == figures(undisturbed / "r")


@pytest.mark.ci
def test_two_nodes_of_two_ranks_train_as_one_of_four_and_may_be_asked_again(engine, image, runs, undisturbed):
    with project(engine, "plain", runs) as made:
        assert made.end() == [0, 0], made.tell()
        assert "4 × 4 images on cpu" in made.tell()
        assert_same_run(runs, undisturbed)
        # The rendezvous still runs, and has seen its agents close their meeting
        made.compose("up", "--detach")
        assert made.end() == [0, 0], made.tell()
        assert "runs/r is finished" in made.tell()


LOST = {
    "rank-0s-node": lambda made: made.holder_of_rank_0(),
    "other-node": lambda made: next(node for node in made.nodes if node != made.holder_of_rank_0()),
    "rendezvous": lambda made: f"{made.name}_rendezvous_1",
}


@pytest.mark.parametrize("which", LOST.values(), ids=LOST)
def test_whatever_container_is_lost_the_run_goes_on_to_the_same_weights(engine, image, runs, undisturbed, which):
    with project(engine, "lost", runs) as made:
        made.until_past(15)
        lost = which(made)
        made.lose(lost)
        until(lambda: engine.inspect(lost, ".RestartCount") == 1, log=made.tell)
        assert made.end() == [0, 0], made.tell()
        assert "going on from step" in made.tell()
        assert_same_run(runs, undisturbed)


def test_stop_saves_within_the_grace_period_and_up_goes_on(engine, image, runs, undisturbed):
    with project(engine, "stopped", runs) as made:
        made.until_past(15)
        made.compose("stop")
        assert made.end() == [75, 75], made.tell()
        (line,) = [line for line in made.tell().splitlines() if "preempted at step" in line]
        assert f"preempted at step {max(saved_steps(runs / 'r'))}:" in line
        made.compose("up", "--detach")
        assert made.end() == [0, 0], made.tell()
        assert_same_run(runs, undisturbed)


@pytest.mark.parametrize("profile, service, nproc", [("cpu", "node", "2"), ("gpu", "gpu", "gpu")], ids=["cpu", "gpu"])
def test_the_file_is_valid_for_each_profile(engine, profile, service, nproc):
    said = engine.ask(
        "docker-compose", f"--file={FILE}", f"--profile={profile}", "config", NODES="3", ARGS="a=1 b=[2,3]"
    )
    services = yaml.safe_load(said)["services"]
    node = services[service]
    assert (node["environment"]["PET_NNODES"], node["environment"]["PET_NPROC_PER_NODE"]) == ("3", nproc)
    assert (node["command"], node["scale"]) == ("a=1 b=[2,3]", 3)
