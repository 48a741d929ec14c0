"""How vLLM serves a model: what all families share, and the registry of each family's own settings.

Separate from model/families/registry.py, so that server flags are only in the keys of the stages that serve.
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
from model.weights.paths import TRUST

KV_CACHES = ("auto", "bfloat16", "fp8")
CPUINFO = Path("/proc/cpuinfo")


class ServingError(ValueError):
    """A combination that vLLM cannot serve correctly: what was found, and what can be served."""

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
    """Properties of a checkpoint that decide the flags. `layout` is None for BF16, and `nvidia` if a Mamba
    in_proj is quantised. `lora_rank` is 0 without an adapter.
    """

    layout: str | None = None
    weight_only: bool = False
    fp8_cache: bool = False
    lora_rank: int = 0
    lora_attention_only: bool = True


def quantised(folder: Path) -> Served:
    """The Served of a checkpoint from stage quantize."""
    settings = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    return Served(
        layout=json.loads((folder / "audit.json").read_text())["layout"],
        weight_only=settings["quant_algo"] == "W4A16_NVFP4",
        fp8_cache=settings["kv_cache_quant_algo"] == "FP8",
    )


@dataclass(frozen=True)
class Serving:
    """How one family is served.

    `name` is the model's name for clients. If an adapter is added at run time, the adapter has that name and
    the base is called `base_name`. `request`: the chat_template_kwargs of every request. A vLLM before
    `without_code` runs Python code of the checkpoint's folder.
    """

    model_type: str
    name: str
    base_name: str
    request: dict[str, Any]
    without_code: str
    limits: Callable[[str, Served], list[ServingError]]  # what a version cannot serve correctly
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
        trusted: bool = False,
    ) -> Serve:
        """All flags for one vLLM version on `cpu` or `cuda`.

        They include name, sizes and (on cuda) the share of the GPU's memory. `kv_cache` is one of KV_CACHES.
        Raises ServingError for what that version cannot serve correctly, and for one that runs code of the
        checkpoint's folder unless that is `trusted`.
        """
        if faults := self.limits(vllm, checkpoint):
            raise faults[0]
        if version(vllm) < version(self.without_code) and not trusted:
            raise ServingError(
                f"vLLM {vllm} runs Python code of the checkpoint's folder (--trust-remote-code), and stage"
                " base has trust: false",
                f"serve with {self.without_code} or newer, or set trust: true if you trust the"
                " repository's authors",
            )
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
        """The Served of a BF16 base with this adapter (a folder with adapter_config.json)."""
        config = json.loads((adapter / "adapter_config.json").read_text())
        targets = config["target_modules"]
        modules = {targets} if isinstance(targets, str) else set(targets)
        attention = modules <= self.attention and not config.get("target_parameters")
        return Served(lora_rank=config["r"], lora_attention_only=attention)


def of(config: dict[str, Any]) -> Serving:
    """The Serving of a config.json's family. Raises UnknownFamily for any other `model_type`."""
    from model.families.nemotron_h.serving import NEMOTRON_H

    return for_model_type({serving.model_type: serving for serving in (NEMOTRON_H,)}, config)


def of_folder(checkpoint: Path) -> Serving:
    """`of` the config.json of a checkpoint folder."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return of(config)


def trusted(base: Path) -> bool:
    """Whether stage base wrote its artifact `base` with trust: true."""
    return (base / TRUST).is_file()


def installed() -> str:
    """The installed version of vLLM. Raises ServingError if there is none."""
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
    """The KV cache of a server on `device`.

    `requested` is one of KV_CACHES. `auto` takes FP8 if the checkpoint asks for it and a GPU serves it, and
    the model's own dtype otherwise: on a CPU an FP8 cache saves little, and vLLM refuses it without AVX-512
    or AMX. Raises ServingError for `fp8` on such a CPU, and if an older vLLM would use the checkpoint's FP8
    instead of the requested cache.
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
        # A model without a layout runs in float32 on a CPU, and `--kv-cache-dtype` has no value for float32.
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
