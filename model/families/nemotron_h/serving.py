"""The flags that one vLLM version needs to serve NemotronH, and what it cannot do.

| what | from version | before |
|---|---|---|
| `--reasoning-parser nemotron_v3` | 0.17.1 | the plugin file beside the published checkpoint |
| `--default-chat-template-kwargs` (thinking off) | 0.15 | every client says so in its request |
| LoRA on ungated experts | 0.15 | refused: the model has no expert mapping there |
| kv_cache_scheme read from the checkpoint | 0.17.1 | `--kv-cache-dtype`, which overrides the file |
| `--kv-cache-dtype bfloat16` for every attention backend | 0.15 | `auto`: BF16 for a BF16 model |
| a quantised Mamba in_proj read right | 0.18 | refused: two of its scales are uninitialised memory there |
| FlashInfer chosen by `--moe-backend` | 0.31 | environment variables |
| weight-only NVFP4 (`W4A16_NVFP4`), read from config.json | 0.22 | refused: linears 0.21, experts 0.22 |
| SSM cache dtype read from the config | 0.13 | `--mamba-ssm-cache-dtype float32` |

Sources: vLLM's release branches and wheels, pull requests 31343, 39765, 41769 and issue 52308. Prefix
caching is off on CPU (its engine dies on hybrid models), and float16 is refused everywhere (wrong results
for this architecture's experts).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path

SERVED_NAME = "nemotron-nano"
BASE_NAME = "nemotron-nano-base"  # where the adapter is added at run time and has the name that clients know
THINKING_OFF = {"enable_thinking": False}
OLDEST = (0, 12)
RANKS = (8, 16, 32, 64, 128, 256, 512)
KV_CACHES = ("auto", "bfloat16", "fp8")
CPUINFO = Path("/proc/cpuinfo")


class ServingError(ValueError):
    """A combination that vLLM cannot serve right: what was found, and what can be served."""

    def __init__(self, found: str, remedy: str):
        super().__init__(f"{found}; {remedy}")
        self.found, self.remedy = found, remedy


@dataclass(frozen=True)
class Serve:
    """Arguments after `vllm serve MODEL`, and environment variables."""

    args: list[str]
    env: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """What decides the flags. `layout` is None for BF16, `nvidia` where a Mamba in_proj is quantised;
    `lora_rank` is 0 without an adapter.
    """

    layout: str | None = None
    weight_only: bool = False
    fp8_cache: bool = False
    lora_rank: int = 0
    lora_attention_only: bool = True


def quantised(folder: Path) -> Checkpoint:
    """What decides the flags of a checkpoint that stage quantize made."""
    settings = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    return Checkpoint(
        layout=json.loads((folder / "audit.json").read_text())["layout"],
        weight_only=settings["quant_algo"] == "W4A16_NVFP4",
        fp8_cache=settings["kv_cache_quant_algo"] == "FP8",
    )


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def adapted(adapter: Path) -> Checkpoint:
    """What decides the flags of a BF16 base that is served with this adapter (a folder with
    adapter_config.json).
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    targets = config["target_modules"]
    attention = set([targets] if isinstance(targets, str) else targets) <= ATTENTION and not config.get(
        "target_parameters"
    )
    return Checkpoint(lora_rank=config["r"], lora_attention_only=attention)


def installed() -> str:
    """The version of the vLLM that is installed here. Raises ServingError if there is none."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise ServingError("this image holds no vLLM", "check images/vllm") from error


def version(text: str) -> tuple[int, ...]:
    """`0.12.0+cpu` -> (0, 12, 0)."""
    if not (match := re.match(r"(\d+(?:\.\d+)*)", text)):
        raise ServingError(f"{text!r} is no version of vLLM", "expected something like 0.31.0")
    return tuple(int(part) for part in match[1].split("."))


@dataclass(frozen=True)
class KVCache:
    """The value of `--kv-cache-dtype`, and the reason for it in one sentence."""

    dtype: str
    why: str


def kv_cache(
    vllm: str, device: str, checkpoint: Checkpoint, asked: str = "auto", cpuinfo: Path = CPUINFO
) -> KVCache:
    """The KV cache of a server on `device`, whatever the checkpoint's files ask for.

    `asked` is one of KV_CACHES. `auto` takes FP8 where the checkpoint asks for it and a GPU serves it, and
    the model's own dtype everywhere else: on a CPU an FP8 cache saves nothing that matters, and vLLM
    refuses it without AVX-512 or AMX. Raises ServingError for `fp8` on such a CPU, and for `bfloat16`
    where an older vLLM would follow the checkpoint instead.
    """
    on_cpu, explicit = device == "cpu", version(vllm) >= (0, 15)
    if asked == "fp8" or (asked == "auto" and checkpoint.fp8_cache and not on_cpu):
        if on_cpu and not fp8_on_cpu(cpuinfo):
            raise ServingError(
                "kv_cache: fp8 on a CPU without AVX-512 and AMX, where vLLM refuses to start",
                "set kv_cache: auto",
            )
        return KVCache("fp8", "the recipe asks for it" if asked == "fp8" else "the checkpoint asks for it")
    if on_cpu:
        why = (
            "vLLM has the FP8 that the checkpoint asks for on some CPUs only"
            if checkpoint.fp8_cache
            else "the checkpoint asks for no other"
        )
        # A model without a layout runs in float32 on a CPU, which `--kv-cache-dtype` has no word for.
        return (
            KVCache("bfloat16", why)
            if checkpoint.layout
            else KVCache("auto", "the model runs in float32 on a CPU")
        )
    if checkpoint.fp8_cache and not explicit:
        raise ServingError(
            f"vLLM {vllm} takes the KV cache that the checkpoint asks for, FP8",
            "quantise with kv_cache: none, or serve with 0.15 or newer",
        )
    return KVCache(
        "bfloat16" if explicit else "auto",
        "the recipe asks for it" if asked == "bfloat16" else "the checkpoint asks for no other",
    )


def fp8_on_cpu(cpuinfo: Path = CPUINFO) -> bool:
    """Whether vLLM's CPU build has an FP8 KV cache on this machine: x86-64 with AVX-512 or AMX."""
    flags = {
        flag
        for line in cpuinfo.read_text().splitlines()
        if line.startswith("flags")
        for flag in line.partition(":")[2].split()
    }
    return bool(flags & {"avx512f", "amx_tile"})


