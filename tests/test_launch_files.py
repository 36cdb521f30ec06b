"""The files that start a training, accelerate's, Slurm's and Kubernetes': read and run as they will be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from latent_folders import four_latents, small_autoencoder, small_clip, write_latents

from shapeloom.errors import UserError
from shapeloom.launch.launch_file import environment, read_launch_file
from shapeloom.launch.ranks import main as main_of_ranks
from shapeloom.models.denoiser import Denoiser
from shapeloom.models.transformer import Block
from shapeloom.training.loop import REQUEUE_EXIT_CODE

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
FILES = sorted((LAUNCH / "accelerate").glob("*.yaml"))
LAYOUTS = {
    name: layout
    for layout, names in {
        "one": ["cpu", "gpu"],
        "ddp": ["cpu2", "ddp", "ddp-nodes"],
        "fsdp2": ["fsdp2", "fsdp2-nodes"],
        "zero1": ["zero1"],
        "zero2": ["zero2"],
        "zero3": ["zero3", "zero3-offload"],
    }.items()
    for name in names
}
TINY = [
    *("--preset", "tiny", "cpu=true", "model.width=32", "model.heads=2", "model.layers=2", "batch_size=4"),
    *("log_every=1", "eval_every=0", "eval_samples=1", "sheet_samples=0", "trackers=[]", "save_every=0"),
]

# Counts a step every 20 ms in a file, and keeps the contract of training/loop.py: signalled, it ends with 75.
STAND_IN = """
import os, pathlib, signal, sys, time
asked, file = [], pathlib.Path(sys.argv[1]) / ("rank" + os.environ["RANK"])
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))
step = int(file.read_text()) if file.exists() else 0
while step < int(sys.argv[2]):
    step += 1
    if step == int(os.environ.get("DIE_AT", -1)) and os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(0.02)
    file.write_text(str(step))
    if asked:
        time.sleep(0.3 * int(os.environ["RANK"]))  # ranks save at their own pace
        (file.parent / ("asked" + os.environ["RANK"])).write_text(str(len(asked)))
        sys.exit(75)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment in which the module `stand_in` can be started."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "latents"
    return write_latents(folder, small_autoencoder(), small_clip(), four_latents())


def until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# --- accelerate ------------------------------------------------------------------------------------------------------


