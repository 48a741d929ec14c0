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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import hashing, manifest, modes
from forge.finding import Finding, Refused, error
from forge.manifest import MANIFEST, Manifest


@dataclass(frozen=True)
class Artifact:
    stage: str
    key: str
    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def bytes(self) -> int:
        return sum(entry["size"] for entry in self.manifest["files"].values())

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that it was made with."""
        components = self.manifest["components"].items()
        return {n.removeprefix("param/"): json.loads(v) for n, v in components if n.startswith("param/")}

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

    def at(self, stage: str, key: str) -> Artifact | None:
        """What lies at a key, whole or not. Refused if its manifest is damaged."""
        return self._read(self.root / "artifacts" / stage / key)

    def find(self, stage: str, key: str | None) -> Artifact | None:
        """The artifact of a key, or None. One whose files are not those of its manifest does not count."""
        artifact = self.at(stage, key) if key else None
        return artifact if artifact and not self.damage(artifact) else None

    def broken(self, stage: str, key: str) -> str:
        """Why the artifact that lies at a key does not count ("" if none lies there, or it does)."""
        artifact = self.at(stage, key)
        return self.damage(artifact) if artifact else ""

    def unfinished(self, stage: str, key: str) -> bool:
        """Whether an earlier attempt at a key left something to go on from."""
        scratch = self.root / "scratch" / stage / key
        # "home" is the home folder of the stage's process; executors make it, and caches in it are no
        # progress.
        return scratch.is_dir() and any(p.name != "home" for p in scratch.iterdir())

    def damage(self, artifact: Artifact) -> str:
        """The first of `damages`, "" if there is none."""
        return next(self.damages(artifact), "")

    def damages(self, artifact: Artifact) -> Iterator[str]:
        """What is wrong with an artifact's files, each by name. Reads no content: what a file holds is known
        if it was read since it last changed, see `unread`.
        """
        expected, present = artifact.manifest["files"], _files(artifact.folder)
        for name, entry in expected.items():
            status = present.pop(name, None)
            if status is None:
                yield f"{name} is missing"
            elif not stat.S_ISREG(status.st_mode):
                yield f"{name} is no plain file"
            elif status.st_size != entry["size"]:
                yield f"{name} has {status.st_size} bytes of {entry['size']}"
            elif self.memo.known(status) not in (None, entry["sha256"]):
                yield f"{name} has other content than when it was made"
        present.pop(MANIFEST, None)
        yield from (f"{name} is there, and no file of it" for name in sorted(present))

    def readable(self, artifact: Artifact) -> list[str]:
        """The files of an artifact that are there, and are files."""
        present = _files(artifact.folder)
        named = [name for name in artifact.manifest["files"] if name in present]
        return [name for name in named if stat.S_ISREG(present[name].st_mode)]

    def unread(self, artifact: Artifact) -> list[str]:
        """Those of `readable` that were not read since they last changed. Whether they were copied, touched
        or edited only their content tells.
        """
        names = self.readable(artifact)
        return [name for name in names if self.memo.known(os.lstat(artifact.folder / name)) is None]

    def newest(self, stage: str, recipe: str, executor: str | None = None) -> Artifact | None:
        """The last accepted artifact of a stage under a recipe, rather one of the same executor than
        another.
        """
        mine = self.made(stage, recipe)
        return max(
            mine, key=lambda a: (a.manifest["executor"] == executor, a.manifest["created"]), default=None
        )

    def made(self, stage: str, recipe: str) -> list[Artifact]:
        """Every artifact of a stage that was made under a recipe."""
        return [artifact for artifact in self.all(stage) if artifact.manifest["recipe"] == recipe]

    def all(self, stage: str = "*") -> list[Artifact]:
        """Every artifact of a stage, or of all stages, whole or not. Refused as `at` is."""
        folders = sorted(self.root.glob(f"artifacts/{stage}/*"))
        return [artifact for folder in folders if (artifact := self._read(folder))]

    def _read(self, folder: Path) -> Artifact | None:
        read = manifest.read(folder)
        return Artifact(folder.parent.name, folder.name, folder, read) if read is not None else None

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
        modes.make_folder(self.tmp)
        scratch = modes.make_folder(self.root / "scratch" / stage / key)
        output = Path(tempfile.mkdtemp(prefix=f"{stage}-{key[:12]}-", dir=self.tmp))
        output.chmod(modes.folder_mode())
        return output, scratch

    def accept(
        self, stage: str, key: str, output: Path, kind: str, patterns: Sequence[str], facts: dict[str, Any]
    ) -> Artifact:
        """Makes `output` the artifact of `key`, of type `kind`, in which each of `patterns` matches a file.
        `facts`: components, sources, seconds, recipe, executor.

        Refused if the output lacks what its type needs; OSError (disk full) leaves the store as it was.
        """
        if findings := faults(output, kind, patterns):
            raise Refused(findings)
        paths = sorted(p for p in output.rglob("*") if not p.is_dir())
        for path in paths:
            modes.seal(path)
        hashing.settle(paths)
        files: dict[str, dict[str, Any]] = {
            str(path.relative_to(output)): {"size": path.stat().st_size, "sha256": self.memo.file(path)}
            for path in paths
        }
        digest = hashing.of_entries((name, entry["sha256"]) for name, entry in files.items())
        accepted = {
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
        modes.write(path, json.dumps(accepted, indent=1, sort_keys=True) + "\n")
        modes.seal(path)
        for folder in [p for p in output.rglob("*") if p.is_dir()] + [output]:
            folder.chmod(modes.folder_mode())  # a container wrote with a umask of its own
            modes.sync(folder)
        modes.make_folder(target.parent)
        _place(output, target)
        modes.sync(target.parent)
        if output.exists():  # the artifact that was there before
            remove(output)
        self.discard(self.root / "scratch" / stage / key)
        return Artifact(stage, key, target, accepted)

    def discard(self, folder: Path) -> None:
        """Deletes a folder of the store if it is there. A crash or a power cut leaves it whole or gone."""
        if not folder.is_dir():
            return
        tombstone = Path(tempfile.mkdtemp(prefix="gone-", dir=modes.make_folder(self.tmp)))
        os.rename(folder, tombstone / folder.name)
        modes.sync(folder.parent)
        remove(tombstone)


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
        elif not manifest.plain_name(str(name)):
            findings.append(
                error(
                    subject,
                    f"the file name {str(name)!r}",
                    "a name of characters that can be printed",
                    "Mend the stage.",
                )
            )
    if (output / MANIFEST).exists():
        findings.append(
            error(subject, MANIFEST, "no file of that name", "It is forge's; name yours otherwise.")
        )
    return findings


def _files(folder: Path) -> dict[str, os.stat_result]:
    """Everything in a folder but its folders, by its path from there; links are not followed."""
    found: dict[str, os.stat_result] = {}
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                else:
                    found[os.path.relpath(entry.path, folder)] = os.lstat(entry.path)
    return found


def remove(path: Path) -> None:
    """Deletes a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _place(output: Path, target: Path) -> None:
    """Renames `output` to `target`. A folder already there changes places with it in one step, so that
    there is never none. What it held is the caller's to remove, once the disk knows of the change.
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
        aside = output.with_name(output.name + "-old")
        os.rename(target, aside)
        os.rename(output, target)
        os.rename(aside, output)
