"""Our Mamba-2 mixer against its definition, a token at a time in float64; packed documents never see each
other.
"""

import copy

import pytest
import small
import torch
import torch.nn.functional as F
from devices import class_in_torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.families.nemotron_h import native
from model.layers import convolution as convolution_kernel
from model.layers import mamba
from model.layers.documents import Documents

CHUNK = 64
# across chunks, of one token, ending on a chunk's first token, a chunk and more, shorter than a chunk
PACKED = (130, 1, 65, 128, 7)
EXACT = {"torch": 1e-5, "triton": 5e-3}  # the Triton kernels multiply float32 as TF32
PLACES = [("cpu", "torch")]
if torch.cuda.is_available():
    missing = pytest.mark.skipif(
        bool(mamba._import_error()), reason=f"needs mamba-ssm: {mamba._import_error()}"
    )
    PLACES += [("cuda", "torch"), pytest.param(("cuda", "triton"), marks=missing)]
everywhere = pytest.mark.parametrize("place", PLACES, ids=lambda place: "-".join(place))


def error(found, wanted):
    """Relative, in the norm over all elements."""
    return (
        (found.detach().double().cpu() - wanted.detach().double().cpu()).norm()
        / wanted.detach().double().cpu().norm()
    ).item()


def recurrence(x, dt, A, B, C, D):
    """Mamba-2 as its definition says it: one document (tokens, ...), a token at a time."""
    share, memory, out = x.shape[1] // B.shape[1], 0.0, []
    for t in range(len(x)):
        b, c = (value[t].repeat_interleave(share, 0) for value in (B, C))
        memory = (
            memory * torch.exp(dt[t] * A)[:, None, None]
            + dt[t][:, None, None] * x[t][:, :, None] * b[:, None, :]
        )
        out.append((memory * c[:, None, :]).sum(-1) + D[:, None] * x[t])
    return torch.stack(out)


def convolution(x, weight, bias):
    """SiLU of a causal depthwise convolution of one document (tokens, channels)."""
    out = []
    for t in range(len(x)):
        past = [x[t - back] * weight[:, -1 - back] for back in range(weight.shape[1]) if back <= t]
        out.append(sum(past) + bias)
    return F.silu(torch.stack(out))


def each(function, lengths, *sequences):
    """`function` of every document of (1, tokens, ...) sequences, laid end to end again."""
    return torch.cat(
        [function(*parts) for parts in zip(*(value[0].split(lengths) for value in sequences), strict=True)]
    )[None]


def mixer_by_definition(mixer, hidden, lengths):
    """The whole mixer in float64; hidden (1, tokens, hidden size)."""
    weight = {name: value.detach().double().cpu() for name, value in mixer.named_parameters()}
    groups, state, inner = mixer.n_groups, mixer.ssm_state_size, mixer.intermediate_size
    z, xbc, dt = (hidden @ weight["in_proj.weight"].T).split([inner, mixer.conv_dim, mixer.num_heads], -1)
    xbc = each(
        lambda part: convolution(part, weight["conv1d.weight"][:, 0], weight["conv1d.bias"]), lengths, xbc
    )
    x, B, C = xbc.split([inner, groups * state, groups * state], -1)
    A, D, dt = -torch.exp(weight["A_log"]), weight["D"], F.softplus(dt + weight["dt_bias"])
    y = each(
        lambda x, dt, B, C: recurrence(x, dt, A, B, C, D),
        lengths,
        x.unflatten(-1, (mixer.num_heads, -1)),
        dt,
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
    )
    gated = (y.flatten(-2) * F.silu(z)).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
    return (normed.flatten(-2) * weight["norm.weight"]) @ weight["out_proj.weight"].T


def inputs(batch, tokens, dt_bias, heads=4, size=32, groups=2, state=16):
    """x, dt, A, B, C, D in float64, each a leaf."""
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, heads, size)
    B = torch.randn(batch, tokens, groups, state)
    C = torch.randn(batch, tokens, groups, state)
    dt = F.softplus(torch.randn(batch, tokens, heads) + dt_bias)
    return [
        value.double().requires_grad_()
        for value in (x, dt, -torch.arange(1.0, heads + 1), B, C, torch.randn(heads))
    ]


