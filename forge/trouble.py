"""What it means that a file could not be read or written, in one sentence with a remedy."""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path

from forge import preflight
from forge.finding import Finding, Refused, error
from forge.plan import GB
from forge.report import size

_GO_ON = "What was built before is as it was; run again to go on."


def findings(home: Path, fault: Refused | OSError) -> list[Finding]:
    """What a command that ends with this exception says."""
    return fault.findings if isinstance(fault, Refused) else [of_fault(home, fault)]


def of_fault(home: Path, fault: OSError) -> Finding:
    """The finding for an OSError of a command. `home` is where artifacts lie."""
    place = _place(home, fault)
    match fault.errno:
        case errno.ENOSPC if _inodes_are_gone(place):
            found = f"no inodes left at {place}: the disk is full of small files"
            return error("store", found, "room for more files", f"Delete some of them. {_GO_ON}")
        case errno.ENOSPC:
            free = preflight.disk_gb(_existing(place)) * GB
            found = f"a full disk ({size(free)} free at {place})"
            return error("store", found, "room for what is written", f"Free some space. {_GO_ON}")
        case errno.EDQUOT:
            found = f"the quota of {_name(os.geteuid())} at {place} used up"
            return error("store", found, "room for what is written", f"Delete some files. {_GO_ON}")
        case errno.EFBIG:
            found = f"{place}, which may not grow any larger"
            remedy = f"It is a limit of the file system (FAT has 4 GB), or the shell's (ulimit -f). {_GO_ON}"
            return error("store", found, "files of any size", remedy)
        case errno.EROFS:
            found = f"a read-only file system at {place}"
            remedy = (
                "Set ANNIE_HOME to another disk. If it was writable, the disk may be failing: see dmesg."
                " plan, status, logs and path still work."
            )
            return error("store", found, "one that can be written", remedy)
        case errno.EACCES | errno.EPERM:
            return _forbidden(home, place)
        case errno.EIO:
            found = f"{place}, which cannot be read or written (I/O error)"
            return error("store", found, "a disk that works", f"See dmesg, and copy what matters. {_GO_ON}")
    found = f"{type(fault).__name__}: {fault}"
    return error("store", found, "files that can be read and written", _GO_ON)


def _place(home: Path, fault: OSError) -> Path:
    return Path(os.fsdecode(fault.filename)) if isinstance(fault.filename, str | bytes) else home


def _inodes_are_gone(place: Path) -> bool:
    status = os.statvfs(_existing(place))
    return status.f_files > 0 and status.f_favail == 0


def _forbidden(home: Path, place: Path) -> Finding:
    of_home = place.is_relative_to(home) or home.is_relative_to(place)
    place = _existing(place)
    owner, user = place.lstat().st_uid, os.geteuid()
    subject = "store" if of_home else str(place)
    if owner == user:
        found = f"{place}, which {_name(user)} may not use although it is theirs"
        return error(subject, found, "a file that its owner may read", f"chmod -R u+rX {place}")
    found, expected = f"{place}, which belongs to {_name(owner)}", f"one that {_name(user)} may use"
    remedy = f"Have {_name(owner)} let you read it, or name another."
    if of_home:
        remedy = (
            "Set ANNIE_HOME to a folder of your own. plan, status, logs and path work on another user's if"
            " they set ANNIE_SHARED=1 and you are in their group."
        )
    return error(subject, found, expected, remedy)


def _existing(place: Path) -> Path:
    """The nearest path above that is there and that one may look at."""
    while place != place.parent:
        try:
            place.lstat()
            return place
        except OSError:
            place = place.parent
    return place


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
