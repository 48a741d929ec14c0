"""The flags that one vLLM version needs to serve NemotronH, and what it cannot do.

| what | from version | before |
|---|---|---|
| `--reasoning-parser nemotron_v3` | 0.17.1 | a plugin, code of the published checkpoint |
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
for this architecture's experts). Code of the checkpoint runs (`--trust-remote-code`) only if stage base has
`trust: true`.
"""

from __future__ import annotations

import json

from model.families.serve import Serve, Served, Serving, ServingError, kv_cache, version

SERVED_NAME = "nemotron-nano"
BASE_NAME = "nemotron-nano-base"  # if an adapter with SERVED_NAME is added at run time
THINKING_OFF = {"enable_thinking": False}
OLDEST = (0, 12)
WITHOUT_CODE = "0.17.1"
RANKS = (8, 16, 32, 64, 128, 256, 512)
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def limits(vllm: str, checkpoint: Served) -> list[ServingError]:
    """Every reason why this vLLM version cannot serve `checkpoint` correctly. Raises ServingError if `vllm`
    is not a version.
    """
    release = version(vllm)
    errors = []
    if release < OLDEST:
        errors.append(
            ServingError(f"vLLM {vllm} does not know this model's NVFP4 experts", "0.12 or newer is needed")
        )
    if checkpoint.layout == "nvidia" and release < (0, 18):
        errors.append(
            ServingError(
                f"vLLM {vllm} reads a quantised in_proj wrongly",
                "quantise with layout: conservative, or serve with 0.18 or newer",
            )
        )
    if checkpoint.weight_only and release < (0, 22):
        errors.append(
            ServingError(
                f"vLLM {vllm} cannot serve experts in W4A16_NVFP4",
                "quantise activations too, or serve with 0.22 or newer",
            )
        )
    if checkpoint.lora_rank:
        if release < (0, 15):
            errors.append(
                ServingError(
                    f"vLLM {vllm} cannot serve an adapter for this model",
                    "merge it, or serve with 0.15 or newer",
                )
            )
        if not checkpoint.lora_attention_only:
            errors.append(
                ServingError(
                    "an adapter on Mamba or expert layers cannot be served at run time everywhere", "merge it"
                )
            )
        if checkpoint.lora_rank > RANKS[-1]:
            errors.append(
                ServingError(
                    f"vLLM takes adapters of rank {RANKS[-1]} at most, this one has {checkpoint.lora_rank}",
                    "merge it",
                )
            )
    return errors


def flags(vllm: str, device: str, checkpoint: Served, cache: str = "auto") -> Serve:
    """The flags that depend on version, device, checkpoint and KV cache, within the version's limits. The
    caller adds name and sizes.
    """
    release, nvfp4 = version(vllm), checkpoint.layout is not None
    args = ["--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder"]
    if release >= version(WITHOUT_CODE):
        args += ["--reasoning-parser", "nemotron_v3"]
    else:
        args += [
            "--reasoning-parser-plugin",
            "nano_v3_reasoning_parser.py",
            "--reasoning-parser",
            "nano_v3",
            "--trust-remote-code",
        ]
    if release >= (0, 15):
        args += ["--default-chat-template-kwargs", json.dumps(THINKING_OFF)]
    if release < (0, 13):
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
        # BF16 for NVFP4, because its emulation computes in BF16; float32 otherwise, so that answers are not
        # affected by rounding.
        args += [
            "--dtype",
            "bfloat16" if nvfp4 else "float32",
            *dtype,
            "--enforce-eager",
            "--no-enable-prefix-caching",
        ]
        # A bounded spin: OpenMP's threads otherwise slow down other processes and themselves (bench/busy.py).
        return Serve(
            args,
            {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "GOMP_SPINCOUNT": "30000"},
        )
    args += ["--dtype", "bfloat16", *dtype]
    if not nvfp4:
        return Serve(args, {})
    if checkpoint.weight_only:
        return Serve([*args, "--moe-backend", "marlin"], {})
    if release >= (0, 31):
        return Serve([*args, "--moe-backend", "flashinfer_cutlass"], {})
    return Serve(args, {"VLLM_USE_FLASHINFER_MOE_FP4": "1", "VLLM_FLASHINFER_MOE_BACKEND": "throughput"})


def layout_of(packed: set[str]) -> str:
    """The layout of the quantised modules `packed`, as far as flags depend on it: whether a Mamba in_proj is
    quantised.
    """
    return "nvidia" if any(module.endswith(".in_proj") for module in packed) else "conservative"


NEMOTRON_H = Serving(
    model_type="nemotron_h",
    name=SERVED_NAME,
    base_name=BASE_NAME,
    request=THINKING_OFF,
    without_code=WITHOUT_CODE,
    limits=limits,
    flags=flags,
    attention=ATTENTION,
    layout_of=layout_of,
)
