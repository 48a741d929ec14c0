"""The native class with our own parts: Projections for every linear and expert stack, our Mamba mixer,
attention by document.

The model is built on the meta device. It is then filled from the shards tensor by tensor, and each tensor is
packed on its target device, so loading holds one matrix in BF16. Linears that NVIDIA's export leaves in BF16
stay in BF16 here too, so an adapter on them is trained on exactly the weights that are served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from model import layouts
from model.families import registry
from model.families.family import Config, Linear
from model.layers.documents import Documents
from model.layers.graphs import Graphs
from model.layers.grouped import ALIGNMENT
from model.layers.loss import cross_entropy, likeliest, trained_targets
from model.layers.loss import distillation as distilled
from model.layers.projection import Projection
from model.weights.checkpoint import Checkpoint
from model.weights.shards import Shards

if TYPE_CHECKING:
    from model.layers.structure import Model

# random experts made at once: single ones are bound by kernel launches, more need memory to pack
TOGETHER = 8


def load(
    checkpoint: Checkpoint,
    form: str = "bf16",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    shards: Shards = Shards(),
) -> Model:
    """Loads a checkpoint in hub layout as a frozen model for training. `progress` gets bytes read and bytes
    in all.

    With `shards` this process holds a share of the Projections' weights, and all processes take part in every
    forward and backward.

    Raises ValueError if a tensor is missing, left over, or of another shape than config.json says.
    """
    config = checkpoint.config
    if unknown := sorted(set(registry.of(config).tensors(config)) ^ set(checkpoint.entries)):
        raise ValueError(
            f"{unknown[0]} is in {'the checkpoint' if unknown[0] in checkpoint.entries else 'config.json'}"
            f" only ({len(unknown)} such tensors)"
        )
    model, bytes_read, total = empty(config, form, dtype, device, shards), 0, checkpoint.bytes
    for file in checkpoint.files:
        for name in checkpoint.names_in_file(file):
            fill(model, name, checkpoint.tensor(name))
            bytes_read += checkpoint.entries[name].bytes
            if progress:
                progress(bytes_read, total)
    return finish(model)


def random(
    config: Config,
    form: str = "bf16",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    std: float = 0.02,
    shards: Shards = Shards(),
) -> Model:
    """The same model with random weights, made on the device, `TOGETHER` experts at a time. For measuring
    speed and memory at any size.
    """
    model = empty(config, form, dtype, device, shards)
    generator = torch.Generator(device).manual_seed(0)
    family = registry.of(config)
    for name, spec in family.tensors(config).items():
        shape, linear = spec.shape, model.linears.get(name)
        if linear and linear.index is not None:
            if linear.index % TOGETHER:
                continue  # came with an earlier one
            stack = projection(model, linear)
            shape = (min(TOGETHER, stack.experts - linear.index), *shape)
        value = family.initial(family.native(name), shape)
        if value is None:
            value = torch.randn(shape, generator=generator, device=device).mul_(std)
        fill(model, name, value)
    return finish(model)


def empty(config: Config, form: str, dtype: torch.dtype, device: str, shards: Shards = Shards()) -> Model:
    """The model without weights: Projections are allocated in their form, everything else is on the meta
    device. `model.linears` maps the hub name of each linear's tensor to its record.
    """
    family = registry.of(config)
    with torch.device("meta"):
        model = family.skeleton(config)
    model.linears = {linear.weight: linear for linear in family.linears(config)}
    packed = packed_modules(config)
    for linear in model.linears.values():
        if linear.index:
            continue  # came with the first of its stack
        path, attribute = linear.module.rsplit(".", 1)
        parent, old = model.get_submodule(path), getattr(model.get_submodule(path), attribute)
        count, (out, inside) = (
            (old.shape[0], old.shape[1:]) if isinstance(old, nn.Parameter) else (1, old.weight.shape)
        )
        linear_form = form if linear.module in packed else "bf16"
        delattr(parent, attribute)
        setattr(parent, attribute, Projection(count, out, inside, linear_form, dtype, device, shards))
    model.placed, model.hub_config = (dtype, device), config
    return model


@torch.no_grad()
def fill(model: Model, name: str, value: torch.Tensor) -> None:
    """Stores one tensor of the checkpoint, by hub name, in the model."""
    dtype, device = model.placed
    if linear := model.linears.get(name):
        projection(model, linear).put(linear.index or 0, value)
        return
    family = registry.of(model.hub_config)
    path, attribute = (native := family.native(name)).rsplit(".", 1)
    module = model.get_submodule(path)
    old = getattr(module, attribute)
    if old.shape != value.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected {tuple(old.shape)} from config.json"
        )
    value = value.to(device=device, dtype=torch.float32 if family.stored_exactly(native) else dtype)
    setattr(
        module,
        attribute,
        nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value,
    )


def finish(model: Model) -> Model:
    """Prepares the filled model. Raises ValueError if a tensor was not filled."""
    unfilled = [
        name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta
    ]
    if unfilled:
        raise ValueError(f"{unfilled[0]} was not filled ({len(unfilled)} such tensors)")
    return prepare(model)


def prepare(model: Model) -> Model:
    """Repairs the model and installs our mixers, norms, experts and attention. Its weights may be filled
    before or after.
    """
    registry.of(model.hub_config).attach(model)
    return model.requires_grad_(False)


def exported(model: Model) -> list[Projection]:
    """The Projections that have a change and that the export will quantise."""
    packed = packed_modules(model.hub_config)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, Projection) and module.rank and name in packed
    ]


def packed_modules(config: Config) -> set[str]:
    """Native names of the modules and stacks that the export quantises; training may hold these in 4 bits."""
    return {linear.module for linear in layouts.linears(config, registry.of(config).layout)}


def projection(model: Model, linear: Linear) -> Projection:
    """The Projection that holds a linear."""
    return cast(Projection, model.get_submodule(linear.module))


def keep_decoded(model: Model, room: float) -> tuple[int, int]:
    """Keeps 4-bit weights decoded in at most `room` bytes, as many Projections as fit. Returns their number
    and their bytes.

    The first blocks come first: the backward decodes them again, while the last blocks may keep their
    activations.
    """
    dtype, device = model.placed
    multiple = ALIGNMENT if torch.device(device).type == "cuda" and dtype == torch.bfloat16 else 1
    count, kept_bytes = 0, 0
    for module in model.modules():
        if (
            isinstance(module, Projection)
            and module.form != "bf16"
            and kept_bytes + (size := module.decoded_bytes(multiple)) <= room
        ):
            module.keep_decoded(multiple)
            count, kept_bytes = count + 1, kept_bytes + size
    return count, kept_bytes


def bytes_by_group(model: Model) -> dict[str, dict[str, int]]:
    """Group -> {"bytes": in memory, "four_bit": of these in 4 bits, "trainable": parameters with a gradient}.

    The family defines the groups: embeddings, attention, mamba, experts (the routed stacks), shared, router,
    adapter, norms. This shows whether the experts are packed. bitsandbytes silently leaves them in BF16,
    because they are not Linears.
    """
    group, groups = registry.of(model.hub_config).group, dict[str, dict[str, int]]()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        row = groups.setdefault(group(name), {"bytes": 0, "four_bit": 0, "trainable": 0})
        row["bytes"] += tensor.numel() * tensor.element_size()
        if tensor.dtype == torch.uint8:
            row["four_bit"] += tensor.numel() * tensor.element_size()
        if getattr(tensor, "requires_grad", False):
            row["trainable"] += tensor.numel()
    return groups


def parameters(model: Model) -> int:
    """Number of weights of the base, packed or not, and of the adapter."""
    packed = sum(
        m.experts * m.out_features * m.in_features for m in model.modules() if isinstance(m, Projection)
    )
    return packed + sum(p.numel() for p in model.parameters())


def hidden_states(model: Model, ids: torch.Tensor, documents: Documents) -> torch.Tensor:
    """The input of lm_head, (tokens, hidden size), for one packed sequence `ids` int64 (tokens,)."""
    if len(ids) != documents.tokens:
        raise ValueError(f"{len(ids)} tokens in documents of {documents.tokens}")
    graphs: Graphs | None = getattr(model, "graphs", None)
    if graphs and model.training and torch.is_grad_enabled():
        return graphs.hidden(ids, documents)
    return _forward(model, ids, documents)


def capture(model: Model) -> Graphs:
    """Makes training steps of a model on a GPU replay CUDA graphs (model/layers/graphs.py)."""
    model.graphs = Graphs(
        model,
        lambda ids, documents: _forward(model, ids, documents),
        [p for p in model.parameters() if p.requires_grad],
    )
    return model.graphs


def _forward(model: Model, ids: torch.Tensor, documents: Documents) -> torch.Tensor:
    # transformers uses a mapping of masks unchanged; attention and Mamba separate documents themselves.
    hidden: torch.Tensor = model.model(
        input_ids=ids[None], attention_mask={}, use_cache=False, documents=documents
    ).last_hidden_state[0]
    return hidden


def loss(model: Model, ids: torch.Tensor, labels: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Sum of -log p over the trained tokens of one packed sequence: float32 scalar."""
    hidden = hidden_states(model, ids, documents)
    positions, targets = trained_targets(labels)
    return cross_entropy(hidden[positions], model.lm_head.weight, targets)


def distillation(
    model: Model,
    ids: torch.Tensor,
    labels: torch.Tensor,
    documents: Documents,
    index: torch.Tensor,
    logs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the trained tokens of one packed sequence: the divergence from a teacher
    (model/layers/loss.py), and -log p, which has no gradient.
    """
    hidden = hidden_states(model, ids, documents)
    positions, targets = trained_targets(labels)
    return distilled(hidden[positions], model.lm_head.weight, targets, index, logs)


@torch.no_grad()
def likeliest_tokens(
    model: Model,
    ids: torch.Tensor,
    labels: torch.Tensor,
    documents: Documents,
    count: int,
    chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest next tokens at every trained position of one packed sequence, in the form of
    `likeliest` (model/layers/loss.py).
    """
    hidden = hidden_states(model, ids, documents)[trained_targets(labels)[0]]
    index, logs = zip(
        *(likeliest(rows @ model.lm_head.weight.t(), count) for rows in hidden.split(chunk)), strict=True
    )
    return torch.cat(index), torch.cat(logs)
