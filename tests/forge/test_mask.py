"""Secrets never reach a log, however they come."""

from __future__ import annotations

import random

from forge.mask import Mask

SECRET = 'p4ss word/"x"'
TOKEN = "hf_" + "aB3" * 11


def test_a_secret_is_masked_in_every_form_it_takes():
    mask = Mask([SECRET + "\n"])
    for text in (SECRET, "p4ss%20word%2F%22x%22", 'p4ss word/\\"x\\"', "cDRzcyB3b3JkLyJ4Ig=="):
        assert "p4ss" not in mask.text(f"a {text} b") and "cDRz" not in mask.text(text)
    assert mask.text("nothing here") == "nothing here"


def test_a_hub_token_is_masked_though_no_file_names_it():
    assert Mask().text(f"Authorization: Bearer {TOKEN}, and hf_home") == "Authorization: Bearer [secret], and hf_home"


def test_a_secret_that_is_split_across_chunks_is_masked():
    text = f"one {SECRET} two\nthree {TOKEN} four\nfive {SECRET}"
    dice = random.Random(1)
    for _ in range(200):
        mask, shown, rest = Mask([SECRET]), "", text
        while rest:
            cut = dice.randint(1, 9)
            shown, rest = shown + mask.feed(rest[:cut]), rest[cut:]
        assert shown + mask.flush() == "one [secret] two\nthree [secret] four\nfive [secret]"


def test_a_line_without_end_is_shown_in_parts_and_masked():
    mask, shown = Mask([SECRET]), ""
    for _ in range(40):
        shown += mask.feed("x" * 4999 + SECRET)
    shown += mask.flush()
    assert shown.count("[secret]") == 40 and "p4ss" not in shown and shown.count("x") >= 4999 * 40


def test_short_words_are_no_secrets():
    assert Mask(["", "\n", "ab"]).text("a table") == "a table"
