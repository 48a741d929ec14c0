"""Serving what a recipe made, on this machine: through compose, or by a local vLLM.

Both start the supervisor that the serving artifact brings (stages/serving/supervisor.py). It ends vLLM and
all of its processes with itself.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from forge import key as keys
from forge import modes, plan, preflight, verify
from forge.executor import Executor
from forge.executor.local import Local, end_with_parent
from forge.finding import Refused, error
from forge.plan import Context, Plan
from forge.store import Artifact
from product import PACKAGE, SERVER, loopback, render, serving_check, serving_record
from product.serving_check import Endpoint
from product.serving_record import Record

STOP_SECONDS = 60  # the supervisor's grace period and vLLM's own end


@dataclass(frozen=True)
class Address:
    """Where clients reach the server: an address of this machine, and a port. `key_file` holds the key that
    they send.
    """

    port: int = 8000
    bind: str = "127.0.0.1"
    key_file: Path | None = None

    def key(self) -> str:
        """Refused for a file that holds none, and for an address of the network without one."""
        if self.key_file is None:
            if not loopback.is_loopback(self.bind):
                raise Refused(
                    error(
                        "serve",
                        f"--bind {self.bind} without a key: whoever reaches this machine could ask",
                        "--api-key-file FILE, or an address of loopback",
                        "Make a key: (umask 077; openssl rand -hex 32 > api.key).",
                    )
                )
            return ""
        return loopback.read_key("serve", self.key_file)

    def variables(self) -> dict[str, str]:
        """What the supervisor and compose.yaml read."""
        variables = {"ANNIE_BIND": self.bind, "ANNIE_PORT": str(self.port)}
        if self.key_file:
            owner = self.key_file.stat()
            variables["ANNIE_API_KEY_FILE"] = str(self.key_file.resolve())
            # The container reads a file of 0600 only as its owner.
            variables["ANNIE_USER"] = f"{owner.st_uid}:{owner.st_gid}"
        return variables


def serve(
    context: Context,
    executor: Executor,
    address: Address,
    detach: bool = False,
    stop: bool = False,
    take: Callable[[str], Artifact] | None = None,
) -> int:
    """Starts (or stops) the server and returns the exit status. `take` gives the artifact of a stage, by
    default that of the present recipe. Refused if there is nothing to serve, the server does not come up, or
    it is not the one that was built.
    """
    take = take or partial(plan.artifact, context)
    if executor.name == "docker":
        return _stop_compose(context) if stop else _compose(context, address, detach, take)
    if not isinstance(executor, Local):
        raise Refused(
            error("executor", executor.name, "docker or local, which can serve", "Name one of the two.")
        )
    return _stop_local(context.store.home) if stop else _local(context, executor, address, detach, take)


# --- through compose ----------------------------------------------------------------------------------------


def _compose_command(context: Context) -> list[str]:
    return ["docker", "compose", "--project-directory", str(context.repo)]


def _stop_compose(context: Context) -> int:
    # Also the server of another recipe, which compose.override.yaml may no longer name.
    everything = ["--profile", render.OTHER, "down", "--remove-orphans"]
    code = subprocess.run([*_compose_command(context), *everything]).returncode
    serving_record.remove(context.store.home)
    return code


def _compose(context: Context, address: Address, detach: bool, take: Callable[[str], Artifact]) -> int:
    key = address.key()
    artifact = _whole(context, take(PACKAGE))
    tag = image_tag(artifact.folder)
    if not tag or subprocess.run(["docker", "image", "inspect", tag], capture_output=True).returncode:
        raise Refused(
            error(
                "serve",
                f"no image {tag or 'for this artifact'}",
                "the serving image in this engine",
                f"Make it: python build.py run --recipe {context.recipe.option} --executor docker --only"
                f" {PACKAGE} --force",
            )
        )
    _tell_unused_gpu(artifact.folder)
    write_override(context.repo, artifact)
    compose, service = _compose_command(context), described(artifact.folder)["service"]
    environment = {**os.environ, **address.variables()}
    # The engine itself refuses a port that another program holds.
    if code := subprocess.run([*compose, "up", "--detach", service], env=environment).returncode:
        return code

    def why_dead() -> str | None:
        running = subprocess.run(
            [*compose, "ps", "--quiet", "--status", "running", service],
            env=environment,
            capture_output=True,
            text=True,
        ).stdout.strip()
        return None if running else f"its container stopped; see: docker compose logs {service}"

    serving_record.write(context.store.home, Record(str(artifact.folder), address.port, artifact.key))
    try:
        _come_up(Endpoint(address.port, key, artifact.key, address.bind), artifact.folder, why_dead)
    except BaseException:
        subprocess.run([*compose, "down"], env=environment)
        serving_record.remove(context.store.home)
        raise
    print(f"serving {tag} on http://{address.bind}:{address.port}")
    if detach:
        return 0
    follow = [*compose, "logs", "--follow", "--no-log-prefix", "--tail=0", service]
    return subprocess.run(follow, env=environment).returncode


def image_tag(folder: Path) -> str:
    """The tag of the image that was built from a serving artifact; empty where no engine built one."""
    described = folder / "image.json"
    return str(json.loads(described.read_text())["tag"]) if described.exists() else ""


def described(folder: Path) -> dict[str, Any]:
    """serve.json of a serving artifact."""
    values: dict[str, Any] = json.loads((folder / "serve.json").read_text())
    return values


def point_compose(repo: Path, planned: Plan) -> None:
    """Makes compose start the image of the recipe as it is now, which a run need not have built: an earlier
    state that was put back has its image still.
    """
    for stage in planned.stages:
        if stage.name == PACKAGE and stage.state == "cached" and stage.artifact:
            write_override(repo, stage.artifact)


def write_override(repo: Path, artifact: Artifact) -> None:
    """Writes compose.override.yaml, so that compose starts the image of a serving artifact; does nothing
    where it has none.
    """
    if tag := image_tag(artifact.folder):
        render.write_override(repo, tag, artifact.key, _origin(artifact), described(artifact.folder))


def _origin(artifact: Artifact) -> str:
    """What is served, in words: the first line of the server's log, and of compose.override.yaml."""
    recipe, made = artifact.manifest["recipe"], artifact.created.astimezone(datetime.UTC)
    return f"recipe {recipe}, key {artifact.key[:12]}, made {made:%Y-%m-%d %H:%M} UTC"


