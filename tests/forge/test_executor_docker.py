"""The docker executor on a toy image and toy stages. Without an engine only what needs none is tested."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from forge.executor import Neighbour, Task
from forge.executor.container import container_job
from forge.executor.docker import Docker
from forge.executor.engine import answers, machine_findings, neighbours, no_engine
from forge.finding import Refused
from forge.follow import StageFailed, follow
from forge.image import Image, fingerprint, machine_type
from forge.journal import Journal
from forge.mask import Mask
from forge.program import Program
from product import SERVER

BASE = "python:3.11-slim-bookworm"
REPO = Path(__file__).resolve().parents[2]
engine = pytest.mark.skipif(not answers(), reason="no Docker engine answers here")

STAGE = """\
    import json, os, signal, sys, time
    its = json.load(open(sys.argv[1]))
    if its["params"]["listens"]:
        signal.signal(signal.SIGTERM, lambda *_: (open(its["output"] + "/saved", "w"), sys.exit(1)))
    print(json.dumps({"event": "progress", "done": 1, "total": 1, "unit": "x", "note": ""}))
    print("to the log", file=sys.stderr)
    open(its["output"] + "/made.txt", "w").write(open(its["sources"]["words"][0]).read())
    open(os.environ["HOME"] + "/cache.txt", "w").write("x")
    for path in (its["inputs"]["base"] + "/x", "/annie/stages/x"):
        try:
            open(path, "w")
        except OSError:
            continue
        sys.exit(9)
    time.sleep(its["params"]["sleep"])
    sys.exit(its["params"]["code"])
    """


DOCKERFILE = (REPO / "stages/quantize/Dockerfile").read_text().replace("quantize", "toy")


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "repo/stages/toy").mkdir(parents=True)
    (tmp_path / "repo/stages/toy/Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "repo/stages/toy/__main__.py").write_text(textwrap.dedent(STAGE))
    folder = tmp_path / "repo/images/toy"
    folder.mkdir(parents=True)
    (folder / "Dockerfile").write_text(
        "ARG BASE\nFROM scratch AS wheels\nFROM ${BASE}\nRUN --mount=type=bind,from=wheels,target=/wheels ls"
        " /wheels\nWORKDIR /annie\n"
    )
    (tmp_path / "input").mkdir()
    (tmp_path / "words.txt").write_text("alpha")
    return tmp_path


def task(toy, **params):
    run = toy / "run"
    run.mkdir(exist_ok=True)
    job = {
        "stage": "toy",
        "params": {"code": 0, "sleep": 0, "listens": False, **params},
        "inputs": {"base": str(toy / "input")},
        "sources": {"words": [str(toy / "words.txt")]},
        "secrets": {},
        "output": str(toy / "output"),
        "scratch": str(toy / "scratch"),
        "seed": 1,
        "device": "cpu",
        "provenance": {},
    }
    environment = Image("toy", toy / "repo/images/toy", {"base": BASE})
    return Task("toy", Program("toy", environment, toy / "repo"), job, run, "01-toy")


def made(executor, task, said=print):
    """The task, whose environment and image are made."""
    executor.prepare(task.program.environment, said)
    executor.bake(task.program, said)
    return task


def test_the_job_in_a_container_has_no_path_of_the_host(toy):
    job, mounts = container_job(task(toy))
    assert str(toy) not in json.dumps(job)
    assert {target: read_only for _, target, read_only in mounts} == {
        "/inputs/base": True,
        "/sources/words/0/words.txt": True,
        "/output": False,
        "/scratch": False,
    }


def test_a_container_mounts_data_and_no_code(toy):
    executor, wanted = Docker(toy / "repo", toy / "home"), task(toy)
    spec = executor.spec(wanted, toy / "run/01-toy.json", container_job(wanted)[1])
    assert {target for _, target, _ in spec.mounts} == {
        "/job.json",
        "/inputs/base",
        "/sources/words/0/words.txt",
        "/output",
        "/scratch",
    }
    assert not any(Path(source).is_relative_to(toy / "repo") for source, _, _ in spec.mounts)


@engine
def test_a_stages_image_is_its_own_layer_on_its_environment(toy):
    (toy / "repo/stages/job.py").write_text("")
    (toy / "repo/stages/unused.py").write_text("")
    (toy / "repo/stages/toy/stage.toml").write_text("")
    (toy / "repo/stages/toy/__main__.py").write_text("import stages.job\n")
    executor = Docker(toy / "repo", toy / "home")
    program = made(executor, task(toy)).program
    described = executor.client.images.get(executor.baked(program)).attrs
    below = executor.client.images.get(executor.tag(program.environment)).attrs["RootFS"]["Layers"]
    layers = described["RootFS"]["Layers"]
    assert "annie/env-toy:latest" in executor.client.images.get(executor.tag(program.environment)).tags
    assert layers[: len(below)] == below and len(layers) > len(below)
    assert described["Config"]["Labels"] == {
        "io.annie.stage": "toy",
        "io.annie.environment": executor.tag(program.environment),
    }
    sources = ["--entrypoint=find", "annie/toy", "/annie", "-type", "f", "-name", "*[!c]"]
    found = subprocess.run(
        ["docker", "run", "--rm", *sources], capture_output=True, text=True, check=True
    ).stdout.split()
    assert sorted(found) == [
        "/annie/stages/job.py",
        "/annie/stages/toy/__main__.py",
        "/annie/stages/toy/stage.toml",
    ]


def test_the_same_files_give_the_same_context(toy, tmp_path_factory):
    """Whatever their times and modes are in the clone, and the caller's umask: a layer holds both, and any
    user of a container reads them.
    """
    program, seen = task(toy).program, []
    for time_, mode, umask in ((1_000_000_000, 0o600, 0o077), (1_500_000_000, 0o755, 0o022)):
        code = toy / "repo/stages/toy/__main__.py"
        os.utime(code, (time_, time_))
        code.chmod(mode)
        context, before = tmp_path_factory.mktemp("context"), os.umask(umask)
        try:
            program.copy(context)
        finally:
            os.umask(before)
        copied = context / "stages/toy/__main__.py"
        about = [(path.stat().st_mtime, path.stat().st_mode & 0o777) for path in (copied, copied.parent)]
        seen.append((about, copied.read_text()))
    assert seen[0] == seen[1] and seen[0][0] == [(0, 0o644), (0, 0o755)]


def test_an_image_is_named_by_what_goes_into_it(toy):
    executor, program = Docker(toy / "repo", toy / "home"), task(toy).program
    names = [executor.baked(program)]
    (toy / "repo/stages/toy/README.md").write_text("beside")
    (toy / "repo/stages/other.py").write_text("not imported")
    assert executor.baked(program) == names[0]
    for changed in ("stages/toy/__main__.py", "stages/toy/Dockerfile", "images/toy/Dockerfile"):
        with (toy / "repo" / changed).open("a") as file:
            file.write("# changed\n")
        names.append(executor.baked(program))
    assert len(set(names)) == 4 and all(name.startswith("annie/toy:") for name in names)


def test_a_stage_without_a_dockerfile_is_named(toy):
    (toy / "repo/stages/toy/Dockerfile").unlink()
    with pytest.raises(Refused, match="no Dockerfile") as refused:
        Docker(toy / "repo", toy / "home").bake(task(toy).program, print)
    assert "CONTRIBUTING.md" in str(refused.value)


@pytest.mark.parametrize("stage", sorted(path.parent.name for path in REPO.glob("stages/*/stage.toml")))
def test_every_stage_has_a_dockerfile_on_its_environment(stage):
    text = (REPO / "stages" / stage / "Dockerfile").read_text()
    assert "FROM ${ENVIRONMENT}" in text and f'ENTRYPOINT ["python3", "-m", "stages.{stage}"]' in text


def test_the_earlier_artifact_is_mounted_for_a_stage_that_is_given_it(toy):
    wanted = task(toy)
    given, mounts = container_job(replace(wanted, job={**wanted.job, "previous": str(toy / "earlier")}))
    assert given["previous"] == "/previous" and (str(toy / "earlier"), "/previous", True) in mounts
    assert "previous" not in container_job(wanted)[0]


@pytest.mark.parametrize("gpu", [False, True])
def test_a_task_with_a_gpu_has_the_one_more_mount_where_kernels_stay(toy, gpu):
    """Always at one path: Triton writes absolute paths beside what it compiled."""
    its, wanted = Docker(toy / "repo", toy / "home"), replace(task(toy), gpu=gpu)
    _, mounts = container_job(wanted)
    spec = its.spec(wanted, toy / "job.json", mounts)
    folder = toy / "home/kernels" / f"toy-{fingerprint(wanted.program.environment, 'docker')}"
    added = set(spec.mounts) - set(mounts) - {(str(toy / "job.json"), "/job.json", True)}
    assert added == ({(str(folder), "/kernels", False)} if gpu else set())
    assert spec.environment.get("ANNIE_KERNELS") == ("/kernels" if gpu else None)
    assert (f"--mount=type=bind,source={folder},target=/kernels" in spec.as_command()) == gpu
    assert str(toy) not in json.dumps(spec.environment)


@engine
def test_kernels_stay_for_the_next_container_and_belong_to_its_user(toy):
    """Without the GPU itself, which the engine may not have."""
    its = Docker(toy / "repo", toy / "home", user=(1234, 1234))
    (toy / "repo/stages/toy/__main__.py").write_text(
        textwrap.dedent("""\
        import os, pathlib
        folder = pathlib.Path(os.environ["ANNIE_KERNELS"])
        print(sorted(path.name for path in folder.iterdir()))
        (folder / "kernel").touch()
        """)
    )
    wanted = made(its, replace(task(toy), gpu=True))
    real = its.spec
    its.spec = lambda *of: replace(real(*of), gpu=False)
    said = [[line.text for line in its.logs(its.submit(wanted))] for _ in range(2)]
    assert said == [["[]"], ["['kernel']"]]
    assert (its.kernels(wanted) / "kernel").stat().st_uid == 1234


@engine
def test_an_image_with_a_seed_begins_with_its_kernels(toy):
    """The Dockerfile of docs/formats.md, Kernels, on a stand-in for a base, and a folder that another
    machine filled.
    """
    its = Docker(toy / "repo", toy / "home")
    shutil.copytree(REPO / "model", toy / "repo/model")
    name = "NVIDIA-GB10-580.95.05-torch-none-triton-none"
    (toy / "filled" / name / "triton").mkdir(parents=True)
    (toy / "filled" / name / "triton/k.cubin").write_text("code")
    dockerfile = re.search(r"```dockerfile\n(.*?)```", (REPO / "docs/formats.md").read_text(), re.DOTALL)[1]
    assert dockerfile.startswith("FROM nvcr.io/nvidia/pytorch:")
    stand_in = re.sub(r"FROM \S+", f"FROM {BASE}", dockerfile)
    subprocess.run(
        [
            "docker",
            "buildx",
            "build",
            "--load",
            "--quiet",
            "--tag=annie/toy-warm",
            "--file=-",
            str(toy / "filled"),
        ],
        input=stand_in,
        text=True,
        check=True,
    )
    (toy / "repo/stages/toy/__main__.py").write_text(
        textwrap.dedent("""\
        from model.layers import kernel_cache
        kernel_cache.identity = lambda: "NVIDIA-GB10-580.95.05-torch-none-triton-none"
        kept = kernel_cache.prepare(print).rglob("*.cubin")
        print(sorted(str(path.relative_to("/kernels")) for path in kept))
        """)
    )
    environment = Image("toy", toy / "repo/images/toy", {"base": "annie/toy-warm"})
    wanted = made(its, replace(task(toy), gpu=True, program=Program("toy", environment, toy / "repo")))
    real = its.spec
    its.spec = lambda *of: replace(real(*of), gpu=False)
    assert [line.text for line in its.logs(its.submit(wanted))] == [f"['{name}/triton/k.cubin']"]
    assert (its.kernels(wanted) / name / "triton/k.cubin").read_text() == "code"


def test_a_command_mounts_what_links_lead_to_and_has_no_path_of_the_host(toy):
    """The hub's cache: `snapshots/<commit>/config.json -> ../../blobs/<digest>`."""
    folder, blobs = toy / "hub/snapshots/1234", toy / "hub/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abcd").write_text("{}")
    (folder / "config.json").symlink_to("../../blobs/abcd")
    (folder / "torn.safetensors").symlink_to("../../blobs/nothing")
    its = Docker(toy / "repo", toy / "home")
    program = replace(task(toy).program, start="audit")
    words = its.command(program, [folder, "--vllm=0.31.0"])
    assert words[-5:] == [its.baked(program), "-m", "stages.toy.audit", "/read/0/1234", "--vllm=0.31.0"]
    assert {
        "--rm",
        "--network=none",
        "--read-only",
        "--entrypoint=python3",
        f"--mount=type=bind,source={blobs}/abcd,target=/read/0/1234/config.json,readonly",
    } <= set(words)
    assert not any("torn" in word or "scratch" in word for word in words) and all(
        word.endswith(",readonly") for word in words if "--mount" in word
    )


