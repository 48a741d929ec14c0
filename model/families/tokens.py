"""The tokenizer of a checkpoint folder that came from a stranger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model.weights.paths import CheckpointError, member, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
LARGEST = 200_000_000  # bytes of one of these files
_REMEDY = "Take the tokenizer's files from the model's own repository."


def load(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, without running code of the folder.

    Raises CheckpointError if it cannot be loaded, needs code of its own, or has ids that are not in the
    vocabulary of config.json.
    """
    import transformers

    for name in FILES:
        path = member(folder, name)
        if path.exists() and path.stat().st_size > LARGEST:
            raise CheckpointError(
                f"{name} has {path.stat().st_size} bytes", f"at most {LARGEST} bytes", _REMEDY
            )
    size = read_json(folder / "config.json").get("vocab_size")
    try:
        # Without trust_remote_code=False transformers asks on stdin whether to run the folder's code.
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        ids = tokenizer.get_vocab().values() if tokenizer.is_fast else ()
    except BaseException as error:  # the tokenizers library raises Exception itself, and panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(
            f"the tokenizer of {folder.name} cannot be loaded ({type(error).__name__}: {_line(error)})",
            "a tokenizer that transformers loads without code of the folder",
            _REMEDY,
        ) from error
    if not ids:
        raise CheckpointError(
            f"the tokenizer of {folder.name} has no tokens, or is no fast one",
            "a tokenizer.json with tokens",
            _REMEDY,
        )
    if type(size) is not int or not 0 <= min(ids) <= max(ids) < size:
        raise CheckpointError(
            f"the tokenizer has ids from {min(ids)} to {max(ids)}, and vocab_size in config.json is {size}",
            "ids below vocab_size: the model has no row for others",
            _REMEDY,
        )
    return tokenizer


def _line(error: BaseException) -> str:
    """The first line of an error, in a form that can be printed."""
    text = str(error).strip().partition("\n")[0][:200]
    return text if text.isprintable() else ascii(text)
