"""The Mamba-2 mixer of NemotronH with document boundaries, from kernels that need no compiler.

The class's own forward passes `out_proj.weight` to its fused training kernel, so a wrapper around that module
(LoRA, 4 bits, fake quantisation) is not computed. Without kernels it supports no documents. `attach` replaces
it by `forward`: in_proj, convolution, scan, norm and out_proj, called one by one. The middle three exist
twice: in Triton (ours and mamba-ssm's) for CUDA, and in plain torch for other devices. Formulas: Dao and Gu,
"Transformers are SSMs" (arXiv 2405.21060), sections 6 and 7.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from model.layers import convolution, tuning
from model.layers.documents import Documents

if TYPE_CHECKING:
    from transformers import Cache

    from model.layers.structure import Mamba

IMPLEMENTATIONS = ("triton", "torch")
PACKED = ("seq_idx", "cu_seq_lens_q")  # transformers' arguments for a packed batch


class MissingKernels(ImportError):
    """The device is CUDA and the Triton kernels cannot be imported; the message names the package."""


@functools.cache
def _import_error() -> str:
    """Why the Triton kernels cannot be imported; empty if they can. Then they are also prepared
    (model/layers/tuning.py).
    """
    try:
        import mamba_ssm.ops.triton.layernorm_gated
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401
    except ImportError as error:
        return str(error) or type(error).__name__
    tuning.prepare()
    return ""


def implementation(device: torch.device | str) -> str:
    """The implementation for a device: "triton" on CUDA, "torch" elsewhere. Raises MissingKernels on CUDA
    without the package: plain torch takes several times the time and memory there, so it must be requested.
    """
    if torch.device(device).type != "cuda":
        return "torch"
    if _import_error():
        raise MissingKernels(
            f"Mamba layers on CUDA need mamba-ssm (2.3.2.post1, installed without its compiled extension), "
            f'which does not import: {_import_error()}. Install it, or ask for implementation="torch"'
        )
    return "triton"


def _checked_implementation(requested: str | None, device: torch.device) -> str:
    if requested is None:
        return implementation(device)
    if requested not in IMPLEMENTATIONS:
        raise ValueError(f"there is no implementation {requested!r}; there are {', '.join(IMPLEMENTATIONS)}")
    if requested != "torch" and implementation(device) != requested:
        raise ValueError(f"the Triton kernels run on CUDA, and these tensors are on {device}")
    return requested


def _check_documents(documents: Documents | None, x: torch.Tensor) -> None:
    if documents is not None and (x.shape[0] != 1 or sum(documents.lengths) != x.shape[1]):
        raise ValueError(
            f"documents of {sum(documents.lengths)} tokens in all describe a batch of 1, found {x.shape[0]} x"
            f" {x.shape[1]} tokens"
        )


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: Documents | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """SiLU of a causal depthwise convolution that does not cross document boundaries.

    x (batch, tokens, channels); weight (channels, kernel), its last column for the present token; bias
    (channels,) or None. Returns x's shape and dtype; sums are float32. Raises ValueError if the documents do
    not fit x.
    """
    _check_documents(documents, x)
    if _checked_implementation(implementation, x.device) == "triton":
        rows = documents or Documents((x.shape[1],) * x.shape[0])
        return convolution.conv(x.flatten(0, 1), weight, bias, rows.position(x.device)).view(x.shape)
    exact = torch.promote_types(x.dtype, torch.float32)
    kernel, taps = weight.shape[1], weight.to(exact).unbind(1)
    lengths = (x.shape[1],) if documents is None else documents.lengths
    # Zeros before each document make the boundaries. Then a few shifted products, which on CPUs are faster
    # than torch's depthwise convolution.
    gap = x.new_zeros(x.shape[0], kernel - 1, x.shape[2], dtype=exact)
    spaced = torch.cat([part for document in x.to(exact).split(lengths, 1) for part in (gap, document)], 1)
    out = spaced[:, kernel - 1 :] * taps[-1]
    for back in range(1, kernel):
        out = torch.addcmul(out, spaced[:, kernel - 1 - back : -back], taps[-1 - back])
    out = F.silu(out if bias is None else out + bias.to(exact))
    if len(lengths) > 1:
        out = torch.cat(out.split([n for length in lengths for n in (length, kernel - 1)][:-1], 1)[::2], 1)
    return out.to(x.dtype)


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    chunk: int,
    documents: Documents | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t;  y_t = C_t h_t + D x_t;  h is zero before each document.

    x (batch, tokens, heads, head_dim); dt (batch, tokens, heads) float32, already positive (softplus) and not
    clamped; A (heads,) negative float32; B, C (batch, tokens, groups, state), each shared by heads / groups
    heads; D (heads,) or None. `chunk`: the most tokens that one matrix product covers; it changes no result.
    With documents the batch is 1. Returns x's shape and dtype; states and decays are float32. Raises
    ValueError if the documents do not fit x.
    """
    _check_documents(documents, x)
    if _checked_implementation(implementation, x.device) == "triton":
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        index = None if documents is None else documents.index(x.device)[None]
        y: torch.Tensor = mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, seq_idx=index)
        return y
    with torch.autocast(x.device.type, enabled=False):  # it would round the products of states to BF16
        return _scan(x, dt, A, B, C, D, chunk, documents)


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    chunk: int,
    documents: Documents | None,
) -> torch.Tensor:
    # Letters: b batch, n chunks, l and s positions in a chunk, g groups, r heads of a group, k state, p
    # head_dim.
    tokens, heads, groups = x.shape[1], x.shape[2], B.shape[2]
    exact = torch.promote_types(x.dtype, torch.float32)
    count = -(-tokens // chunk)
    # evenly filled chunks: 200 tokens are four of 50, not three of 64 and one of 8
    length = -(-tokens // count)
    pad = count * length - tokens

    def chunked(value: torch.Tensor) -> torch.Tensor:  # (b, tokens, ...) -> (b, n, l, ...)
        value = value.to(exact)
        chunks: torch.Tensor = (
            F.pad(value, (0, 0) * (value.ndim - 2) + (0, pad)) if pad else value
        ).unflatten(1, (count, length))
        return chunks

    x_, dt_, B, C = chunked(x).unflatten(3, (groups, -1)), chunked(dt), chunked(B), chunked(C)
    # log of the decay from before the chunk's first token to after token l: b n l h
    log = (dt_ * A.to(exact)).cumsum(2)
    weighted = x_ * dt_.unflatten(3, (groups, -1)).unsqueeze(-1)
    blocked = ~torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    start, end, chunk_decay = log.exp(), (log[:, :, -1:] - log).exp(), log[:, :, -1].exp()
    if documents is not None:
        index = documents.index(x.device)
        index = torch.cat([index, index[-1:].expand(pad)]).view(count, length)
        last = index[:, -1:]
        before = torch.cat([index[:1, :1], last[:-1]])  # the document whose state enters the chunk
        blocked = (blocked | (index[:, :, None] != index[:, None, :]))[:, None]
        start = start * (index == before)[..., None]
        end = end * (index == last)[..., None]
        chunk_decay = chunk_decay * (last == before)

    # Within a chunk: every token with every earlier one of its document.
    log = log.transpose(2, 3)
    decay = (
        (log.unsqueeze(-1) - log.unsqueeze(-2))
        .masked_fill_(blocked, -torch.inf)
        .exp_()
        .unflatten(2, (groups, -1))
    )
    pairs = decay * torch.einsum("bnlgk,bnsgk->bngls", C, B).unsqueeze(3)
    y = torch.einsum("bngrls,bnsgrp->bnlgrp", pairs, weighted)
    # Between chunks: what each adds to the state, the states that enter, and their part of the output.
    if count > 1:
        end, start = (value.unflatten(3, (groups, -1)).unsqueeze(-1) for value in (end, start))
        added = torch.einsum("bnlgk,bnlgrp->bngkrp", B, weighted * end)
        entering = _EnteringStates.apply(added, chunk_decay.unflatten(2, (groups, 1, -1)).unsqueeze(-1))
        y = torch.addcmul(y, torch.einsum("bnlgk,bngkrp->bnlgrp", C, entering), start)
    if D is not None:
        y = torch.addcmul(y, x_, D.to(exact).view(groups, -1, 1))
    return y.reshape(x.shape[0], count * length, heads, -1)[:, :tokens].to(x.dtype)


class _EnteringStates(torch.autograd.Function):
    """The state that enters each chunk: zero, then entering[n + 1] = decay[n] * entering[n] + added[n].

    added (batch, chunks, ...); decay broadcasts to it. Written by hand, because autograd would keep a tensor
    and two nodes per chunk.
    """

    apply: ClassVar[Callable[..., torch.Tensor]]

    @staticmethod
    def forward(ctx: Any, added: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        entering = torch.zeros_like(added, memory_format=torch.contiguous_format)
        states, adds, decays = entering.unbind(1), added.unbind(1), decay.unbind(1)
        for i in range(len(states) - 1):
            torch.addcmul(adds[i], decays[i], states[i], out=states[i + 1])
        ctx.save_for_backward(entering, decay)
        return entering

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        entering, decay = ctx.saved_tensors
        added = torch.zeros_like(entering)
        sums, gradients, decays = added.unbind(1), gradient.unbind(1), decay.unbind(1)
        for i in reversed(range(len(sums) - 1)):
            torch.addcmul(gradients[i + 1], decays[i + 1], sums[i + 1], out=sums[i])
        return added, (added * entering).sum_to_size(decay.shape)


def gated_norm(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: int,
    implementation: str | None = None,
) -> torch.Tensor:
    """weight * rms(y * silu(z)) in float32, with the mean square over each `group` of neighbouring channels.
    The gate comes before the norm.

    y, z (..., channels); weight (channels,). Returns y's shape and dtype. Source: the checkpoint's own
    `MambaRMSNormGated`.
    """
    if _checked_implementation(implementation, y.device) == "triton":
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

        normalised: torch.Tensor = rmsnorm_fn(
            y, weight, None, z=z, eps=eps, group_size=group, norm_before_gate=False
        )
        return normalised
    exact = torch.promote_types(y.dtype, torch.float32)
    gated: torch.Tensor = (y.to(exact) * F.silu(z.to(exact))).unflatten(-1, (-1, group))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(exact)).to(y.dtype)


def forward(
    self: Mamba,
    hidden_states: torch.Tensor,
    cache_params: Cache | None = None,
    attention_mask: torch.Tensor | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The mixer's forward, installed by `attach`: (batch, tokens, hidden size) to the same shape and dtype.

    attention_mask (batch, tokens) is zero on padding. Padding is zeroed before in_proj and after the
    convolution, so it adds nothing to any state. With cache_params (generation) the class's own forward runs.
    Raises ValueError for documents together with a cache. Also raises ValueError if transformers says that
    the batch is packed but there are no documents, because states would leak.
    """
    if cache_params is not None:
        if documents is not None:
            raise ValueError(
                "packed documents and a generation cache exclude each other: call the model with"
                " use_cache=False"
            )
        generated: torch.Tensor = type(self).forward(
            self, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
        )
        return generated
    if documents is None and any(kwargs.get(name) is not None for name in PACKED):
        raise ValueError(
            f"a packed batch ({', '.join(n for n in PACKED if kwargs.get(n) is not None)}) needs"
            " documents=Documents(lengths)"
        )
    implementation, dtype = self.implementation, hidden_states.dtype
    groups, state = self.n_groups, self.ssm_state_size

    def unpadded(value: torch.Tensor) -> torch.Tensor:
        return value if attention_mask is None else value * attention_mask[:, :, None].to(value.dtype)

    projected = self.in_proj(unpadded(hidden_states))
    z, xbc, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
    xbc = unpadded(conv(xbc, self.conv1d.weight.squeeze(1), self.conv1d.bias, documents, implementation))
    x, B, C = xbc.split([self.intermediate_size, groups * state, groups * state], -1)
    # no clamp: the checkpoint's own code and vLLM have none
    dt = F.softplus(dt.float() + self.dt_bias.float())
    y = scan(
        x.unflatten(-1, (self.num_heads, -1)),
        dt,
        -torch.exp(self.A_log.float()),
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
        self.D.float(),
        self.chunk_size,
        documents,
        implementation,
    )
    y = gated_norm(
        y.flatten(-2), z, self.norm.weight, self.norm.variance_epsilon, self.norm.group_size, implementation
    )
    output: torch.Tensor = self.out_proj(y.to(dtype))
    return output


def attach(mixer: Mamba, implementation: str | None = None) -> Mamba:
    """Binds `forward` to one NemotronHMamba2Mixer and returns it. Generation still uses the class's own
    forward.

    `implementation`: None chooses by device at each call; "torch" uses plain torch on CUDA too. Raises
    ValueError for a mixer whose activation is not SiLU.
    """
    if mixer.activation not in ("silu", "swish"):
        raise ValueError(
            f"the Mamba convolution is followed by SiLU in this model, found {mixer.activation!r}: keep the"
            " class's own forward"
        )
    mixer.implementation = implementation
    mixer.forward = types.MethodType(forward, mixer)
    return mixer
