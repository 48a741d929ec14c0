"""The checks that a merged checkpoint has to pass.

`check_files`: names, shapes and dtypes are those of the base; tensors that the adapter does not name are
equal byte for byte. `check_tensors`: every other tensor is W + scale * B A as PEFT reads the adapter, rounded
once. `check_forward`: the merged model computes what base and adapter compute, within the error of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from model import walk
from model.families.family import Linear
from model.layers.projection import Projection
from model.lora import Adapter
from model.weights.checkpoint import Checkpoint
from stages import dataset, job
from stages.job import StageError
from stages.merge.parameters import Parameters
from stages.merge.peft_reading import PeftReading
from stages.merge.rounding import DO_NOT_USE, Agreement, compare

ALLOWED = 1.2  # times the error of the reference, which rounds the exact weights once
NOISE = 0.01  # of the adapter's effect: another order of summing can change near-tied routing
REPORT = "Do not use this merge; report it."


def check_files(
    base: Checkpoint, merged: Checkpoint, adapter: Adapter, changed: dict[str, int], control: bool = False
) -> dict[str, Any]:
    """Checks that names, shapes and dtypes are those of the source, and that tensors that the adapter does
    not name are equal byte for byte; all tensors, if it is a control.

    The merged files are read back from disk. `changed` holds the number of changed elements of every merged
    tensor. Warns of idle tensors and of changes too small for BF16. Raises StageError with the tensor's name,
    and if nothing changed at all.
    """
    # B itself is checked, because the merge of a trained but tiny adapter can equal the base in BF16.
    if control and (
        trained := sorted(
            name for name in {pair.b for pair in adapter.pairs.values()} if adapter.tensor(name).any()
        )
    ):
        raise StageError(
            f"{trained[0]} and {len(trained) - 1} more tensors of a control are not zero",
            "an adapter whose B is zero",
            "Set train's steps to 0, or leave merge's `control` out.",
        )
    for name in sorted(set(base.entries) ^ set(merged.entries)):
        raise StageError(
            f"{name} is in {'the source' if name in base.entries else 'the merge'} only",
            "the same tensors in both",
            REPORT,
        )
    for name, entry in base.entries.items():
        merged_entry = merged.entries[name]
        if (entry.shape, entry.dtype) != (merged_entry.shape, merged_entry.dtype):
            raise StageError(
                f"{name} is {merged_entry.dtype} {merged_entry.shape}",
                f"{entry.dtype} {entry.shape} as in the source",
                REPORT,
            )
        if (control or name not in adapter.pairs) and not base.same_bits(name, merged):
            raise StageError(
                f"{name} differs from the source though the adapter "
                f"{'is zero' if control else 'does not name it'}",
                "equal bytes",
                REPORT,
            )
    if missing := sorted(set(adapter.pairs) - set(changed)):
        raise StageError(
            f"{missing[0]} and {len(missing) - 1} more were named by the adapter and not merged",
            "all of them merged",
            "Report it.",
        )
    facts = {
        "tensors": len(base.entries),
        "merged": len(changed),
        "changed_elements": sum(changed.values()),
        "control": control,
    }
    return facts if control else facts | unchanged_tensors(adapter, changed)


def unchanged_tensors(adapter: Adapter, changed: dict[str, int]) -> dict[str, list[str]]:
    """The merged tensors that equal the base: `idle` ones, whose change is zero, and `too_small` ones, whose
    change BF16 rounds away.

    An expert that no training token reached is idle; that is no fault. Raises StageError if no tensor
    changed.
    """
    unchanged = sorted(name for name, count in changed.items() if not count)
    idle = [name for name in unchanged if adapter.change(name).zero]
    small = [name for name in unchanged if name not in set(idle)]
    if len(idle) == len(changed):
        raise StageError(
            f"the adapter changes nothing in any of its {len(changed)} tensors, first {idle[0]}: B is zero",
            "an adapter that was trained",
            "See training.json, and train longer or with a higher learning rate. If the adapter is meant to "
            "be zero, say control: true.",
        )
    if len(unchanged) == len(changed):
        raise StageError(
            f"the adapter's change is too small for BF16 in all of its {len(small)} tensors, first "
            f"{small[0]}: every element rounds back to the base's",
            "a change of about 0.2 % of a weight in some element",
            "Train longer or with a higher learning rate.",
        )
    if idle:
        job.warning(
            f"the adapter leaves {len(idle)} of {len(changed)} tensors as they are, since their B is zero: "
            f"{_joined_names(idle)}",
            "An expert that no training token reached is left so. If these should have been trained, see "
            "training.json.",
        )
    if small:
        job.warning(
            f"the adapter's change is too small for BF16 in {len(small)} of {len(changed)} tensors, which "
            f"stay the base's: {_joined_names(small)}",
            "Train longer or with a higher learning rate if they should change.",
        )
    return {"idle": idle, "too_small": small}


def _joined_names(tensors: list[str]) -> str:
    return ", ".join(tensors[:3]) + (", ..." if len(tensors) > 3 else "")


def check_tensors(base: Checkpoint, merged: Checkpoint, adapter: Adapter, reading: PeftReading) -> Agreement:
    """Compares every merged tensor, read back from disk, with what PEFT computes from the base's.

    Raises StageError with the tensor's name.
    """
    agreement = Agreement()
    groups: dict[str | int, list[str]] = {}
    for name in adapter.pairs:
        number = adapter.family.layer(name)
        groups.setdefault(name if number is None else number, []).append(name)
    for group in groups.values():
        with reading.loaded(group):
            for name in group:
                weight = base.tensor(name)
                compare(name, weight, reading.apply(name, weight), merged.tensor(name), agreement)
    return agreement


def check_forward(
    base: Checkpoint,
    adapter: Adapter,
    merged: Checkpoint,
    reading: PeftReading,
    rows: Path,
    params: Parameters,
    device: str,
) -> tuple[dict[str, Any], Agreement]:
    """Compares the merged model's forward pass with that of base and adapter, on real conversations, in
    `proof_precision`.

    Four models go through the layers side by side, so memory is that of one layer: (1) the base; (2) the base
    with the adapter's factors next to its weights; (3) the reference: the base with W + scale * B A as PEFT
    reads the adapter, rounded once; (4) the merged files. Rounding to BF16 cannot be avoided, and near-tied
    routers amplify it, so no constant bounds the error. Instead the merged model's error against (2) may be
    1.2 times the reference's, after every layer and in the logits. Every merged tensor is also compared with
    the reference's, as in `check_tensors`.

    Raises StageError with the tensor's or the layer's name, and if the adapter has no effect at all.
    """
    dtype, config, family = getattr(torch, params.proof_precision), base.config, adapter.family
    sequences = walk.packed(sample_conversations(rows, params.proof_tokens), params.proof_tokens)
    layers, embeddings = walk.Layers(config, dtype, device), base.tensor(family.embeddings)
    plain, adapted, reference, merged_walk = (
        walk.Walk(sequences, embeddings, dtype, device) for _ in range(4)
    )
    agreement, all_equal, worst = Agreement(), True, (0.0, "")
    for number in range(len(layers)):
        block = layers.fill(number, base.tensor)
        changed = [name for name in layers.names(number) if name in adapter.pairs]
        plain.through(block)
        with reading.loaded(changed) if changed else nullcontext():
            weights = attach_factors(block, [adapter.linears[name] for name in changed], reading, base)
            adapted.through(block)
            for module in projections(block).values():
                module.rank = 0
            differing: list[str] = []
            layers.fill(
                number, reference_reader(base, merged, reading, weights, agreement, differing), changed
            )
        reference.through(block)
        all_equal = all_equal and not differing
        if all_equal:
            merged_walk.hidden = list(reference.hidden)  # equal weights and equal inputs
        else:
            layers.fill(number, merged.tensor, differing)
            merged_walk.through(block)
        effect = adapted.distance(plain)
        error = check_error(
            f"the hidden states after layer {number}",
            merged_walk.distance(adapted),
            reference.distance(adapted),
            effect,
        )
        worst = max(worst, (error / max(effect, 1e-30), f"layer {number}"))
        job.progress(number + 1, len(layers), "layers", "proving the merge")
    norm, head = base.tensor(family.final_norm), base.tensor(family.head)
    exact = head
    if family.head in adapter.pairs:
        with reading.loaded([family.head]):
            exact = reading.apply(family.head, head)
        compare(family.head, head, exact, merged.tensor(family.head), agreement)
    runs = (
        (plain, head),
        (adapted, exact),
        (reference, exact.to(head.dtype)),
        (merged_walk, merged.tensor(family.head)),
    )
    facts = judge_logits(*(run.logits(norm, weight, family.epsilon(config)) for run, weight in runs))
    return facts | {"worst_layer": {"name": worst[1], "error": worst[0]}}, agreement


def check_error(subject: str, error: float, rounding_error: float, effect: float) -> float:
    """Returns `error` if rounding the weights once explains it, else raises StageError. `rounding_error` is
    the error of the reference, `effect` the adapter's own effect.
    """
    if not error <= ALLOWED * rounding_error + NOISE * effect:
        raise StageError(
            f"{subject} of the merged model are off by {error / max(effect, 1e-30):.2f} of the adapter's "
            "effect",
            f"at most {ALLOWED} times the {rounding_error / max(effect, 1e-30):.2f} that rounding the right "
            "weights to BF16 costs",
            DO_NOT_USE,
        )
    return error


def projections(block: torch.nn.Module) -> dict[str, Projection]:
    """The projections of a block, by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Projection)}


