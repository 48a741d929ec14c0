"""Causal attention within each document of a packed sequence, at a cost that does not depend on how the
lengths are distributed.

On a GPU in BF16 or FP16 one call handles all documents: torch's variable-length attention (a flash kernel)
reads the documents' offsets from the device, so nothing is planned or compiled for a length. With one call
per document torch would choose cuDNN's attention on Hopper, which plans again, forward and backward, for
every new length. Elsewhere (a CPU, or float32, which has no flash kernel) a loop over the documents costs a
few calls, and no mask of tokens squared is formed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from model.layers.documents import Documents

NAME = "documents"  # among transformers' attention implementations
FLASH = (torch.bfloat16, torch.float16)


def register() -> None:
    """Registers this as transformers' attention implementation `documents`; a second call changes nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, forward)


def forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    **ignored: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: query (batch, heads, tokens, size), key and value with fewer heads -> (batch,
    tokens, heads, size).

    Without documents every row of the batch is one document. Raises ValueError for a mask, for dropout, and
    for documents with a batch of more than one.
    """
    if attention_mask is not None:
        raise ValueError(
            f"attention implementation {NAME!r} takes documents, not a mask: pack the rows instead of padding"
            " them"
        )
    if dropout:
        raise ValueError(f"attention implementation {NAME!r} has no dropout, found {dropout}")
    batch, _, tokens, _ = query.shape
    if documents is None:
        documents = Documents((tokens,) * batch)
    elif batch != 1 or documents.tokens != tokens:
        raise ValueError(
            f"documents of {documents.tokens} tokens describe a batch of 1, found {batch} x {tokens} tokens"
        )
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    attend = in_one_call if query.is_cuda and query.dtype in FLASH else by_document
    return attend(q, k, v, documents, scaling).unflatten(0, (batch, tokens)), None


def by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float | None
) -> torch.Tensor:
    """query (tokens, heads, size), key and value (tokens, fewer heads, size) -> query's shape."""
    parts = []
    for a, b in documents.spans:
        q, k, v = (rows[a:b].transpose(0, 1)[None] for rows in (query, key, value))
        parts.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[
                0
            ].transpose(0, 1)
        )
    return torch.cat(parts)


def in_one_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float | None
) -> torch.Tensor:
    """The same by torch's flash kernel. CUDA, BF16 or FP16. Raises RuntimeError if torch has none for this
    GPU.
    """
    attend, options = _varlen()
    offsets, longest = documents.offsets(query.device), max(documents.lengths)
    return attend(query, key, value, offsets, offsets, longest, longest, scale=scale, **options)


@cache
def _varlen() -> tuple[Callable[..., torch.Tensor], dict[str, Any]]:
    """torch's function, and the arguments with which the installed version computes causal attention with
    fewer key heads than query heads.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise RuntimeError(
            f"torch {torch.__version__} has no variable-length attention; expected 2.10 or newer"
        ) from error
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    attend = cast("Callable[..., torch.Tensor]", varlen_attn)  # with return_aux alone it is a pair
    return attend, causal | ({"enable_gqa": True} if "enable_gqa" in known else {})