def test_every_layout_has_a_file() -> None:
    assert {path.stem for path in FILES} == set(LAYOUTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_each_file(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no" and not config.dynamo_config, "the run's own settings decide these"
    assert config.num_machines == (2 if path.stem.endswith("nodes") else 1)
    assert config.main_process_ip is None and path.read_text().count("NCCL") == 0, "no site's network"
    file = read_launch_file(path)
    assert file.layout == LAYOUTS[path.stem] and file.cpu == path.stem.startswith("cpu")
    assert file.processes == config.num_processes and file.machines == config.num_machines


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-nodes"])
def test_fsdp2_as_accelerate_understands_it(name: str) -> None:
    with patch_environment(**environment(read_launch_file(LAUNCH / "accelerate" / f"{name}.yaml"))):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.activation_checkpointing and plugin.mixed_precision_policy is None
    assert plugin.transformer_cls_names_to_wrap == [Block.__name__]
    model = Denoiser(width=32, heads=2, layers=3)
    plugin.set_auto_wrap_policy(model)
    wrapped = [m for m in model.modules() if plugin.auto_wrap_policy(module=m, recurse=False, nonwrapped_numel=0)]
    assert wrapped == list(model.blocks)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3-offload"])
def test_zero_as_accelerate_understands_it(name: str) -> None:
    with patch_environment(**environment(read_launch_file(LAUNCH / "accelerate" / f"{name}.yaml"))):
        plugin = DeepSpeedPlugin()
    config, device = plugin.deepspeed_config, "cpu" if name.endswith("offload") else "none"
    assert config["zero_optimization"]["stage"] == plugin.zero_stage == int(name[4])
    for offloaded in ("offload_optimizer", "offload_param"):
        assert config["zero_optimization"][offloaded]["device"] == device
    decided_by_the_run = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [config[key] for key in (*decided_by_the_run, "gradient_clipping")] == ["auto"] * 4
    assert "bf16" not in config and "fp16" not in config and not plugin.zero3_init_flag


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ranks_get_the_environment_of_accelerate_launch(path: Path, monkeypatch) -> None:
    """Against the parsing that `accelerate launch` itself does of file and command line."""
    from accelerate.commands import launch

    seen: dict[str, str] = {}
    for start in ("prepare_simple_launcher_cmd_env", "prepare_deepspeed_cmd_env", "prepare_multi_gpu_env"):
        real = getattr(launch, start)

        def spy(args, real=real):
            answer = real(args)
            seen.update(answer[1] if isinstance(answer, tuple) else answer)
            raise KeyboardInterrupt

        monkeypatch.setattr(launch, start, spy)
    words = ["--config_file", str(path), "--num_machines", "1", "--main_process_port", "0", "-m", "module"]
    with pytest.raises(KeyboardInterrupt):
        launch.launch_command(launch_command_parser().parse_args(words))
    ours = environment(read_launch_file(path))
    theirs = {name: value for name, value in seen.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    theirs["ACCELERATE_CONFIG_DS_FIELDS"] = ours.get("ACCELERATE_CONFIG_DS_FIELDS", "")  # of no use without a JSON file
    assert {name: value for name, value in ours.items() if name in theirs} == {
        name: value for name, value in theirs.items() if value
    }


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("use_cpu: false", "use_cpu: false\nnum_gpus: 8", "num_gpus"),
        ("zero_stage: 2", "zero_stagee: 2", "unknown key zero_stagee"),
        ("zero_stage: 2", "zero_stage: 5", "zero_stage 5 is not one of 1, 2, 3"),
        ("num_machines: 1", "num_machines: 3", "must be a multiple of num_machines 3"),
        ("distributed_type: DEEPSPEED", "distributed_type: MEGATRON_LM", "MEGATRON_LM is not supported"),
        ("distributed_type: DEEPSPEED", "distributed_type: FSDP", "set fsdp_version: 2"),
        ("distributed_type: DEEPSPEED", "distributed_type: NONSENSE", "NONSENSE"),
        ("zero_stage: 2", "deepspeed_config_file: a.json", "leave deepspeed_config_file out"),
        ("compute_environment: LOCAL_MACHINE", "- [", "accelerate file"),
    ],
)
def test_files_that_will_not_do(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = (LAUNCH / "accelerate" / "zero2.yaml").read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=said) as caught:
        read_launch_file(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_accelerate_launch_trains_two_steps(latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["accelerate.commands.launch", "--config_file", LAUNCH / "accelerate" / "cpu.yaml", "-m"]
    words += ["shapeloom.training.denoiser", "--data", latents, "--out", out, *TINY, "steps=2"]
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "state" / "00000002" / "progress.json").read_text())["step"] == 2


# --- the ranks of one machine ----------------------------------------------------------------------------------------


def ranks(*words: object, env: dict[str, str], file: str = "cpu2.yaml") -> subprocess.Popen[str]:
    command = ["shapeloom.launch.ranks", "--accelerate", LAUNCH / "accelerate" / file, *words]
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_are_signalled_once_and_asked_to_be_started_again(stand_in, tmp_path: Path, number: int) -> None:
    started = ranks("stand_in", tmp_path, 1000, env=stand_in)
    until(lambda: (tmp_path / "rank0").exists() and (tmp_path / "rank1").exists())
    started.send_signal(number)
    assert started.wait(60) == REQUEUE_EXIT_CODE
    assert [(tmp_path / f"asked{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    step = int((tmp_path / "rank0").read_text())
    again = ranks("stand_in", tmp_path, step + 5, env=stand_in)
    assert again.wait(60) == 0, "it goes on from there, to its end"


def test_a_rank_that_dies_ends_the_others(stand_in, tmp_path: Path) -> None:
    started = ranks("--patience-s", 0.2, "stand_in", tmp_path, 100_000, env={**stand_in, "DIE_AT": "3"})
    output = started.communicate(timeout=60)[0]
    assert started.returncode == 7 and "rank 1 failed (7); ending the others" in output


def test_several_machines_number_their_ranks(tmp_path: Path, stand_in) -> None:
    (tmp_path / "stand_in.py").write_text("import os; print('rank', os.environ['RANK'], os.environ['LOCAL_RANK'])")
    words = ("--ranks", 2, "--nodes", 2, "--node", 1, "--main", "first", "stand_in")
    lines = ranks(*words, env=stand_in, file="fsdp2-nodes.yaml").communicate(timeout=60)[0].splitlines()
    assert sorted(line for line in lines if line.startswith("rank")) == ["rank 2 0", "rank 3 1"]


@pytest.mark.parametrize(
    ("words", "file", "said"),
    [
        (["--ranks", 2, "stand_in"], "cpu.yaml", "is for one process, not 2"),
        (["--nodes", 2, "stand_in"], "ddp-nodes.yaml", "--nodes needs --main"),
        (["--nodes", 2, "--node", 2, "--main", "a", "stand_in"], "ddp.yaml", "--node 2 of --nodes 2"),
        (["stand_in"], "dpp.yaml", "dpp.yaml does not exist (in launch/accelerate/ there are cpu.yaml, "),
    ],
)
def test_ranks_that_cannot_be(monkeypatch, words: list[object], file: str, said: str) -> None:
    command = ["ranks", "--accelerate", LAUNCH / "accelerate" / file, *words]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError) as caught:
        main_of_ranks()
    assert said in str(caught.value)


# --- Slurm -----------------------------------------------------------------------------------------------------------

SBATCH = sorted((LAUNCH / "slurm").glob("*.sbatch"))
# Starts tasks as srun does, passes signals on to them as Slurm signals a step, and ends with the largest exit code.
SRUN = """#!{python}
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:]]
options = []
while words[0].startswith("--"):
    options.append(words.pop(0))
open("srun-options", "w").write(" ".join(options))
n, tasks = int(os.environ["SLURM_NTASKS"]), []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
for i in range(n):
    env = dict(os.environ, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
    tasks.append(subprocess.Popen(words, env=env, start_new_session=True))
open("srun-pid", "w").write(str(os.getpid()))
codes = [task.wait() for task in tasks]
os.remove("srun-pid")
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
case "$1" in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >>requeued ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with srun and scontrol on its path, and what Slurm tells a job of two ranks."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
    job |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable}
    yield {**os.environ, **job, "ACCELERATE": str(LAUNCH / "accelerate" / "cpu2.yaml")}


def submit(script: Path, *words: object, folder: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(script), *map(str, words)],
        env=env,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("script", SBATCH, ids=lambda path: path.name)
def test_sbatch_scripts_say_what_requeueing_needs(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    for line in ("--requeue", "--signal=USR1@600", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text
    assert "NCCL" not in text and "--partition" not in text and "--account" not in text
    accelerate = text.partition("ACCELERATE:-")[2].partition("}")[0]
    file = read_launch_file(LAUNCH.parent / accelerate)
    assert f"#SBATCH --nodes={file.machines}\n" in text and file.processes == 8 * file.machines


def test_two_scripts_differ_only_in_how_many_machines() -> None:
    node, nodes = (path.read_text().splitlines() for path in SBATCH)
    differ = [(a, b) for a, b in zip(node, nodes, strict=True) if a != b and not a.startswith("# ")]
    assert [a.split("=")[0] for a, _ in differ if not a.startswith("#  ")] == ["#SBATCH --nodes", "ACCELERATE"]


def test_a_signalled_job_saves_is_queued_again_and_ends(slurm, latents: Path, tmp_path: Path) -> None:
    """A real training on two gloo ranks, signalled as Slurm signals a step; the other script does the same."""
    script, out = SBATCH[1], tmp_path / "run"
    words = ["--data", latents, "--out", out, *TINY, "processes=2"]
    first = submit(script, *words, "steps=100000", folder=tmp_path, env=slurm)
    until(lambda: (out / "log.jsonl").is_file() and (tmp_path / "srun-pid").is_file())
    os.kill(int((tmp_path / "srun-pid").read_text()), signal.SIGUSR1)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == REQUEUE_EXIT_CODE, output
    assert (tmp_path / "requeued").read_text().split() == [slurm["SLURM_JOB_ID"]]
    assert (tmp_path / "srun-options").read_text() == "--kill-on-bad-exit=0 --wait=600"
    step = int((out / "state" / "latest").read_text())
    assert step > 0 and "Traceback" not in output
    second = submit(script, *words, f"steps={step + 3}", folder=tmp_path, env=slurm)
    assert second.communicate(timeout=120) and second.returncode == 0
    assert (tmp_path / "requeued").read_text().split() == [slurm["SLURM_JOB_ID"]], "what has ended is not queued again"
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, step + 4)), "no step is lost"


def test_a_job_that_fails_is_not_queued_again(slurm, tmp_path: Path) -> None:
    job = submit(SBATCH[0], "--preset", "nonsense", folder=tmp_path, env=slurm | {"SLURM_NTASKS": "1"})
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 1 and "unknown preset 'nonsense'" in output and not (tmp_path / "requeued").exists()


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def test_the_kubernetes_job() -> None:
    settings, service, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "job.yaml").read_text())
    values, name = settings["data"], job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert spec["completions"] == spec["parallelism"] == int(values["NODES"])
    assert pod["terminationGracePeriodSeconds"] >= 600 and pod["subdomain"] == service["metadata"]["name"]
    container = pod["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(values["RANKS"])
    assert container["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
    on_exit = spec["podFailurePolicy"]["rules"][0]
    assert on_exit["action"] == "Ignore"
    assert on_exit["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    file = read_launch_file(LAUNCH.parent / values["ACCELERATE"])
    assert file.machines > 1 and not file.cpu
    main = next(word for word in container["command"] if word.startswith("--main="))
    assert main == f"--main={name}-0.{service['metadata']['name']}"


def test_the_kubernetes_command_trains(latents: Path, tmp_path: Path) -> None:
    """The pod's own command with its variables filled in, for one pod of two CPU ranks."""
    settings, _, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "job.yaml").read_text())
    out = tmp_path / "run"
    values = settings["data"] | {"NODES": "1", "RANKS": "2", "JOB_COMPLETION_INDEX": "0", "DATA": str(latents)}
    values |= {"OUT": str(out), "PRESET": "tiny", "ACCELERATE": str(LAUNCH / "accelerate" / "cpu2.yaml")}
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    for key, value in values.items():
        command = [word.replace(f"$({key})", value) for word in command]
    command = [word for word in command if not word.startswith(("--main=", "--port="))]
    assert command[0] == "python" and not any("$(" in word for word in command)
    done = subprocess.run([sys.executable, *command[1:], *TINY[2:], "steps=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((out / "state" / "00000002").glob("part-*-of-00002.safetensors"))) == 2
