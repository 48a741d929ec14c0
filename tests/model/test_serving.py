"""The flags of every vLLM that we serve with, and what each of them cannot do."""

import json
from pathlib import Path

import pytest

from model.families.nemotron_h import nano
from model.families.nemotron_h.serving import NEMOTRON_H
from model.families.serve import Served, ServingError, kv_cache, version

BF16 = Served()
OFFICIAL = Served("nvidia", fp8_cache=True)
CONSERVATIVE = Served("conservative", fp8_cache=True)
ADAPTER = Served(lora_rank=16)
RELEASES = ("0.12.0", "0.13.0", "0.15.1", "0.17.0", "0.17.1", "0.18.0", "0.30.2", "0.31.0", "0.32.0+cpu")


def served(vllm, checkpoint=CONSERVATIVE, device="cuda", **more):
    return NEMOTRON_H.serve(vllm, device, checkpoint, 2048, 4, **{"trusted": True, **more})


def value(made, flag):
    """What follows `flag`; None if it is not given."""
    assert made.args.count(flag) <= 1
    return made.args[made.args.index(flag) + 1] if flag in made.args else None


@pytest.mark.trap("in-proj-on-old-vllm")
@pytest.mark.parametrize("vllm", ["0.12.0", "0.15.1", "0.17.1"])
def test_a_quantised_in_proj_is_refused_before_0_18(vllm):
    with pytest.raises(ServingError, match="layout: conservative"):
        served(vllm, OFFICIAL)
    served(vllm, CONSERVATIVE)


@pytest.mark.trap("in-proj-on-old-vllm")
@pytest.mark.parametrize("vllm", ["0.18", "0.18.0", "0.31.0"])
def test_it_is_served_from_0_18_on(vllm):
    served(vllm, OFFICIAL)


@pytest.mark.trap("kv-cache-dtype-ignored")
@pytest.mark.parametrize("vllm", RELEASES)
def test_the_kv_cache_is_always_said(vllm):
    assert value(served(vllm), "--kv-cache-dtype") == "fp8"
    # before, some attention backends knew BF16 as auto only
    bf16 = "bfloat16" if version(vllm) >= (0, 15) else "auto"
    assert value(served(vllm, Served("conservative")), "--kv-cache-dtype") == bf16
    assert value(served(vllm, BF16), "--kv-cache-dtype") == bf16


def test_the_recipe_overrides_the_kv_cache_that_the_checkpoint_asks_for():
    assert value(served("0.31.0", OFFICIAL, kv_cache="bfloat16"), "--kv-cache-dtype") == "bfloat16"
    assert value(served("0.31.0", Served("nvidia"), kv_cache="fp8"), "--kv-cache-dtype") == "fp8"
    with pytest.raises(ServingError, match="0.14.1 takes the KV cache that the checkpoint asks for"):
        served("0.14.1", CONSERVATIVE, kv_cache="bfloat16")


CPUS = {
    "AVX2": ("flags\t\t: fpu sse4_2 avx avx2 fma\n", False),
    "AVX-512": ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512bw\n", True),
    "AMX": ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
    "aarch64": ("Features\t: fp asimd sve bf16\n", False),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_an_fp8_cache_on_a_cpu_is_served_only_where_vllm_can(cpu, tmp_path):
    text, can = CPUS[cpu]
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    if can:
        assert kv_cache("0.32.0+cpu", "cpu", OFFICIAL, "fp8", cpuinfo).dtype == "fp8"
    else:
        with pytest.raises(ServingError, match="kv_cache: auto"):
            kv_cache("0.32.0+cpu", "cpu", OFFICIAL, "fp8", cpuinfo)
    # Unless the recipe insists, the answer does not depend on the CPU: a report is the same report on every
    # machine.
    assert kv_cache("0.32.0+cpu", "cpu", OFFICIAL, "auto", cpuinfo).dtype == "bfloat16"
    assert kv_cache("0.32.0+cpu", "cpu", BF16, "auto", cpuinfo).dtype == "auto"


@pytest.mark.trap("adapter-not-applied")
@pytest.mark.parametrize("vllm", ["0.12.0", "0.14.1"])
def test_an_adapter_is_refused_before_0_15(vllm):
    with pytest.raises(ServingError, match="merge it"):
        served(vllm, ADAPTER)
    served(vllm, BF16)


@pytest.mark.trap("adapter-not-applied")
def test_an_adapter_goes_to_attention_alone():
    made = served("0.15.1", ADAPTER)
    start = made.args.index("--lora-target-modules")
    assert "--enable-lora" in made.args and made.args[start + 1 : start + 6] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
    ]
    with pytest.raises(ServingError, match="merge it"):
        served("0.31.0", Served(lora_rank=16, lora_attention_only=False))
    assert "--enable-lora" not in served("0.31.0", BF16).args


