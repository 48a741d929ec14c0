"""A miniature repository with three stages, run by the local executor on this interpreter."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from forge import plan, recipe, run
from forge.executor.local import Local
from forge.store import Store

REPO = Path(__file__).resolve().parents[2]

FILES = {
    "recipes/toy.yaml": (
        """\
        name: toy
        about: three small stages
        seed: 3
        images: {plain: {base: none}}
        stages:
          words:
            upper: false
            sources: {files: [../data/a.txt, ../data/b]}
          count: {}
          slow:
            steps: 3
            needs: {minutes: 0.5}
        """
    ),
    "data/a.txt": "alpha beta\n",
    "data/b/c.txt": "gamma\n",
    "images/plain/note.txt": "an image without a lock runs on this interpreter\n",
    "model/__init__.py": "",
    "model/spelling.py": (
        """\
        from model import letters

        def spell(word, upper):
            return letters.UPPER[word] if word in letters.UPPER else word.upper() if upper else word
        """
    ),
    "model/letters.py": "UPPER = {}\n",
    "model/unused.py": "NOTHING = 0\n",
    "stages/__init__.py": "",
    "stages/artifacts.toml": 'text = ["text.txt"]\nreport = ["report.json"]\n',
    "stages/words/stage.toml": (
        """\
        summary = "the words of some files"
        image = "plain"
        produces = "text"
        [sources.files]
        doc = "text files"
        many = true
        [secrets.token]
        doc = "a token"
        [parameters.upper]
        type = "bool"
        doc = "shout"
        [parameters.times]
        type = "int"
        default = 1
        min = 1
        max = 9
        doc = "how often"
        [needs]
        minutes = 0.1
        disk_gb = 0.001
        memory_gb = 0.1
        """
    ),
    "stages/words/__main__.py": (
        """\
        from stages import job

        def run(task):
            from model.spelling import spell
            files = [f for p in task.sources["files"] for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
            words = [spell(w, task.params["upper"]) for f in files for w in f.read_text().split()]
            for number, word in enumerate(words, 1):
                job.progress(number, len(words), "words", word)
            if "token" in task.secrets:
                for part in ["the token is ", *task.secrets["token"].read_text()]:  # a letter at a time
                    print(part, end="", flush=True)
            (task.output / "text.txt").write_text(" ".join(words * task.params["times"]))

        if __name__ == "__main__":
            job.main(run)
        """
    ),
    "stages/count/stage.toml": (
        """\
        summary = "how many words"
        image = "plain"
        produces = "text"
        [consumes]
        words = "text"
        [needs]
        minutes = 0.1
        disk_gb = 0.001
        memory_gb = 0.1
        """
    ),
    "stages/count/__main__.py": (
        """\
        from stages import job

        def run(task):
            count = len((task.inputs["words"] / "text.txt").read_text().split())
            job.metric("count", count)
            (task.output / "text.txt").write_text(str(count))

        if __name__ == "__main__":
            job.main(run)
        """
    ),
    "stages/slow/stage.toml": (
        """\
        summary = "step by step, with a checkpoint after each"
        image = "plain"
        produces = "text"
        [consumes]
        count = "text"
        [parameters.steps]
        type = "int"
        default = 2
        doc = "how many"
        [parameters.seconds]
        type = "float"
        default = 0.0
        doc = "how long a step takes"
        [parameters.how]
        type = "str"
        default = "well"
        choices = ["well", "badly", "empty", "crash", "large"]
        doc = "how it ends"
        [needs]
        minutes = 0.1
        disk_gb = 0.001
        memory_gb = 0.1
        """
    ),
    "stages/slow/__main__.py": (
        """\
        import os, sys, time
        from stages import job

        def run(task):
            done = task.scratch / "done"
            first = int(done.read_text()) if done.exists() else 0
            (task.output / "text.txt").write_text("half")
            for step in range(first, task.params["steps"]):
                time.sleep(task.params["seconds"])
                done.write_text(str(step + 1))
                job.progress(step + 1, task.params["steps"], "steps", f"from {first}")
            how = task.params["how"]
            if how == "badly":
                raise job.StageError("a bad thing", "a good thing", "Make it good.")
            if how == "crash":
                os.kill(os.getpid(), 9)
            if how == "empty":
                (task.output / "text.txt").unlink()
                return
            if how == "large":
                with open(task.output / "large.bin", "wb") as stream:
                    for _ in range(64):
                        stream.write(b"x" * 1_000_000)
            (task.output / "text.txt").write_text(f"went on from {first}")

        if __name__ == "__main__":
            job.main(run)
        """
    ),
}


def make(folder: Path) -> Path:
    """The miniature repository, in `folder`."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    shutil.copy(REPO / "stages" / "job.py", folder / "stages" / "job.py")
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new))


class Toy:
    """A repository, its home, and a listener that keeps every event."""

    def __init__(self, folder: Path):
        self.repo, self.home = make(folder / "repo"), folder / "home"
        self.recipe = self.repo / "recipes" / "toy.yaml"
        self.events: list[dict] = []

    def context(self) -> plan.Context:
        return plan.Context(recipe.load(self.recipe, self.repo), Store(self.home), self.repo, "local")

    def plan(self, **selected) -> plan.Plan:
        return plan.make(self.context(), plan.Selection(**selected))

    def states(self, **selected) -> dict[str, str]:
        return {stage.name: stage.state for stage in self.plan(**selected).stages}

    def run(self, wait=True, **selected) -> run.Outcome:
        self.events.clear()
        return run.run(
            self.context(), Local(self.repo, self.home), plan.Selection(**selected), self.events.append, wait
        )

    def event(self, kind: str) -> dict:
        return next(e for e in self.events if e["event"] == kind)

    def text(self, stage: str) -> str:
        return (plan.artifact(self.context(), stage).folder / "text.txt").read_text()

    def log(self, stage: str) -> str:
        return next(iter(sorted(self.home.glob(f"runs/*/*-{stage}.log"), reverse=True))).read_text()

    def start(self, *lines: str) -> subprocess.Popen:
        """Another process that runs this toy's recipe; `lines` come first."""
        code = "\n".join(
            [
                "import sys; sys.path[:0] = sys.argv[2:]",
                "from pathlib import Path",
                "import toy",
                "mini = toy.Toy.__new__(toy.Toy)",
                "mini.repo, mini.home = Path(sys.argv[1]) / 'repo', Path(sys.argv[1]) / 'home'",
                "mini.recipe, mini.events = mini.repo / 'recipes' / 'toy.yaml', []",
                *lines,
                "sys.exit(mini.run().code)",
            ]
        )
        # A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that: here
        # it is to be heard.
        return subprocess.Popen(
            [sys.executable, "-c", code, str(self.home.parent), str(REPO), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
