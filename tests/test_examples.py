"""The scripts under examples/: checked as far as a machine without SLURM and Kubernetes can, and run for real with
stand-ins for those."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import launch
import pytest
import yaml
from conftest import ROOT, SETTINGS, environment
from launch import Job
from torch.distributed.run import get_args_parser

from fastrex import cli

EXAMPLES = ROOT / "examples"
SLURM, MANIFEST = EXAMPLES / "slurm.sh", EXAMPLES / "kubeflow-pytorchjob.yaml"
GUARD_S = 300
LONGER = [*SETTINGS, "optim.epochs=6"]
LAST = "step-00000024"


def torchrun_options() -> set[str]:
    return set(get_args_parser()._option_string_actions)


def train_options() -> set[str]:
    return {name for parameter in cli.train.params for name in (*parameter.opts, *parameter.secondary_opts)}


def options(words: Iterable[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("-")}


def directives() -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", SLURM.read_text(), re.M)
    assert len(found) == SLURM.read_text().count("#SBATCH")
    return dict(found)


# The scripts as they stand.


def test_the_slurm_script_is_sound() -> None:
    assert os.access(SLURM, os.X_OK)
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text()
    assert "eval" not in text
    block = re.search(r"torchrun (--.*?-m fastrex)", text.replace("\\\n", " "), re.S)
    assert block is not None
    used = options(shlex.split(block[1]))
    assert used - {"-m"} <= torchrun_options(), used
    words = re.search(r"^train=\((.*)\)$", text, re.M)
    assert words is not None
    assert options(shlex.split(words[1])) <= train_options()
    # Signals that torchrun is told to hand on, and the one that SLURM sends: to the step, not to the script.
    name, seconds = directives()["signal"].split("@")
    assert f"SIG{name}" in next(w for w in shlex.split(block[1]) if w.startswith("--signals-to-handle"))
    timeout = re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", text)
    assert timeout is not None
    assert int(timeout[1]) < int(seconds)
    assert {"requeue", "open-mode", "time", "nodes"} <= directives().keys()


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian package shellcheck)")
    subprocess.run(["shellcheck", "--shell=bash", "--enable=quote-safe-variables", SLURM], check=True)


@pytest.mark.parametrize("number", ["", "12; touch broken", "$(touch broken)"])
def test_the_slurm_script_refuses_other_job_numbers(tmp_path: Path, number: str) -> None:
    env = {**environment(), "SLURM_JOB_ID": number}
    done = subprocess.run(["bash", SLURM, "demo"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "must be started by sbatch" in done.stderr
    assert not list(tmp_path.iterdir())


# Fields of PyTorchJob v1 (kubeflow.org) and of the core v1 objects below it that the example may use, with their
# types. What is not listed here is a spelling mistake until it has been looked up.
Schema = Any
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
VOLUME: Schema = {
    "name": NAME,
    "persistentVolumeClaim": {"claimName": NAME, "readOnly": bool},
    "emptyDir": {"medium": ["", "Memory"], "sizeLimit": QUANTITY},
}
RESOURCES: Schema = {"cpu": QUANTITY, "memory": QUANTITY, "nvidia.com/gpu": int}
CONTAINER: Schema = {
    "name": NAME,
    "image": str,
    "command": [[str]],
    "args": [[str]],
    "env": [[{"name": re.compile(r"[A-Z_]+"), "value": str}]],
    "ports": [[{"name": NAME, "containerPort": int}]],
    "resources": {"requests": RESOURCES, "limits": RESOURCES},
    "securityContext": {
        "allowPrivilegeEscalation": bool,
        "readOnlyRootFilesystem": bool,
        "capabilities": {"drop": [[str]]},
    },
    "volumeMounts": [[{"name": NAME, "mountPath": str, "readOnly": bool}]],
}
POD: Schema = {
    "terminationGracePeriodSeconds": int,
    "automountServiceAccountToken": bool,
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": int,
        "runAsGroup": int,
        "fsGroup": int,
        "fsGroupChangePolicy": ["OnRootMismatch", "Always"],
        "seccompProfile": {"type": ["RuntimeDefault", "Unconfined", "Localhost"]},
    },
    "containers": [[CONTAINER]],
    "volumes": [[VOLUME]],
}
REPLICA: Schema = {
    "replicas": int,
    "restartPolicy": ["Always", "OnFailure", "Never", "ExitCode"],
    "template": {"spec": POD},
}
PYTORCHJOB: Schema = {
    "apiVersion": ["kubeflow.org/v1"],
    "kind": ["PyTorchJob"],
    "metadata": {"name": NAME},
    "spec": {
        "elasticPolicy": {
            "rdzvBackend": ["c10d", "etcd", "etcd-v2"],
            "minReplicas": int,
            "maxReplicas": int,
            "maxRestarts": int,
            "rdzvConf": [[{"key": str, "value": str}]],
        },
        "runPolicy": {"cleanPodPolicy": ["None", "Running", "All"], "backoffLimit": int},
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
    },
}


def faults_of(value: Any, schema: Schema, place: str = "") -> list[str]:
    """What does not fit. A schema is a type, a pattern, a list of words, [[schema of the items]] or a dict of
    fields."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place}: {value!r} is no mapping"]
        unknown = [f"{place}: unknown field {name}" for name in value.keys() - schema.keys()]
        known = value.keys() & schema.keys()
        return unknown + [fault for n in known for fault in faults_of(value[n], schema[n], f"{place}.{n}")]
    if isinstance(schema, list) and isinstance(schema[0], list):
        if not isinstance(value, list) or not value:
            return [f"{place}: {value!r} is no list"]
        return [fault for i, item in enumerate(value) for fault in faults_of(item, schema[0][0], f"{place}[{i}]")]
    if isinstance(schema, list):
        return [] if value in schema else [f"{place}: {value!r} is none of {schema}"]
    if isinstance(schema, re.Pattern):
        return [] if schema.fullmatch(str(value)) else [f"{place}: {value!r} must match {schema.pattern}"]
    return [] if type(value) is schema else [f"{place}: {value!r} is no {schema.__name__}"]


