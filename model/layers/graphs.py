"""Replays the forward and backward of a training step as CUDA graphs, so that short steps do not wait for ten
thousand kernel launches.

A graph runs the same launches on the same memory. So a pack is padded to one of a few sizes (steps of an
eighth of its power of two) with one idle document at its end, and tensors that depend on the documents are
filled before each replay. The loss is outside the graphs, because its size is the number of trained tokens.
All graphs share one memory pool, one set of gradients, and the two tensors that carry the hidden states and
their gradient. Nothing stays in the pool between graphs, so it is as large as the largest graph needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from model.layers.documents import Documents
from model.layers.projection import Projection

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

    from model.layers.structure import Model

Run = Callable[[torch.Tensor, Documents], torch.Tensor]  # ids int64 (tokens,) -> (tokens, hidden size)
FEWEST = 8  # least number of documents in a graph


@dataclass(frozen=True)
class Key:
    """What a graph is captured for: number of tokens, number of documents, and whether weights go through the
    export's rounding.
    """

    tokens: int
    documents: int
    rounded: bool


def padded_size(tokens: int) -> int:
    """The size that a pack of `tokens` is padded to: the next multiple of an eighth of its power of two, at
    least 128.
    """
    step = max(128, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


class Captured:
    """A forward and a backward graph, and the tensors that they read and write. `run(ids, documents)` is the
    forward: int64 (tokens,) -> (tokens, hidden).
    """

    def __init__(
        self,
        key: Key,
        run: Run,
        parameters: list[nn.Parameter],
        gradients: list[torch.Tensor],
        pool: _POOL_HANDLE,
        hidden: torch.Tensor,
        hidden_gradient: torch.Tensor,
    ):
        """The graphs add to `gradients`, write `hidden` and read its gradient `hidden_gradient`; both are
        (tokens, hidden size).
        """
        device = parameters[0].device
        self.key, self.hidden, self.hidden_gradient = key, hidden, hidden_gradient
        self.ids = torch.zeros(key.tokens, dtype=torch.int64, device=device)
        self.buffers = {
            "offsets": torch.zeros(key.documents + 1, dtype=torch.int32, device=device),
            "index": torch.zeros(key.tokens, dtype=torch.int32, device=device),
            "position": torch.zeros(key.tokens, dtype=torch.int32, device=device),
        }
        self.fill(torch.zeros(key.tokens, dtype=torch.int64), Documents((key.tokens,)))
        documents = Documents(
            (key.tokens,), {(name, str(device)): buffer for name, buffer in self.buffers.items()}
        )

        def forward() -> torch.Tensor:
            output = run(self.ids, documents)
            hidden.copy_(output.detach())
            return output

        def backward(output: torch.Tensor) -> None:
            torch._foreach_add_(gradients, list(torch.autograd.grad(output, parameters, hidden_gradient)))

        # One run without capture compiles and loads kernels, and lets libraries allocate workspaces.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            backward(forward())
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.empty_cache()  # else that stream would keep its memory, which no other stream can use
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: NCCL's thread may query events during the capture.
        with torch.cuda.graph(self.forward, pool=pool, capture_error_mode="thread_local"):
            output = forward()
        with torch.cuda.graph(self.backward, pool=pool, capture_error_mode="thread_local"):
            backward(output)

    def fill(self, ids: torch.Tensor, documents: Documents) -> None:
        """Copies a pack, and an idle document behind it, to where the graphs read them. `ids` int64 (tokens,)
        on any device.
        """
        idle = self.key.tokens - documents.tokens
        padded_documents = Documents((*documents.lengths, idle)) if idle else documents
        if len(padded_documents.lengths) > self.key.documents:
            raise ValueError(f"{len(padded_documents.lengths)} documents for a graph of {self.key.documents}")
        self.ids[: documents.tokens].copy_(ids, non_blocking=True)
        self.ids[documents.tokens :].zero_()
        # Unused documents are empty: they begin and end where the last one ends.
        offsets = padded_documents.offsets("cpu")
        offsets = torch.cat(
            [offsets, offsets[-1:].expand(self.key.documents - len(padded_documents.lengths))]
        )
        for name, values in (
            ("offsets", offsets),
            ("index", padded_documents.index("cpu")),
            ("position", padded_documents.position("cpu")),
        ):
            self.buffers[name].copy_(values.pin_memory(), non_blocking=True)


class Graphs:
    """The graphs of one model. `hidden(ids, documents)` is `run` with gradients for `parameters`; a new size
    is captured first.
    """

    def __init__(self, model: Model, run: Run, parameters: Iterable[nn.Parameter]):
        self.model, self.run, self.parameters = model, run, list(parameters)
        self.projections = [module for module in model.modules() if isinstance(module, Projection)]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[Key, Captured] = {}
        self.rows = torch.empty(2, 0, 0)  # hidden states and their gradient, of the longest pack so far
        self.link = torch.zeros((), device=self.gradients[0].device, requires_grad=True)

    def key(self, documents: Documents) -> Key:
        tokens = padded_size(documents.tokens)
        count = len(documents.lengths) + (tokens > documents.tokens)
        return Key(
            tokens,
            max(FEWEST, 1 << (count - 1).bit_length()),
            any(module.rounded for module in self.projections),
        )

    def prepare(
        self, packs: Iterable[Documents], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Captures every size among `packs`. The largest comes first, so that the smaller ones reuse its
        memory.
        """
        keys = sorted(
            {self.key(documents) for documents in packs} - set(self.captured),
            key=lambda key: (-key.tokens, -key.documents),
        )
        for number, key in enumerate(keys, 1):
            self.capture(key)
            progress(number, len(keys))

    def capture(self, key: Key) -> Captured:
        if not self.model.training:
            raise ValueError("graphs are of training steps: call model.train() first")
        if self.rows.shape[1] < key.tokens:
            table = self.model.get_input_embeddings().weight
            self.rows = torch.zeros(2, key.tokens, table.shape[1], dtype=table.dtype, device=table.device)
        # In the middle of a step they hold the sums of its earlier packs, and capturing adds to them.
        sums = [gradient.clone() for gradient in self.gradients] if self.holds_gradients else None
        captured = Captured(
            key, self.run, self.parameters, self.gradients, self.pool, *self.rows[:, : key.tokens]
        )
        self.captured[key] = captured
        torch._foreach_copy_(self.gradients, sums) if sums else torch._foreach_zero_(self.gradients)
        return captured

    @property
    def holds_gradients(self) -> bool:
        """Whether the parameters' gradients are the tensors of `gradients`: an earlier pack of this step was
        replayed.
        """
        return self.parameters[0].grad is self.gradients[0]

    def hidden(self, ids: torch.Tensor, documents: Documents) -> torch.Tensor:
        """As assemble.hidden_states: (tokens, hidden size). Run its backward before the next call."""
        key = self.key(documents)
        captured = self.captured.get(key) or self.capture(key)
        captured.fill(ids, documents)
        return _Replay.apply(self.link, self, captured)[: documents.tokens]

    def accumulate(self) -> None:
        """Called after a backward: adds the sums in `gradients` to the parameters' own gradients."""
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            if p.grad is None:
                p.grad = gradient
            elif p.grad is not gradient:
                p.grad += gradient


class _Replay(torch.autograd.Function):
    apply: ClassVar[Callable[..., torch.Tensor]]

    @staticmethod
    def forward(ctx: Any, link: torch.Tensor, graphs: Graphs, captured: Captured) -> torch.Tensor:
        ctx.graphs, ctx.captured = graphs, captured
        captured.forward.replay()
        return captured.hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[None, None, None]:
        graphs, captured = ctx.graphs, ctx.captured
        if not graphs.holds_gradients:
            torch._foreach_zero_(graphs.gradients)  # sums of an earlier step
        captured.hidden_gradient.copy_(g)
        captured.backward.replay()
        graphs.accumulate()
        return None, None, None
