"""The local executor: what becomes of a stage whose forge is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]

FORGE = """\
    import sys
    from pathlib import Path
    from forge.executor import Task
    from forge.executor.local import Local
    from forge.image import Image
    root = Path(sys.argv[1])
    its = Local(root, root / "home")
    job = {"output": str(root / "output"), "scratch": str(root / "scratch")}
    running = its.submit(Task("slow", Image("none", root / "images/none"), job, root, root, "01-slow"))
    print(running.process.pid, flush=True)
    for line in its.logs(running):
        pass
    """


def test_a_stage_does_not_outlive_a_forge_that_was_killed(tmp_path):
    (tmp_path / "stages/slow").mkdir(parents=True)
    (tmp_path / "images/none").mkdir(parents=True)
    (tmp_path / "stages/slow/__main__.py").write_text("import time\ntime.sleep(600)\n")
    forge = subprocess.Popen([sys.executable, "-c", textwrap.dedent(FORGE), str(tmp_path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)})
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
