"""The store under kills and flipped bits.

    python -m tests.chaos.stored flips [--count 200]
    python -m tests.chaos.stored kills [--count 30] [--stages train,merge,quantize]
    python -m tests.chaos.stored kills --executor docker --stages package      (the image build)

Works on a copy of what the recipe has built (make demo, make model RECIPE=tiny), in a folder of its own.
Prints one line for each fault. Exits with 1 if a fault went unnoticed, or something that was accepted is lost
or changed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from forge import plan, recipe, verify
from forge.store import Artifact, Store

REPO = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("ANNIE_HOME", REPO / ".annie"))


@dataclass(frozen=True)
class Line:
    """A recipe whose artifacts are in a home that may be harmed."""

    home: Path
    recipe: str
    executor: str

    def context(self) -> plan.Context:
        found = recipe.load(recipe.find(self.recipe, REPO), REPO)
        return plan.Context(found, Store(self.home), REPO, self.executor)

    def run(self, stage: str) -> subprocess.Popen[bytes]:
        """A run of one stage, also if it is built."""
        command = [sys.executable, str(REPO / "build.py"), "run", "--only", stage, "--force"]
        return subprocess.Popen(
            [*command, "--recipe", self.recipe, "--executor", self.executor],
            env={**os.environ, "ANNIE_HOME": str(self.home)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def whole(self) -> dict[str, str]:
        """Stage -> digest of each artifact of the recipe. SystemExit if one is not what its manifest says,
        or its image is gone.
        """
        here = self.context()
        recorded = plan.recorded(here)
        for verdict in verify.verify(here, recorded, lambda count: None):
            if verdict.damages:
                raise SystemExit(f"FAIL {verdict.stage}: {'; '.join(verdict.damages)}")
        for stage, artifact in recorded.items():
            described = artifact.folder / "image.json"
            if described.exists():
                tag = json.loads(described.read_text())["tag"]
                if subprocess.run(["docker", "image", "inspect", tag], capture_output=True).returncode:
                    raise SystemExit(f"FAIL {stage}: its image {tag} is gone")
        return {stage: artifact.digest for stage, artifact in recorded.items()}

    def weights(self) -> dict[str, str]:
        """Stage/file -> digest of every safetensors file. Reports beside them hold times of day."""
        return {
            f"{stage}/{name}": entry["sha256"]
            for stage, artifact in plan.recorded(self.context()).items()
            for name, entry in artifact.manifest["files"].items()
            if name.endswith(".safetensors")
        }


def copied_home(folder: Path) -> Path:
    """A home with copies of the artifacts, and the environments that are there."""
    home = folder / "home"
    shutil.copytree(HOME / "store" / "artifacts", home / "store" / "artifacts")
    (home / "envs").symlink_to((HOME / "envs").resolve())
    return home


# --- flipped bits -------------------------------------------------------------------------------------------


def flip(path: Path, chance: random.Random) -> None:
    """Changes one bit of a file in place, and sets its times back: decay leaves no trace in them."""
    status = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as stream:
        offset = chance.randrange(status.st_size)
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1 << chance.randrange(8)]))
    path.chmod(status.st_mode & 0o777)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def noticed(here: plan.Context, artifact: Artifact, name: str) -> bool:
    """Whether reading the artifact names the file."""
    damages = verify.read(here.store, artifact, here.store.readable(artifact), lambda count: None)
    return any(damage.startswith(f"{name} ") for damage in damages)


def flips(line: Line, count: int, chance: random.Random) -> bool:
    here = line.context()
    artifacts = list(plan.recorded(here).values())
    missed = []
    for number in range(count):
        artifact = chance.choice(artifacts)
        name = chance.choice([n for n, entry in artifact.manifest["files"].items() if entry["size"]])
        path, kept = artifact.folder / name, line.home / "kept"
        shutil.copy2(path, kept)
        flip(path, chance)
        if not noticed(here, artifact, name):
            missed.append(f"{artifact.stage}/{name}")
        os.replace(kept, path)
        if verify.read(here.store, artifact, [name], lambda count: None):
            missed.append(f"{artifact.stage}/{name} put back")
        print(f"\r{number + 1} of {count} flips", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{'FAIL' if missed else 'ok  '} bits flipped x {count}: {len(missed)} unnoticed {missed[:5]}")
    return not missed


# --- kills --------------------------------------------------------------------------------------------------


def kills(line: Line, stage: str, count: int, chance: random.Random) -> bool:
    """Kills a run of one stage `count` times at random, each time on what the last left; then lets it end."""
    began, killed = time.monotonic(), 0
    if code := line.run(stage).wait():
        print(f"FAIL {stage} ended with {code} before anything was killed")
        return False
    seconds, before, made = time.monotonic() - began, line.whole(), line.weights()
    while killed < count:
        process = line.run(stage)
        try:
            process.wait(chance.uniform(0.05, 1.05) * seconds)
            before = line.whole()
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        if line.whole() != before or line.weights() != made:
            print(f"FAIL kill -9 in {stage}: what was accepted has changed")
            return False
        print(f"\r{stage}: {killed} of {count} kills", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    code = line.run(stage).wait()
    line.whole()
    fine = code == 0 and line.weights() == made
    state = "ok  " if fine else "FAIL"
    print(
        f"{state} kill -9 in {stage} x {killed}, within {seconds:.0f} s: nothing lost; then exit {code}, the"
        " same weights"
    )
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fault", choices=["flips", "kills"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--stages", default="train,merge,quantize")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--executor", default="local", choices=["docker", "local"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        line = Line(copied_home(Path(folder)), options.recipe, options.executor)
        if options.fault == "flips":
            return not flips(line, options.count or 200, chance)
        stages = options.stages.split(",")
        return not all(kills(line, stage, options.count or 30, chance) for stage in stages)


if __name__ == "__main__":
    sys.exit(main())
