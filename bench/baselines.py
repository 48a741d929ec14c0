"""The two ways of fine-tuning that ours is compared with: the lab notebook's, and transformers with PEFT at
their defaults.

Weights are random (std 0.02) and made on the device one matrix at a time, and packed at once if the way of
training packs them. So neither host memory nor more than one matrix (one expert stack for PEFT) in BF16 is
needed. Hidden states are (1, T, D).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.operations import Workload, linears
from bench.row import DoesNotFit, Row, pack, packed, random, start_dt

RANK, ALPHA, DROPOUT = 16, 32, 0.05
PARTS = {"M": "mamba", "*": "attention", "E": "experts"}


# --- the notebook's recipe ------------------------------------------------------------------------------


class Lora(nn.Module):
    """A packed matrix with a float32 adapter, dropout before A, B zero at the start: what PEFT makes of a
    Linear4bit.
    """

    def __init__(self, into: int, out: int, device: torch.device) -> None:
        super().__init__()
        self.base = packed(into, out, device)
        self.a = nn.Linear(into, RANK, bias=False, device=device)
        self.b = nn.Linear(RANK, out, bias=False, device=device)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.b(self.a(self.dropout(x))) * (ALPHA / RANK)
        product: torch.Tensor = self.base(x).clone() + low
        return product


class Mlp(nn.Module):
    """down(relu(up(x))^2): an expert, or the shared one."""

    def __init__(self, d: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.up, self.down = Lora(d, width, device), Lora(width, d, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(F.relu(self.up(x)).square())
        return y


class Experts(nn.Module):
    """128 experts one after the other, each on its routed tokens. Under autocast the router's logits are
    BF16, as in the notebook.
    """

    bias: torch.Tensor

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        super().__init__()
        d, self.top = config["hidden_size"], config["num_experts_per_tok"]
        self.scale = config["routed_scaling_factor"]
        self.router = nn.Parameter(
            random(config["n_routed_experts"], d, device=device, dtype=torch.float32), requires_grad=False
        )
        self.register_buffer("bias", torch.zeros(config["n_routed_experts"], device=device))
        self.experts = nn.ModuleList(
            Mlp(d, config["moe_intermediate_size"], device) for _ in range(config["n_routed_experts"])
        )
        self.shared = Mlp(d, config["moe_shared_expert_intermediate_size"], device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, x.shape[-1])
        scores = F.linear(flat.float(), self.router).sigmoid()
        chosen = (scores + self.bias).topk(self.top, dim=-1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale
        out = torch.zeros_like(flat, dtype=weights.dtype)
        places = F.one_hot(chosen, len(self.experts)).permute(2, 0, 1)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(places[number])
            if tokens.numel():
                expert_output = expert(flat[tokens]) * weights[tokens, slots].unsqueeze(-1)
                out.index_add_(0, tokens, expert_output.to(out.dtype))
            else:  # an idle expert is called all the same, so that its adapters have a gradient (of zero)
                out = out + expert(torch.zeros_like(flat[:1])).to(out.dtype)
        shared: torch.Tensor = self.shared(x)
        return out.to(x.dtype).view_as(x) + shared


class Attention(nn.Module):
    """Grouped-query attention without positions."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        super().__init__()
        self.size = config["head_dim"]
        self.q, self.k, self.v, self.o = (Lora(i, o, device) for i, o in linears(config)["attention"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projected.view(*x.shape[:2], -1, self.size).transpose(1, 2)
            for projected in (self.q(x), self.k(x), self.v(x))
        )
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))  # what autocast does to this product
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        y: torch.Tensor = self.o(mixed.reshape(*x.shape[:2], -1).to(x.dtype))
        return y


class Mamba(nn.Module):
    """Mamba-2 without mamba-ssm: packed projections without adapters, torch's convolution, the scan below,
    gated norm in groups.
    """

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        super().__init__()
        self.heads, self.size, self.groups, self.state = (
            config[k] for k in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
        )
        self.inner = self.heads * self.size
        self.chunk = config["chunk_size"]
        self.epsilon = config["layer_norm_epsilon"]
        self.conv_width = self.inner + 2 * self.groups * self.state
        (into, out), back = linears(config)["mamba"]
        self.in_proj, self.out_proj = packed(into, out, device), packed(*back, device)
        self.conv = nn.Conv1d(
            self.conv_width,
            self.conv_width,
            config["conv_kernel"],
            groups=self.conv_width,
            padding=config["conv_kernel"] - 1,
            device=device,
        )
        self.A_log = nn.Parameter(torch.arange(1, self.heads + 1, device=device).float().log())
        self.D = nn.Parameter(torch.ones(self.heads, device=device))
        self.dt_bias = nn.Parameter(start_dt(self.heads, device, config))
        self.weight = nn.Parameter(torch.ones(self.inner, device=device))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        gate, mixed, dt = self.in_proj(x).split([self.inner, self.conv_width, self.heads], dim=-1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2))[..., :tokens].transpose(1, 2))
        value, B, C = mixed.split([self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        shape = (batch, tokens, self.groups, self.state)
        dt = F.softplus(dt + self.dt_bias)
        y = naive_scan(
            value.reshape(batch, tokens, self.heads, self.size),
            dt,
            -self.A_log.float().exp(),
            B.reshape(shape),
            C.reshape(shape),
            self.D,
            self.chunk,
        )
        y = y.reshape(batch, tokens, self.inner).float() * F.silu(gate.float())
        y = y.view(batch, tokens, self.groups, -1)
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)).view(
            batch, tokens, self.inner
        )
        out: torch.Tensor = self.out_proj((self.weight * y).to(x.dtype))
        return out


