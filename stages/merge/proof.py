"""What a merged checkpoint has to show before it is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nemotron import native
from nemotron.checkpoint import Checkpoint
from nemotron.lora import Adapter
from stages.job import StageError


def files(base: Checkpoint, merged: Checkpoint, adapter: Adapter, changed: dict[str, int]) -> dict:
    """Same names, shapes and dtypes as the source; changed tensors exactly those that the adapter names.

    Reads the merged files back from disk. Raises StageError with the tensor's name.
    """
    for name in sorted(set(base.entries) ^ set(merged.entries)):
        raise StageError(f"{name} is in {'the source' if name in base.entries else 'the merge'} only", "the same tensors in both", "Do not use this merge; report it.")
    for name, entry in base.entries.items():
        other = merged.entries[name]
        if (entry.shape, entry.dtype) != (other.shape, other.dtype):
            raise StageError(f"{name} is {other.dtype} {other.shape}", f"{entry.dtype} {entry.shape} as in the source", "Do not use this merge; report it.")
        if name not in adapter.pairs and base.raw(name) != merged.raw(name):
            raise StageError(f"{name} differs from the source though the adapter does not name it", "equal bytes", "Do not use this merge; report it.")
    if missing := sorted(set(adapter.pairs) - set(changed)):
        raise StageError(f"{missing[0]} and {len(missing) - 1} more were named by the adapter and not merged", "all of them merged", "Report it.")
    if idle := sorted(name for name, count in changed.items() if not count):
        raise StageError(
            f"the adapter changes nothing in {len(idle)} of {len(changed)} tensors, first {idle[0]}", "a change in each",
            "That layer was not trained, or so little that BF16 rounds it away: see training.json, and train longer or with a higher learning rate.")
    return {"tensors": len(base.entries), "merged": len(changed), "changed_elements": sum(changed.values())}


@torch.no_grad()
def forward(base: Path, adapter: Path, merged: Path, rows: Path, params: dict, device: str) -> dict:
    """Logits of the merged model against those of base and adapter, on real conversations, in float32.

    Both run in float32, so what differs is the one rounding of the merged weights to BF16. Raises StageError beyond
    `proof_error`, relative to the root mean square of the logits.
    """
    from peft import PeftModel

    tokens = sample(rows, params["proof_tokens"])
    with_adapter = PeftModel.from_pretrained(native.load(base, torch.float32), adapter).to(device).eval()
    expected = [with_adapter(input_ids=ids.to(device), use_cache=False).logits.cpu() for ids in tokens]
    del with_adapter
    alone = native.load(merged, torch.float32).to(device).eval()
    found = [alone(input_ids=ids.to(device), use_cache=False).logits.cpu() for ids in tokens]
    difference = torch.cat([(a - b).flatten() for a, b in zip(expected, found)])
    size = torch.cat([a.flatten() for a in expected]).square().mean().sqrt()
    error = (difference.square().mean().sqrt() / size).item()
    agree = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(expected, found)]).float().mean().item()
    if error > params["proof_error"]:
        raise StageError(
            f"the merged model's logits are {error:.4f} off those of the adapter (relative)", f"at most {params['proof_error']}",
            "The adapter was merged into the wrong places or with the wrong scale: report it with merge.json.")
    return {"proof_tokens": sum(ids.numel() for ids in tokens), "logit_error": error, "greedy_agreement": agree}


def sample(rows: Path, tokens: int) -> list[torch.Tensor]:
    """The first training conversations, (1, length) each, until there are `tokens` tokens."""
    taken, count = [], 0
    with rows.open() as opened:
        for line in opened:
            ids = json.loads(line)["input_ids"][: tokens - count]
            taken.append(torch.tensor([ids]))
            count += len(ids)
            if count >= tokens:
                break
    return taken
