"""The parameters of stage train, made by `make parameters` from stage.toml: change that file instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Parameters:
    # How the base is held: lora in BF16, qlora in NF4, nvfp4 on the exporter's grid; what the export leaves
    # in BF16 stays in BF16
    method: Literal["lora", "qlora", "nvfp4"]
    # GB of memory in which 4-bit weights are also held decoded, so that steps need not decode them; faster if
    # there is memory to spare (docs/performance.md)
    decoded_gb: float
    # What the adapter is put on; attention can be served unmerged and stays BF16 in the NVFP4 layout
    targets: Literal["attention", "mamba", "attention+mamba", "experts", "all"]
    # LoRA rank; more than the width of the narrowest layer it is put on is refused, and vLLM serves at most
    # 512
    rank: int
    # LoRA alpha; the adapter's product is scaled by alpha / rank
    alpha: int
    # Peak learning rate, after which a cosine falls to zero
    learning_rate: float
    # Optimiser steps; after three of them every adapter tensor must have changed. 0 leaves B at zero: a
    # control
    steps: int
    # How often each conversation is trained, given instead of steps; their number follows from the data. 0:
    # not used
    epochs: float
    # Conversations per step; not used with batch_tokens
    batch: int
    # Most tokens per step, given instead of batch: a step has as many conversations as fit. 0: not used
    batch_tokens: int
    # Most tokens of a packed sequence; a step is packed into as few sequences as possible, and its loss does
    # not depend on their number
    sequence_tokens: int
    # Steps over which the learning rate rises, at most steps
    warmup_steps: int
    # Gradients are clipped to this norm
    max_grad_norm: float
    # AdamW weight decay
    weight_decay: float
    # Precision in which the base is held; the adapter is always float32
    precision: Literal["float32", "bfloat16"]
    # Recompute activations instead of holding them; on a GPU, steps shorter than sequence_tokens hold what
    # fits into the same memory
    gradient_checkpointing: bool
    # On a GPU, steps replay CUDA graphs of a few padded sizes, so that short ones are not bound by launching
    # kernels; not with sharded
    cuda_graphs: bool
    # On one GPU, two runs end in the same adapter bit for bit, and so does one that was killed and resumed;
    # steps take longer
    deterministic: bool
    # Steps between losses on held-out conversations
    eval_every: int
    # Steps between checkpoints
    save_every: int
    # Held-out losses without a new best after which training stops; 0: never
    patience: int
    # Last share of the steps in which adapted weights that the export quantises go through its NVFP4 rounding
    # (method lora)
    qat_share: float
    # What the rounded steps learn: the labels (QAT), or the outputs of the model before rounding began (QAD)
    qat_loss: Literal["labels", "teacher"]
    # Processes on this machine that share each step's sequences, started through torchrun; one per GPU
    ranks: int
    # Each rank holds its share of the base and is sent the rest, packed, a stack at a time: less memory each,
    # more traffic; the losses are the same
    sharded: bool
    # Share by which the training loss has to fall; below it there is a warning. A large share leads to
    # learning by heart: the verdict in training.json says more
    min_loss_drop: float
    # Fail instead of warn if the training loss falls less
    require_loss_drop: bool