def at(device, values, dtype=torch.float32):
    return [value.detach().to(device, dtype).requires_grad_() for value in values]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small.base(tmp_path_factory.mktemp("made") / "base")


@pytest.fixture
def model(checkpoint):
    return native.load(checkpoint)


def a_mixer(model, dt_bias=-3.0):
    """A mixer whose output its states decide, so that a wrong state shows; the class's own forward, no
    attachment yet.
    """
    mixer = copy.deepcopy(model.model.layers[0].mixer)
    mixer.__dict__.pop("forward", None)
    torch.manual_seed(1)
    mixer.dt_bias.data.fill_(dt_bias)
    mixer.D.data.zero_()
    mixer.in_proj.weight.data.normal_(std=0.2)
    mixer.conv1d.bias.data.normal_()  # so that padding comes out of the convolution as something
    mixer.requires_grad_()
    mixer.conv1d.requires_grad_(False)  # as in every method: the kernel has no gradient of it
    return mixer


@pytest.mark.trap("state-lost-between-chunks")
@everywhere
@pytest.mark.parametrize("lengths", [PACKED, None], ids=["packed", "batch"])
@pytest.mark.parametrize("dt_bias", [-3.0, -8.0])
def test_scan_equals_the_recurrence_with_all_gradients(place, dt_bias, lengths):
    device, way = place
    batch, tokens = (1, sum(PACKED)) if lengths else (2, 3 * CHUNK + 8)
    exact = inputs(batch, tokens, dt_bias)
    x, dt, A, B, C, D = exact
    if lengths:
        wanted = each(lambda x, dt, B, C: recurrence(x, dt, A, B, C, D), lengths, x, dt, B, C)
    else:
        wanted = torch.stack([recurrence(x[i], dt[i], A, B[i], C[i], D) for i in range(batch)])
    toward = torch.randn_like(wanted)
    given = at(device, exact)
    found = mamba.scan(*given, CHUNK, Documents(lengths) if lengths else None, way)
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert error(found, wanted) < EXACT[way]
    gradients = torch.autograd.grad(found, given, toward.to(found))
    for name, ours, right in zip(
        ("x", "dt", "A", "B", "C", "D"), gradients, torch.autograd.grad(wanted, exact, toward), strict=True
    ):
        assert error(ours, right) < EXACT[way], name


@everywhere
def test_scan_in_bfloat16_keeps_its_states_in_float32(place):
    device, way = place
    # values that BF16 holds
    exact = at("cpu", at("cpu", inputs(1, 330, -3.0), torch.bfloat16), torch.float64)
    exact[1].data.copy_(exact[1].float())
    wanted = recurrence(*(exact[i][0] if i in (0, 1, 3, 4) else exact[i] for i in range(6)))[None]
    x, dt, A, B, C, D = at(device, exact)
    found = mamba.scan(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D, CHUNK, None, way)
    assert found.dtype == torch.bfloat16 and error(found, wanted) < 5e-3


@everywhere
@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_scan_takes_any_length(place, tokens):
    device, way = place
    x, dt, A, B, C, D = exact = inputs(1, tokens, -3.0)
    found = mamba.scan(*at(device, exact), CHUNK, None, way)
    assert error(found, recurrence(x[0], dt[0], A, B[0], C[0], D)[None]) < EXACT[way]


def test_scan_stays_exact_where_states_die_at_once_and_where_they_never_do():
    for dt_bias, scale in ((3.0, 64.0), (-30.0, 1.0)):
        x, dt, A, B, C, D = exact = inputs(1, 200, dt_bias)
        A.data.mul_(scale)
        given = at("cpu", exact)
        found = mamba.scan(*given, CHUNK)
        assert error(found, recurrence(x[0], dt[0], A, B[0], C[0], D)[None]) < 1e-5
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found.sum(), given))