@engine
def test_a_command_reads_its_folder_and_can_write_nothing(toy):
    (toy / "repo/stages/toy/look.py").write_text(
        textwrap.dedent("""\
        import pathlib, sys
        folder = pathlib.Path(sys.argv[1])
        print((folder / "words.txt").read_text(), flush=True)
        (folder / "more.txt").write_text("x")
        """)
    )
    (toy / "input/words.txt").write_text("alpha")
    its = Docker(toy / "repo", toy / "home")
    program = replace(made(its, task(toy)).program, start="look")
    done = subprocess.run(its.command(program, [toy / "input"]), capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stdout == "alpha\n"
        and "Error" in done.stderr
        and not (toy / "input/more.txt").exists()
    )


@engine
def test_what_a_container_writes_belongs_to_the_user_it_runs_as(toy):
    its = Docker(toy / "repo", toy / "home", user=(1234, 1234))
    wanted = made(its, task(toy))
    lines: list[str] = []
    made(its, wanted, lines.append)
    assert lines == []  # built once
    running = its.submit(wanted)
    said = list(its.logs(running))
    assert its.poll(running) == 0, said
    assert {(line.stream, "event" in line.text) for line in said} == {("stdout", True), ("stderr", False)}
    written = [toy / "output/made.txt", toy / "scratch/home/cache.txt"]
    assert [path.stat().st_uid for path in written] == [1234, 1234]
    assert written[0].read_text() == "alpha"


