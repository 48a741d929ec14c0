"""Milliseconds of one MoE layer's grouped products at the real widths, torch's kernel compared with ours:
`python -m bench.grouped [TOKENS]`.
"""

import sys
import time
from typing import TYPE_CHECKING

import torch

from model.layers import grouped
from model.layers.grouped import Routing

if TYPE_CHECKING:
    from collections.abc import Callable

EXPERTS, CHOICES, HIDDEN, INNER, RANK = 128, 6, 2688, 1856, 16


def measured(run: Callable[[], object]) -> float:
    """Median milliseconds of nine runs after three."""
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return sorted(times[3:])[4]


def main(tokens: int = 16384) -> None:
    torch.manual_seed(0)
    index = torch.rand(tokens, EXPERTS, device="cuda").topk(CHOICES).indices
    routing, rows = Routing.of(index, EXPERTS), tokens * CHOICES
    tensors = {
        name: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02
        for name, shape in {
            "x": (rows, HIDDEN + RANK),
            "g": (rows, INNER),
            "w": (EXPERTS, INNER, HIDDEN + RANK),
            "a": (EXPERTS, RANK, HIDDEN),
            "low": (rows, RANK),
        }.items()
    }
    x, g, w, a, low = tensors.values()
    cases: dict[str, tuple[Callable[[], torch.Tensor], int]] = {
        "x W'": (lambda: grouped.product(x, w, routing), 2 * rows * INNER * (HIDDEN + RANK)),
        "g W": (lambda: grouped.input_gradient(g, w, routing), 2 * rows * INNER * (HIDDEN + RANK)),
        "x A'": (lambda: grouped.product(x[:, :HIDDEN], a, routing), 2 * rows * HIDDEN * RANK),
        "low' x": (lambda: grouped.outer(low, x[:, :HIDDEN], routing), 2 * rows * HIDDEN * RANK),
    }
    print(f"{torch.cuda.get_device_name()}, {tokens:,} tokens")
    for name, (run, operations) in cases.items():
        results = {}
        for kernels in ("torch", "ours"):
            grouped.TORCH_KERNELS = (9, 10) if kernels == "torch" else ()
            results[kernels] = (run(), measured(run))
        error = (
            (results["ours"][0] - results["torch"][0]).float().norm() / results["torch"][0].float().norm()
        ).item()
        print(
            f"{name:7s}"
            + "".join(
                f"  {k} {ms:7.2f} ms {operations / ms / 1e9:6.0f} TFLOP/s" for k, (_, ms) in results.items()
            )
            + f"  apart by {error:.1e}"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
