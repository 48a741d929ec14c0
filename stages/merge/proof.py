"""What a merged checkpoint has to show before it is accepted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from nemotron import walk
from nemotron.adapter import factors
from nemotron.checkpoint import Checkpoint
from nemotron.lora import Adapter
from nemotron.projection import Projection
from stages import dataset, job
from stages.job import StageError


def files(base: Checkpoint, merged: Checkpoint, adapter: Adapter, changed: dict[str, int], control: bool = False) -> dict:
    """Same names, shapes and dtypes as the source; changed tensors exactly those that the adapter names, or of a control none.

    Reads the merged files back from disk. Raises StageError with the tensor's name.
    """
    # Not by what it changed alone: a trained adapter that BF16 rounds away would pass for a control too.
    if control and (trained := sorted(name for name in {pair.b for pair in adapter.pairs.values()} if adapter.tensor(name).any())):
        raise StageError(f"{trained[0]} and {len(trained) - 1} more tensors of a control are not zero", "an adapter whose B is zero",
                         "Set train's steps to 0, or leave merge's `control` out.")
    for name in sorted(set(base.entries) ^ set(merged.entries)):
        raise StageError(f"{name} is in {'the source' if name in base.entries else 'the merge'} only", "the same tensors in both", "Do not use this merge; report it.")
    for name, entry in base.entries.items():
        other = merged.entries[name]
        if (entry.shape, entry.dtype) != (other.shape, other.dtype):
            raise StageError(f"{name} is {other.dtype} {other.shape}", f"{entry.dtype} {entry.shape} as in the source", "Do not use this merge; report it.")
        if (control or name not in adapter.pairs) and not base.same(name, merged):
            raise StageError(f"{name} differs from the source though the adapter {'is zero' if control else 'does not name it'}", "equal bytes", "Do not use this merge; report it.")
    if missing := sorted(set(adapter.pairs) - set(changed)):
        raise StageError(f"{missing[0]} and {len(missing) - 1} more were named by the adapter and not merged", "all of them merged", "Report it.")
    if not control and (idle := sorted(name for name, count in changed.items() if not count)):
        raise StageError(
            f"the adapter changes nothing in {len(idle)} of {len(changed)} tensors, first {idle[0]}", "a change in each",
            "That layer was not trained, or so little that BF16 rounds it away: see training.json, and train longer or with a higher learning rate. "
            "If the adapter is meant to be zero, say control: true.")
    return {"tensors": len(base.entries), "merged": len(changed), "changed_elements": sum(changed.values()), "control": control}


def forward(base: Checkpoint, adapter: Adapter, merged: Checkpoint, rows: Path, params: dict, device: str) -> dict:
    """Logits of the merged model against those of base and adapter, on real conversations, in `proof_precision`.

    The three go through the layers side by side, so memory is that of a layer. The adapter is computed beside the base's weights,
    and read by nemotron/adapter.py, not as stage merge read it (nemotron/lora.py): one reading of its packing checks the other.

    What may differ is the one rounding of the merged weights to BF16 (and an expert chosen otherwise because of it). The
    error is therefore measured against the adapter's own effect, the distance between its logits and the base's: an
    adapter merged into the wrong place or with the wrong scale is off by about all of it. Raises StageError beyond
    `proof_error`, and if the adapter has no effect at all.
    """
    dtype, config = getattr(torch, params["proof_precision"]), base.config
    sequences = walk.packed(sample(rows, params["proof_tokens"]), params["proof_tokens"])
    layers, embeddings = walk.Layers(config, dtype, device), base.tensor("backbone.embeddings.weight")
    plain, adapted, after = (walk.Walk(sequences, embeddings, dtype, device) for _ in range(3))
    read, worst = set(), (0.0, "")
    for number in range(len(layers)):
        block = layers.fill(number, base.tensor)
        plain.through(block)
        read |= set(beside(block, number, adapter))
        adapted.through(block)
        for module in projections(block).values():
            module.rank = 0
        after.through(layers.fill(number, merged.tensor, [name for name in layers.names(number) if name in adapter.pairs]))
        worst = max(worst, (after.distance(adapted) / max(adapted.distance(plain), 1e-30), f"layer {number}"))
        job.progress(number + 1, len(layers), "layers", "proving the merge")
    read |= {key for name, pair in adapter.pairs.items() if name == "lm_head.weight" for key in (pair.a, pair.b)}
    if left := sorted(adapter.tensors.entries.keys() - read):
        raise StageError(f"{left[0]} and {len(left) - 1} more tensors of the adapter belong to no layer", "every one of them in the model", "Is it an adapter of another model?")
    head = base.tensor("lm_head.weight")
    changed = head.float() + adapter.delta("lm_head.weight") if "lm_head.weight" in adapter.pairs else head
    return judged(*(its.logits(base.tensor("backbone.norm_f.weight"), weight, config["layer_norm_epsilon"])
                    for its, weight in ((plain, head), (adapted, changed), (after, merged.tensor("lm_head.weight")))), params["proof_error"], worst)


def projections(block: torch.nn.Module) -> dict[str, Projection]:
    return {name: module for name, module in block.named_modules() if isinstance(module, Projection)}


def beside(block: torch.nn.Module, number: int, adapter: Adapter) -> list[str]:
    """Puts the adapter's factors beside the weights of a filled block; the names of the tensors that they are from."""
    read = []
    for name, module in projections(block).items():
        if found := factors(adapter.tensors, f"model.layers.{number}.{name}", module, adapter.rank):
            a, b, keys = found
            module.change(a, b, adapter.scale)
            read += keys
    return read


def judged(plain: Iterable[torch.Tensor], adapted: Iterable[torch.Tensor], merged: Iterable[torch.Tensor], limit: float, worst: tuple[float, str]) -> dict:
    """Judges the logits of base, base with adapter, and merge, chunk by chunk."""
    tokens = agree = 0
    effect = error = 0.0
    for before, wanted, found in zip(plain, adapted, merged, strict=True):
        effect += (wanted - before).square().mean(-1).sum().item()
        error += (found - wanted).square().mean(-1).sum().item()
        agree += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        tokens += len(wanted)
    effect, error = (effect / tokens) ** 0.5, (error / tokens) ** 0.5
    if not effect:
        raise StageError("an adapter that changes no logit", "one that was trained", "See training.json: train longer, or with other targets.")
    if not error <= limit * effect:
        raise StageError(
            f"the merged model's logits are off by {error / effect:.2f} of the adapter's effect, its hidden states most at {worst[1]} ({worst[0]:.2f})", f"at most {limit}",
            "The adapter was merged into the wrong place or with the wrong scale: report it with this log.")
    return {"proof_tokens": tokens, "adapter_effect": effect, "merge_error": error, "greedy_agreement": agree / tokens}


def sample(rows: Path, tokens: int) -> list[torch.Tensor]:
    """The first training conversations, int64 (length,) each, until there are `tokens` tokens."""
    taken, count = [], 0
    for _, row in dataset.read(rows):
        ids = row["input_ids"][: tokens - count]
        taken.append(torch.tensor(ids))
        count += len(ids)
        if count >= tokens:
            break
    return taken