def attach_factors(
    block: torch.nn.Module, changed: list[Linear], reading: PeftReading, base: Checkpoint
) -> Callable[[str], torch.Tensor]:
    """Adds the adapter's factors to the projections of a filled block. Returns a function that reads a weight
    as the base has it.

    DoRA's change has no factors. Such a weight is replaced as a whole, rounded to the block's dtype.
    """
    modules, places = projections(block), {linear.weight: linear for linear in changed}
    parts: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
    replaced = set()
    for name, linear in places.items():
        path, matrix = linear.part, linear.index or 0
        if factors := reading.factors(name):
            parts.setdefault(path, {})[matrix] = factors
        else:
            weight = reading.apply(name, base.tensor(name))
            modules[path].put(matrix, weight.to(modules[path].dtype))
            replaced.add(name)
    for path, pairs in parts.items():
        module, rank = modules[path], max(len(a) for a, _ in pairs.values())
        a = torch.zeros(module.experts, rank, module.in_features, device=module.weight.device)
        b = torch.zeros(module.experts, module.out_features, rank, device=module.weight.device)
        for matrix, (factor_a, factor_b) in pairs.items():
            a[matrix, : len(factor_a)], b[matrix, :, : len(factor_a)] = factor_a, factor_b
        module.set_change(a, b, 1.0)

    def weight_of(name: str) -> torch.Tensor:
        if name in replaced:
            return base.tensor(name)
        module, matrix = modules[places[name].part], places[name].index or 0
        return module.weight[matrix * module.out_features : (matrix + 1) * module.out_features].to(
            torch.bfloat16
        )

    return weight_of