@pytest.fixture(scope="module")
def manifest() -> Any:
    return yaml.safe_load(MANIFEST.read_text())


def test_the_manifest_has_only_fields_of_the_api(manifest: Any) -> None:
    assert faults_of(manifest, PYTORCHJOB) == []
    # The check itself sees what it is for.
    manifest = yaml.safe_load(MANIFEST.read_text().replace("restartPolicy: OnFailure", "restartPolicy: OnFail"))
    assert len(faults_of(manifest, PYTORCHJOB)) == 1
    manifest = yaml.safe_load(MANIFEST.read_text().replace("volumeMounts:", "volumemounts:"))
    assert len(faults_of(manifest, PYTORCHJOB)) == 1


def test_the_manifest_agrees_with_itself_and_with_the_commands(manifest: Any) -> None:
    spec = manifest["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    known = {"join_timeout", "read_timeout", "last_call_timeout", "close_timeout", "keep_alive_interval"}
    assert {c["key"] for c in elastic["rdzvConf"]} <= known | {"keep_alive_max_attempt"}
    words = [*container["command"], *container["args"]]
    split = words.index("train")
    assert words[0] == "torchrun"
    assert words[split - 2 : split] == ["-m", "fastrex"]
    assert options(words[:split]) - {"-m"} <= torchrun_options()
    assert options(words[split:]) <= train_options()
    assert words[words.index("--resume") + 1] == "auto"
    gpus = {container["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")}
    assert {f"--nproc-per-node={count}" for count in gpus} <= set(words)
    env = {e["name"]: e["value"] for e in container["env"]}
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    # The image is read-only: all that is written goes to a volume.
    writable = [Path(m["mountPath"]) for m in container["volumeMounts"] if not m.get("readOnly")]
    written = [words[words.index("--out") + 1], env["FASTREX_CACHE"], env["HOME"], env["TRITON_CACHE_DIR"], "/dev/shm"]
    for path in written:
        assert any(Path(path).is_relative_to(folder) for folder in writable), path
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_launcher_that_repeats_its_command_continues_the_run(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """--resume never, the default, then means auto; without --out there is nothing to continue."""
    from click.testing import CliRunner

    from fastrex import trainer

    asked: list[str] = []

    def train(config: object, **named: Any) -> trainer.Result:
        asked.append(named["resume"])
        return trainer.Result(tmp_path, "completed", 0)

    monkeypatch.setattr(trainer, "train", train)
    words = ["train", "demo", "--out", str(tmp_path)]
    for other in cli.RESTARTS:
        monkeypatch.delenv(other, raising=False)
    for count in ("", "0", "1", "2"):
        monkeypatch.setenv(name, count)
        CliRunner().invoke(cli.cli, words, standalone_mode=False)
    assert asked == ["never", "never", "auto", "auto"]
    failed = CliRunner().invoke(cli.cli, ["train", "demo"], standalone_mode=False)
    assert "pass --out RUN" in str(failed.exception)


# Dry runs.

SCONTROL = """#!/bin/sh
echo "$@" >> "$STAND_IN/scontrol"
[ "$1 $2" = "show hostnames" ] && printf 'localhost\\nlocalhost\\n'
exit 0
"""
SRUN = """#!{python}
# What srun does, on this machine: so many tasks with SLURM's variables and a core per node, signals handed on to
# them, and when one fails the others are ended.
import os, signal, subprocess, sys, time
words, asked = sys.argv[1:], {{}}
while words[0].startswith("--"):
    name, _, value = words.pop(0)[2:].partition("=")
    asked[name] = value
count, per_node = int(asked["ntasks"]), int(asked["ntasks-per-node"])
tasks, cores = [], sorted(os.sched_getaffinity(0))
def hand_on(number, frame):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, hand_on)
for task in range(count):
    own = {{"SLURM_PROCID": task, "SLURM_LOCALID": task % per_node, "SLURM_NODEID": task // per_node}}
    node = {{cores[own["SLURM_NODEID"] % len(cores)]}}
    env = {{**os.environ, **{{name: str(value) for name, value in own.items()}}}}
    tasks.append(subprocess.Popen(words, env=env, preexec_fn=lambda: os.sched_setaffinity(0, node)))
with open(os.environ["STAND_IN"] + "/srun", "w") as file:
    file.write(str(os.getpid()))
ending = float("inf")
while any(task.poll() is None for task in tasks):
    time.sleep(0.05)
    if asked.get("kill-on-bad-exit") == "1" and ending == float("inf") and any(task.poll() for task in tasks):
        hand_on(signal.SIGTERM, None)
        ending = time.monotonic() + 30
    if time.monotonic() > ending:
        hand_on(signal.SIGKILL, None)
sys.exit(max(abs(task.returncode) for task in tasks))
"""


def stand_ins(folder: Path, **programs: str) -> Path:
    """A folder for PATH with these programs, and the commands of this Python."""
    folder.mkdir()
    commands = {"fastrex": "fastrex", "torchrun": "torch.distributed.run"}
    shims = {name: f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n' for name, module in commands.items()}
    for name, text in {**shims, **programs}.items():
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


class Slurm:
    """What SLURM does with a script, for two nodes on this machine."""

    def __init__(self, folder: Path, launcher: str, nodes: int = 2, srun: str = "") -> None:
        self.folder, self.out = folder, folder / "run"
        programs = {"scontrol": SCONTROL, "srun": srun or SRUN.format(python=sys.executable)}
        self.tools = stand_ins(folder / "tools", **programs)
        self.job = free_job()
        # SLURM runs its own copy, made when the job was submitted.
        self.script = shutil.copy(SLURM, folder / "slurm_script")
        self.env = {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "STAND_IN": str(folder),
            "RUN": str(self.out),
            "LAUNCHER": launcher,
            "RANKS_PER_NODE": "1",
            "SLURM_JOB_ID": str(self.job),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "here[1-2]",
            "SLURM_CPUS_PER_TASK": "1",
        }

    def start(self, words: list[str], **more: str) -> Job:
        (self.folder / "srun").unlink(missing_ok=True)
        return launch.command(self.folder / "log", ["bash", str(self.script), *words], **self.env, **more)

    @property
    def requeued(self) -> bool:
        path = self.folder / "scontrol"
        return path.exists() and f"requeue {self.job}\n" in path.read_text()

    def signal_the_step(self) -> None:
        os.kill(int((self.folder / "srun").read_text()), getattr(signal, f"SIG{directives()['signal'].split('@')[0]}"))

    def status(self) -> dict[str, Any]:
        return json.loads((self.out / "status.json").read_text())


def free_job() -> int:
    """A job number whose port nobody uses."""
    for number in range(4000 + os.getpid() % 5000, 10000):
        with socket.socket() as box, contextlib.suppress(OSError):
            box.bind(("", 20000 + number))
            return 120000 + number
    raise AssertionError("no port is free between 20000 and 30000")


def tensors(run: Path) -> Mapping[str, str]:
    files = (run / "checkpoints" / LAST).glob("*.safetensors")
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert found
    return found


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, stripes: Path) -> Mapping[str, str]:
    """The last checkpoint of the same run on two ranks without accidents."""
    folder = tmp_path_factory.mktemp("quiet")
    words = ["train", "demo", *LONGER, "--data", str(stripes), "--out", str(folder / "run"), "--device", "cpu"]
    with launch.ranks(folder / "log", 2, launch.faulty(words)) as job:
        assert job.wait(GUARD_S) == [0, 0], job.output
    return tensors(folder / "run")


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_slurm_job_goes_on_after_its_time_limit(
    launcher: str, tmp_path: Path, stripes: Path, quiet: Mapping[str, str], report: Callable[..., None]
) -> None:
    slurm = Slurm(tmp_path, launcher)
    words = ["demo", *LONGER, "--data", str(stripes), "--device", "cpu"]
    with slurm.start(words) as job:
        steps = slurm.out / "metrics.jsonl"
        job.until(lambda: steps.exists() and steps.read_text().count("\n") > 2, GUARD_S)
        slurm.signal_the_step()
        assert job.wait(GUARD_S) == [0], job.output
    assert slurm.status()["state"] == "preempted", job.output
    assert slurm.requeued
    (tmp_path / "scontrol").unlink()
    with slurm.start(words, SLURM_RESTART_COUNT="1") as job:
        assert job.wait(GUARD_S) == [0], job.output
    assert "resumed from step-" in job.output
    assert slurm.status()["state"] == "completed"
    assert not slurm.requeued
    assert tensors(slurm.out) == quiet
    report("cluster", f"SLURM's time limit, requeued (dry run, {launcher})", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("settings", "code", "state"),
    [(["optim.lr=1e30", "optim.warmup_epochs=0"], 3, "diverged"), (["optim.batch_size=15000"], 1, None)],
)
def test_a_slurm_job_that_ends_badly_stays_out_of_the_queue(
    settings: list[str], code: int, state: str | None, tmp_path: Path, stripes: Path
) -> None:
    slurm = Slurm(tmp_path, "srun", nodes=1)
    with slurm.start(["demo", *SETTINGS, *settings, "--data", str(stripes), "--device", "cpu"]) as job:
        assert job.wait(GUARD_S) == [code], job.output
    assert (slurm.status()["state"] if state else (slurm.out / "status.json").exists()) == (state or False)
    assert not slurm.requeued


@pytest.mark.faults
def test_a_slurm_job_without_progress_stays_out_of_the_queue(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "srun", srun="#!/bin/sh\nexit 75\n")
    slurm.out.mkdir()
    (slurm.out / "status.json").write_text('{"state": "preempted"}')
    with slurm.start(["demo"]) as job:
        assert job.wait(GUARD_S) == [1], job.output
    assert "no progress" in job.output
    assert not slurm.requeued


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_the_container_trains_in_two_pods(
    kind: str, manifest: Any, tmp_path: Path, stripes: Path, quiet: Mapping[str, str], report: Callable[..., None]
) -> None:
    """The command of the manifest, with the variables that the operator sets, its volumes as folders."""
    spec = manifest["spec"]
    (container,) = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    elastic, port = spec["elasticPolicy"], str(launch.free_port())
    volumes = {"/data/imagenet": str(stripes), "/runs": str(tmp_path), "/tmp": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()

    def here(text: str) -> str:
        for mount, folder in volumes.items():
            if text == mount or text.startswith(f"{mount}/"):
                return folder + text.removeprefix(mount)
        return text

    words = [here(word) for word in (*container["command"], *container["args"])]
    words = [re.sub(r"^--nproc-per-node=\d+$", "--nproc-per-node=1", word) for word in words]
    words[words.index("trex")] = "demo"
    words += [*LONGER, "--device", "cpu"]
    tools = stand_ins(tmp_path / "tools")
    own = {e["name"]: here(e["value"]) for e in container["env"] if e["name"] != "FASTREX_CACHE"}
    env = {**own, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "0"}
    if kind == "PyTorchJob":
        env |= {
            "PET_RDZV_BACKEND": elastic["rdzvBackend"],
            "PET_RDZV_ENDPOINT": f"localhost:{port}",
            "PET_RDZV_CONF": ",".join(f"{c['key']}={c['value']}" for c in elastic["rdzvConf"]),
            "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
            "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        }
        pods = [env, env]
    else:
        env |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": port}
        pods = [{**env, "PET_NODE_RANK": str(number)} for number in range(2)]
    with contextlib.ExitStack() as stack:
        jobs = []
        for number, pod in enumerate(pods):
            command = ["taskset", "-c", str(core(number)), *words] if shutil.which("taskset") else words
            jobs.append(stack.enter_context(launch.command(tmp_path / f"pod{number}.log", command, **pod)))
        for job in jobs:
            assert job.wait(GUARD_S) == [0], "\n".join(j.output for j in jobs)
    assert tensors(tmp_path / "trex") == quiet
    report("cluster", f"Kubernetes {kind} in two pods (dry run)", injected=0, survived=0, bits_equal=True)


def core(number: int) -> int:
    """A pod has its own cores."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[number % len(cores)]