@engine
def test_the_script_beside_a_run_does_the_same_again(toy):
    its = Docker(toy / "repo", toy / "home")
    running = its.submit(made(its, task(toy, code=3)))
    list(its.logs(running))
    assert its.poll(running) == 3
    (toy / "output/made.txt").unlink()
    assert subprocess.run([str(toy / "run/01-toy.sh")], capture_output=True).returncode == 3
    assert (toy / "output/made.txt").exists()


@engine
def test_a_container_that_a_killed_run_left_is_removed_by_the_next(toy):
    its = Docker(toy / "repo", toy / "home")
    left = its.submit(made(its, task(toy, sleep=600)))
    running = Docker(toy / "repo", toy / "home")
    next_ = running.submit(made(running, task(toy)))
    list(running.logs(next_))
    assert running.poll(next_) == 0
    list(its.logs(left))
    assert its.poll(left) == 137
    assert running.client.containers.list(all=True, filters={"label": f"io.annie.home={toy / 'home'}"}) == []


@engine
def test_what_runs_beside_a_stage_is_known_by_what_it_may_take(toy):
    """Stages of every store; not the containers of others, what has no limit, or what a CPU serves."""
    its, other = Docker(toy / "repo", toy / "home"), Docker(toy / "repo", toy / "elsewhere")
    image = its.baked(made(its, task(toy)).program)
    running = other.submit(replace(task(toy, sleep=600), memory_gb=0.5))
    command = ["docker", "run", "--rm", "--detach", "--network=none", "--entrypoint=sleep"]
    names = f"annie-toy-{uuid.uuid4().hex[:8]}"
    limited = ["--memory=300000000", "--memory-swap=300000000"]
    started = [
        subprocess.run([*command, *words, "600"], capture_output=True, text=True, check=True).stdout.strip()
        for words in (
            [*limited, f"--name={names}-served", "--label=io.annie.key=1", BASE],
            [*limited, f"--name={names}-stranger", BASE],
            [f"--name={names}-unlimited", image],
        )
    ]
    try:
        ours = Neighbour(running.container.name, "stage toy", 0.5)
        seen = its.neighbours()
        assert ours in seen and not [each for each in seen if each.container.startswith(names)]
        its.end_orphans()  # of its own store alone
        assert ours in its.neighbours()
        other.end_orphans()
        assert ours not in its.neighbours()
    finally:
        subprocess.run(["docker", "rm", "--force", *started], capture_output=True, check=True)
        other.end_orphans()


