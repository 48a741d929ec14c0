"""Recognises what a file holds, by its bytes and not by its name (records.py reads it).

Readable are Parquet, and JSON Lines and JSON (an array, or objects over several lines) in UTF-8, UTF-16 or
UTF-32, also as gzip. For any other kind the error names the kind and a way to convert it.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.job import StageError

HEAD = 1 << 16  # bytes of a file that are read to recognise it
TEXT_BYTES = 100_000_000  # the largest prompt or file of tools
JSON, TEXT, PARQUET, EMPTY = "JSON", "text", "Parquet", "an empty file"
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # UTF-32 LE is first, because its mark begins with that of UTF-16 LE
ANEW = "Copy or download it again, or write it anew."
SAVE = "Save the conversations as JSON Lines or Parquet."
FOREIGN = (
    (b"SQLite format 3\0", "an SQLite database", SAVE),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file (.xls, .doc)", SAVE),
    (b"%PDF", "a PDF", SAVE),
    (b"ARROW1", "an Arrow file", "Save it with `dataset.to_parquet(...)` or `to_json(...)`."),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream, as `save_to_disk` writes it",
        "Save it with `dataset.to_parquet(...)` or `to_json(...)`.",
    ),
    (b"PARE", "an encrypted Parquet file", "Write it without encryption."),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it (zstd -d), or pack it with gzip."),
    (b"\xfd7zXZ\0", "an xz archive", "Unpack it (xz -d), or pack it with gzip."),
    (b"BZh", "a bzip2 archive", "Unpack it (bzip2 -d), or pack it with gzip."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it, and name the folder."),
    (b"Rar!", "a rar archive", "Unpack it, and name the folder."),
    (b"Obj\x01", "an Avro file", SAVE),
    (b"\x89HDF", "an HDF5 file", SAVE),
    (b"\x80\x04", "a pickle", SAVE),
    (
        b"version https://git-lfs",
        "a Git LFS pointer: the data itself was not downloaded",
        "Run `git lfs pull` in its repository.",
    ),
)


class Foreign(Exception):
    """A file of a kind that is not read: the kind, and the remedy."""

    def __init__(self, kind: str, remedy: str):
        super().__init__(f"{kind}. {remedy}")
        self.kind, self.remedy = kind, remedy


@dataclass(frozen=True)
class Kind:
    """How to read a file. `name` is JSON, PARQUET, EMPTY, or TEXT if the first line is not JSON (its lines
    become rejects). `packed` means gzip. `encoding` and `newline` are those of a text.
    """

    name: str
    packed: bool = False
    encoding: str = "utf-8"
    newline: str = "\n"


def recognise(path: Path) -> Kind:
    """The kind of a file. Raises Foreign if that kind is not read, and StageError if the file is torn or
    cannot be opened.
    """
    refuse_special(path)
    with as_stage_errors(path.name):
        with path.open("rb") as opened:
            head = opened.read(HEAD)
        packed = head.startswith(b"\x1f\x8b")
        if packed:
            with gzip.open(path) as opened:
                head = opened.read(HEAD)
    if not head.strip(b" \t\r\n"):
        return Kind(EMPTY, packed)
    if head.startswith(b"PAR1"):
        if packed:
            raise Foreign("Parquet inside gzip", "Unpack it (gzip -d): Parquet packs its columns itself.")
        return Kind(PARQUET)
    if head.startswith(b"PK\x03\x04"):
        raise Foreign(*_zip_kind(path, head))
    if head[257:262] == b"ustar":
        raise Foreign("a tar archive", "Unpack it, and name the folder.")
    for magic, kind, remedy in FOREIGN:
        if head.startswith(magic):
            raise Foreign(kind, remedy)
    encoding = _encoding(head)
    text = head.decode(encoding, "replace").lstrip("\ufeff \t\r\n")
    if is_text := text[:1] not in ("{", "["):
        _refuse_foreign_text(text)
    return Kind(
        TEXT if is_text else JSON, packed, encoding, "\r" if "\r" in text and "\n" not in text else "\n"
    )


def refuse_special(path: Path) -> None:
    """Raises StageError for a FIFO, a socket or a device, which is not opened: it may have no end."""
    with as_stage_errors(path.name):
        mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise StageError(
            f"{path.name} is a FIFO, a socket or a device", "a regular file", "Save what it gives as a file."
        )


@contextlib.contextmanager
def as_stage_errors(name: str) -> Iterator[None]:
    """Turns errors of reading into StageErrors with the file's name."""
    try:
        from pyarrow import ArrowException as arrow_error
    # The check before the first stage has only the standard library, and opens no Parquet.
    except ImportError:
        arrow_error = ()
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StageError(f"{name} is a torn gzip file: {error}", "a whole one", ANEW) from error
    except arrow_error as error:
        raise _torn_parquet(name, error) from error
    except UnicodeDecodeError as error:
        raise StageError(
            f"{name} is no {error.encoding} text ({error.reason} at {error.start})",
            "one encoding, UTF-8 at best",
            "Save it as UTF-8.",
        ) from error
    except OSError as error:
        if error.errno is None:  # Arrow's, not the system's
            raise _torn_parquet(name, error) from error
        raise StageError(
            f"{name} cannot be read: {error.strerror}",
            "a file that this user may read",
            "Check the path and its permissions.",
        ) from error


