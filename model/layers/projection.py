"""Frozen matrices in one of three forms, each with a trainable low-rank change.

A `Projection` replaces a linear or a stack of expert matrices of the native class. Its weights are

    bf16     as they are (any float dtype)
    nf4      4-bit codes in blocks of 64          (model/weights/nf4.py)
    nvfp4    the exporter's own grid, groups of 16 (model/weights/nvfp4.py)

and are decoded for every product. Forward and backward each hold one dense stack during the product, and
autograd saves packed weights only. `keep_decoded` keeps a stack decoded where there is memory. Several
processes may share the weights (model/weights/shards.py). The low-rank factors are always float32 and are
cast to the input's dtype for products, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from model.weights import decode, nf4, nvfp4, rounding
from model.weights.shards import Shards

FORMS = {"bf16": 16.0, "nf4": 4.25, "nvfp4": 4.5}  # bits a weight
PACKINGS = {"nf4": nf4, "nvfp4": nvfp4}
ROUNDED_AT_ONCE = 8  # matrices in float32 at a time while a stack is rounded


class Projection(nn.Module):
    """`experts` matrices (out, in). `rank` is 0 until `adapt` creates the factors `lora_a` (experts, rank,
    in) and `lora_b` (experts, out, rank).

    Each buffer has one row per row of the stacked matrices, or this process's share of these rows.
    """

    weight: torch.Tensor
    weight_scale_2: torch.Tensor

    def __init__(
        self,
        experts: int,
        out: int,
        inside: int,
        form: str = "bf16",
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        shards: Shards = Shards(),
    ):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r} of weights; known are {', '.join(FORMS)}")
        self.experts = experts
        self.out_features = out
        self.in_features = inside
        self.form = form
        self.dtype = dtype
        self.shards = shards
        self.rank, self.scale, self.rounded = 0, 0.0, False
        self.decoded: torch.Tensor | None = None
        rows = shards.rows_per_process(experts * out)
        forms: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
            "bf16": {"weight": ((rows, inside), dtype)},
            "nf4": {
                "weight": ((rows, inside // 2), torch.uint8),
                "weight_scale": ((rows, inside // nf4.BLOCK), torch.bfloat16),
            },
            "nvfp4": {
                "weight": ((rows, inside // 2), torch.uint8),
                "weight_scale": ((rows, inside // nvfp4.GROUP), torch.float8_e4m3fn),
                # one number per matrix, and every process holds all of them
                "weight_scale_2": ((experts,), torch.float32),
            },
        }
        parts = forms[form]
        for name, (shape, kind) in parts.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self._by_rows = tuple(name for name in parts if name != "weight_scale_2")

    @torch.no_grad()
    def put(self, expert: int, matrices: torch.Tensor) -> None:
        """Stores one matrix (out, in), or n matrices (n, out, in) from `expert` on. Packs them on the device
        of the weights.

        Raises ValueError on another shape, and on more matrices than there are.
        """
        expected = (self.out_features, self.in_features)
        stack = matrices if matrices.ndim == 3 else matrices[None]
        count = len(stack)
        if tuple(stack.shape[1:]) != expected:
            raise ValueError(f"a matrix of shape {tuple(matrices.shape)}, expected {expected}")
        if expert + count > self.experts:
            raise ValueError(f"{count} matrices from {expert} on, expected {self.experts} in all")
        stack = stack.to(self.weight.device)
        packed = {"weight": stack} if self.form == "bf16" else vars(PACKINGS[self.form].pack(stack))
        if self.form == "nvfp4":
            self.weight_scale_2[expert : expert + count] = packed["weight_scale_2"]
        for name in self._by_rows:
            self.shards.put(getattr(self, name), expert * self.out_features, packed[name].flatten(0, 1))

    def stored_weights(self) -> torch.Tensor | nf4.Packed | nvfp4.Packed:
        """All frozen weights in their form, gathered from all processes: tensors (experts, out, ...)."""
        rows, sizes = self.experts * self.out_features, (self.experts, self.out_features)
        tensors: dict[str, torch.Tensor] = {
            name: self.shards.gather(getattr(self, name), rows).unflatten(0, sizes) for name in self._by_rows
        }
        if self.form == "bf16":
            return tensors["weight"]
        return (
            nf4.Packed(**tensors)
            if self.form == "nf4"
            else nvfp4.Packed(**tensors, weight_scale_2=self.weight_scale_2)
        )

    def dense(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The frozen weights (experts, out, in) in `dtype`, without the change. Written into `out`, a view of
        that shape, if it is given.
        """
        if self.decoded is not None:
            weights = self.decoded[:, : self.out_features, : self.in_features]
            return weights if out is None else out.copy_(weights)
        stored = self.stored_weights()
        if isinstance(stored, torch.Tensor):
            return stored if out is None else out.copy_(stored)
        if self.weight.is_cuda:
            return decode.stack(
                stored,
                (
                    torch.empty(
                        self.experts,
                        self.out_features,
                        self.in_features,
                        dtype=self.dtype,
                        device=self.weight.device,
                    )
                    if out is None
                    else out
                ),
            )
        weights = PACKINGS[self.form].unpack(stored).to(self.dtype)
        return weights if out is None else out.copy_(weights)

    @torch.no_grad()
    def keep_decoded(self, multiple: int = 1) -> None:
        """Decodes the weights once and keeps them, with room for the factors beside and below them. Call it
        after `adapt`.

        `multiple`: the value that `with_b_columns` and `with_a_rows` will be called with.
        """
        room = self.rank + -self.rank % multiple
        decoded = torch.zeros(
            self.experts,
            self.out_features + room,
            self.in_features + room,
            dtype=self.dtype,
            device=self.weight.device,
        )
        self.dense(decoded[:, : self.out_features, : self.in_features])
        self.decoded = decoded

    def decoded_bytes(self, multiple: int = 1) -> int:
        """Bytes that `keep_decoded` takes."""
        room = self.rank + -self.rank % multiple
        return self.experts * (self.out_features + room) * (self.in_features + room) * self.dtype.itemsize

    def adapt(self, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        """Gives every matrix a change `alpha / rank * B @ A`, which starts at zero: A as nn.Linear
        initialises it, B zero.
        """
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform with a = sqrt(5), as PEFT has it
        # Drawn on the CPU, so that one seed gives the same adapter on every device.
        a = (torch.rand(self.experts, rank, self.in_features, generator=generator) * 2 - 1) * bound
        self.lora_a = nn.Parameter(a.to(self.weight.device))
        self.lora_b = nn.Parameter(
            torch.zeros(self.experts, self.out_features, rank, device=self.weight.device)
        )
        self.rank, self.scale = rank, alpha / rank

    def set_change(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        """Sets an existing change, times `scale`: A (experts, rank, in), B (experts, out, rank). Rank 0
        removes it.
        """
        self.lora_a, self.lora_b = (
            nn.Parameter(factor.to(self.weight.device, torch.float32), requires_grad=False)
            for factor in (a, b)
        )
        self.rank, self.scale = a.shape[1], scale

    @torch.no_grad()
    def forward_weights(self) -> torch.Tensor:
        """The weights that the forward multiplies with, (experts, out, in) in `dtype`.

        If rounded, they are what the export will write: NVFP4 of the BF16 merge of base and change, which
        includes the low-rank product. If not, they are the frozen weights, and the low-rank product is added
        separately.
        """
        if not self.rounded:
            return self.dense()
        weights = torch.empty(
            self.experts, self.out_features, self.in_features, dtype=self.dtype, device=self.weight.device
        )
        frozen = self.dense()
        for first in range(0, self.experts, ROUNDED_AT_ONCE):
            chunk = slice(first, first + ROUNDED_AT_ONCE)
            merged = frozen[chunk].float()
            if self.rank:
                merged = merged + self.scale * (self.lora_b[chunk] @ self.lora_a[chunk])
            weights[chunk] = rounding.rounded(merged.to(torch.bfloat16), self.dtype)
        return weights

    @torch.no_grad()
    def with_b_columns(self, multiple: int = 1) -> torch.Tensor:
        """The frozen weights with scale * B as further columns, (experts, out, in + rank). For rows that
        carry A x behind x.
        """
        _, b = self.factors(self.dtype, multiple)
        if self.decoded is not None:
            weights = self.decoded[:, : self.out_features]
        else:
            weights = self.weight.new_empty(
                self.experts, self.out_features, self.in_features + b.shape[2], dtype=self.dtype
            )
            self.dense(weights[:, :, : self.in_features])
        weights[:, :, self.in_features :] = b
        return weights

    @torch.no_grad()
    def with_a_rows(self, multiple: int = 1) -> torch.Tensor:
        """The frozen weights with A as further rows, (experts, out + rank, in). For gradient rows that carry
        the gradient of A x at their end.
        """
        a, _ = self.factors(self.dtype, multiple)
        if self.decoded is not None:
            weights = self.decoded[:, :, : self.in_features]
        else:
            weights = self.weight.new_empty(
                self.experts, self.out_features + a.shape[1], self.in_features, dtype=self.dtype
            )
            self.dense(weights[:, : self.out_features])
        weights[:, self.out_features :] = a
        return weights

    @property
    def trainable_factors(self) -> tuple[nn.Parameter, nn.Parameter] | tuple[None, None]:
        """A and B, or None and None without a change."""
        return (self.lora_a, self.lora_b) if self.rank else (None, None)

    def factors(self, dtype: torch.dtype, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """A (experts, rank, in) and scale * B (experts, out, rank) in `dtype`, the rank padded with zeros to
        a multiple of `multiple`.
        """
        a, b = self.lora_a.detach().to(dtype), (self.scale * self.lora_b.detach()).to(dtype)
        if missing := -self.rank % multiple:
            a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
        return a, b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As a linear without bias: (..., in) -> (..., out). Raises ValueError for a stack of several
        matrices.
        """
        if self.experts != 1:
            raise ValueError(f"a stack of {self.experts} matrices is multiplied by model.layers.experts")
        return _Linear.apply(x, *self.trainable_factors, self)

    def extra_repr(self) -> str:
        return f"{self.experts} x ({self.out_features}, {self.in_features}), {self.form}, rank {self.rank}"


class _Linear(torch.autograd.Function):
    """`x @ W.T + scale * (x @ A.T) @ B.T`. The backward decodes W again and forms no gradient of it.

    If rounded, the forward multiplies with W' = NVFP4(W + scale * B @ A) alone, and A and B get the gradients
    of the unrounded sum (straight-through).
    """

    apply: ClassVar[Callable[..., torch.Tensor]]

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None, projection: Projection
    ) -> torch.Tensor:
        ctx.projection, ctx.change = projection, a is not None
        ctx.save_for_backward(x if ctx.change else None)
        y = x @ projection.forward_weights()[0].t()
        if ctx.change and not projection.rounded:
            factor_a, factor_b = projection.factors(x.dtype)
            y += (x @ factor_a[0].t()) @ factor_b[0].t()
        return y

    @staticmethod
    def backward(
        ctx: Any, g: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        projection = ctx.projection
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = g @ projection.forward_weights()[0]
        if ctx.change:
            (x,) = ctx.saved_tensors
            factor_a, factor_b = projection.factors(x.dtype)
            rows, gradient = x.flatten(0, -2), g.flatten(0, -2)
            within = gradient @ factor_b[0]
            da = (within.t() @ rows).float()[None]
            db = (gradient.t() @ (projection.scale * (rows @ factor_a[0].t()))).float()[None]
            if dx is not None and not projection.rounded:
                dx += (within @ factor_a[0]).view_as(dx)
        return dx, da, db, None
