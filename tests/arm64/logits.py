"""The logits of one prompt, computed in float32 by the project's own code, and how two machines' logits
differ.

python tests/arm64/logits.py compute CHECKPOINT OUTPUT     writes (tokens, vocabulary) as a .npy file
python tests/arm64/logits.py compare OUTPUT OTHER          prints a JSON object, see `compare`
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

import numpy

PROMPT = "What is the capital of Japan?"


def compute(checkpoint: Path, output: Path) -> None:
    import torch
    import transformers

    from model.families.nemotron_h import native

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    model = native.load(checkpoint).eval()
    began = time.monotonic()
    with torch.no_grad():
        logits = model(ids).logits[0]
    numpy.save(output, logits.numpy())
    print(
        f"torch {torch.__version__} on {platform.machine()}: {len(logits)} tokens, forward pass"
        f" {time.monotonic() - began:.1f} s"
    )


def compare(one: Path, other: Path) -> None:
    """`difference`: the largest of any two logits; `largest`: the largest absolute logit; `tokens`: the
    most likely next token of each.
    """
    a, b = numpy.load(one), numpy.load(other)
    print(
        json.dumps(
            {
                "shape": a.shape,
                "difference": float(abs(a - b).max()),
                "largest": float(abs(a).max()),
                "tokens": [int(a[-1].argmax()), int(b[-1].argmax())],
            }
        )
    )


if __name__ == "__main__":
    {"compute": compute, "compare": compare}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
