"""A small seeded mutator of files, and the loop that gives what it makes to a reader (fuzz_readers.py).

    python3 -m tests.stages.fuzz [--seconds S] [--ranges K] [--processes N] [--corpus FOLDER] [READER ...]

from the repository's root tries every reader in processes of its own, each for S seconds from each of K
seeds, and prints a table. Files that a reader fails on are kept in the corpus, which the tests read again.
Every case is made from a seed alone, so a failure is seen again with that seed: ANNIE_FUZZ_SEED=N. Tests try
each reader for ANNIE_FUZZ_SECONDS (default: 3).
"""

import argparse
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
CORPUS = HERE / "corpus"
SECONDS = float(os.environ.get("ANNIE_FUZZ_SECONDS", "3"))
FIRST_SEED = int(os.environ.get("ANNIE_FUZZ_SEED", "0"))
RANGE = 10**9  # seeds
SLOWEST = 1.0  # seconds of the processor that one case may take
LATE = 120  # seconds after which a process that does not end is killed
KEPT = 5  # failures of a process whose files are kept
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
STRING = re.compile(rb'"[^"\\]*"')
VALUES = [
    *(b"-1", b"0", b"1", b"1.5", b"1e400", b"-0.0", b"NaN", b"Infinity", b"-Infinity"),
    *(b"9223372036854775807", b"18446744073709551616", b"1" + b"0" * 30, b"9" * 5000),
    *(b"null", b"true", b"false", b"[]", b"{}", b'""', b'"x"', b"[1]", b'{"a": 1}'),
    *(b'"../x"', b'"/etc/passwd"', b'"a\\u0000b"', b'"\\ud800"', b'"\\u202e"', b'"' + b"a" * 5000 + b'"'),
    b"[" * 5000,
]


def mutated(data, chance):
    """One to three changes of `data`: of bytes, of its length, or of a number or text of JSON."""
    for _ in range(chance.randint(1, 3)):
        data = chance.choice(CHANGES)(data, chance)
    return data


def flip(data, chance):
    place = chance.randrange(len(data) or 1)
    return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]


def cut(data, chance):
    return data[: chance.randrange(len(data) + 1)]


def take_out(data, chance):
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + data[min(last, first + 64) :]


def repeat(data, chance):
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:last] + data[first:]


def replace(data, chance):
    """Another value in place of a number or a text."""
    found = list(chance.choice((NUMBER, STRING)).finditer(data))
    if not found:
        return data
    match = chance.choice(found)
    return data[: match.start()] + chance.choice(VALUES) + data[match.end() :]


CHANGES = [flip, cut, take_out, repeat, replace, replace, replace]


def mutated_safetensors(data, chance):
    """`mutated`, or changes of the header alone, with its length put right."""
    if chance.random() < 0.3:
        return mutated(data, chance)
    (length,) = struct.unpack("<Q", data[:8])
    text = mutated(data[8 : 8 + length], chance)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutated_file(data, name, chance):
    return (mutated_safetensors if name.endswith(".safetensors") else mutated)(data, chance)


@dataclass
class Result:
    """Of one reader: cases tried, those that it took without an error, seconds of the slowest, failures."""

    cases: int = 0
    taken: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def refused(self):
        return self.cases - self.taken - len(self.failures)

    def add(self, other):
        self.cases, self.taken = self.cases + other.cases, self.taken + other.taken
        self.slowest = max(self.slowest, other.slowest)
        self.failures += other.failures


class Trial:
    """Changed files given to a reader. It has failed if it raises anything that it does not allow, an error
    without words or one that cannot be printed, or if it takes more than SLOWEST.
    """

    def __init__(self, reader, result):
        self.reader, self.result = reader, result
        self.whole = {name: (reader.folder / name).read_bytes() for name in reader.names}

    def warm_up(self):
        """Reads the whole files once, untimed: the first reading imports libraries."""
        self._read()
        self.result.taken = 0

    def run(self, label, changed):
        """Whether the reader did as it should with `changed`, file name -> content."""
        for name, data in {**self.whole, **changed}.items():
            (self.reader.folder / name).write_bytes(data)
        began = time.process_time()
        failure = self._read()
        took = time.process_time() - began
        self.result.cases += 1
        self.result.slowest = max(self.result.slowest, took)
        if not failure and took > SLOWEST:
            failure = f"took {took:.1f} seconds"
        if failure:
            self.result.failures.append(f"{label}: {failure}")
        return not failure

    def _read(self):
        try:
            self.reader.read()
        except self.reader.allowed as error:
            words = str(error)
            return "" if words and words.replace("\n", " ").isprintable() else f"its words are {words!a}"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            words = f"{type(error).__name__}: {str(error)[:200]!a}"
            return f"{words} ({Path(place.filename).name}:{place.lineno})"
        self.result.taken += 1
        return ""