def test_a_model_that_a_gpu_serves_may_take_its_limit():
    """The engines of the tests have no GPU to give: a container as docker's client shows it."""
    host = {"Memory": 54_000_000_000, "DeviceRequests": [{"Driver": "nvidia", "Count": -1}]}
    shown = SimpleNamespace(name="annie-vllm-1", labels={"served": "1"}, attrs={"HostConfig": host})
    containers = SimpleNamespace(
        list=lambda filters, **options: [shown] if filters["label"] in shown.labels else []
    )
    client = SimpleNamespace(containers=containers)
    assert neighbours(client, "stage", "served") == [Neighbour("annie-vllm-1", "the served model", 54.0)]
    host["DeviceRequests"] = None
    assert neighbours(client, "stage", "served") == []


@engine
def test_cancel_ends_a_container(toy):
    its = Docker(toy / "repo", toy / "home")
    running = its.submit(made(its, task(toy, sleep=600)))
    began = time.monotonic()
    its.cancel(running)
    assert time.monotonic() - began < 15 and its.poll(running) not in (None, 0)


@engine
def test_cancel_lets_a_stage_save(toy):
    its = Docker(toy / "repo", toy / "home")
    running = its.submit(made(its, task(toy, sleep=600, listens=True)))
    assert next(its.logs(running)).text.startswith('{"event": "progress"')
    began = time.monotonic()
    its.cancel(running)
    assert (toy / "output/saved").exists() and time.monotonic() - began < 15


