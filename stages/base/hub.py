"""`source: hub`: one commit of a repository; every file is checked against the hub's own digest.

A broken connection resumes within the file. If a run fails, the next run uses the files that are complete.
Files of this commit that the stage's earlier artifact has are not downloaded again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from model.weights import origin
from model.weights.origin import Origin
from model.weights.paths import member
from stages import job
from stages.base import folder, patience
from stages.base.parameters import Parameters
from stages.job import Job, StageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from huggingface_hub.hf_api import RepoSibling

PATTERNS = ("*.json", "*.jinja", "*.safetensors", "*.py", "*.model", "LICENSE*", "README.md")
BLOCK = 16 * 1024 * 1024
LISTING_BYTES = 10_000_000  # of the list of files; a thousand files take 500,000


def run(task: Job) -> None:
    """Downloads the files of the commit that a checkpoint consists of into the output, and checks them."""
    download(task, PATTERNS)
    folder.check(task.output)


def download(task: Job, patterns: Sequence[str]) -> None:
    """Downloads the files that one of `patterns` names into the scratch folder, which the next attempt
    reuses, then links the checked files into the output, and writes where they are from.
    """
    from huggingface_hub import hf_hub_download

    # The transport's own class. A refused connection raises it, and not HfHubHTTPError.
    from huggingface_hub.errors import HTTPError

    params = task.parameters(Parameters)
    repository, commit = params.repository, params.commit
    if not repository:
        raise StageError("no `repository`", "one such as owner/name", "Name it in the recipe")
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise StageError(
            f"commit {commit!r}",
            "40 hex digits",
            "Branches and tags move; take the commit from the repository's history",
        )
    token = task.secrets["hf_token"].read_text().strip() if "hf_token" in task.secrets else False
    patience.count_bytes()
    # Left by a killed run. huggingface_hub uses a new name for every try, so it never resumes these.
    for part in task.scratch.rglob("*.incomplete"):
        part.unlink()
    try:
        files = listing(repository, commit, token, patterns)
        check_names(files, task)
        total, done = sum(f.size or 0 for f in files), 0
        for file in files:
            job.progress(done, total, "bytes", file.rfilename)
            if not take_earlier(file, task.previous, task.scratch):
                fetch(hf_hub_download, repository, commit, file, task.scratch, token)
            done += file.size or 0
    except (HTTPError, OSError) as error:
        # Only the kind of error and its status: the full text may contain what was sent, such as the token.
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(
            error, "strerror", None
        )
        raise StageError(
            f"{type(error).__name__}{f' {status}' if status else ''} while downloading {repository}",
            "the files of that commit",
            "Run again: what has arrived is kept. 401 or 403 want a token with access (secret hf_token), 404"
            " another name or commit",
        ) from None
    job.progress(total, total, "bytes", "checked")
    for file in files:
        target = member(task.output, file.rfilename)
        target.parent.mkdir(parents=True, exist_ok=True)
        link(task.scratch / file.rfilename, target)
    origin.write(task.output, Origin(repository, commit))


def listing(repository: str, commit: str, token: str | bool, patterns: Sequence[str]) -> list[RepoSibling]:
    """The files of the commit that one of `patterns` names. Raises StageError if the hub answers with
    another commit, or with something other than a list of files with sizes and digests.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        info = patience.within(
            f"the list of files of {repository}",
            LISTING_BYTES,
            lambda: 0,
            lambda: HfApi().model_info(repository, revision=commit, files_metadata=True, token=token),
        )
        files = [f for f in info.siblings or [] if any(fnmatch(f.rfilename, pattern) for pattern in patterns)]
        bad = [f.rfilename for f in files if not is_announced(f)]
    except (HTTPError, OSError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StageError(
            f"the hub's answer about {repository} is no list of files ({type(error).__name__})",
            "the JSON of a repository",
            "Something between here and the hub changes answers, such as a login page: try another network.",
        ) from error
    if info.sha != commit:
        raise StageError(
            f"the hub answers with commit {str(info.sha)[:40]!r}",
            f"{commit}, as asked",
            "Take the commit from the repository's history.",
        )
    if bad:
        raise StageError(
            f"the hub announces {bad[0]!a} without its size and digest",
            "both for every file",
            "Run again; if it comes back, something between here and the hub changes answers.",
        )
    return files


def is_announced(file: RepoSibling) -> bool:
    """Whether the hub says of a file how large it is, and its digest in hex digits."""
    known = announced_digest(file)
    return (
        type(file.size) is int
        and file.size >= 0
        and isinstance(known, str)
        and bool(re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", known))
    )


def check_names(files: list[RepoSibling], task: Job) -> None:
    """Raises CheckpointError for a name that leads out of the folders of the stage, and StageError for two
    files of one name, or a file and a folder. Nothing has been written by then.
    """
    names: set[str] = set()
    for file in files:
        member(task.scratch, file.rfilename)
        member(task.output, file.rfilename)
        if file.rfilename in names:
            raise StageError(f"the hub lists {file.rfilename} twice", "every file once", "Run again.")
        names.add(file.rfilename)
    for name in names:
        if both := [str(folder) for folder in PurePosixPath(name).parents if str(folder) in names]:
            raise StageError(
                f"the hub lists {both[0]} as a file and as a folder", "one of them", "Run again."
            )


def take_earlier(file: RepoSibling, previous: Path | None, scratch: Path) -> bool:
    """Links a file of `previous`, the stage's earlier artifact, into `scratch` if it has the digest that the
    hub announces. Returns whether it did.
    """
    if previous is None:
        return False
    earlier, target = previous / file.rfilename, scratch / file.rfilename
    if target.exists() or not earlier.is_file() or earlier.stat().st_size != file.size:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    link(earlier, target)
    if is_whole(target, file):
        return True
    target.unlink()
    return False


def link(source: Path, target: Path) -> None:
    """Makes a hard link; a copy if the two folders are on different file systems or mounts."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def fetch(
    download: Callable[..., object],
    repository: str,
    commit: str,
    file: RepoSibling,
    scratch: Path,
    token: str | bool,
) -> None:
    """Downloads one file into `scratch`, unless it is there already. Raises StageError if its digest is not
    the one that the hub announces.
    """
    path = scratch / file.rfilename
    if is_whole(path, file):
        return
    patience.within(
        file.rfilename,
        file.size or 0,
        lambda: sum(part.stat().st_size for part in scratch.rglob("*.incomplete")),
        lambda: download(repository, file.rfilename, revision=commit, local_dir=scratch, token=token),
    )
    found, expected = digest(path, file), announced_digest(file) or "none"
    if found != expected:
        path.unlink()
        raise StageError(
            f"{file.rfilename} has digest {found[:12]}",
            f"{expected[:12]}, which the hub announces for this commit",
            "Run again to download it anew; if it comes back, something between here and the hub changes"
            " files",
        )


def is_whole(path: Path, file: RepoSibling) -> bool:
    """Whether `path` has the size and the digest that the hub announces for `file`."""
    return (
        path.is_file() and path.stat().st_size == file.size and digest(path, file) == announced_digest(file)
    )


def announced_digest(file: RepoSibling) -> str | None:
    """SHA-256 of a large file (LFS), or the git blob id of a small one."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def digest(path: Path, file: RepoSibling) -> str:
    """The digest of `path`, of the same kind as the hub's digest of `file`."""
    hashed = (
        hashlib.sha256()
        if file.lfs
        else hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    )
    with path.open("rb") as opened:
        while block := opened.read(BLOCK):
            hashed.update(block)
    return hashed.hexdigest()
