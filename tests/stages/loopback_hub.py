"""As much of the Hub's API as huggingface_hub asks for to download one commit, served from a folder on
loopback; and the stage against it.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import load_file, save_file

from model.weights.checkpoint import INDEX, Checkpoint

REPO = Path(__file__).resolve().parents[2]
TOKEN = "hf_nobody-may-read-this"
REPOSITORY, COMMIT = "acme/tiny", "0123456789abcdef" * 2 + "01234567"
LARGE = "model-00001-of-00001.safetensors"
BLOCK = 10 * 1024 * 1024  # bytes that huggingface_hub writes at a time
CUT = BLOCK + 1024 * 1024  # bytes of a download that breaks


def enlarge(folder, vocabulary):
    """The checkpoint in `folder` with that many tokens, in one file."""
    checkpoint = Checkpoint(folder)
    tensors = {name: tensor for file in checkpoint.files for name, tensor in load_file(folder / file).items()}
    for name in ("backbone.embeddings.weight", "lm_head.weight"):
        tensors[name] = torch.cat(
            [
                tensors[name],
                torch.zeros(vocabulary - len(tensors[name]), tensors[name].shape[1], dtype=torch.bfloat16),
            ]
        )
    for file in checkpoint.files:
        (folder / file).unlink()
    save_file(tensors, folder / LARGE, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, LARGE)}))
    (folder / "config.json").write_text(json.dumps({**checkpoint.config, "vocab_size": vocabulary}, indent=2))
    return folder


@dataclass(frozen=True)
class Request:
    file: str  # "" if it asks for no file
    range: str | None
    authorization: str | None


class Hub:
    """`requests` are the GETs about the repository so far. `altered` names a file that is not what is
    announced.

    `breaks` is what happens once in the middle of the large file: "stall" (silence, and `stalled` is set)
    or "drop" (the connection ends).

    `change` alters the list of files before it is sent. `status` is what every request for a file gets:
    a status and headers. `page` is the body of every answer. With `drips` bodies come a byte at a time. With
    `packed` bodies are gzip, which nobody asked for.
    """

    def __init__(self, folder):
        self.folder, self.requests, self.breaks, self.altered = folder, [], None, None
        self.change, self.status, self.page, self.drips = lambda info: None, None, None, False
        self.packed, self.encodings = False, []
        self.stalled, self.closing = threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        path, start = unquote(urlsplit(request.path).path), 0
        prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix) if path.startswith(prefix) else ""
        if request.command == "GET" and REPOSITORY in path:
            self.requests.append(Request(name, request.headers["Range"], request.headers["Authorization"]))
        if path == f"/api/models/{REPOSITORY}/revision/{COMMIT}":
            body, headers = json.dumps(self.info()).encode(), {}
        elif name and (self.folder / name).is_file():
            body = (self.folder / name).read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
            body = body.replace(b" ", b"\t") if name == self.altered else body
        else:
            return request.send_error(404)
        if self.status and name:
            return self.refuse(request)
        body = self.page or body
        self.encodings.append(request.headers["Accept-Encoding"])
        if self.packed:
            body, headers = gzip.compress(body), {**headers, "Content-Encoding": "gzip"}
        whole = len(body)
        if wanted := request.headers["Range"]:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        request.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(whole - start)}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return None
        if self.drips and name:
            return self.drip(request, body[start:])
        breaks, self.breaks = (self.breaks, None) if name == LARGE else (None, self.breaks)
        request.wfile.write(body[start : CUT if breaks else whole])
        if breaks == "stall":
            self.stalled.set()
            self.closing.wait()
        return None

    def refuse(self, request):
        status, headers = self.status
        request.send_response(status)
        for key, value in {**headers, "Content-Length": "0"}.items():
            request.send_header(key, value)
        request.end_headers()

    def drip(self, request, body):
        for byte in body:
            if self.closing.wait(0.05):
                break
            request.wfile.write(bytes([byte]))

    def info(self):
        info = {
            "id": REPOSITORY,
            "sha": COMMIT,
            "siblings": [announced(p, p.name) for p in sorted(self.folder.iterdir())],
        }
        self.change(info)
        return info


def announced(path, name):
    """What the Hub says of a file: a SHA-256 for a large one (LFS), the git blob id of a small one."""
    body = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
    large = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return {
        "rfilename": name,
        "size": len(body),
        "blobId": blob,
        **({"lfs": large} if path.suffix == ".safetensors" else {}),
    }


class Download:
    """The stage in a process of its own, since huggingface_hub reads its endpoint once, when it is
    imported.
    """

    def __init__(self, folder, params, endpoint, patience=None, module="stages.base", **job):
        self.output, self.scratch = folder / "output", folder / "scratch"
        shutil.rmtree(self.output, ignore_errors=True)
        for made in (self.output, self.scratch):
            made.mkdir(parents=True, exist_ok=True)
        (folder / "token").write_text(TOKEN + "\n")
        its = {
            "stage": "base",
            "params": params,
            "inputs": {},
            "output": str(self.output),
            "scratch": str(self.scratch),
            "seed": 0,
            **job,
        }
        (folder / "job.json").write_text(json.dumps({**its, "secrets": {"hf_token": str(folder / "token")}}))
        hub = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        # `patience`: seconds that a call of the hub may bring too few bytes
        program = (
            ["-m", module]
            if patience is None
            else [
                "-c",
                f"from stages.base import __main__, patience; patience.WINDOW = {patience}\n"
                "__main__.job.main(__main__.run)",
            ]
        )
        self.process = subprocess.Popen(
            [sys.executable, *program, folder / "job.json"],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO), **hub},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def finish(self):
        """Exit code, the last event, and everything it printed."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, json.loads(out.splitlines()[-1]) if out else {}, out + err