def naive_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """y (b, t, h, p) of Mamba-2 from products that are formed in full and then summed, as the hub's code does
    without mamba-ssm.

    x (b, t, h, p), dt (b, t, h), A and D (h,), B and C (b, t, g, n). The first product is (b, c, l, s, h, n)
    in float32: 4 MiB per token at the real widths. Letters: c chunk, l and s positions in it, h head, p head
    size, n state.
    """
    batch, tokens, heads, size = x.shape
    B, C = (t.float().repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    x, dt = x.float(), dt.float()
    skipped = D[:, None] * x
    pad = -tokens % chunk

    def cut(t: torch.Tensor) -> torch.Tensor:
        padded = F.pad(t, (*[0] * (2 * (t.dim() - 2)), 0, pad))
        return padded.reshape(batch, -1, chunk, *t.shape[2:])

    x, a, B, C = cut(x * dt[..., None]), cut(dt * A), cut(B), cut(C)
    a = a.permute(0, 3, 1, 2)  # b h c l
    reached = a.cumsum(-1)
    scores = (C[:, :, :, None] * B[:, :, None]).sum(-1)  # b c l s h, summed from b c l s h n
    weights = scores * decay_between(a).permute(0, 2, 3, 4, 1)
    y = (weights[..., None] * x[:, :, None]).sum(3)  # b c l h p, summed from b c l s h p
    decay_to_end = (reached[..., -1:] - reached).exp().permute(0, 2, 3, 1)  # b c l h
    states = ((B * decay_to_end[..., None])[..., None, :] * x[..., None]).sum(
        2
    )  # b c h p n, summed from b c l h p n
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    carried = decay_between(F.pad(reached[..., -1], (1, 0))).permute(0, 2, 3, 1)  # b to from h
    starts = (carried[..., None, None] * states[:, None]).sum(2)[:, :-1]
    y = y + (C[..., None, :] * starts[:, :, None]).sum(-1) * reached.exp().permute(0, 2, 3, 1)[..., None]
    return y.reshape(batch, -1, heads, size)[:, :tokens] + skipped


def decay_between(a: torch.Tensor) -> torch.Tensor:
    """(..., l, s): exp of the sum of a (..., l) over s+1..l, and 0 where s > l."""
    length = a.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=a.device).tril
    steps = a[..., None].expand(*a.shape, length).masked_fill(~lower(-1), 0).cumsum(-2)
    return steps.masked_fill(~lower(), -torch.inf).exp()


class Block(nn.Module):
    """x + mixer(norm(x)). The norm's float32 weight makes all hidden states float32, as PEFT's kbit
    preparation does.
    """

    def __init__(self, letter: str, config: dict[str, Any], device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config["hidden_size"], device=device), requires_grad=False)
        self.epsilon, self.letter = config["layer_norm_epsilon"], letter
        self.mixer = {"M": Mamba, "*": Attention, "E": Experts}[letter](config, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.mixer(rms(x, self.weight, self.epsilon))
        return x + mixed


def rms(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon))


class Notebook(nn.Module):
    """The whole model as the notebook trained it: checkpointed blocks, float32 embeddings and head, logits
    of every position.
    """

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        super().__init__()
        d, words = config["hidden_size"], config["vocab_size"]
        self.embeddings, self.head = (
            nn.Parameter(random(words, d, device=device, dtype=torch.float32), requires_grad=False)
            for _ in range(2)
        )
        self.layers = nn.ModuleList(
            Block(letter, config, device) for letter in config["hybrid_override_pattern"]
        )
        self.weight = nn.Parameter(torch.ones(d, device=device), requires_grad=False)
        self.epsilon = config["layer_norm_epsilon"]

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, self.embeddings).requires_grad_()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        logits = F.linear(rms(x, self.weight, self.epsilon), self.head).float()
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def notebook(config: dict[str, Any], device: torch.device) -> Row:
    """The notebook's run: 4-bit linears and adapters one by one, a Python loop over experts, the naive
    scan.
    """
    model = Notebook(config, device).train()
    workload = Workload(targets=frozenset({"attention", "experts", "shared"}))
    return Row(
        model,
        lambda ids, labels, mask: model(ids, labels),
        workload,
        zip((PARTS[letter] for letter in config["hybrid_override_pattern"]), model.layers, strict=True),
    )


