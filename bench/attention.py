"""Measures the error of BF16 attention over packed documents against float64, in one call and with one call
per document.

    python -m bench.attention [--lengths 1,2,127,128,129,1000] [--device cuda]

Prints relative errors (Frobenius norms) of the output and of the gradients of query, key and value, with the
heads of Nemotron 3 Nano. A CPU has no kernel for one call, so only the second row is printed there. Exits 1
if an error of one call is more than 1.5 times that of a call per document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from model.families.nemotron_h import nano
from model.layers import attention
from model.layers.documents import Documents

HEADS, KEYS, SIZE = (nano.WIDTHS[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
SCALE = SIZE**-0.5
ALLOWED = 1.5
IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "one call": attention.in_one_call,
    "a call a document": attention.by_document,
}


def definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """softmax(q k / sqrt(size)) v, one document and head at a time; shapes as in its module."""
    parts = []
    for a, b in documents.spans:
        later = torch.ones(b - a, b - a, dtype=torch.bool, device=query.device).triu(1)
        heads = []
        for head in range(HEADS):
            shared = head * KEYS // HEADS
            scores = (query[a:b, head] @ key[a:b, shared].t() * SCALE).masked_fill(later, -torch.inf)
            heads.append(scores.softmax(-1) @ value[a:b, shared])
        parts.append(torch.stack(heads, 1))
    return torch.cat(parts)


def results(
    attend: Callable[..., torch.Tensor], parts: list[torch.Tensor], output_gradient: torch.Tensor
) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value, for a given output gradient, as float64 on the
    CPU.
    """
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    output = attend(*leaves)
    return [
        tensor.detach().double().cpu()
        for tensor in (output, *torch.autograd.grad(output, leaves, output_gradient))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="1,2,127,128,129,1000", help="tokens of the documents")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    documents = Documents(tuple(map(int, options.lengths.split(","))))
    generator = torch.Generator().manual_seed(0)
    shapes = [(documents.tokens, heads, SIZE) for heads in (HEADS, KEYS, KEYS, HEADS)]
    tensors = [torch.randn(shape, generator=generator).bfloat16().to(options.device) for shape in shapes]
    *parts, output_gradient = [tensor.double() for tensor in tensors]
    exact = results(lambda q, k, v: definition(q, k, v, documents), parts, output_gradient)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, BF16, documents of {options.lengths} tokens")
    print(f"{'':18s} {'output':>9s} {'query':>9s} {'key':>9s} {'value':>9s}")
    errors = {}
    for label, attend in IMPLEMENTATIONS.items():
        if attend is attention.in_one_call and options.device == "cpu":
            continue
        approximate = results(
            lambda *leaves, attend=attend: attend(*leaves, documents, SCALE), tensors[:3], tensors[3]
        )
        errors[label] = [((a - b).norm() / b.norm()).item() for a, b in zip(approximate, exact, strict=True)]
        print(f"{label:18s} " + " ".join(f"{error:9.2e}" for error in errors[label]))
    one_call = errors.get("one call", [])
    if any(
        error > ALLOWED * by_document
        for error, by_document in zip(one_call, errors["a call a document"], strict=False)
    ):
        sys.exit(f"one call is further off than {ALLOWED} times a call a document")


if __name__ == "__main__":
    main()
