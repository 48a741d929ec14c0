"""A small seeded mutator of files, and the loop that gives what it makes to a reader.

Every case is made from a seed alone, so a failure is seen again with that seed. ANNIE_FUZZ_SECONDS sets how
long each reader is tried (default: 3).
"""

import json
import os
import random
import re
import struct
import time

from model.weights.paths import CheckpointError

SECONDS = float(os.environ.get("ANNIE_FUZZ_SECONDS", "3"))
FIRST_SEED = int(os.environ.get("ANNIE_FUZZ_SEED", "0"))
SLOWEST = 1.0  # seconds of the processor that one case may take
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


def mutated_file(path, chance):
    data = path.read_bytes()
    change = mutated_safetensors if path.suffix == ".safetensors" else mutated
    path.write_bytes(change(data, chance))


def cases(folder, names, restore):
    """Seeds, as long as the time lasts. Before each, all files are restored and one or two changed."""
    ends, seed = time.monotonic() + SECONDS, FIRST_SEED
    while time.monotonic() < ends:
        chance = random.Random(seed)
        restore()
        for name in chance.sample(names, chance.randint(1, min(2, len(names)))):
            mutated_file(folder / name, chance)
        yield seed
        seed += 1


def check(reader, folder, names, allowed):
    """Gives changed files to `reader`; it may succeed, or raise one of `allowed` with words that can be
    printed. The number of cases, and how many were taken.
    """
    whole = {name: (folder / name).read_bytes() for name in names}

    def restore():
        for name, data in whole.items():
            (folder / name).write_bytes(data)

    count = taken = 0
    for seed in cases(folder, names, restore):
        began = time.process_time()
        try:
            reader()
            taken += 1
        except allowed as error:
            words = str(error)
            assert words, f"ANNIE_FUZZ_SEED={seed}: an error without words"
            if isinstance(error, CheckpointError):
                assert words.isprintable(), f"ANNIE_FUZZ_SEED={seed}: {words!a}"
        except Exception as error:
            raise AssertionError(f"ANNIE_FUZZ_SEED={seed}: {type(error).__name__}: {error}") from error
        took = time.process_time() - began
        assert took < SLOWEST, f"ANNIE_FUZZ_SEED={seed}: took {took:.1f} seconds"
        count += 1
    restore()
    print(json.dumps({"cases": count, "taken": taken}))
    assert count > taken, "no change was refused"
    return count