GREEDY = """\
    import json, subprocess, sys
    words = [sys.executable, "-c", "held = b'x' * 400_000_000"]
    if json.load(open("/job.json"))["params"]["child"]:
        print(json.dumps({"event": "error", "found": f"{subprocess.run(words).returncode}"}))
        sys.exit(1)
    held = b"x" * 400_000_000
    """


def ended(toy, wanted):
    """What a run says of a task that fails."""
    its, lines = Docker(toy / "repo", toy / "home"), []
    journal = Journal(toy / "home", "toy", Mask(()), lines.append)
    with pytest.raises(StageFailed) as failed:
        follow(its, journal, toy / "home", made(its, wanted), journal.log("01-toy"))
    journal.close()
    assert its.client.containers.list(all=True, filters={"label": f"io.annie.home={toy / 'home'}"}) == []
    return failed.value.finding


@engine
@pytest.mark.parametrize("child", [False, True])
def test_a_stage_that_its_memory_limit_killed_is_told_so(toy, child):
    """Also where a process of it was killed, and the stage itself said something else."""
    (toy / "repo/stages/toy/__main__.py").write_text(textwrap.dedent(GREEDY))
    finding = ended(toy, replace(task(toy, child=child), memory_gb=0.2))
    assert "reached the stage's memory limit of 0.2 GB" in finding.found
    assert ("the stage said: -9" in finding.found) == child
    assert "toy: {needs: {memory_gb: 0.4}}" in finding.remedy


@engine
def test_a_stage_within_its_limit_is_not_killed_and_another_fault_is_no_lack_of_memory(toy):
    (toy / "repo/stages/toy/__main__.py").write_text(textwrap.dedent(GREEDY) + "sys.exit(3)\n")
    assert ended(toy, replace(task(toy, child=False), memory_gb=0.6)).found == "exit status 3"


THREADS = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
FORKS = "os.fork() or time.sleep(60)"


@engine
@pytest.mark.parametrize(
    ("starts", "said"), [(THREADS, "can't start new thread"), (FORKS, "Resource temporarily unavailable")]
)
@pytest.mark.parametrize("through", ["job.main(run)", "run(None)"])
def test_a_stage_that_its_limit_of_processes_stopped_is_told_so(toy, starts, said, through):
    """A stage's own `main` says of any exception that it is a fault of the stage."""
    shutil.copy(REPO / "stages/job.py", toy / "repo/stages")
    lines = [
        "import os, threading, time",
        "from stages import job",
        "def run(task):",
        "    for number in range(200):",
        f"        {starts}",
        through,
    ]
    (toy / "repo/stages/toy/__main__.py").write_text("\n".join(lines))
    finding = ended(toy, replace(task(toy), pids=100))
    assert said in finding.found and "toy: {needs: {pids: 200}}" in finding.remedy


@engine
@pytest.mark.trap("limits-that-cuda-passes")
def test_a_container_has_the_limits_of_its_stage_and_goes_first(toy):
    its = Docker(toy / "repo", toy / "home")
    running = its.submit(made(its, replace(task(toy, sleep=600), memory_gb=1.5, pids=77)))
    host = its.client.api.inspect_container(running.container.id)["HostConfig"]
    its.cancel(running)
    assert [host[name] for name in ("Memory", "MemorySwap", "PidsLimit")] == [1_500_000_000] * 2 + [77]
    assert host["OomScoreAdj"] == 1000
    script = (toy / "run/01-toy.sh").read_text()
    for flag in ("memory=1500000000", "memory-swap=1500000000", "pids-limit=77", "oom-score-adj=1000"):
        assert f"--{flag} " in script