def serve(
    vllm: str,
    device: str,
    checkpoint: Checkpoint,
    max_model_len: int,
    max_num_seqs: int,
    memory_share: float = 0.35,
    name: str = SERVED_NAME,
    kv_cache: str = "auto",
) -> Serve:
    """All flags for one vLLM version on `cpu` or `cuda`.

    Name, sizes and (on cuda) the share of the GPU's memory are included; `kv_cache` is one of KV_CACHES.
    Raises ServingError for what that version cannot serve correctly.
    """
    if faults := limits(vllm, checkpoint):
        raise faults[0]
    made = flags(vllm, device, checkpoint, kv_cache)
    args = [
        "--served-model-name",
        name,
        "--max-model-len",
        str(max_model_len),
        "--max-num-seqs",
        str(max_num_seqs),
    ]
    if device == "cuda":
        args += ["--gpu-memory-utilization", str(memory_share)]
    return Serve([*args, *made.args], made.env)


def limits(vllm: str, checkpoint: Checkpoint) -> list[ServingError]:
    """Everything that one vLLM version cannot serve right of `checkpoint`. Raises ServingError if `vllm`
    is no version.
    """
    its = version(vllm)
    found = []
    if its < OLDEST:
        found.append(
            ServingError(f"vLLM {vllm} does not know this model's NVFP4 experts", "0.12 or newer is needed")
        )
    if checkpoint.layout == "nvidia" and its < (0, 18):
        found.append(
            ServingError(
                f"vLLM {vllm} reads a quantised in_proj wrongly",
                "quantise with layout: conservative, or serve with 0.18 or newer",
            )
        )
    if checkpoint.weight_only and its < (0, 22):
        found.append(
            ServingError(
                f"vLLM {vllm} cannot serve experts in W4A16_NVFP4",
                "quantise activations too, or serve with 0.22 or newer",
            )
        )
    if checkpoint.lora_rank:
        if its < (0, 15):
            found.append(
                ServingError(
                    f"vLLM {vllm} cannot serve an adapter for this model",
                    "merge it, or serve with 0.15 or newer",
                )
            )
        if not checkpoint.lora_attention_only:
            found.append(
                ServingError(
                    "an adapter on Mamba or expert layers cannot be served at run time everywhere", "merge it"
                )
            )
        if checkpoint.lora_rank > RANKS[-1]:
            found.append(
                ServingError(
                    f"vLLM takes adapters of rank {RANKS[-1]} at most, this one has {checkpoint.lora_rank}",
                    "merge it",
                )
            )
    return found


def flags(vllm: str, device: str, checkpoint: Checkpoint, cache: str = "auto") -> Serve:
    """The flags that version, device, checkpoint and KV cache decide, within the version's limits; name
    and sizes are the caller's.
    """
    its, nvfp4 = version(vllm), checkpoint.layout is not None
    args = ["--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder"]
    if its >= (0, 17, 1):
        args += ["--reasoning-parser", "nemotron_v3"]
    else:
        args += [
            "--reasoning-parser-plugin",
            "nano_v3_reasoning_parser.py",
            "--reasoning-parser",
            "nano_v3",
            "--trust-remote-code",
        ]
    if its >= (0, 15):
        args += ["--default-chat-template-kwargs", json.dumps(THINKING_OFF)]
    if its < (0, 13):
        args += ["--mamba-ssm-cache-dtype", "float32"]
    if checkpoint.lora_rank:
        rank = next(r for r in RANKS if r >= checkpoint.lora_rank)
        args += [
            "--enable-lora",
            "--max-lora-rank",
            str(rank),
            "--lora-target-modules",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "qkv_proj",
        ]
    dtype = ["--kv-cache-dtype", kv_cache(vllm, device, checkpoint, cache).dtype]
    if device == "cpu":
        # BF16 for NVFP4, which is what its emulation computes in; float32 elsewhere, so that answers are the
        # model's own.
        args += [
            "--dtype",
            "bfloat16" if nvfp4 else "float32",
            *dtype,
            "--enforce-eager",
            "--no-enable-prefix-caching",
        ]
        # A bounded spin, since OpenMP's threads otherwise slow whatever else the machine does, and themselves
        # (bench/busy.py).
        return Serve(
            args,
            {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "GOMP_SPINCOUNT": "30000"},
        )
    args += ["--dtype", "bfloat16", *dtype]
    if not nvfp4:
        return Serve(args, {})
    if checkpoint.weight_only:
        return Serve([*args, "--moe-backend", "marlin"], {})
    if its >= (0, 31):
        return Serve([*args, "--moe-backend", "flashinfer_cutlass"], {})
    return Serve(args, {"VLLM_USE_FLASHINFER_MOE_FP4": "1", "VLLM_FLASHINFER_MOE_BACKEND": "throughput"})
