"""The launchers in examples/, without their programs: what they start parses, and Slurm's script requeues as it says.

TrainJobs, and pods of either kind, are checked with the models that Kubeflow publishes. What KubeRay adds is held by
names, which were compared with its CRD; so is SkyPilot's file, which SkyPilot 0.14.1 parsed: it cannot be installed
beside what the tests need.
"""

import os
import re
import shlex
import signal
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from ttt_e2e.cli.main import COMMANDS, main
from ttt_e2e.cli.parser import parse
from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import preset
from ttt_e2e.inner_loop.activations import activation_bytes
from ttt_e2e.model.cluster import rows_at_a_time
from ttt_e2e.training.parallelize import mesh_shape

EXAMPLES = Path(__file__).parents[1] / "examples"
NODES = GPUS = 8
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-8]",
    "SLURM_JOB_NUM_NODES": str(NODES),
    "SLURM_GPUS_PER_NODE": f"h100:{GPUS}",
    "DATA": "tokens",
    "RUN": "run",
}
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": str(NODES),
    "SKYPILOT_NUM_GPUS_PER_NODE": str(GPUS),
    "SKYPILOT_TASK_ID": "task",
}
KUBEFLOW = {"PET_MASTER_ADDR": "node-0", "PET_MASTER_PORT": "29500"}


def read_yaml(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def start(folder: Path, command: list[str], variables: dict[str, str]) -> "subprocess.Popen[str]":
    """Start a launcher in `folder`, with the commands there in place of real ones."""
    for path in [*folder.glob("*"), *folder.glob("ttt-e2e/bin/*")]:
        path.chmod(0o755)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
    environment = os.environ | paths | variables
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("launcher", ["slurm", "kubernetes", "skypilot"])
def test_what_is_started_parses(launcher: str, tmp_path: Path) -> None:
    """By torchrun's parser and by ours; batch and mesh split over the GPUs."""
    torchrun = tmp_path / ("ttt-e2e/bin/torchrun" if launcher == "skypilot" else "torchrun")
    torchrun.parent.mkdir(exist_ok=True, parents=True)
    torchrun.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\" > words\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\n"$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'node%s\\n' 1 2 3 4 5 6 7 8\n")
    if launcher == "slurm":
        command, variables = ["bash", str(EXAMPLES / "slurm/train.sbatch"), "seed=3"], SLURM
    elif launcher == "skypilot":
        command, variables = ["bash", "-c", read_yaml("skypilot/train.yaml")[0]["run"]], SKYPILOT
    else:
        command, variables = read_yaml("kubernetes/trainjob.yaml")[1]["spec"]["trainer"]["command"], KUBEFLOW
    assert start(tmp_path, command, variables).wait() == 0
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    options = get_args_parser().parse_args(words)
    assert options.module and options.training_script == "ttt_e2e" and options.max_restarts == 3
    head = {"slurm": "node1", "kubernetes": "node-0", "skypilot": "10.0.0.1"}[launcher]
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", f"{head}:29500") and options.rdzv_id
    if launcher != "kubernetes":  # where variables say it
        assert (options.nnodes, options.nproc_per_node) == (str(NODES), str(GPUS))
    arguments = parse(options.training_script_args, COMMANDS)
    assert arguments.command == "train" and arguments.resume
    config = override(preset(arguments.preset), arguments.settings)
    assert config.train.seed == (3 if launcher == "slurm" else 0)
    assert rows_at_a_time(config.train, NODES * GPUS) == 1
    assert mesh_shape(config.train, NODES * GPUS) == (1, NODES * GPUS)


@pytest.mark.parametrize(
    ("training", "stopped", "code", "requeued"),
    [
        ("exit 0", False, 0, False),
        ("exit 1", False, 1, False),
        ("trap 'kill $!; exit 1' TERM; echo started; sleep 60 & wait", True, 1, True),
        ("trap 'kill $!; exit 0' TERM; echo started; sleep 60 & wait", True, 0, False),
    ],
)
def test_slurm_requeues_what_was_stopped(
    tmp_path: Path, training: str, stopped: bool, code: int, requeued: bool
) -> None:
    """What ends by itself, well or not, does not come back."""
    (tmp_path / "srun").write_text(f"#!/bin/bash\necho $$ > pid\n{training}\n")
    (tmp_path / "scancel").write_text('#!/bin/bash\necho "$@" >> calls\nkill -TERM "$(cat pid)"\n')
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ "$1" = show ] || echo "$@" >> calls\n')
    batch = start(tmp_path, ["bash", str(EXAMPLES / "slurm/train.sbatch")], SLURM)
    assert batch.stdout is not None
    if stopped:
        assert batch.stdout.readline() == "started\n"
        batch.send_signal(signal.SIGUSR1)
    assert batch.wait() == code
    batch.stdout.close()
    calls = tmp_path / "calls"
    expected = ["--signal=TERM 7"] * stopped + ["requeue 7"] * requeued
    assert (calls.read_text().splitlines() if calls.exists() else []) == expected


