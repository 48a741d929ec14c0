"""Secrets out of everything that is shown or logged."""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

SHOWN = "[secret]"
# Access tokens of the Hugging Face hub, whether or not a recipe names the file they came from.
_HUB_TOKEN = r"hf_[A-Za-z0-9]{16,}"
# User and password of a URL, such as a proxy's.
_URL_LOGIN = r"(?<=://)[^/\s:@\"']+:[^/\s@\"']+(?=@)"
# A shorter "secret" would blot out ordinary words.
_SHORTEST = 4


class Mask:
    """Replaces secrets in whole lines. Each secret is known as it is, URL-quoted, as a JSON string, and in
    base64.
    """

    def __init__(self, secrets: Iterable[str] = ()):
        forms: set[str] = set()
        for secret in secrets:
            for line in {secret.strip(), *secret.split("\n")}:
                line = line.strip()
                if len(line) >= _SHORTEST:
                    forms |= {line, urllib.parse.quote(line, safe=""), json.dumps(line)[1:-1]}
                    forms.add(base64.b64encode(line.encode()).decode().rstrip("="))
        # Longest first, so that a secret that contains another is replaced whole.
        known = [re.escape(form) for form in sorted(forms, key=len, reverse=True)]
        self._pattern = re.compile("|".join([*known, _HUB_TOKEN, _URL_LOGIN]))

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> Mask:
        """Knows the content of each file; one that does not exist holds no secret."""
        return cls(path.read_text() for path in paths if path.is_file())

    def text(self, text: str) -> str:
        """`text` with every secret replaced; executors hand on whole lines, so none is cut in two."""
        return self._pattern.sub(SHOWN, text)
