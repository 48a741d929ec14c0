"""The native class computes what the checkpoint means, and each silent failure makes a test fail."""

import json
import types

import pytest
import small
import torch
from devices import class_in_torch

from model.families.family import FamilyError
from model.families.nemotron_h import native, targets
from model.weights.checkpoint import Checkpoint
from stages.base import tiny

LENGTH = 200  # more than three chunks of 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small.base(tmp_path_factory.mktemp("made") / "base")


def recurrence(mixer, hidden):
    """A Mamba-2 mixer as its definition says it, a token at a time in float64. `hidden`: (tokens, hidden
    size).
    """
    weight = {name: value.detach().double() for name, value in mixer.named_parameters()}
    heads, size, state = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    z, xbc, dt = (hidden.double() @ weight["in_proj.weight"].T).split(
        [mixer.intermediate_size, mixer.conv_dim, heads], -1
    )
    kernel = weight["conv1d.weight"][:, 0]
    before = torch.cat([torch.zeros(kernel.shape[1] - 1, xbc.shape[1], dtype=torch.float64), xbc])
    conv = (
        torch.stack([(before[t : t + kernel.shape[1]] * kernel.T).sum(0) for t in range(len(xbc))])
        + weight["conv1d.bias"]
    )
    x, b, c = torch.nn.functional.silu(conv).split(
        [mixer.intermediate_size, mixer.n_groups * state, mixer.n_groups * state], -1
    )
    dt = torch.nn.functional.softplus(dt + weight["dt_bias"])
    decay = torch.exp(-torch.exp(weight["A_log"]) * dt)
    memory, out = torch.zeros(heads, size, state, dtype=torch.float64), []
    share = heads // mixer.n_groups
    for t in range(len(x)):
        xt = x[t].view(heads, size)
        bt, ct = (v[t].view(mixer.n_groups, state).repeat_interleave(share, 0) for v in (b, c))
        memory = memory * decay[t, :, None, None] + dt[t, :, None, None] * xt[:, :, None] * bt[:, None, :]
        out.append((memory @ ct[:, :, None])[..., 0] + weight["D"][:, None] * xt)
    y = torch.stack(out).flatten(1) * torch.nn.functional.silu(z)
    groups = y.view(len(y), mixer.n_groups, -1)
    y = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + mixer.norm.variance_epsilon)).flatten(1)
    return (y * weight["norm.weight"]) @ weight["out_proj.weight"].T


def mixer_error(model, dt_bias):
    mixer = model.model.layers[0].mixer
    torch.manual_seed(1)
    mixer.dt_bias.data.fill_(dt_bias)
    mixer.D.data.zero_()  # the skip path would drown the state, which is what is looked at
    mixer.in_proj.weight.data.normal_(std=0.2)
    hidden = torch.randn(LENGTH, mixer.hidden_size)
    wanted = recurrence(mixer, hidden)
    with torch.no_grad():
        found = mixer(hidden[None])[0].double()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.trap("state-lost-between-chunks")
def test_state_is_carried_between_chunks(checkpoint):
    assert mixer_error(native.load(checkpoint), -3.0) < 1e-4


@pytest.mark.trap("state-lost-between-chunks")
@pytest.mark.parametrize("version", ["5.3.0", "5.14.0", "5.15.0"])
def test_releases_that_lose_state_are_refused(version):
    with pytest.raises(FamilyError, match="loses Mamba state"):
        native.check_version(version)
    native.check_version("5.15.1")


@pytest.mark.trap("time-step-floor")
def test_small_time_steps_are_not_clamped(checkpoint, monkeypatch):
    class_in_torch(monkeypatch)
    model = native.load(checkpoint)
    assert mixer_error(model, -8.0) < 1e-4
    mixer = model.model.layers[0].mixer
    mixer.forward = types.MethodType(type(mixer).forward, mixer)
    assert mixer_error(model, -8.0) < 1e-4, (
        "generation takes the class's own forward, so that is repaired too"
    )
    mixer.time_step_limit = (model.config.time_step_min, float("inf"))
    assert mixer_error(model, -8.0) > 0.05, (
        "the unrepaired class has to be far off, or this test shows nothing"
    )


@pytest.mark.trap("gate-after-the-norm")
def test_gate_comes_before_the_grouped_norm(checkpoint):
    norm = native.load(checkpoint).model.layers[0].mixer.norm
    x, z = torch.randn(2, 5, norm.weight.numel())
    gated = (x * torch.nn.functional.silu(z)).view(5, -1, norm.group_size)
    wanted = norm.weight * (
        gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    ).view(5, -1)
    assert torch.allclose(norm(x, z), wanted, atol=1e-5)


@pytest.mark.trap("router-in-bf16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_and_float32_tensors_keep_every_bit(checkpoint, dtype):
    model, stored = native.load(checkpoint, dtype), Checkpoint(checkpoint)
    here = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = [name for name in stored.entries if name.endswith(("A_log", ".D", "e_score_correction_bias"))]
    assert len(names) == 2 * 2 + 2
    for name in names:
        assert torch.equal(here[native.native(name)], stored.tensor(name)), name
    bias = here["model.layers.1.mixer.gate.e_score_correction_bias"]
    assert len(bias.bfloat16().unique()) < len(bias.unique()), (
        "the bias has to be one that BF16 would flatten"
    )


@pytest.mark.trap("router-in-bf16")
def test_autocast_does_not_reach_the_router(checkpoint):
    router = native.load(checkpoint).model.layers[1].mixer.gate
    hidden = torch.randn(64, 128)
    exact = router(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = router(hidden)
    assert all(torch.equal(a, b) for a, b in zip(exact, under, strict=True))
    assert not router.weight.requires_grad


@pytest.mark.parametrize("preset", ["attention", "mamba", "experts", "all"])
def test_presets_make_adapters_and_leave_the_router_frozen(checkpoint, preset):
    import peft

    model = native.load(checkpoint)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4, lora_dropout=0.0, **targets.targets(Checkpoint(checkpoint).config, preset).arguments()
        ),
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    groups = {"attention": "q_proj", "mamba": "in_proj", "experts": "mixer.experts"}
    for word in groups.values() if preset == "all" else [groups[preset]]:
        assert any(word in name for name in trained), word


def test_a_preset_that_matches_nothing_is_refused():
    with pytest.raises(FamilyError, match="does not have"):
        targets.targets(tiny.config("M*", 128, 4, 512), "experts")


def test_the_config_has_the_published_keys(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "MEM*E" and "time_step_limit" not in config
    assert len(list(checkpoint.glob("*.safetensors"))) >= 1
