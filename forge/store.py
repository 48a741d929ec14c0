"""Artifacts on disk: written beside their place, checked, synced, renamed. A crash leaves the old state or
the new one.
"""

from __future__ import annotations

import ctypes
import datetime
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import hashing
from forge.finding import Finding, Refused, error

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    stage: str
    key: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def bytes(self) -> int:
        return sum(entry["size"] for entry in self.manifest["files"].values())

    @property
    def created(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(self.manifest["created"])


class Store:
    """The store of one home folder. Reading needs no lock; `clean`, `begin` and `accept` are for the
    lock's holder.
    """

    def __init__(self, home: Path):
        self.home = home
        self.root = home / "store"
        self.tmp = self.root / "tmp"
        self._memo: hashing.Memo | None = None

    @property
    def memo(self) -> hashing.Memo:
        if self._memo is None:
            self._memo = hashing.Memo(self.root / "memo.sqlite")
        return self._memo

    # --- reading --------------------------------------------------------------------------------------------

    def find(self, stage: str, key: str | None) -> Artifact | None:
        """The artifact of a key, or None. One whose files are not those of its manifest does not count."""
        if key is None:
            return None
        artifact = self._read(self.root / "artifacts" / stage / key)
        return artifact if artifact and not self.damage(artifact) else None

    def broken(self, stage: str, key: str) -> str:
        """Why the artifact that lies at a key does not count ("" if none lies there, or it does)."""
        artifact = self._read(self.root / "artifacts" / stage / key)
        return self.damage(artifact) if artifact else ""

    def unfinished(self, stage: str, key: str) -> bool:
        """Whether an earlier attempt at a key left something to go on from."""
        scratch = self.root / "scratch" / stage / key
        # "home" is the home folder of the stage's process; executors make it, and caches in it are no
        # progress.
        return scratch.is_dir() and any(p.name != "home" for p in scratch.iterdir())

    def damage(self, artifact: Artifact) -> str:
        """What is wrong with an artifact's files by name and size ("" if nothing); reads no content."""
        for name, entry in artifact.manifest["files"].items():
            try:
                size = os.stat(artifact.folder / name).st_size
            except FileNotFoundError:
                return f"{name} is missing"
            if size != entry["size"]:
                return f"{name} has {size} bytes of {entry['size']}"
        return ""

    def newest(self, stage: str, recipe: str, executor: str | None = None) -> Artifact | None:
        """The last accepted artifact of a stage under a recipe, rather one of the same executor than
        another.
        """
        folder = self.root / "artifacts" / stage
        artifacts = [self._read(p) for p in folder.iterdir()] if folder.is_dir() else []
        mine = [a for a in artifacts if a and a.manifest["recipe"] == recipe]
        return max(
            mine, key=lambda a: (a.manifest["executor"] == executor, a.manifest["created"]), default=None
        )

    def _read(self, folder: Path) -> Artifact | None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as fault:
            raise Refused(
                error(
                    str(folder / MANIFEST),
                    f"a manifest that is not JSON ({fault})",
                    "the manifest as it was accepted",
                    "Delete that folder; the stage runs again.",
                )
            ) from fault
        return Artifact(folder.parent.name, folder.name, folder, manifest)

    # --- writing --------------------------------------------------------------------------------------------

    def clean(self) -> None:
        """Removes what a killed run left in `tmp`."""
        if self.tmp.is_dir():
            for leftover in self.tmp.iterdir():
                remove(leftover)

    def begin(self, stage: str, key: str) -> tuple[Path, Path]:
        """An empty output folder, and the key's scratch folder with whatever an earlier attempt left
        there.
        """
        self.tmp.mkdir(parents=True, exist_ok=True)
        scratch = self.root / "scratch" / stage / key
        scratch.mkdir(parents=True, exist_ok=True)
        output = Path(tempfile.mkdtemp(prefix=f"{stage}-{key[:12]}-", dir=self.tmp))
        output.chmod(0o755)  # mkdtemp's 0700 would shut out a container's user
        return output, scratch

    def accept(
        self, stage: str, key: str, output: Path, kind: str, patterns: Sequence[str], facts: dict[str, Any]
    ) -> Artifact:
        """Makes `output` the artifact of `key`, of type `kind`, in which each of `patterns` matches a file.
        `facts`: components, seconds, recipe, executor.

        Refused if the output lacks what its type needs; OSError (disk full) leaves the store as it was.
        """
        if findings := faults(output, kind, patterns):
            raise Refused(findings)
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in output.rglob("*") if not p.is_dir()):
            _seal(path)
            files[str(path.relative_to(output))] = {
                "size": path.stat().st_size,
                "sha256": self.memo.file(path),
            }
        digest = hashing.of_entries((name, entry["sha256"]) for name, entry in files.items())
        manifest = {
            "stage": stage,
            "key": key,
            "type": kind,
            "digest": digest,
            "files": files,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **facts,
        }
        target = self.root / "artifacts" / stage / key
        path = output / MANIFEST
        path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        _seal(path)
        for folder in [p for p in output.rglob("*") if p.is_dir()] + [output]:
            _sync(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        _place(output, target)
        _sync(target.parent)
        if output.exists():  # the artifact that was there before
            remove(output)
        remove(self.root / "scratch" / stage / key)
        return Artifact(stage, key, target, manifest)


def faults(output: Path, kind: str, patterns: Sequence[str]) -> list[Finding]:
    """What an output lacks to be an artifact of type `kind`: by names and sizes, not by content."""
    subject = f"output of type {kind}"
    findings = []
    for pattern in patterns:
        if not any(p.is_file() for p in output.glob(pattern)):
            findings.append(
                error(
                    subject,
                    f"no {pattern}",
                    f"a file {pattern}",
                    "The stage exited 0 without writing it: mend the stage.",
                )
            )
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            findings.append(
                error(
                    subject, f"{name}, which is no plain file", "files and folders", "Write the file itself."
                )
            )
    if (output / MANIFEST).exists():
        findings.append(
            error(subject, MANIFEST, "no file of that name", "It is forge's; name yours otherwise.")
        )
    return findings


def remove(path: Path) -> None:
    """Deletes a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _seal(path: Path) -> None:
    """Syncs a file and makes it read-only, unless it is a hard link to a file that may be the user's."""
    _sync(path)
    status = path.stat()
    if status.st_nlink == 1 and status.st_uid == os.geteuid():
        path.chmod(stat.S_IMODE(status.st_mode) & ~0o222)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _place(output: Path, target: Path) -> None:
    """Renames `output` to `target`. A folder already there changes places with it in one step, so that
    there is never none.
    """
    if not target.exists():
        os.rename(output, target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(output), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(target))
        # A file system without exchange (NFS): two steps, and a crash between them leaves the stage to be run
        # again.
        os.rename(target, output.with_name(output.name + "-old"))
        os.rename(output, target)
        remove(output.with_name(output.name + "-old"))