def reference_reader(
    base: Checkpoint,
    merged: Checkpoint,
    reading: PeftReading,
    weights: Callable[[str], torch.Tensor],
    agreement: Agreement,
    differing: list[str],
) -> Callable[[str], torch.Tensor]:
    """A function that reads a tensor of the reference, after comparing it with the merged one.

    It adds the names of tensors whose bits differ to `differing`.
    """

    def read(name: str) -> torch.Tensor:
        weight = weights(name)
        applied = reading.apply(name, weight)
        if not compare(name, weight, applied, merged.tensor(name), agreement):
            differing.append(name)
        return applied.to(weight.dtype)

    return read


def judge_logits(
    plain: Iterable[torch.Tensor],
    adapted: Iterable[torch.Tensor],
    reference: Iterable[torch.Tensor],
    merged: Iterable[torch.Tensor],
) -> dict[str, Any]:
    """Compares the logits of base, base with adapter, reference and merge, chunk by chunk. Raises StageError
    if the adapter has no effect or the merge's error is too large.
    """
    tokens = agree = 0
    effect = rounding_error = error = 0.0
    for before, exact, rounded, after in zip(plain, adapted, reference, merged, strict=True):
        effect += (exact - before).square().mean(-1).sum().item()
        rounding_error += (rounded - exact).square().mean(-1).sum().item()
        error += (after - exact).square().mean(-1).sum().item()
        agree += int((exact.argmax(-1) == after.argmax(-1)).sum())
        tokens += len(exact)
    effect, rounding_error, error = ((total / tokens) ** 0.5 for total in (effect, rounding_error, error))
    if not effect:
        raise StageError(
            "an adapter that changes no logit",
            "one that was trained",
            "See training.json: train longer, or with other targets.",
        )
    check_error("the logits", error, rounding_error, effect)
    return {
        "proof_tokens": tokens,
        "adapter_effect": effect,
        "rounding_error": rounding_error,
        "merge_error": error,
        "greedy_agreement": agree / tokens,
    }


def sample_conversations(rows: Path, tokens: int) -> list[torch.Tensor]:
    """The first training conversations, int64 (length,) each, at most `tokens` tokens in all."""
    conversations, count = [], 0
    for _, row in dataset.read(rows):
        ids = row["input_ids"][: tokens - count]
        conversations.append(torch.tensor(ids))
        count += len(ids)
        if count >= tokens:
            break
    return conversations
