"""Repairs the hub's own modeling_nemotron_h.py, for runs with trust_remote_code=True.

    python -m model.families.nemotron_h.patches FILE_OR_FOLDER [--check]

This project itself uses the class in transformers (model/families/nemotron_h/native.py) and never runs the
hub's file. That file is NVIDIA's, is downloaded under its own licence and is not in this repository. Copies
of the file differ around the sites, so the sites are found by regular expression:

- a norm: without mamba-ssm the file raises ImportError. The repair defines the gated norm in plain torch, for
  any device: the gate before the norm, the mean square per group. mamba-ssm is still used if it imports.
- b router: under autocast the router's logits become BF16, whose spacing at the size of a real correction
  bias is more than the spread of that bias.
- b sum: index_add_ refuses an expert's output of another dtype than its buffer. On its own this repair would
  only hide a router in BF16.
- c idle input: an expert that no token chose gets an input with the dtype of its weight, which in 4 bits is
  uint8. No gradient passes through integers, so its parameters would still count as unused. The input gets
  the dtype of a real one.
- d idle call: that call adds exactly zero (relu2, no biases, an input of zeros). It makes every rank use
  every parameter: DDP waits for a gradient of each, and FSDP gathers an expert's weights on all ranks at
  once. It stays if torch.distributed is initialised. Otherwise it is dropped, because it reads the weights
  of all idle experts (122 of 128 per layer for one generated token) to add zero. Without it an idle expert's
  gradient is None instead of zero, so AdamW skips the expert in that step instead of decaying it.
- e tied keys: transformers 5 calls `_tied_weights_keys.keys()` when it saves, after it has written the
  configs; a list has no keys. A class without `_tied_weights_keys` needs no repair.
- f stream: the block requests a CUDA stream even if its tensors are not on a CUDA device.

A file is written completely or not at all: every site must be found exactly once, in its original or patched
form, and the result must parse. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FILE = "modeling_nemotron_h.py"
CLASSES = ("NemotronHBlock", "NemotronHForCausalLM", "NemotronHTopkRouter")
TO_PATCH, PATCHED, THERE, ABSENT = "to patch", "patched", "already there", "absent"

# Formula: the checkpoint's own call of mamba-ssm's kernel, with norm_before_gate=False; the same as
# model/layers/mamba.py's gated_norm.
NORM = '''\
    def rmsnorm_fn(x, weight, bias=None, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        """weight * rms(x * silu(z)), in float32, over each group_size channels. x, z (..., channels)."""
        if norm_before_gate or z is None or bias is not None:
            raise NotImplementedError("without mamba-ssm: only norms without bias whose gate comes before")
        exact, shape = torch.promote_types(x.dtype, torch.float32), (-1, group_size or x.shape[-1])
        gated = (x.to(exact) * torch.nn.functional.silu(z.to(exact))).unflatten(-1, shape)
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
        return (normed.flatten(-2) * weight.to(exact)).to(x.dtype)'''
NO_AUTOCAST = "with torch.autocast(device_type=hidden_states.device.type, enabled=False):"
DISTRIBUTED = "elif torch.distributed.is_available() and torch.distributed.is_initialized():"
STREAM = "torch.cuda.stream(torch.cuda.default_stream(hidden_states.device))"


class PatchError(ValueError):
    """A file that cannot be patched. The message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Site:
    """One place in the file. `original` matches the hub's text, `patched` the repaired text, and
    `replacement` makes the second from a match of the first.
    """

    name: str
    purpose: str
    original: re.Pattern[str]
    patched: re.Pattern[str]
    replacement: Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Row:
    """The state of a site. `line`: where it was found; several lines if found more than once, empty if not
    found.
    """

    site: str
    line: str
    state: str
    purpose: str


def _without_autocast(body: re.Match[str]) -> str:
    indent, lines = body[1], body[0].split("\n")
    return "\n".join([indent + NO_AUTOCAST, *("    " + line if line else line for line in lines)])


