"""How a model is served by vLLM: what every family shares, and the registry of what each says itself.

Apart from model/families/registry.py, so that a flag of the server is in no key but those of the stages that
serve.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.families.unknown import for_model_type

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
class Served:
    """What decides the flags. `layout` is None for BF16, `nvidia` where a Mamba in_proj is quantised;
    `lora_rank` is 0 without an adapter.
    """

    layout: str | None = None
    weight_only: bool = False
    fp8_cache: bool = False
    lora_rank: int = 0
    lora_attention_only: bool = True


def quantised(folder: Path) -> Served:
    """What decides the flags of a checkpoint that stage quantize made."""
    settings = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    return Served(
        layout=json.loads((folder / "audit.json").read_text())["layout"],
        weight_only=settings["quant_algo"] == "W4A16_NVFP4",
        fp8_cache=settings["kv_cache_quant_algo"] == "FP8",
    )


@dataclass(frozen=True)
class Serving:
    """What one family says of its servers.

    `name` is what clients call the model, `base_name` what the base is called where an adapter is added at
    run time and has that name. `request` are the chat_template_kwargs of every request.
    """

    model_type: str
    name: str
    base_name: str
    request: dict[str, Any]
    limits: Callable[[str, Served], list[ServingError]]  # what a version cannot serve right
    flags: Callable[[str, str, Served, str], Serve]  # by version, device, checkpoint and KV cache
    attention: frozenset[str]  # LoRA targets that vLLM can add at run time everywhere
    layout_of: Callable[[set[str]], str]  # of packed modules, as far as flags depend on it

    def serve(
        self,
        vllm: str,
        device: str,
        checkpoint: Served,
        max_model_len: int,
        max_num_seqs: int,
        memory_share: float = 0.35,
        name: str | None = None,
        kv_cache: str = "auto",
    ) -> Serve:
        """All flags for one vLLM version on `cpu` or `cuda`.

        Name, sizes and (on cuda) the share of the GPU's memory are included; `kv_cache` is one of KV_CACHES.
        Raises ServingError for what that version cannot serve correctly.
        """
        if faults := self.limits(vllm, checkpoint):
            raise faults[0]
        family_flags = self.flags(vllm, device, checkpoint, kv_cache)
        args = [
            "--served-model-name",
            name or self.name,
            "--max-model-len",
            str(max_model_len),
            "--max-num-seqs",
            str(max_num_seqs),
        ]
        if device == "cuda":
            args += ["--gpu-memory-utilization", str(memory_share)]
        return Serve([*args, *family_flags.args], family_flags.env)

    def adapted(self, adapter: Path) -> Served:
        """What decides the flags of a BF16 base that is served with this adapter (a folder with
        adapter_config.json).
        """
        config = json.loads((adapter / "adapter_config.json").read_text())
        targets = config["target_modules"]
        modules = {targets} if isinstance(targets, str) else set(targets)
        attention = modules <= self.attention and not config.get("target_parameters")
        return Served(lora_rank=config["r"], lora_attention_only=attention)


def of(config: dict[str, Any]) -> Serving:
    """How a config.json's family is served. Raises UnknownFamily for any other `model_type`."""
    from model.families.nemotron_h.serving import NEMOTRON_H

    return for_model_type({serving.model_type: serving for serving in (NEMOTRON_H,)}, config)


def of_folder(checkpoint: Path) -> Serving:
    """`of` the config.json of a checkpoint folder."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return of(config)


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
    vllm: str, device: str, checkpoint: Served, requested: str = "auto", cpuinfo: Path = CPUINFO
) -> KVCache:
    """The KV cache of a server on `device`, whatever the checkpoint's files ask for.

    `asked` is one of KV_CACHES. `auto` takes FP8 where the checkpoint asks for it and a GPU serves it, and
    the model's own dtype everywhere else: on a CPU an FP8 cache saves nothing that matters, and vLLM
    refuses it without AVX-512 or AMX. Raises ServingError for `fp8` on such a CPU, and for `bfloat16`
    where an older vLLM would follow the checkpoint instead.
    """
    on_cpu, explicit = device == "cpu", version(vllm) >= (0, 15)
    if requested == "fp8" or (requested == "auto" and checkpoint.fp8_cache and not on_cpu):
        if on_cpu and not fp8_on_cpu(cpuinfo):
            raise ServingError(
                "kv_cache: fp8 on a CPU without AVX-512 and AMX, where vLLM refuses to start",
                "set kv_cache: auto",
            )
        return KVCache(
            "fp8", "the recipe asks for it" if requested == "fp8" else "the checkpoint asks for it"
        )
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
        "the recipe asks for it" if requested == "bfloat16" else "the checkpoint asks for no other",
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
