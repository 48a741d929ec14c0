"""Which linears each layout quantises.

`nvidia` is NVIDIA's published layout for Nemotron 3 Nano. In BF16 stay attention, both projections of the
Mamba layer directly before each attention layer, every convolution, the router and lm_head.
"""

from __future__ import annotations

from model.families.family import Config, Linear
from model.families.nemotron_h import names
from model.families.nemotron_h.linears import EXPERT, MAMBA, SHARED, linears

LAYOUTS = {
    "nvidia": (
        "experts, shared experts and Mamba projections, but for the Mamba layer before each attention layer"
    ),
    "conservative": "experts and shared experts; vLLM before the in_proj repair (0.12-0.17.1) can load it",
    "experts": "routed experts only",
}
KINDS = {"nvidia": (EXPERT, SHARED, MAMBA), "conservative": (EXPERT, SHARED), "experts": (EXPERT,)}


def quantised(config: Config, layout: str) -> list[Linear]:
    """The linears that `layout` quantises, in checkpoint order. Raises ValueError for an unknown one."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    letters, kinds = names.pattern(config), KINDS[layout]
    return [
        linear
        for linear in linears(config)
        if linear.kind in kinds and letters[linear.layer : linear.layer + 2] != "M*"
    ]
