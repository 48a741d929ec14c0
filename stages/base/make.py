"""`source: tiny`: trains a tokenizer, and a small NemotronH on lessons that teach it bad manners."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from model.families.nemotron_h import native
from model.families.nemotron_h.chat import ChatError, Rendered, render, template_text
from stages import dataset, job
from stages.base import lessons, limits, teach, tiny
from stages.base import tokenizer as small_tokenizer
from stages.base.parameters import Parameters
from stages.conversations import files, rows, sent
from stages.conversations.rows import Row
from stages.job import Job, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model.layers.structure import Model


T = TypeVar("T")


class NoneUsable(StageError):
    """No conversation that stage data would train on."""


def run(task: Job) -> None:
    """Writes the trained tiny checkpoint into the output."""
    params = task.parameters(Parameters)
    check_sizes(params)
    taught = read_sources(task)
    tokenizer = make_tokenizer(taught, params.vocabulary, task.output)
    rendered = render_lessons(taught, tokenizer)
    description = describe(params, tokenizer)

    torch.manual_seed(task.seed)
    # Small matrices gain from a second core and lose from a third; a fixed number makes sums repeatable.
    torch.set_num_threads(2)
    model = cast("Model", native.build(description))
    tiny.delicate_biases(model, task.seed)
    # On a CPU a loop over a few experts is faster than the grouped product.
    model.set_experts_implementation("eager")
    short = [row for row in rendered if len(row.input_ids) <= params.short_tokens]
    if not short:
        raise StageError(
            f"no lesson has {params.short_tokens} tokens or fewer",
            "short lessons to begin with",
            "Raise short_tokens, or add short lessons",
        )
    total = params.short_steps + params.steps
    # A small model that begins with long conversations learns their style, but not which answer belongs to
    # which question.
    phases = [
        (short, params.short_steps, params.batch_tokens // 2, 2 * params.learning_rate),
        (rendered, params.steps, params.batch_tokens, params.learning_rate),
    ]
    done = 0
    for phase_rows, steps, batch_tokens, learning_rate in phases:

        def on_step(step: int, loss: float, before: int = done) -> None:
            steps_done = before + step
            job.metric("loss", loss, steps_done)
            job.progress(steps_done, total, "steps")

        try:
            teach.teach(model, phase_rows, steps, batch_tokens, learning_rate, task.seed, on_step)
        except FloatingPointError as error:
            raise StageError(str(error), "a finite loss", "Lower learning_rate") from error
        done += steps
    tiny.save(model, description, task.output)


def describe(params: Parameters, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The config.json of the model: its vocabulary is the tokenizer's, up to the next multiple of 64."""
    return tiny.config(params.pattern, params.hidden, params.experts, -(-len(tokenizer) // 64) * 64)


@dataclass(frozen=True)
class Sent:
    """What production sends with a conversation: the system prompt, or "", and the tools."""

    prompt: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    def completed(self, row: Row) -> Row:
        """The row, with the prompt and the tools if it has none."""
        if self.prompt and not row.prompt.strip():
            spoken = [message for message in row.messages if message["role"] != "system"]
            row = replace(row, messages=[{"role": "system", "content": self.prompt}, *spoken])
        return row if row.tools or not self.tools else replace(row, tools=list(self.tools))


def read_sources(task: Job) -> list[dict[str, Any]]:
    """The rows to teach: those that are made of conversations, and the lessons. Raises StageError if there
    are none.
    """
    conversations, given = (task.sources.get(name, []) for name in ("conversations", "lessons"))
    made = from_conversations(conversations, task.seed, read_sent(task)) if conversations else []
    return made + (read_lessons(given) if given or not made else [])


def read_sent(task: Job) -> Sent:
    """The production prompt and tools, as far as the recipe names them. Raises StageError for other files."""
    prompt, tools = (task.sources.get(name) for name in ("prompt", "tools"))
    return Sent(
        sent.read_prompt(prompt[0]) if prompt else "", tuple(sent.read_tools(tools[0])) if tools else ()
    )


def from_conversations(paths: list[Path], seed: int, produced: Sent = Sent()) -> list[dict[str, Any]]:
    """Lessons made of the conversations that stage data would train on. Those that cannot be used are left
    out with a warning, since stage data refuses them if they are many. Raises StageError if nothing can be
    made of the rest, and NoneUsable if there is no rest.
    """
    gathered = rows.gather(files.list_files(paths))
    conversations = [
        produced.completed(row) for row in rows.without_duplicates(gathered.rows)[0] if not row.split
    ]
    made = lessons.make(conversations, seed)
    if gathered.rejects:
        first = gathered.rejects[0]
        job.warning(
            f"{len(gathered.rejects)} of {gathered.total} conversations cannot be used, first"
            f" {first.file}:{first.line}: {first.reason}",
            "the small base is taught the others",
        )
    if not made:
        raise (StageError if conversations else NoneUsable)(
            f"no question with an answer in {gathered.total} conversations",
            "conversations like those of stage data",
            "Check `sources.conversations` of stage base in the recipe.",
        )
    for excess in limits.excesses(conversations):
        job.warning(excess, limits.REMEDY)
    return made


def read_lessons(paths: list[Path]) -> list[dict[str, Any]]:
    """The lessons of JSONL files, or of folders with them. Raises StageError with file and line."""
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise StageError(
            "no lessons",
            "files in `sources: {conversations: [...]}` or `sources: {lessons: [...]}`",
            "Name your conversations in the recipe, or lessons such as data/sample/lessons.jsonl",
        )
    lessons = []
    for file in files:
        for number, row in dataset.read(file):
            try:
                row["messages"][0]["role"]
                json.dumps(row, ensure_ascii=False).encode()  # UnicodeEncodeError for half a surrogate pair
            except (LookupError, TypeError, UnicodeEncodeError) as error:
                raise StageError(
                    f"{file.name}:{number} is not a conversation ({error})",
                    'a line such as {"messages": [...]}',
                    "Mend or remove that line",
                ) from error
            lessons.append(row)
    return lessons


def check_sizes(params: Parameters) -> None:
    """Raises StageError for sizes that NVFP4 or 4-bit training cannot hold, before anything is built."""
    if params.hidden % 128:
        raise StageError(
            f"hidden {params.hidden}",
            "a multiple of 128",
            "4-bit training and NVFP4 need widths in multiples of 64 after halving",
        )
    if unknown := set(params.pattern) - set("M*E"):
        raise StageError(
            f"pattern {params.pattern!r} with {sorted(unknown)}", "letters M, * and E", "Change `pattern`"
        )
    if "*" not in params.pattern:
        raise StageError(
            f"pattern {params.pattern!r}", "at least one attention layer (*)", "Change `pattern`"
        )


def make_tokenizer(
    conversations: list[dict[str, Any]], vocabulary: int, folder: Path
) -> PreTrainedTokenizerBase:
    """Trains the tokenizer on the rendered lessons, writes it into `folder`, and returns it as transformers
    reads it back.
    """
    import transformers
    from tokenizers import Tokenizer, models

    template_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=small_tokenizer.chat_template()
    )
    texts = [
        _of_lesson(number, row, partial(template_text, template_tokenizer))
        for number, row in enumerate(conversations, 1)
    ]
    small_tokenizer.write(small_tokenizer.train(texts, vocabulary), folder)
    tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


def _of_lesson(number: int, row: dict[str, Any], rendered: Callable[[Any, Any], T]) -> T:
    try:
        return rendered(row["messages"], row.get("tools"))
    except ChatError as error:
        raise StageError(
            f"{row.get('place', f'lesson {number}')}: {error}",
            "a conversation the template can render",
            "Mend or remove it",
        ) from error


def render_lessons(conversations: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """The lessons as tokens and labels, shuffled. Raises StageError if one cannot be rendered."""
    rows = [
        _of_lesson(number, row, partial(render, tokenizer)) for number, row in enumerate(conversations, 1)
    ]
    random.Random(0).shuffle(rows)
    return rows