@pytest.mark.trap("naive-scan-memory")
def test_no_temporary_has_an_element_per_token_and_state():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes = [
                t.untyped_storage().nbytes() // t.element_size()
                for t in tree_leaves(out)
                if isinstance(t, torch.Tensor)
            ]
            self.elements = max([self.elements, *sizes])
            return out

    tokens, heads, state = 4 * CHUNK, 8, 128
    given = at("cpu", inputs(1, tokens, -3.0, heads=heads, size=16, groups=1, state=state))
    with Largest() as largest:
        mamba.scan(*given, CHUNK, Documents((tokens - 3, 3))).sum().backward()
    assert largest.elements <= tokens * heads * CHUNK < tokens * heads * state, (
        "B repeated to the heads would already be larger"
    )


@pytest.mark.trap("packing-leaks")
@everywhere
@pytest.mark.parametrize("lengths", [(5,), (1,), (9, 1, 2, 1, 3, 70)])
def test_convolution_starts_anew_in_every_document(place, lengths):
    device, way = place
    torch.manual_seed(0)
    exact = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, sum(lengths), 32), (32, 4), (32,))
    ]
    wanted = each(lambda x: convolution(x, *exact[1:]), lengths, exact[0])
    toward = torch.randn_like(wanted)
    given = at(device, exact)
    trained = 1 if way == "triton" else 3  # the kernel's weight and bias are frozen
    given = [*given[:trained], *(value.detach() for value in given[trained:])]
    found = mamba.conv(*given, Documents(lengths), way)
    tolerance = 1e-5 if device == "cpu" else EXACT[way]
    assert error(found, wanted) < tolerance
    right_ones = torch.autograd.grad(wanted, exact[:trained], toward)
    for ours, right in zip(
        torch.autograd.grad(found, given[:trained], toward.to(found)), right_ones, strict=True
    ):
        assert error(ours, right) < tolerance


def test_the_convolution_kernel_refuses_a_weight_that_it_has_no_gradient_for():
    x = torch.randn(5, 32)
    weight = torch.randn(32, 4, requires_grad=True)
    position = Documents((5,)).position("cpu")
    with pytest.raises(ValueError, match="frozen in every method"):
        convolution_kernel.conv(x, weight, None, position)


@everywhere
def test_convolution_takes_a_batch_and_no_bias(place):
    device, way = place
    torch.manual_seed(0)
    x, weight = torch.randn(3, 70, 32, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
    wanted = torch.stack([convolution(row, weight, torch.zeros(32)) for row in x])
    assert (
        error(mamba.conv(*(v.float().to(device) for v in (x, weight)), None, None, way), wanted) < EXACT[way]
    )


@pytest.mark.trap("gate-after-the-norm")
@everywhere
def test_gate_comes_before_the_grouped_norm(place):
    device, way = place
    torch.manual_seed(0)
    exact = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 9, 256), (2, 9, 256), (256,))
    ]
    y, z, weight = exact
    gated = (y * z * torch.sigmoid(z)).view(2, 9, 4, 64)
    wanted = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(2, 9, 256) * weight
    given = at(device, exact)
    found = mamba.gated_norm(*given, 1e-5, 64, way)
    assert error(found, wanted) < 1e-5
    toward = torch.randn_like(wanted)
    for ours, right in zip(
        torch.autograd.grad(found, given, toward.to(found)),
        torch.autograd.grad(wanted, exact, toward),
        strict=True,
    ):
        assert error(ours, right) < 1e-5
    notebook = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight * F.silu(z)
    assert error(found, notebook) > 0.3, (
        "a norm before the gate, without groups, has to be far off, or this test shows nothing"
    )


@pytest.mark.trap("time-step-floor")
@everywhere
@pytest.mark.parametrize("dt_bias", [-3.0, -8.0])
def test_mixer_equals_its_definition_and_nothing_clamps_dt(model, place, dt_bias):
    device, way = place
    mixer = mamba.attach(a_mixer(model, dt_bias).to(device), way)
    mixer.time_step_limit = (0.001, float("inf"))  # as the class has it before native.repair
    hidden = torch.randn(1, sum(PACKED), mixer.hidden_size, dtype=torch.float64, requires_grad=True)
    wanted = mixer_by_definition(mixer, hidden, PACKED)
    given = hidden.detach().float().to(device).requires_grad_()
    found = mixer(given, documents=Documents(PACKED))
    toward = torch.randn_like(wanted)
    tolerance = {"torch": 5e-5, "triton": 1e-2}[way]  # the norm divides by a small state
    assert error(found, wanted) < tolerance
    assert (
        error(
            torch.autograd.grad(found, given, toward.to(found))[0],
            torch.autograd.grad(wanted, hidden, toward)[0],
        )
        < tolerance
    )