def test_a_user_who_is_not_in_the_group_docker_is_told_so(tmp_path):
    """The engine's socket belongs to root and that group: connecting ends with EACCES."""
    folder = tmp_path / "run"
    folder.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "docker.sock"))
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may open everything
    try:
        finding = no_engine(f"unix://{folder}/docker.sock")
    finally:
        os.seteuid(user)
        folder.chmod(0o700)
        listener.close()
    assert finding and "may not open" in finding.found
    assert (
        "sudo usermod -aG docker $USER" in finding.remedy
        and "log" in finding.remedy
        and "--executor local" in finding.remedy
    )


def test_an_engine_that_is_not_there_is_told_so(tmp_path):
    finding = no_engine(f"unix://{tmp_path}/docker.sock")
    assert finding and "no engine that answers" in finding.found and "Start a Docker engine" in finding.remedy


@pytest.mark.parametrize(
    "machine, refused",
    [("x86_64", False), ("amd64", False), ("aarch64", False), ("arm64", False), ("riscv64", True)],
)
def test_an_engine_is_refused_only_on_a_machine_for_which_no_lock_holds_torch(machine, refused):
    on_cpu = Image("train", REPO / "images/train", {"torch": "cpu"})
    with_its_own = Image("vllm", REPO / "images/vllm", {"torch": "base"})
    assert machine_findings([with_its_own], machine_type(machine)) == []
    found = machine_findings([on_cpu, with_its_own], machine_type(machine))
    assert [(f.found, f.expected.split(",")[0]) for f in found] == (
        [("torch: cpu on riscv64", "aarch64 or x86_64")] if refused else []
    )


@engine
def test_this_machine_has_what_the_small_recipe_needs(toy):
    assert [
        f
        for f in Docker(toy / "repo", toy / "home").check([task(toy).program.environment], gpu=False)
        if f.level == "error"
    ] == []


@engine
@pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import shutil, sys; sys.exit(shutil.which('nvidia-smi') is None)"]
    ).returncode
    == 0,
    reason="this machine has a GPU",
)
def test_an_engine_without_the_gpu_runtime_is_named_before_anything_runs(toy):
    found = Docker(toy / "repo", toy / "home").check([], gpu=True)
    assert any("NVIDIA" in f.found and f.remedy for f in found)


@engine
@pytest.mark.parametrize("adapter", [False, True])
def test_the_serving_image_holds_the_checkpoint_and_an_adapter_if_there_is_one(toy, adapter):
    for name, files in (
        ("output", ("serve.json", "check.json", "prompt.txt", "tools.json", "README.md")),
        ("checkpoint", ("config.json", "chat_template.jinja", "model.safetensors")),
        ("adapter", ("adapter_config.json", "adapter_model.safetensors")),
    ):
        (toy / name).mkdir()
        for file in files:
            (toy / name / file).write_text(name)
    server = toy / "output" / SERVER
    server.mkdir(parents=True)
    for name in ("front.py", "supervisor.py"):
        (server / name).write_text("")
    image, tag = Image("serve", REPO / "images/serve", {}), f"annie/toy-serving:{uuid.uuid4().hex[:8]}"
    contexts = {
        "checkpoint": toy / "checkpoint",
        "adapter": toy / "adapter" if adapter else None,
        "image": image.folder,
    }
    # build_product would tag it as the newest
    its = Docker(toy / "repo", toy / "home")
    its._build(image.folder / "Dockerfile", tag, toy / "output", contexts, {"BASE": BASE}, {}, print)
    try:
        shown = subprocess.run(
            [
                "docker",
                "run",
                "--rm",
                "--entrypoint",
                "find",
                tag,
                "/model",
                "/opt/annie/serving",
                "-type",
                "f",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert len(shown.split()) == 10
        found = subprocess.run(
            ["docker", "run", "--rm", "--entrypoint", "ls", tag, "/adapter"], capture_output=True, text=True
        )
        assert found.stdout.split() == (
            ["adapter_config.json", "adapter_model.safetensors"] if adapter else []
        )
    finally:
        subprocess.run(["docker", "image", "rm", tag], check=True, capture_output=True)
