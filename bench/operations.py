"""How many matrix-product operations one optimizer step takes, part by part, for each way of training.

Counted are the products that each way of training computes (two operations per multiply-add), including
recomputed forwards. So its share of the matrix ceiling can be told apart from its extra work. Elementwise
work, norms, convolutions, top-k and 4-bit decoding are not products and not counted.

Letters in formulas: T tokens of a step, S tokens of a document, D hidden, V vocabulary, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model.families.nemotron_h.nano import PATTERN, WIDTHS

TARGETS = frozenset({"attention", "mamba", "experts", "shared"})


@dataclass(frozen=True)
class Workload:
    """The properties of a way of training that decide which products it computes."""

    recompute: bool = True  # every block's forward runs again in the backward
    down_recomputed: bool = True  # and in it the experts' down projection, whose output no gradient needs
    logits: str = "all"  # for "all" positions, or for "trained" ones only
    logits_recomputed: bool = False
    # "split": (xA)B beside xW; "dense": W + BA is formed, and so is a gradient of W's size
    expert_lora: str = "split"
    scores: str = "head"  # the scan's C B^T per "head", or once per "group" of heads
    targets: frozenset[str] = TARGETS
    rank: int = 16


@dataclass(frozen=True)
class Part:
    """Operations of one part of a step."""

    name: str
    forward: float
    recomputed: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.recomputed + self.backward


def sizes(layers: int) -> dict[str, Any]:
    """The hub config of the real model cut to its first `layers` layers. Raises ValueError outside 1..52."""
    if not 1 <= layers <= len(PATTERN):
        raise ValueError(
            f"--layers {layers}: the model has {len(PATTERN)} layers, so 1 to {len(PATTERN)} can be measured"
        )
    return WIDTHS | {"hybrid_override_pattern": PATTERN[:layers]}


def linears(config: dict[str, Any]) -> dict[str, list[tuple[int, int]]]:
    """Part -> (in, out) of each of its frozen matrices in one layer; for `experts`, of one expert."""
    d = config["hidden_size"]
    width = config["moe_intermediate_size"]
    shared = config["moe_shared_expert_intermediate_size"]
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    conv = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    queries, keys = (
        config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads")
    )
    return {
        "mamba": [(d, inner + conv + config["mamba_num_heads"]), (inner, d)],
        "attention": [(d, queries), (d, keys), (d, keys), (queries, d)],
        "experts": [(d, width), (width, d)],
        "shared": [(d, shared), (shared, d)],
    }


def count(
    config: dict[str, Any], workload: Workload, tokens: int, trained: int, length: float, passes: int = 1
) -> list[Part]:
    """The parts of one step on `tokens` tokens in documents of `length`, `trained` of them with a label, in
    `passes` micro-batches.

    If documents differ, `length` is the mean over tokens of their document's length; this makes the attention
    scores exact. Weight gradients of frozen matrices are not counted, because autograd does not compute them.
    `passes` matters only if W + BA is formed once per micro-batch.
    """
    letters = config["hybrid_override_pattern"]
    layers = {
        "mamba": letters.count("M"),
        "attention": letters.count("*"),
        "experts": letters.count("E"),
        "shared": letters.count("E"),
    }
    matrices = linears(config)
    rows = {part: tokens * (config["num_experts_per_tok"] if part == "experts" else 1) for part in layers}
    again = 1 if workload.recompute else 0
    parts: list[Part] = []

    def add(name: str, forward: float, backward: float, recomputed: float = again) -> None:
        parts.append(Part(name, forward, forward * recomputed, forward * backward))

    dense = workload.expert_lora == "dense" and "experts" in workload.targets
    for part, pairs in matrices.items():
        products = 2 * rows[part] * layers[part] * sum(i * o for i, o in pairs)
        half = part == "experts" and not workload.down_recomputed
        add(
            f"{part} weights", products, 2 if dense and part == "experts" else 1, again / 2 if half else again
        )
    lora = dense_lora = 0.0
    for part in workload.targets:
        if dense and part == "experts":
            stack = config["n_routed_experts"] * sum(i * o for i, o in matrices[part])
            dense_lora = 2 * passes * layers[part] * workload.rank * stack
        else:
            lora += 2 * rows[part] * layers[part] * workload.rank * sum(i + o for i, o in matrices[part])
    add("LoRA", lora, 2)
    if dense_lora:
        add("LoRA formed as BA", dense_lora, 2)
    add("scan", tokens * layers["mamba"] * scan(config, workload), 2)
    # Causal: half of the S x S square. Two products forward, five backward (the scores once more, and four
    # gradients).
    square = 2 * 2 * tokens * length / 2 * config["num_attention_heads"] * config["head_dim"]
    add("attention scores", layers["attention"] * square, 2.5)
    add("router", 2 * tokens * layers["experts"] * config["hidden_size"] * config["n_routed_experts"], 1)
    positions = tokens if workload.logits == "all" else trained
    add(
        "lm_head",
        2 * positions * config["hidden_size"] * config["vocab_size"],
        1,
        1 if workload.logits_recomputed else 0,
    )
    return [part for part in parts if part.total]


def scan(config: dict[str, Any], workload: Workload) -> float:
    """Forward operations per token of one layer's chunked scan: scores, scores x values, and the states in
    and out.
    """
    heads, size, state, chunk = (
        int(config[key]) for key in ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "chunk_size")
    )
    scored = int(config["n_groups"]) if workload.scores == "group" else heads
    return 2 * (scored * chunk * state + heads * chunk * size + 2 * heads * state * size)


def total(parts: list[Part], operations_of: Callable[[Part], float] = lambda part: part.total) -> float:
    """Operations of all parts together; `operations_of` selects which."""
    return sum(operations_of(part) for part in parts)