@pytest.mark.parametrize("padded", [False, True])
def test_mixer_equals_the_class_in_output_and_every_gradient(model, padded, monkeypatch):
    class_in_torch(monkeypatch)
    own = a_mixer(model).train().requires_grad_()  # the convolution too, which torch has gradients of
    ours = mamba.attach(copy.deepcopy(own))
    hidden = torch.randn(3, 3 * CHUNK + 8, own.hidden_size)
    mask = None
    if padded:
        mask = torch.ones(hidden.shape[:2], dtype=torch.long)
        mask[1, :70], mask[2, 150:] = 0, 0
    toward, results = torch.randn_like(hidden), []
    for mixer in (own, ours):
        given = hidden.clone().requires_grad_()
        out = mixer(given, attention_mask=mask)
        results.append(
            {"output": out, "hidden": torch.autograd.grad(out, given, toward, retain_graph=True)[0]}
        )
        names, parameters = zip(*mixer.named_parameters(), strict=True)
        results[-1] |= dict(zip(names, torch.autograd.grad(out, parameters, toward), strict=True))
    assert len(results[0]) == 2 + 8
    for name, wanted in results[0].items():
        assert error(results[1][name], wanted) < 5e-5, name


@pytest.mark.trap("packing-leaks")
@everywhere
def test_a_packed_document_is_the_document_alone(model, place):
    device, way = place
    mixer = mamba.attach(a_mixer(model).to(device), way)
    torch.manual_seed(2)
    packed = torch.randn(1, sum(PACKED), mixer.hidden_size, device=device, requires_grad=True)
    toward = torch.randn(1, sum(PACKED), mixer.hidden_size, device=device)
    together = mixer(packed, documents=Documents(PACKED))
    gradient = torch.autograd.grad(together, packed, toward)[0]
    for start, end in Documents(PACKED).spans:
        alone = packed[:, start:end].detach().requires_grad_()
        out = mixer(alone)
        assert error(together[:, start:end], out) < EXACT[way]
        assert (
            error(gradient[:, start:end], torch.autograd.grad(out, alone, toward[:, start:end])[0])
            < EXACT[way]
        )
    leaking = mixer(packed)
    after = PACKED[0] + PACKED[1]
    assert error(leaking[:, : PACKED[0]], together[:, : PACKED[0]]) < EXACT[way]
    leak = error(leaking[:, after : after + 20], together[:, after : after + 20])
    assert leak > 0.05, "without documents the state has to leak, or this test shows nothing"


@pytest.mark.trap("packing-leaks")
def test_no_gradient_reaches_another_document(model):
    mixer = mamba.attach(a_mixer(model))
    hidden = torch.randn(1, sum(PACKED), mixer.hidden_size, requires_grad=True)
    start, end = Documents(PACKED).spans[2]
    gradient = torch.autograd.grad(
        mixer(hidden, documents=Documents(PACKED))[:, start:end].square().sum(), hidden
    )[0][0]
    assert gradient[start:end].norm(dim=-1).min() > 0.1
    assert not gradient[end:].any()
    # Decays are sums over the chunk, so what an earlier document's dt gets cancels to rounding and not to
    # zero bits.
    assert gradient[:start].abs().max() < 1e-6 * gradient[start:end].abs().max()


@everywhere
def test_padding_changes_nothing_in_the_tokens_that_are_there(model, place):
    device, way = place
    mixer = mamba.attach(a_mixer(model).to(device), way)
    hidden = torch.randn(2, 150, mixer.hidden_size, device=device)
    mask = torch.ones(2, 150, dtype=torch.bool, device=device)
    mask[0, :80], mask[1, 90:] = False, False
    with torch.no_grad():
        together = mixer(hidden, attention_mask=mask)
        for row in range(2):
            assert error(together[row][mask[row]], mixer(hidden[row][mask[row]][None])[0]) < EXACT[way]


