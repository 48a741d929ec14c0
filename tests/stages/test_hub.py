"""A hub that lists what it must not, or never delivers, ends stage base with a sentence."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import contracts
import huggingface_hub
import loopback_hub
import pytest
import small

from stages.base import __main__ as base
from stages.job import Job, StageError


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = small.base(tmp_path_factory.mktemp("published") / "base", "*E")
    return small.tokenizer(folder)


REPO = Path(__file__).resolve().parents[2]
HUB = contracts.defaults("base", source="hub", repository=loopback_hub.REPOSITORY, commit=loopback_hub.COMMIT)
ANSWERS = {
    "a name above": (lambda i: i["siblings"][0].update(rfilename="../../x.json"), "leads out of its folder"),
    "an absolute name": (lambda i: i["siblings"][0].update(rfilename="/tmp/x.json"), "absolute"),
    "a control character": (lambda i: i["siblings"][0].update(rfilename="a\n.json"), "control character"),
    "a file twice": (lambda i: i["siblings"].append(i["siblings"][0]), "twice"),
    "a file and a folder": (
        lambda i: i["siblings"].append({**i["siblings"][0], "rfilename": "config.json/a.json"}),
        "as a file and a",
    ),
    "a negative size": (lambda i: i["siblings"][0].update(size=-1), "without its size"),
    "a size as text": (lambda i: i["siblings"][0].update(size="12"), "without its size"),
    "no digest": (lambda i: i["siblings"][0].pop("blobId"), "without its size and digest"),
    "files that are numbers": (lambda i: i.update(siblings=[1, 2]), "no list of files"),
    "another commit": (lambda i: i.update(sha="f" * 40), "answers with commit 'ffff"),
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_the_hubs_list_is_checked_before_anything_is_downloaded(published, tmp_path, monkeypatch, fault):
    change, found = ANSWERS[fault]
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir()
    scratch.mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with loopback_hub.Hub(published) as hub:
        hub.change = change
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        with pytest.raises(StageError, match=found) as error:
            base.run(Job("base", HUB, {}, output, scratch, 0))
    assert error.value.expected and error.value.remedy and len(hub.requests) == 1
    assert not list(output.iterdir()) and not list(scratch.iterdir())


ENDLESS = {
    "a drip": (lambda hub: setattr(hub, "drips", True), "bytes arrived in 3 seconds"),
    "429 for ever": (lambda hub: setattr(hub, "status", (429, {})), "bytes arrived in 3 seconds"),
    "429 with a pause of a day": (
        lambda hub: setattr(hub, "status", (429, {"Retry-After": "86400"})),
        "bytes arrived in 3 seconds",
    ),
    "503 with a pause of a day": (
        lambda hub: setattr(hub, "status", (503, {"Retry-After": "86400"})),
        "while downloading|bytes arrived in 3 seconds",
    ),
    "a list that unpacks to 100 MB": (
        lambda hub: (setattr(hub, "packed", True), setattr(hub, "page", b"[" * 100_000_000)),
        "an answer of the hub is packed .'gzip'.",
    ),
    "a list that is nested without end": (
        lambda hub: setattr(hub, "page", b"[" * 100_000),
        "no list of files .RecursionError.",
    ),
    "a page instead of the list": (
        lambda hub: setattr(hub, "page", b"<html>Log in</html>"),
        "no list of files",
    ),
}


@pytest.mark.parametrize("fault", ENDLESS)
def test_a_hub_that_never_delivers_ends_the_stage_in_time(published, tmp_path, fault):
    change, found = ENDLESS[fault]
    with loopback_hub.Hub(published) as hub:
        change(hub)
        began = time.monotonic()
        code, last, printed = loopback_hub.Download(tmp_path / "job", HUB, hub.url, patience=3).finish()
    assert code == 1 and re.search(found, last["found"]), printed
    assert last["remedy"] and "Traceback" not in printed and time.monotonic() - began < 60
    assert set(hub.encodings) <= {"identity"}


def test_words_of_a_stranger_reach_no_terminal_as_they_are(tmp_path):
    error = StageError("a\x1b[2Jb\u202ec\ud800d\nनमस्ते é 🎉", "\x07", "\r")
    assert error.found == "a\\x1b[2Jb\\u202ec\\ud800d\nनमस्ते é 🎉"
    assert (error.expected, error.remedy) == ("\\x07", "\\r")
    warns = "from stages import job; job.warning('a\\x1b[2Jb', '\\u202e')"
    done = subprocess.run([sys.executable, "-c", warns], capture_output=True, text=True, cwd=REPO)
    event = json.loads(done.stdout)
    assert (event["message"], event["remedy"]) == ("a\\x1b[2Jb", "\\u202e")


def test_a_page_instead_of_a_file_is_told_by_its_digest(published, tmp_path):
    with loopback_hub.Hub(published) as hub:
        hub.altered = "config.json"
        code, last, _ = loopback_hub.Download(tmp_path / "job", HUB, hub.url).finish()
    assert code == 1 and "config.json has digest" in last["found"]
