"""Operations of a document: the formula agrees with the count of the benchmark, part by part."""

import pytest

from bench import operations as bench
from model.families.nemotron_h import operations


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("documents", "length", "trained"), [(1, 200, 50), (8, 2048, 512), (2, 16384, 4000)])
def test_the_formula_counts_what_the_benchmark_counts(recomputed, documents, length, trained):
    config = bench.sizes(52)
    workload = bench.Workload(recompute=recomputed, down_recomputed=False, logits="trained", scores="group")
    parts = bench.count(config, workload, documents * length, documents * trained, length)
    without_lora = sum(part.total for part in parts if part.name != "LoRA")
    assert documents * operations.count(config, recomputed).of(length, trained) == without_lora
    assert bench.total(parts) < 1.02 * without_lora, "LoRA is too much to leave out"


def test_attention_is_little_of_a_short_document_and_much_of_a_long_one():
    work = operations.count(bench.sizes(52), True)
    squares = {tokens: work.square * tokens for tokens in (300, 1400, 16384)}  # a token
    share = {tokens: square / (work.token + square) for tokens, square in squares.items()}
    assert share[300] < 0.005 < 0.01 < share[1400] < 0.03 < 0.15 < share[16384]
