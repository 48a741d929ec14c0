"""Secrets never reach a log, however they come."""

from __future__ import annotations

from forge.mask import Mask

SECRET = 'p4ss word/"x"'
TOKEN = "hf_" + "aB3" * 11


def test_a_secret_is_masked_in_every_form_it_takes():
    mask = Mask([SECRET + "\n"])
    for text in (SECRET, "p4ss%20word%2F%22x%22", 'p4ss word/\\"x\\"', "cDRzcyB3b3JkLyJ4Ig=="):
        assert "p4ss" not in mask.text(f"a {text} b") and "cDRz" not in mask.text(text)
    assert mask.text("nothing here") == "nothing here"


def test_a_hub_token_is_masked_though_no_file_names_it():
    assert (
        Mask().text(f"Authorization: Bearer {TOKEN}, and hf_home")
        == "Authorization: Bearer [secret], and hf_home"
    )


def test_a_secret_of_several_lines_is_masked_line_by_line():
    mask = Mask(["-----BEGIN KEY-----\nabcdef\nghijkl\n"])
    assert [mask.text(line) for line in ("x abcdef y", "ghijkl")] == ["x [secret] y", "[secret]"]


def test_short_words_are_no_secrets():
    assert Mask(["", "\n", "ab"]).text("a table") == "a table"


def test_a_password_in_a_url_is_masked_and_its_host_is_not():
    text = Mask().text(
        "proxies={'https': 'http://me:p4ss@proxy.example:3128'} from https://hub.example/a:b@c"
    )
    assert "p4ss" not in text and "http://[secret]@proxy.example:3128" in text and "hub.example/a:b@c" in text
