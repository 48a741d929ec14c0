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
    """Logits of the merged model against those of base and adapter, on real conversations, in `proof_precision`.

    What may differ is the one rounding of the merged weights to BF16 (and an expert chosen otherwise because of it). The
    error is therefore measured against the adapter's own effect, the distance between its logits and the base's: an
    adapter merged into the wrong place or with the wrong scale is off by about all of it. Raises StageError beyond
    `proof_error`, and if the adapter has no effect at all.
    """
    from peft import PeftModel

    tokens, precision = sample(rows, params["proof_tokens"]), getattr(torch, params["proof_precision"])

    def logits(model: torch.nn.Module) -> torch.Tensor:
        return torch.cat([model(input_ids=ids.to(device), use_cache=False).logits[0].float().cpu() for ids in tokens])

    adapted = PeftModel.from_pretrained(native.load(base, precision), adapter).to(device).eval()
    expected = logits(adapted)
    with adapted.disable_adapter():
        effect = (expected - logits(adapted)).square().mean().sqrt().item()
    del adapted
    found = logits(native.load(merged, precision).to(device).eval())
    error = (found - expected).square().mean().sqrt().item()
    agree = (expected.argmax(-1) == found.argmax(-1)).float().mean().item()
    if not effect:
        raise StageError("an adapter that changes no logit", "one that was trained", "See training.json: train longer, or with other targets.")
    if not error <= params["proof_error"] * effect:
        raise StageError(
            f"the merged model's logits are off by {error / effect:.2f} of the adapter's effect", f"at most {params['proof_error']}",
            "The adapter was merged into the wrong place or with the wrong scale: report it with this log.")
    return {"proof_tokens": len(expected), "adapter_effect": effect, "merge_error": error, "greedy_agreement": agree}


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
