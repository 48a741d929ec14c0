"""Runs this project's own export in a real vLLM, at the real widths and with random weights.

    python -m bench.serve make FOLDER [--pattern MEM*EME]  calibrates, packs and writes as stage quantize does
    python -m bench.serve ask FOLDER [--eager]             compares vLLM's outputs, and measures its speed

Weights are generated while they are read, so the BF16 model needs no disk. `ask` compares vLLM's
log-probabilities for a prompt of 100 tokens with those of the dequantised weights, computed layer by layer
(model/walk.py) in BF16 and in float32. Both are needed because routers of random weights are nearly tied, so
rounding alone changes which experts a token gets. Then it measures tokens per second.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.stage_job import defaults
from bench.weights import Random
from model import audit, layouts, walk
from model.families.nemotron_h import nano
from model.families.nemotron_h.layout import LAYOUTS
from model.weights import quant_config
from model.weights.checkpoint import Checkpoint, Slot, write_index
from stages.job import Job
from stages.quantize import calibrate, quantize
from stages.quantize.fidelity import dequantising_reader

CONFIG = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "mamba_ssm_cache_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PROMPT, GREEDY, DECODED = 100, 24, 256


def make(
    folder: Path, config: dict[str, Any], device: str, form: str, chosen: str, kv_cache: str | None
) -> None:
    """Writes FOLDER/nvfp4 and prints the time of each part."""
    source, output = Random(config, folder / "source"), folder / "nvfp4"
    output.mkdir()
    write_index(
        source.folder,
        [
            (
                file,
                [
                    Slot(name, source.entries[name].dtype, source.entries[name].shape)
                    for name in source.names_in_file(file)
                ],
            )
            for file in source.files
        ],
    )
    modules, began = layouts.quantised(config, chosen), time.perf_counter()
    maxima: dict[str, torch.Tensor] = {}
    idle: list[str] = []
    if form == "w4a4":
        rows = list(
            torch.randint(0, config["vocab_size"], (64, 512), generator=torch.Generator().manual_seed(0))
        )
        maxima, idle = calibrate.maxima(source, chosen, rows, device)
    calibrated = time.perf_counter()
    quantize.stream(
        source,
        modules,
        maxima,
        Job("quantize", defaults("quantize") | {"layout": chosen}, {}, output, folder, 0, device=device),
    )
    written = time.perf_counter()
    quant_config.write(output, layouts.hf_quant_config(config, chosen, kv_cache, "0.47.0", form == "w4a16"))
    if findings := audit.nvfp4(output, chosen, weight_only=form == "w4a16"):
        raise SystemExit("\n".join(map(str, findings)))
    checkpoint = Checkpoint(output)
    print(
        f"{len(checkpoint.entries):,} tensors, {checkpoint.bytes:,} bytes, {len(modules):,} matrices packed,"
        f" {len(idle)} idle; calibrated {calibrated - began:.1f} s, packed and written"
        f" {written - calibrated:.1f} s, audited"
    )


@torch.no_grad()
def expected(checkpoint: Checkpoint, ids: list[int], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities (tokens, vocabulary) of the next token at each position, float32 on the CPU."""
    read_dequantised = dequantising_reader(checkpoint)
    layers = walk.Layers(checkpoint.config, dtype, device)
    forward_pass = walk.Walk(
        walk.packed([torch.tensor(ids)]), checkpoint.tensor("backbone.embeddings.weight"), dtype, device
    )
    for number in range(len(layers)):
        forward_pass.through(layers.fill(number, read_dequantised))
    logits = forward_pass.logits(
        checkpoint.tensor("backbone.norm_f.weight"),
        checkpoint.tensor("lm_head.weight"),
        checkpoint.config["layer_norm_epsilon"],
    )
    return torch.cat([chunk.log_softmax(-1).cpu() for chunk in logits])


def ask(folder: Path, device: str, eager: bool, sizes: list[int]) -> None:
    """Starts vLLM in this process, and prints the comparison and the speeds."""
    from vllm import LLM, SamplingParams

    algorithm = json.loads((folder / "nvfp4" / audit.QUANT).read_text())["quantization"]["quant_algo"]
    # as model/families/nemotron_h/serving.py has it
    backend = {"moe_backend": "marlin"} if algorithm == "W4A16_NVFP4" and device == "cuda" else {}
    began = time.perf_counter()
    served = LLM(
        str(folder / "nvfp4"),
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=16,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=eager,
        **backend,
    )
    print(f"engine up in {time.perf_counter() - began:.1f} s", flush=True)
    checkpoint = Checkpoint(folder / "nvfp4")
    ids = torch.randint(
        3, checkpoint.config["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(1)
    ).tolist()

    def generate(count: int, tokens: int, **options: int) -> list[Any]:
        settings = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options
        )
        answers: list[Any] = served.generate([{"prompt_token_ids": ids}] * count, settings, use_tqdm=False)
        return answers

    answer = generate(1, GREEDY, logprobs=1, prompt_logprobs=1)[0]
    greedy = list(answer.outputs[0].token_ids)
    bf16_logs, float32_logs = (
        expected(checkpoint, ids + greedy, device, dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    prompt = torch.tensor(ids[1:])[:, None]
    vllm_prompt = torch.tensor(
        [place[token].logprob for token, place in zip(ids[1:], answer.prompt_logprobs[1:], strict=False)]
    )
    bf16_prompt, float32_prompt = (
        logs[: PROMPT - 1].gather(1, prompt).flatten() for logs in (bf16_logs, float32_logs)
    )
    agree = sum(token == bf16_logs[PROMPT + n - 1].argmax().item() for n, token in enumerate(greedy))
    print(
        f"prompt log-probabilities (they spread by {float32_prompt.std():.2f}): vLLM from BF16"
        f" {(vllm_prompt - bf16_prompt).abs().mean():.4f}, from float32"
        f" {(vllm_prompt - float32_prompt).abs().mean():.4f}; BF16 from float32"
        f" {(bf16_prompt - float32_prompt).abs().mean():.4f}; greedy tokens as in BF16: {agree} of {GREEDY}",
        flush=True,
    )
    for size in sizes:
        generate(size, 16)
        began = time.perf_counter()
        generate(size, DECODED)
        print(f"batch {size}: {size * DECODED / (time.perf_counter() - began):,.1f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("make", "ask"))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--pattern",
        default=nano.PATTERN,
        help="layers: M Mamba, E experts, * attention (default: all 52)",
    )
    parser.add_argument("--config", type=Path, help="a config.json instead of the real widths")
    parser.add_argument("--form", choices=("w4a4", "w4a16"), default="w4a4")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="nvidia")
    parser.add_argument("--kv-cache", choices=("FP8", "none"), default="FP8")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.what == "ask":
        ask(
            options.folder,
            options.device,
            options.eager,
            [int(size) for size in options.batches.split(",") if size],
        )
        return
    wide = (
        nano.WIDTHS
        | {"hybrid_override_pattern": options.pattern, "num_hidden_layers": len(options.pattern)}
        | CONFIG
    )
    config = json.loads(options.config.read_text()) if options.config else wide
    make(
        options.folder,
        config,
        options.device,
        options.form,
        options.layout,
        None if options.kv_cache == "none" else options.kv_cache,
    )


if __name__ == "__main__":
    main()