def _torn_parquet(name: str, error: Exception) -> StageError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return StageError(f"{name} begins as Parquet and cannot be read: {first}", "a whole Parquet file", ANEW)


def read_text(path: Path, purpose: str) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, without a byte order mark and with LF at every line end.

    Raises StageError if the path is a folder, or the file is empty or no text. `purpose` says what the file
    is for.
    """
    expected = f"{purpose}, as a text file in UTF-8"
    if path.is_dir():
        raise StageError(f"{path.name} is a folder", expected, "Name the file in the recipe.")
    refuse_special(path)
    if (size := path.stat().st_size) > TEXT_BYTES:
        raise StageError(
            f"{path.name} has {size} bytes", f"{expected} of at most {TEXT_BYTES}", "Name the right file."
        )
    with as_stage_errors(path.name):
        raw = path.read_bytes()
        encoding = _encoding(raw)
        binary = b"\0" in raw and encoding.startswith("utf-8")
        decoded = "" if binary else raw.decode(encoding)
    if binary:
        raise StageError(
            f"{path.name} is no text: it has NUL bytes", expected, "Name the right file, or save it as UTF-8."
        )
    if not decoded.strip():
        raise StageError(f"{path.name} is empty", expected, "Name the right file in the recipe.")
    return with_lf(decoded)


def with_lf(text: str) -> str:
    """`text` with LF in place of CRLF and of a single CR."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(head: bytes) -> str:
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    # Without a byte order mark: JSON begins with two ASCII characters, so the NULs among the first four bytes
    # show the width (RFC 4627, section 3).
    nuls = tuple(byte == 0 for byte in head[:4])
    encodings: dict[tuple[bool, ...], str] = {
        (False, True, False, True): "utf-16-le",
        (True, False, True, False): "utf-16-be",
        (False, True, True, True): "utf-32-le",
        (True, True, True, False): "utf-32-be",
    }
    return encodings.get(nuls, "utf-8")


def _zip_kind(path: Path, head: bytes) -> tuple[str, str]:
    """What a zip file holds, by names that stand in it as they are: at its start or in the list at its end.
    Nothing is unpacked.
    """
    with as_stage_errors(path.name), path.open("rb") as opened:
        opened.seek(max(0, path.stat().st_size - HEAD))
        names = head + opened.read(HEAD)
    if b"xl/workbook" in names:
        return "an Excel workbook", SAVE
    if b"word/document" in names:
        return "a Word document", SAVE
    return "a zip archive", "Unpack it, and name the folder."


def _refuse_foreign_text(text: str) -> None:
    """Raises Foreign for text of a well-known kind. Other text is read line by line, and its lines become
    rejects.
    """
    first = text.partition("\n")[0]
    if text.startswith("<"):
        raise Foreign("HTML or XML", "If it was downloaded: a page came instead of the file. " + SAVE)
    if text.startswith("---") or re.match(r"- ?\w*:|\w+:\s*$", first):
        raise Foreign("YAML", SAVE)
    fields = re.split(r"[,;\t]", first.strip())
    if len(fields) > 1 and all(re.fullmatch(r'"?[\w .-]{1,40}"?', field.strip()) for field in fields):
        raise Foreign(
            "a table in CSV",
            "Save it as JSON Lines: `datasets.load_dataset('csv', data_files=...)` and `.to_json(...)`.",
        )
    if text.startswith("#"):
        raise Foreign("text (Markdown?)", SAVE)