@pytest.mark.parametrize("rank,allowed", [(1, "8"), (8, "8"), (9, "16"), (32, "32"), (500, "512")])
def test_a_rank_is_rounded_up_to_one_that_vllm_knows(rank, allowed):
    assert value(served("0.31.0", Served(lora_rank=rank)), "--max-lora-rank") == allowed


def test_a_rank_beyond_vllm_s_is_refused():
    with pytest.raises(ServingError, match="513"):
        served("0.31.0", Served(lora_rank=513))


@pytest.mark.trap("wrong-expert-backend")
@pytest.mark.parametrize("vllm", ["0.31.0", "0.33.0"])
def test_flashinfer_is_a_flag_from_0_31_on(vllm):
    made = served(vllm, OFFICIAL)
    assert value(made, "--moe-backend") == "flashinfer_cutlass" and made.env == {}


@pytest.mark.trap("wrong-expert-backend")
@pytest.mark.parametrize("vllm", ["0.12.0", "0.30.2"])
def test_before_that_flashinfer_is_two_variables(vllm):
    made = served(vllm)
    assert value(made, "--moe-backend") is None
    assert made.env == {"VLLM_USE_FLASHINFER_MOE_FP4": "1", "VLLM_FLASHINFER_MOE_BACKEND": "throughput"}


def test_weight_only_experts_take_marlin_and_0_22():
    weight_only = Served("conservative", weight_only=True)
    with pytest.raises(ServingError, match="W4A16_NVFP4.*0.22"):
        served("0.21.0", weight_only)
    assert (
        value(served("0.22.0", weight_only), "--moe-backend")
        == value(served("0.31.0", weight_only), "--moe-backend")
        == "marlin"
    )
    # FlashInfer's variables would ask for a backend that refuses it
    assert served("0.22.0", weight_only).env == {}


def test_limits_are_named_all_at_once():
    checkpoint = Served("nvidia", weight_only=True, lora_rank=8)
    assert [fault.remedy for fault in NEMOTRON_H.limits("0.12.0", checkpoint)] == [
        "quantise with layout: conservative, or serve with 0.18 or newer",
        "quantise activations too, or serve with 0.22 or newer",
        "merge it, or serve with 0.15 or newer",
    ]


@pytest.mark.trap("wrong-expert-backend")
def test_bf16_experts_take_vllm_s_own_choice():
    assert all(
        value(served(vllm, BF16), "--moe-backend") is None and served(vllm, BF16).env == {}
        for vllm in RELEASES
    )


@pytest.mark.trap("prefix-cache-and-float16")
@pytest.mark.parametrize("vllm", RELEASES)
@pytest.mark.parametrize("checkpoint", [BF16, CONSERVATIVE])
def test_no_prefix_caching_on_a_cpu_and_float16_nowhere(vllm, checkpoint):
    on_cpu, on_cuda = served(vllm, checkpoint, "cpu"), served(vllm, checkpoint)
    assert "--no-enable-prefix-caching" in on_cpu.args and "--no-enable-prefix-caching" not in on_cuda.args
    assert (
        value(on_cpu, "--dtype") == ("float32" if checkpoint == BF16 else "bfloat16")
        and value(on_cuda, "--dtype") == "bfloat16"
    )
    assert not {"float16", "half"} & {*on_cpu.args, *on_cuda.args}