def test_trainjob() -> None:
    """The models drop a field that the API does not have: nothing may be missing afterwards."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    claim, job = read_yaml("kubernetes/trainjob.yaml")
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (NODES, GPUS)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": GPUS}
    (patch,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = patch["template"]["spec"]["template"]["spec"]
    mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "x" not in models.TrainerV1alpha1TrainJob.from_dict(job | {"x": 1}).to_dict()


def test_rayservice() -> None:
    """Ray checks its part of the file."""
    schema = pytest.importorskip("ray.serve.schema", reason="the extra ray is not installed")
    from ttt_e2e.server.ray import RayOptions

    (service,) = read_yaml("kubernetes/rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert service["spec"].keys() == {"serveConfigV2", "rayClusterConfig"}
    assert service["spec"]["rayClusterConfig"].keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    config = schema.ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "ttt_e2e.server.ray:app"
    options, (replica,) = RayOptions(**application.args), application.deployments
    assert (replica.name, replica.num_replicas, options.memory) == ("Replica", options.replicas, 8 << 30)
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert head.keys() == {"rayStartParams", "template"}
    counts = {"replicas", "minReplicas", "maxReplicas"}
    assert workers.keys() == {"groupName", "rayStartParams", "template", *counts}
    assert {type(value) for group in (head, workers) for value in group["rayStartParams"].values()} == {str}
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == options.replicas
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == replica.ray_actor_options.num_gpus
    assert "RAY_USAGE_STATS_ENABLED" in [one["name"] for one in container["env"]]
    image = (EXAMPLES / "kubernetes/Dockerfile.ray").read_text()
    assert f"=={service['spec']['rayClusterConfig']['rayVersion']}" in image and container["image"] in image
    assert container["image"] == head["template"]["spec"]["containers"][0]["image"]


def holds(whole: Any, part: Any) -> bool:
    """Whether `part` is in `whole`, which may have defaults beside it."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(holds(whole.get(name), value) for name, value in part.items())
    if isinstance(part, list):
        return isinstance(whole, list) and len(whole) == len(part) and all(map(holds, whole, part))
    return bool(whole == part)


def test_pods_of_the_rayservice() -> None:
    """The models drop a field that pods do not have."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (service,) = read_yaml("kubernetes/rayservice.yaml")
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert holds(models.IoK8sApiCoreV1PodSpec.from_dict(pod).to_dict(), pod)
        (container,) = pod["containers"]
        for wrong in (pod | {"x": 1}, pod | {"containers": [container | {"x": 1}]}):
            assert not holds(models.IoK8sApiCoreV1PodSpec.from_dict(wrong).to_dict(), wrong)


def test_skypilot_task() -> None:
    (task,) = read_yaml("skypilot/train.yaml")
    assert task.keys() == {"name", "resources", "num_nodes", "workdir", "volumes", "setup", "run"}
    assert task["resources"].keys() == {"accelerators", "network_tier", "job_recovery"}
    assert task["resources"]["accelerators"] == f"H100:{GPUS}" and task["num_nodes"] == NODES


def test_the_guide_shows_what_cost_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands parse, its table has what they print, and the first one's output stands there."""
    monkeypatch.setattr("ttt_e2e.inner_loop.activations.activation_bytes", cache(activation_bytes))
    guide = (EXAMPLES.parent / "docs/cluster.md").read_text()
    commands = [line for block in re.findall(r"^```bash\n(.*?)^```", guide, re.M | re.S) for line in block.splitlines()]
    for command in commands:
        assert parse(shlex.split(command)[1:], COMMANDS).command in ("cost", "prepare", "train")
    printed = []
    for command in (command for command in commands if " cost " in command):
        assert main(shlex.split(command)[1:]) == 0
        printed.append(capsys.readouterr().out)
    output = next(block for block in re.findall(r"^```text\n(.*?)^```", guide, re.M | re.S) if "weights" in block)
    assert output in printed[0]
    rows = [re.findall(r"^(\d+) .* (\S+ s) +\S+ +(\d+ %)$", text, re.M) for text in printed[1:]]
    for (gpus, *one), (_, *groups) in zip(*rows, strict=True):
        cells = " | ".join([*one, *groups])
        assert re.search(rf"^\| {int(gpus):,} \| [\d,]+ \| {re.escape(cells)} \|$", guide, re.M), gpus