# --- transformers + PEFT today --------------------------------------------------------------------------


def peft_today(config: dict[str, Any], device: torch.device, scan: str = "found") -> Row:
    """The native class with 4-bit Linears and PEFT's LoRA on attention, shared experts and expert stacks, all
    at their defaults.

    The stacks are parameters and not Linears, so they stay BF16. `scan`: "found" uses the Mamba kernels that
    transformers finds, "torch" its own fallback, as on a machine without mamba-ssm. Conversations of a
    micro-batch are padded to the longest of them, like TRL's batches. Raises DoesNotFit before it allocates
    anything.
    """
    import peft
    import transformers
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.models.nemotron_h import modeling_nemotron_h as code

    check_room(config, device)
    note = mamba_path(code, scan)
    with torch.device("meta"):
        bare = code.NemotronHForCausalLM(transformers.NemotronHConfig(**config))
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: Any = replace_with_bnb_linear(
        bare, modules_to_not_convert=["lm_head"], quantization_config=quantization
    )
    materialise(model, config, device)
    model.is_loaded_in_4bit = True  # what loading sets and PEFT reads
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,  # PEFT has no dropout for stacks
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "shared_experts.up_proj",
            "shared_experts.down_proj",
        ],
        target_parameters=["mixer.experts.up_proj", "mixer.experts.down_proj"],
    )
    model = peft.get_peft_model(model, lora).train()
    blocks = model.get_base_model().model.layers
    workload = Workload(
        targets=frozenset({"attention", "experts", "shared"}),
        expert_lora="dense",
        scores="head" if "torch" in note else "group",
    )
    parts = (
        (PARTS[letter], block)
        for letter, block in zip(config["hybrid_override_pattern"], blocks, strict=True)
    )
    loss_of = lambda ids, labels, mask: (
        model(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False).loss
    )
    row = Row(model, loss_of, workload, parts, note)
    row.pads = True
    return row


def check_room(config: dict[str, Any], device: torch.device) -> None:
    """Raises DoesNotFit where weights, adapters and their optimizer state alone are more than the device
    has free.
    """
    if device.type != "cuda":
        return
    sizes, letters, count = linears(config), config["hybrid_override_pattern"], config["n_routed_experts"]
    experts = letters.count("E") * count
    stacks = 2 * experts * sum(i * o for i, o in sizes["experts"])
    # value, gradient and two moments in float32
    adapters = 16 * RANK * experts * sum(i + o for i, o in sizes["experts"])
    free = torch.cuda.mem_get_info(device)[0]
    if (need := stacks + adapters + 4 * config["vocab_size"] * config["hidden_size"]) > free:
        raise DoesNotFit(
            f"needs {need / 1e9:.0f} GB before any activation ({stacks / 1e9:.0f} GB of experts, which"
            f" load_in_4bit leaves in BF16), {free / 1e9:.0f} GB are free: use a larger GPU or fewer --layers"
        )


def mamba_path(code: Any, scan: str) -> str:
    """Chooses the scan that the native class calls, and returns its name in words.

    The fused training kernel needs compiled causal-conv1d and reads out_proj.weight directly, packed or not.
    If mamba-ssm is installed without causal-conv1d, transformers calls the kernel nevertheless and fails, so
    it is disabled.
    """
    code.mamba2_split_conv1d_scan_combined = lambda *_, **__: None
    scan_of_transformers = code.__dict__.setdefault("scan_as_found", code.mamba2_chunk_scan)
    fallback = getattr(scan_of_transformers, "__wrapped__", scan_of_transformers)
    code.mamba2_chunk_scan = fallback if scan == "torch" else scan_of_transformers
    fused = scan == "found" and any(
        getattr(cell.cell_contents, "__module__", "") == "mamba_ssm.ops.triton.ssd_combined"
        for cell in scan_of_transformers.__closure__ or ()
    )
    return "scan of mamba-ssm, conv of torch" if fused else "scan and conv of transformers' torch fallback"


def materialise(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Gives a model on meta random weights on `device`, module by module: BF16 as loading with dtype=bfloat16
    would, or packed to 4 bits at once.
    """
    ones = ("norm.weight", "norm_f.weight", ".D")
    for path, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            pack(module, device)
            continue
        for name, old in list(module.named_parameters(recurse=False)):
            path_of_parameter = f"{path}.{name}"
            if path_of_parameter.endswith(ones):
                value = torch.ones(old.shape, device=device, dtype=torch.bfloat16)
            elif name == "A_log":
                value = torch.arange(1, len(old) + 1, device=device).float().log().bfloat16()
            elif name == "dt_bias":
                value = start_dt(len(old), device, config).bfloat16()
            else:
                value = random(*old.shape, device=device)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, old in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(old.shape, device=device, dtype=torch.float32))