# --- without an engine --------------------------------------------------------------------------------------


def _local(
    context: Context, executor: Local, address: Address, detach: bool, take: Callable[[str], Artifact]
) -> int:
    key, home = address.key(), context.store.home
    earlier = serving_record.read(home)
    ours = " (build.py serve --stop ends what was started from here)" if earlier and earlier.alive() else ""
    remedy = f"Stop what listens there{ours}, or name another --port."
    serving_check.refuse_taken(address.bind, address.port, remedy)
    artifact, step = _whole(context, take(PACKAGE)), context.recipe.stages[PACKAGE]
    if not (product := step.contract.product):
        raise Refused(
            error(PACKAGE, "a stage without [build]", "what its image is made of", "See docs/formats.md.")
        )
    parts = product.folders(artifact.params, lambda name: _whole(context, take(step.inputs[name])).folder)
    model = parts["checkpoint"]
    image = context.recipe.images["vllm"]
    executor.prepare(image, print)
    _tell_unused_gpu(artifact.folder)
    _tell_other_environment(context, artifact)
    # A name that no other server has, nor this one when it is started again.
    record = Record(str(artifact.folder), address.port, f"{artifact.key}.{secrets.token_hex(8)}")
    environment = {
        **executor.server_environment(image),
        **address.variables(),
        "ANNIE_HOST": address.bind,
        "ANNIE_SERVER": record.server,
        "ANNIE_ORIGIN": _origin(artifact),
        "ANNIE_SERVING": str(artifact.folder),
        "ANNIE_MODEL": str(model),
        "ANNIE_ADAPTER": str(parts["adapter"] or ""),
    }
    log = home / "serving.log"
    with modes.open_file(log, "w") as opened:
        process = subprocess.Popen(
            [str(executor.interpreter(image)), str(artifact.folder / SERVER / "supervisor.py")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=opened,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # In the foreground it is asked to stop when this process is gone, however that ended.
            preexec_fn=None if detach else partial(end_with_parent, signal.SIGTERM),
        )
    serving_record.write(home, replace(record, pid=process.pid))

    def why_dead() -> str | None:
        return None if process.poll() is None else f"vLLM ended with {process.returncode}; see {log}"

    try:
        _come_up(Endpoint(address.port, key, record.server, address.bind), artifact.folder, why_dead)
        print(
            f"serving {model} on http://{address.bind}:{address.port}"
            + ("" if detach else "; Ctrl-C stops it"),
            flush=True,
        )
        if detach:
            return 0
        return process.wait()
    except KeyboardInterrupt:
        _end(process.pid)
        return 130
    except BaseException:
        _end(process.pid)
        raise
    finally:
        if process.poll() is not None:
            serving_record.remove(home)


def _stop_local(home: Path) -> int:
    record = serving_record.read(home)
    if record is None or record.pid is None or not record.alive():
        print("nothing is being served from here")
        return 0
    _end(record.pid)
    serving_record.remove(home)
    print("stopped")
    return 0


def _end(pid: int) -> None:
    """Asks a supervisor to stop. It lets answers under way end, and ends all of vLLM's processes. One that
    does not is killed, which makes vLLM end by itself.
    """
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5)):
        try:
            os.kill(pid, number)
            for _ in range(seconds * 10):
                _reap(pid)
                os.kill(pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # another process started it
        return


# --- both ---------------------------------------------------------------------------------------------------


def _whole(context: Context, artifact: Artifact) -> Artifact:
    """The artifact. Files that may have changed since it was stored are read first. Refused if it is not what
    its manifest says.
    """
    stage = artifact.stage
    if unread := context.store.unread(artifact):
        print(f"reading the artifact of {stage} again: {len(unread)} files may have changed", flush=True)
    if damages := verify.read(context.store, artifact, unread, lambda count: None):
        raise Refused(verify.finding(context, stage, damages))
    return artifact


def _come_up(endpoint: Endpoint, folder: Path, why_dead: Callable[[], str | None]) -> None:
    """Waits for the server, and checks that it is the one that was started and its model the one that was
    built.
    """
    shown = -1

    def on_wait(passed: float) -> None:
        nonlocal shown
        if sys.stderr.isatty() or int(passed) // 30 > shown:
            shown = int(passed) // 30
            end = "\r" if sys.stderr.isatty() else "\n"
            print(f"vLLM is loading the model, {passed:.0f} s", end=end, file=sys.stderr, flush=True)

    serving_check.wait(endpoint, why_dead, on_wait)
    print(serving_check.check(endpoint, folder), flush=True)


def _tell_unused_gpu(folder: Path) -> None:
    """Says that a GPU is there which the server will not use: answers would be slow, and nothing else would
    show it.
    """
    if described(folder)["device"] == "cpu" and (gpu := preflight.gpu_architecture()):
        print(
            f"This machine has a GPU ({gpu}), which this server does not use: it was built for a CPU."
            " Build it from a recipe with gpu: cuda.",
            file=sys.stderr,
        )


def _tell_other_environment(context: Context, artifact: Artifact) -> None:
    """Says that an earlier artifact was made for another environment than the one that serves it."""
    now = plan.planned_stage(context, PACKAGE).key.components
    changes = [c for c in keys.changes(artifact.manifest["components"], now) if c.kind == "image"]
    if changes:
        names = ", ".join(change.name for change in changes)
        print(
            f"This model was made for another environment (since then changed: {names}). It is served with"
            " the present one.",
            file=sys.stderr,
        )