def _lines(original_pattern: str, patched_pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    return re.compile(original_pattern, re.MULTILINE), re.compile(patched_pattern, re.MULTILINE)


_IDLE = r"\n(?=(?: *#.*\n)* *expert_dtype = )"  # what follows the branch of an idle expert
_BLOCK = r"(?=(?: *#.*\n)* *residual = hidden_states$)"  # how a block's body begins
SITES = (
    Site(
        "a norm",
        "a gated norm in plain torch where mamba-ssm does not import",
        *_lines(
            r"^except ImportError:\n +raise ImportError\([\"']mamba-ssm is required.*\)$",
            "^except ImportError:\n" + re.escape(NORM) + "$",
        ),
        lambda match: "except ImportError:\n" + NORM,
    ),
    Site(
        "b router",
        "the router computes outside autocast, in float32",
        *_lines(
            r"(?<!enabled=False\):\n)^( +)router_logits = F\.linear\(.*\n(?:(?:\1.*)?\n)*?\1return"
            r" topk_indices, topk_weights$",
            f"^ +{re.escape(NO_AUTOCAST)}\n +router_logits = F\\.linear\\(",
        ),
        _without_autocast,
    ),
    Site(
        "b sum",
        "an expert's output is cast to the dtype of the sum",
        *_lines(
            r"^( +)final_hidden_states\.index_add_\(0, token_indices, weighted_output\)$",
            r"^ +final_hidden_states\.index_add_\(0, token_indices,"
            r" weighted_output\.to\(final_hidden_states\.dtype\)\)$",
        ),
        lambda match: match[0].replace("weighted_output", "weighted_output.to(final_hidden_states.dtype)"),
    ),
    Site(
        "c idle input",
        "an idle expert's input has the dtype of a real one",
        *_lines(
            r"^( +)expert_dtype = expert\.down_proj\.weight\.dtype$",
            r"^ +expert_dtype = hidden_states\.dtype$",
        ),
        lambda match: match[1] + "expert_dtype = hidden_states.dtype",
    ),
    Site(
        "d idle call",
        "an idle expert is called only where torch.distributed runs",
        *_lines(f"^( +)else:{_IDLE}", f"^ +{re.escape(DISTRIBUTED)}{_IDLE}"),
        lambda match: f"{match[1]}{DISTRIBUTED}\n",
    ),
    Site(
        "e tied keys",
        "_tied_weights_keys is a mapping, so that saving works",
        *_lines(
            r"^( +)_tied_weights_keys = \[[\"']lm_head\.weight[\"']\]$",
            r"^ +_tied_weights_keys = \{|^class NemotronHForCausalLM\b(?![\s\S]*_tied_weights_keys)",
        ),
        lambda match: match[1] + "_tied_weights_keys = {}",
    ),
    Site(
        "f stream",
        "no CUDA stream for tensors that are not on CUDA",
        *_lines(
            rf"^( +)with {re.escape(STREAM)}:\n{_BLOCK}",
            rf"^ +with {re.escape(STREAM)} if hidden_states\.is_cuda else"
            rf" contextlib\.nullcontext\(\):\n{_BLOCK}"
            r"|^ +if hidden_states\.(?:is_cuda|device\.type == [\"']cuda[\"']):\n +(\w+) ="
            rf" {re.escape(STREAM)}\n"
            r" +else:\n +\1 = (?:contextlib\.)?nullcontext\(\)\n\n? +with \1:$",
        ),
        lambda match: (
            f"{match[1]}import contextlib\n\n{match[1]}with {STREAM} if hidden_states.is_cuda else"
            " contextlib.nullcontext():\n"
        ),
    ),
)


def survey(text: str) -> list[Row]:
    """One row per site, in the order of SITES. Raises PatchError if the text is not the hub's file."""
    _check_known(text)
    return [_row(site, text) for site in SITES]


def patched(text: str) -> str:
    """The text with every site patched. Raises PatchError unless each site is found exactly once, and if the
    text is not the hub's file.
    """
    rows = survey(text)
    if odd := [row for row in rows if row.state not in (TO_PATCH, THERE)]:
        states = ", ".join(f"{row.site} {row.state}" for row in odd)
        raise PatchError(
            f"found: {states}\nexpected: every site exactly once, as the hub's file has it or as it is"
            " patched\ndo: download the file afresh; if the hub's has changed, look at what it does there"
            " and extend model/families/nemotron_h/patches.py"
        )
    for site, row in zip(SITES, rows, strict=True):
        if row.state == TO_PATCH:
            text = site.original.sub(site.replacement, text)
    unpatched = [row.site for row in survey(text) if row.state != THERE]
    if unpatched:
        raise PatchError(
            f"found: {', '.join(unpatched)} not as it should be after patching\nexpected: every site"
            " patched\ndo: keep this copy of the file, which is as it was, and mend patches.py"
        )
    return text


def patch(path: Path, check: bool = False) -> tuple[list[Row], str]:
    """Patches one file, or with `check` only inspects it. Returns its rows, and why it was refused (empty if
    it was not).

    The new text is written beside the file and renamed over it, with the same mode. A link, as in the hub's
    cache, is replaced by a file, so that the blob behind it keeps the content that its name promises. Raises
    OSError, and PatchError for a file that is not the hub's.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise _unknown(f"bytes that are not UTF-8 ({error.reason} at {error.start})") from error
    rows = survey(text)
    try:
        new = patched(text)
    except PatchError as error:
        return rows, str(error)
    if check or new == text:
        return rows, ""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as opened:
            opened.write(new.encode())
            opened.flush()
            os.fsync(opened.fileno())
        beside.chmod(path.stat().st_mode & 0o777)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return [
        Row(row.site, row.line, PATCHED if row.state == TO_PATCH else row.state, row.purpose) for row in rows
    ], ""


def main(arguments: list[str] | None = None) -> int:
    """Prints one table per file. Returns 0 if every site of every file is patched, else 1 (so `--check` of an
    unpatched file gives 1).
    """
    parser = argparse.ArgumentParser(
        prog="python -m model.families.nemotron_h.patches",
        description="Repairs to the hub's own modeling_nemotron_h.py.",
    )
    parser.add_argument(
        "path", type=Path, metavar="FILE_OR_FOLDER", help=f"a {FILE}, or a folder in which to look for it"
    )
    parser.add_argument("--check", action="store_true", help="say what would be done, and change nothing")
    options = parser.parse_args(arguments)
    paths = sorted(options.path.rglob(FILE)) if options.path.is_dir() else [options.path]
    if not paths:
        print(
            f"found: no {FILE} under {options.path}\nexpected: the hub's file\ndo: name the model's folder or"
            " the hub's cache",
            file=sys.stderr,
        )
        return 1
    return max(_report(path, options.check) for path in paths)


def _report(path: Path, check: bool) -> int:
    print(path, flush=True)
    try:
        rows, refused = patch(path, check)
    except (PatchError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows), flush=True)
    if refused:
        print(f"{refused}; nothing was changed", file=sys.stderr)
    return int(any(row.state not in (PATCHED, THERE) for row in rows))


def table(rows: list[Row]) -> str:
    """The rows under a heading, each column as wide as its widest cell."""
    cells = [
        ("site", "line", "state", "what it does"),
        *((row.site, row.line, row.state, row.purpose) for row in rows),
    ]
    site, line, state = (max(len(row[i]) for row in cells) for i in range(3))
    return "\n".join(f"{a:<{site}}  {b:>{line}}  {c:<{state}}  {d}" for a, b, c, d in cells)


def _row(site: Site, text: str) -> Row:
    original_lines, patched_lines = (
        [text.count("\n", 0, match.start()) + 1 for match in pattern.finditer(text)]
        for pattern in (site.original, site.patched)
    )
    count = len(original_lines) + len(patched_lines)
    state = (
        f"found {count} times"
        if count > 1
        else TO_PATCH
        if original_lines
        else THERE
        if patched_lines
        else ABSENT
    )
    return Row(site.name, ", ".join(map(str, sorted(original_lines + patched_lines))), state, site.purpose)


def _check_known(text: str) -> None:
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        raise _unknown(f"text that is not Python ({error})") from error
    names = {node.name for node in body if isinstance(node, ast.ClassDef)}
    if missing := [name for name in CLASSES if name not in names]:
        raise _unknown(f"no class {', '.join(missing)}")
    # The class inside transformers has the same names, and imports its own package relatively.
    if not any(
        isinstance(node, ast.ImportFrom)
        and not node.level
        and (node.module or "").split(".")[0] == "transformers"
        for node in body
    ):
        raise _unknown(
            "no import from transformers (the class inside transformers is repaired by native.py beside this"
            " module)"
        )


def _unknown(found: str) -> PatchError:
    return PatchError(
        f"found: {found}\nexpected: the hub's {FILE} of a NemotronH with experts\ndo: name that file; nothing"
        " was changed"
    )


if __name__ == "__main__":
    sys.exit(main())