def changed_files(whole, seed):
    """One or two of the files, changed: name -> content."""
    chance = random.Random(seed)
    names = sorted(whole)
    chosen = chance.sample(names, chance.randint(1, min(2, len(names))))
    return {name: mutated_file(whole[name], name, chance) for name in chosen}


def fuzz(reader, seconds, seed, corpus=None, at_case=lambda seed: None):
    """Tries a reader for `seconds`, from `seed` on. With a folder `corpus`, failures are kept there, and it
    goes on; without, it ends at the first.
    """
    result = Result()
    trial = Trial(reader, result)
    trial.warm_up()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        at_case(seed)
        changed = changed_files(trial.whole, seed)
        if not trial.run(f"ANNIE_FUZZ_SEED={seed}", changed):
            if corpus is None:
                break
            if len(result.failures) <= KEPT:
                keep(corpus / str(seed), changed)
        seed += 1
    return result


def keep(folder, changed):
    for name, data in changed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def replay(reader, corpus):
    """Tries what once failed: every folder of `corpus`, which holds files to put in place of whole ones."""
    result = Result()
    trial = Trial(reader, result)
    for case in sorted(path for path in corpus.glob("*") if path.is_dir()):
        files = [file for file in case.rglob("*") if file.is_file()]
        trial.run(case.name, {str(file.relative_to(case)): file.read_bytes() for file in files})
    return result


def process(name, options, seed):
    """Tries a reader in a process of its own, which may die. What it found, or why it is left out."""
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case"
        words = [sys.executable, "-m", "tests.stages.fuzz", name, "--seconds", str(options.seconds)]
        words += ["--corpus", str(options.corpus), "--seed", str(seed), "--case", str(case)]
        try:
            done = subprocess.run(
                words, cwd=REPO, capture_output=True, text=True, timeout=options.seconds + LATE
            )
            lines = done.stdout.splitlines()
            if done.returncode == 0 and lines:
                found = json.loads(lines[-1])
                return found["left_out"] if "left_out" in found else Result(**found)
            ended = f"ended with {done.returncode}: {' '.join(done.stderr.splitlines()[-1:])}"
        except subprocess.TimeoutExpired:
            ended = f"did not end {LATE} seconds after its time"
        place = f"ANNIE_FUZZ_SEED={case.read_text()}" if case.exists() else "before its first case"
        return Result(failures=[f"{place}: the process {ended}"])


def one(readers, name, options):
    """What a process of its own does: prints its result as JSON."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        torch.manual_seed(0)
        try:
            reader = readers[name](Path(folder), stack)
        except ImportError as error:  # of a library that this reader alone needs
            return print(json.dumps({"left_out": str(error)}))
        result = fuzz(
            reader,
            options.seconds,
            options.seed,
            options.corpus / name,
            lambda seed: options.case.write_text(str(seed)),
        )
    return print(json.dumps(asdict(result)))


def table(results):
    """An aligned line for each reader."""
    head = ("reader", "cases", "refused", "taken", "failures", "slowest case (s)")
    lines = [head]
    for name, result in results.items():
        if isinstance(result, str):
            lines.append((name, f"left out: {result}", "", "", "", ""))
            continue
        counts = (result.cases, result.refused, result.taken, len(result.failures))
        lines.append((name, *(f"{count:,}" for count in counts), f"{result.slowest:.2f}"))
    widths = [max(len(line[i]) for line in lines if not line[1].startswith("left")) for i in range(6)]
    for name, *numbers in lines:
        cells = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))
        yield f"{name.ljust(max(widths[0], 16))}  {'  '.join(cells)}".rstrip()


def main():
    from fuzz_readers import READERS

    parser = argparse.ArgumentParser(prog="python3 -m tests.stages.fuzz")
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"all, or some of {', '.join(READERS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each reader and range of seeds")
    parser.add_argument("--ranges", type=int, default=1, help="ranges of seeds, each in a process of its own")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at the same time")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder for files that a reader fails on")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.readers) - set(READERS):
        parser.error(f"no reader {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
    if options.case:
        return one(READERS, options.readers[0], options)
    options.corpus = options.corpus.resolve()
    names = options.readers or list(READERS)
    results = {name: Result() for name in names}
    tasks = [(name, options.seed + number * RANGE) for number in range(options.ranges) for name in names]
    with ThreadPoolExecutor(options.processes) as pool:
        ended = pool.map(lambda task: process(task[0], options, task[1]), tasks)
        for (name, _), found in zip(tasks, ended, strict=True):
            if isinstance(found, str):
                results[name] = found
            else:
                results[name].add(found)
    print("\n".join(table(results)))
    failures = [f"{n}: {text}" for n, r in results.items() if isinstance(r, Result) for text in r.failures]
    print("\n".join(["", *failures]) if failures else "\nno failure")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "model"), str(REPO)]
    sys.exit(main())