@pytest.mark.trap("think-block-disagrees")
@pytest.mark.parametrize("vllm", RELEASES)
def test_thinking_is_off_unless_a_client_asks(vllm):
    said = value(served(vllm), "--default-chat-template-kwargs")
    if version(vllm) >= (0, 15):
        assert json.loads(said) == {"enable_thinking": False}
    else:
        assert said is None  # no such flag there: serve.json carries it for the clients


@pytest.mark.parametrize("vllm", RELEASES)
def test_the_reasoning_parser_is_a_file_before_0_17_1(vllm):
    made = served(vllm)
    its_own = version(vllm) >= (0, 17, 1)
    assert value(made, "--reasoning-parser") == ("nemotron_v3" if its_own else "nano_v3")
    assert value(made, "--reasoning-parser-plugin") == (None if its_own else "nano_v3_reasoning_parser.py")
    assert ("--trust-remote-code" in made.args) is not its_own
    assert value(made, "--tool-call-parser") == "qwen3_coder" and "--enable-auto-tool-choice" in made.args


@pytest.mark.parametrize("vllm", RELEASES)
def test_code_of_the_checkpoint_runs_only_if_it_is_trusted_and_needed(vllm):
    if version(vllm) >= (0, 17, 1):
        assert "--trust-remote-code" not in served(vllm, trusted=False).args
        assert served(vllm, trusted=False) == served(vllm, trusted=True)
        return
    with pytest.raises(ServingError, match=f"vLLM {vllm} runs Python code.*0.17.1 or newer, or set trust"):
        served(vllm, trusted=False)


@pytest.mark.parametrize("vllm", RELEASES)
def test_the_ssm_cache_dtype_is_said_until_vllm_reads_it_from_the_config(vllm):
    assert value(served(vllm), "--mamba-ssm-cache-dtype") == ("float32" if version(vllm) < (0, 13) else None)


def test_sizes_and_the_memory_share_are_handed_on():
    made = NEMOTRON_H.serve("0.31.0", "cuda", OFFICIAL, 4096, 7, 0.5)
    wanted = {
        "--served-model-name": "nemotron-nano",
        "--max-model-len": "4096",
        "--max-num-seqs": "7",
        "--gpu-memory-utilization": "0.5",
    }
    assert {flag: value(made, flag) for flag in wanted} == wanted
    assert value(served("0.31.0", OFFICIAL, "cpu"), "--gpu-memory-utilization") is None


@pytest.mark.parametrize("vllm", ["0.11.2", "nightly", ""])
def test_what_is_too_old_or_no_version_is_refused(vllm):
    with pytest.raises(ServingError, match="0.12|0.31"):
        served(vllm)


@pytest.mark.parametrize(
    "text,numbers", [("0.32.0+cpu", (0, 32, 0)), ("0.31.0rc1", (0, 31, 0)), ("0.17", (0, 17)), ("1", (1,))]
)
def test_a_version_is_its_leading_numbers(text, numbers):
    assert version(text) == numbers


def test_the_memory_of_a_caller_is_what_the_documentation_says():
    c = nano.WIDTHS
    token = 2 * nano.PATTERN.count("*") * c["num_key_value_heads"] * c["head_dim"] * 2
    inner = c["mamba_num_heads"] * c["mamba_head_dim"]
    convolved = inner + 2 * c["n_groups"] * c["ssm_state_size"]
    state = inner * c["ssm_state_size"] * 4 + convolved * (c["conv_kernel"] - 1) * 2
    once = nano.PATTERN.count("M") * state
    text = (Path(__file__).resolve().parents[2] / "docs/serving.md").read_text()
    for said in (f"{token:,} bytes with a BF16 cache", f"{token // 2:,} with FP8", f"{once:,} bytes"):
        assert said in text, said
    for length in (2048, 16384, 65536):
        caller = once + length * token
        memory = f"{caller / 1e6:.0f} MB | {4 * caller / 1e9:.1f} GB | {16 * caller / 1e9:.1f} GB"
        assert f"| {length:,} | {memory} |" in text, memory
