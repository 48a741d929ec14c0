"""Where compiled kernels stay: a folder for each GPU, driver, torch and Triton; told and not silent where
there can be none.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.layers import kernel_cache

REPO = Path(__file__).resolve().parents[2]
SMI = "NVIDIA GB10, 580.95.05"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose nvidia-smi answers as `answers` is given; no cache has a place yet."""
    for name in (*kernel_cache.CACHES, kernel_cache.FOLDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(kernel_cache.SEED, str(tmp_path / "seed"))
    monkeypatch.setattr(kernel_cache, "_prepared", None)
    versions = {"torch": "2.11.0+cu130", "triton": "3.6.0"}
    monkeypatch.setattr(kernel_cache, "version", lambda *names: versions[names[0]])

    def answers(text, code=0):
        program = tmp_path / "bin/nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\nprintf '{text}\\n'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return versions

    answers(SMI)
    return answers


def prepared(root, monkeypatch):
    """What `prepare` gives, and what it has warned of."""
    monkeypatch.setenv(kernel_cache.FOLDER, str(root))
    said = []
    return kernel_cache.prepare(lambda message, remedy: said.append(f"{message} {remedy}")), said


def test_without_a_folder_nothing_is_touched(machine):
    assert kernel_cache.prepare(pytest.fail) is None and kernel_cache.folder() is None
    assert not set(kernel_cache.CACHES) & set(os.environ)


def test_every_cache_lies_in_the_folder_of_this_gpu_driver_torch_and_triton(machine, tmp_path, monkeypatch):
    found, said = prepared(tmp_path / "kernels", monkeypatch)
    assert (
        found
        == kernel_cache.folder()
        == tmp_path / "kernels/NVIDIA-GB10-580.95.05-torch-2.11.0+cu130-triton-3.6.0"
        and not said
    )
    assert {os.environ[name] for name in kernel_cache.CACHES} == {
        str(found / name) for name in ("triton", "inductor", "cuda", "vllm", "flashinfer")
    }
    assert all(Path(os.environ[name]).is_dir() for name in kernel_cache.CACHES)


def test_a_cache_that_has_a_place_keeps_it(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    prepared(tmp_path, monkeypatch)
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere" and "VLLM_CACHE_ROOT" in os.environ


def test_what_decides_whether_a_kernel_runs_decides_the_folder(machine, tmp_path, monkeypatch):
    names = [prepared(tmp_path, monkeypatch)[0]]
    for smi in ("NVIDIA H100, 580.95.05", "NVIDIA GB10, 590.1"):
        machine(smi)
        names.append(prepared(tmp_path, monkeypatch)[0])
    versions = machine(SMI)
    for change in ({"torch": "2.12.0"}, {"triton": "3.7.0"}):
        versions.update(change)
        names.append(prepared(tmp_path, monkeypatch)[0])
    assert len(set(names)) == 5


def test_several_gpus_of_one_kind_share_a_folder(machine, tmp_path, monkeypatch):
    alone, _ = prepared(tmp_path, monkeypatch)
    machine(f"{SMI}\\n{SMI}")
    assert prepared(tmp_path, monkeypatch)[0] == alone


@pytest.mark.parametrize("trap", ["no driver", "no gpu", "no folder"])
def test_a_cache_that_cannot_be_kept_is_told(machine, tmp_path, monkeypatch, trap):
    root = tmp_path / "kernels"
    if trap == "no folder":
        root.write_text("a file")
    else:
        machine("", code=trap == "no driver")
    found, said = prepared(root, monkeypatch)
    assert found is None and kernel_cache.folder() is None and not set(kernel_cache.CACHES) & set(os.environ)
    assert len(said) == 1 and "are not kept" in said[0] and str(root) in said[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_told(machine, tmp_path, monkeypatch):
    tmp_path.chmod(0o555)
    found, said = prepared(tmp_path, monkeypatch)
    assert found is None and "are not kept" in said[0]


def test_nothing_is_imported_that_reads_the_variables():
    program = (
        "import sys; from model.layers import kernel_cache;"
        " print([name for name in ('torch', 'triton', 'vllm') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.parametrize("stage", ["train", "quantize", "evaluate"])
def test_the_stages_prepare_before_they_load_anything_else(tmp_path, stage):
    """Triton, CUDA and vLLM look for their folders once."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{SMI}'\n")
    smi.chmod(0o755)
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps(
            {
                "stage": stage,
                "params": {"ranks": 1, "deterministic": False},
                "inputs": {},
                "output": "",
                "scratch": "",
                "seed": 1,
            }
        )
    )
    program = f"""
import os, runpy, sys
class Look:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "stages.{stage}.fit", "stages.{stage}.{stage}"):
            sys.exit("prepared" if "TRITON_CACHE_DIR" in os.environ else "too late")
sys.meta_path.insert(0, Look())
sys.argv[1:] = [{str(job)!r}]
runpy.run_module("stages.{stage}", run_name="__main__", alter_sys=True)
"""
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ANNIE_KERNELS": str(tmp_path / "kernels")}
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=REPO, env=environment, capture_output=True, text=True
        ).stderr
        == "prepared\n"
    )


# --- a seed, as an image brings it along --------------------------------------------------------------------


def kernel(folder, name="abc"):
    """A kernel as Triton keeps it: a list of its files, by absolute path, and the files."""
    place = folder / "triton" / name
    place.mkdir(parents=True)
    (place / "k.cubin").write_bytes(b"code")
    (place / "__grp__k.json").write_text(
        json.dumps({"child_paths": {"k.cubin": f"/where/it/was/{name}/k.cubin"}})
    )


def seeded(tmp_path, machine, monkeypatch):
    name = kernel_cache.identity()
    kernel(tmp_path / "seed" / name)
    (tmp_path / "seed" / name / "tuning.json").write_text("{}")
    return name


def test_an_empty_folder_begins_as_a_copy_of_the_seed(machine, tmp_path, monkeypatch):
    name = seeded(tmp_path, machine, monkeypatch)
    for path in [*(tmp_path / "seed").rglob("*"), tmp_path / "seed"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    found, said = prepared(tmp_path / "kernels", monkeypatch)
    assert found.name == name and not said
    group = json.loads((found / "triton/abc/__grp__k.json").read_text())
    assert group["child_paths"] == {"k.cubin": str(found / "triton/abc/k.cubin")}  # Triton believes no other
    assert (found / "triton/abc/k.cubin").read_bytes() == b"code" and (found / "tuning.json").exists()
    assert all(path.stat().st_mode & 0o200 for path in found.rglob("*")) and [
        p.name for p in found.parent.iterdir()
    ] == [name]


def test_a_folder_that_holds_something_keeps_it(machine, tmp_path, monkeypatch):
    name = seeded(tmp_path, machine, monkeypatch)
    kernel(tmp_path / "kernels" / name, "own")
    monkeypatch.setattr(
        kernel_cache.shutil,
        "copyfile",
        lambda *_: pytest.fail("hundreds of megabytes are copied for nothing"),
    )
    found, _ = prepared(tmp_path / "kernels", monkeypatch)
    assert [path.name for path in (found / "triton").iterdir()] == ["own"]


def test_a_seed_of_another_machine_is_left_alone(machine, tmp_path, monkeypatch):
    seeded(tmp_path, machine, monkeypatch)
    machine("NVIDIA H100, 580.95.05")
    found, said = prepared(tmp_path / "kernels", monkeypatch)
    assert not said and not any((found / "triton").iterdir())


def test_two_ranks_may_sow_at_once(machine, tmp_path, monkeypatch):
    """The other one was first: between this one's look and its rename."""
    name = seeded(tmp_path, machine, monkeypatch)
    real = Path.rename

    def beaten(self, target):
        kernel(Path(target), "of the other rank")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", beaten)
    found, said = prepared(tmp_path / "kernels", monkeypatch)
    assert not said and [path.name for path in (found / "triton").iterdir()] == ["of the other rank"]
    assert [p.name for p in found.parent.iterdir()] == [name]
