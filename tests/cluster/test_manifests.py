"""What cannot be run here is held to what its readers publish; what it makes of a node is run on this machine."""

import copy
import os
import re
import subprocess
from contextlib import ExitStack

import pytest
import yaml

from tests.cluster.schemas import HERE, LAUNCH, manifests, problems
from tests.cluster.tools import require
from tests.launch.jobs import ROOT, free_port, job

pytestmark = pytest.mark.cluster

TRAINJOB, RUNTIME, *CLAIMS = manifests(LAUNCH / "trainjob.yaml")
(SKY,) = manifests(LAUNCH / "sky.yaml")
KUBEFLOW = yaml.safe_load((HERE / "kubeflow.yaml").read_text())
SKYPILOT = yaml.safe_load((HERE / "skypilot.yaml").read_text())
POD = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
RUN = ["run.name=r", "wandb.mode=disabled", "launch.device=cpu", "train.steps=4"]


def test_every_script_is_clean_to_shellcheck():
    require("shellcheck", packages="shellcheck")
    scripts = [p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch") or p.read_bytes().startswith(b"#!")]
    assert {"torchrun.sh", "slurm.sbatch"} <= {script.name for script in scripts}
    scripts += [ROOT / "benchmarks" / "gpu.sh", ROOT / ".ci" / "run", ROOT / ".ci" / "cluster"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("manifest", [TRAINJOB, RUNTIME], ids=lambda manifest: manifest["kind"])
def test_the_trainjob_has_the_fields_that_kubeflow_publishes(manifest):
    assert manifest["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert problems(manifest, KUBEFLOW[manifest["kind"]]) == []


def test_the_sky_task_has_the_fields_that_skypilot_publishes():
    assert problems(SKY, SKYPILOT) == []


WRONG = {
    "unknown": (("spec", "trainer", "gpus"), 8, ".spec.trainer.gpus: no such field"),
    "type": (("spec", "trainer", "numNodes"), "2", ".spec.trainer.numNodes: '2' is no integer"),
    "item": (("spec", "trainer", "args"), [1], ".spec.trainer.args[0]: 1 is no string"),
    "missing": (("spec",), {}, ".spec: lacks runtimeRef"),
}


@pytest.mark.parametrize(("place", "value", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_found(place, value, said):
    manifest = copy.deepcopy(TRAINJOB)
    *path, last = place
    section = manifest
    for name in path:
        section = section[name]
    section[last] = value
    assert problems(manifest, KUBEFLOW["TrainJob"]) == [said]


def test_the_parts_of_the_trainjob_name_each_other():
    assert TRAINJOB["spec"]["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    (container,) = POD["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shm": "/dev/shm", "runs": "/app/runs", "data": "/app/data"}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    claims = {volumes[name]["persistentVolumeClaim"]["claimName"] for name in ("runs", "data")}
    assert claims == {claim["metadata"]["name"] for claim in CLAIMS}
    assert container["image"] == TRAINJOB["spec"]["trainer"]["image"]
    name = TRAINJOB["metadata"]["name"]
    assert environment()["PET_RDZV_ENDPOINT"] == f"{name}-node-0-0.{name}:29500"


def test_a_pod_has_longer_to_end_than_its_ranks_to_save():
    (seconds,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", (LAUNCH / "torchrun.sh").read_text())
    assert POD["terminationGracePeriodSeconds"] > int(seconds)


def environment():
    """What the TrainJob sets for torchrun itself."""
    return {variable["name"]: variable["value"] for variable in TRAINJOB["spec"]["trainer"]["env"]}


def pod(node, port):
    """What a container of the TrainJob runs, with what Kubeflow's torch plugin adds to its variables."""
    trainer = TRAINJOB["spec"]["trainer"]
    added = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(node), "PET_MASTER_PORT": "29500"}
    here = {"PET_MASTER_ADDR": "localhost", "PET_RDZV_ENDPOINT": f"localhost:{port}"}
    return trainer["command"], {**environment(), **added, **here}


def sky_node(node, port):
    """What SkyPilot runs on a node, and the variables that it sets."""
    run = SKY["run"].replace(":29400", f":{port}").replace('run.root="$HOME/runs"', "")
    variables = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_NODE_RANK": str(node)}
    return ["bash", "-c", run.replace("$ARGS", '"$@"'), "run"], {
        **variables,
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
    }


@pytest.mark.parametrize("node", [pod, sky_node])
def test_two_nodes_with_the_variables_that_the_carrier_sets_train_as_one(node, tmp_path):
    port = free_port()
    with ExitStack() as stack:
        nodes = []
        for i in range(2):
            command, variables = node(i, port)
            path = f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"
            nodes.append(stack.enter_context(job([*command, *RUN], root=tmp_path / "runs", PATH=path, **variables)))
        assert [one.wait() for one in nodes] == [0, 0], nodes[0].said + nodes[1].said
    assert "2 × 4 images on cpu" in nodes[0].said + nodes[1].said
    assert (tmp_path / "runs" / "r" / "result.json").exists()
