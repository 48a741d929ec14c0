"""A real vLLM on a CPU: what it answers about a small checkpoint, an adapter and an NVFP4 export is what
they hold.

Three servers are started. References are transformers' class with our repairs, given vLLM's own tokens.
Every layout is asked in test_vllm_exports.py.
"""

from dataclasses import replace

import exported
import peft
import pytest
import small
import torch

from model.families import serve
from model.families.nemotron_h import native
from model.families.nemotron_h.serving import NEMOTRON_H, SERVED_NAME
from model.families.serve import Served
from model.weights import nvfp4
from stages.evaluate import evaluate
from stages.evaluate.server import Server

THINK, NO_MORE = 12, 13  # token ids of <think> and </think>
# 381 tokens: six chunks of the Mamba scan, and beyond the 319 of prefix-cache-and-float16
LONG = "hello how are you today " * 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and an attention adapter for it."""
    folder = tmp_path_factory.mktemp("made")
    small.adapter(folder / "train", exported.base(folder / "base"), "attention", size=0.3)
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def bf16(made):
    flags = NEMOTRON_H.serve(serve.installed(), "cpu", Served(lora_rank=4), 512, 4)
    with Server(made / "base", flags, "base and tuned", made / "train" / "adapter") as server:
        yield server


@pytest.fixture(scope="module", params=["w4a4", "w4a16"])
def in_4_bits(request, made):
    """An export in NVIDIA's layout, and a server of it as stage evaluate starts one."""
    folder = exported.export(made / "base", made / request.param, "nvidia", request.param)
    with Server(
        folder, NEMOTRON_H.serve(serve.installed(), "cpu", serve.quantised(folder), 512, 4), "nvfp4"
    ) as server:
        yield folder, server


def ask(server, name=SERVED_NAME, content=LONG, **more):
    """Eight greedy tokens with the twenty likeliest at each place."""
    return server.ask(
        {
            "model": name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 8,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **more,
        }
    )


@torch.no_grad()
def difference(answer, model):
    """|log p of vLLM - log p of `model`| for the tokens that vLLM names, (8, 20)."""
    choice, prompt = answer["choices"][0], answer["prompt_token_ids"]
    logits = model(input_ids=torch.tensor([prompt + choice["token_ids"]]), use_cache=False).logits[0]
    expected = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
    places = [
        [(int(t["token"].removeprefix("token_id:")), t["logprob"]) for t in place["top_logprobs"][:20]]
        for place in choice["logprobs"]["content"]
    ]
    found = torch.tensor(places, dtype=torch.float64)
    return (found[..., 1] - expected.gather(1, found[..., 0].long())).abs()


@pytest.mark.trap("time-step-floor")
def test_bf16_answers_as_transformers_does_after_the_repair(made, bf16):
    answer, model = ask(bf16), native.load(made / "base")
    assert difference(answer, model).max() < 1e-3
    assert answer["choices"][0]["message"]["content"] and not answer["choices"][0]["message"].get("reasoning")
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            del module.forward  # ours, which clamps nothing
            module.time_step_limit = (0.001, float("inf"))
    assert difference(answer, model).max() > 1e-2  # what transformers computes by itself


@pytest.mark.trap("think-block-disagrees")
def test_thinking_is_off_unless_asked_for(bf16):
    assert ask(bf16, content="hello")["prompt_token_ids"][-2:] == [THINK, NO_MORE]
    asked = ask(bf16, content="hello", chat_template_kwargs={"enable_thinking": True})["prompt_token_ids"]
    assert THINK in asked and NO_MORE not in asked


@pytest.mark.trap("adapter-not-applied")
def test_an_attention_adapter_is_applied(made, bf16):
    base, tuned = ask(bf16), ask(bf16, "tuned")
    model = native.load(made / "base")
    assert difference(tuned, model).max() > 0.1  # it changes the answer
    # as it should
    assert difference(tuned, peft.PeftModel.from_pretrained(model, made / "train" / "adapter")).max() < 1e-3
    assert base["choices"][0]["token_ids"] != tuned["choices"][0]["token_ids"]
    evaluate.check_adapter(
        {"base": [base["choices"][0]["message"]], "tuned": [tuned["choices"][0]["message"]]}
    )


@pytest.mark.trap("prefix-cache-and-float16")
def test_a_long_prompt_that_comes_back_does_not_kill_the_engine(bf16):
    answers = [ask(bf16) for _ in range(2)]
    assert answers[0]["usage"]["prompt_tokens"] > 319
    assert answers[0]["choices"][0]["token_ids"] == answers[1]["choices"][0]["token_ids"]


def test_nvfp4_answers_as_its_decoded_weights_do(made, in_4_bits):
    folder, server = in_4_bits
    answer = ask(server)
    # In W4A4 activations are in 4 bits too: noise remains. In W4A16 all that remains is BF16's.
    assert difference(answer, exported.decoded(made / "base", folder)).mean() < (
        0.15 if folder.name == "w4a4" else 0.02
    )
    # The measure tells a checkpoint that is read wrongly: nibbles swapped, a scale lost.
    for wrong in (
        lambda p: nvfp4.unpack(replace(p, weight=p.weight << 4 | p.weight >> 4)),
        lambda p: nvfp4.unpack(p) / 2,
    ):
        assert difference(answer, exported.decoded(made / "base", folder, wrong)).mean() > 0.25


def test_the_plugin_refuses_another_vllm(monkeypatch):
    import annie_vllm_cpu
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(RuntimeError, match="images/vllm/plugin/README.md"):
        annie_vllm_cpu.register()