def test_generation_with_a_cache_equals_the_full_forward(model, monkeypatch):
    class_in_torch(monkeypatch)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "conv1d"):
            mamba.attach(layer.mixer)
    ids = torch.randint(20, 500, (1, 90))
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        step = model(input_ids=ids[:, :70], use_cache=True)
        found = [step.logits]
        for t in range(70, 90):
            step = model(input_ids=ids[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits)
    assert error(torch.cat(found, 1), full) < 1e-4


@pytest.mark.trap("out-proj-bypassed")
def test_what_wraps_a_projection_is_computed_in_training(model):
    mixer = mamba.attach(a_mixer(model)).train()
    hidden = torch.randn(1, 10, mixer.hidden_size)
    plain = mixer(hidden)
    for name in ("in_proj", "out_proj"):
        changed = copy.deepcopy(mixer)
        projection = getattr(changed, name)
        # as LoRA or fake quantisation would, but unmistakable
        setattr(changed, name, torch.nn.Sequential(projection, torch.nn.Dropout(1.0)))
        assert plain.any() and not changed(hidden).any(), name


def test_hidden_states_keep_their_dtype_and_small_parameters_float32(checkpoint):
    mixer = mamba.attach(native.load(checkpoint, torch.bfloat16).model.layers[0].mixer)
    assert mixer.A_log.dtype == torch.float32
    hidden = torch.randn(1, 100, mixer.hidden_size, dtype=torch.bfloat16)
    out = mixer(hidden, documents=Documents((60, 40)))
    assert out.dtype == torch.bfloat16
    assert error(out, mixer.float()(hidden.float(), documents=Documents((60, 40)))) < 2e-2


def test_a_copy_of_a_mixer_computes_with_its_own_weights(model):
    mixer = mamba.attach(a_mixer(model))
    other = copy.deepcopy(mixer)
    other.out_proj.weight.data.zero_()
    hidden = torch.randn(1, 10, mixer.hidden_size)
    assert mixer(hidden).any() and not other(hidden).any()


def test_what_would_leak_or_not_fit_is_refused(model):
    mixer, hidden = mamba.attach(a_mixer(model)), torch.randn(1, 10, 128)
    with pytest.raises(ValueError, match="in all"):
        mixer(hidden, documents=Documents((4, 5)))
    with pytest.raises(ValueError, match="in all"):
        mixer(hidden.expand(2, -1, -1), documents=Documents((4, 6)))
    with pytest.raises(ValueError, match="needs documents"):
        mixer(hidden, seq_idx=torch.zeros(1, 10, dtype=torch.int32))
    with pytest.raises(ValueError, match="use_cache=False"):
        mixer(hidden, cache_params=object(), documents=Documents((4, 6)))
    mixer.activation = "gelu"
    with pytest.raises(ValueError, match="SiLU"):
        mamba.attach(mixer)


@pytest.mark.trap("slow-path-instead-of-kernels")
def test_missing_kernels_on_cuda_are_an_error_and_never_a_silent_fallback(monkeypatch):
    assert mamba.implementation("cpu") == "torch"
    monkeypatch.setattr(mamba, "_import_error", lambda: "No module named 'mamba_ssm'")
    with pytest.raises(ImportError, match="mamba-ssm.*No module named"):
        mamba.implementation("cuda")
    assert mamba._checked_implementation("torch", torch.device("cuda")) == "torch", (
        "asked for, plain torch is given"
    )
    with pytest.raises(ImportError):
        mamba._checked_implementation("triton", torch.device("cuda"))
    with pytest.raises(ValueError, match="there are triton, torch"):
        mamba.scan(*inputs(1, 4, -3.0), CHUNK, implementation="cuda")
    with pytest.raises(ValueError, match="on cpu"):
        mamba.scan(*inputs(1, 4, -3.0), CHUNK, implementation="triton")
    monkeypatch.setattr(mamba, "_import_error", lambda: "")
    assert mamba.implementation("cuda") == "triton"
