"""The grouped experts against a loop over experts in float64, and packed weights against autograd on the
dense ones.
"""

import pytest
import torch
from devices import DEVICES, relative

from model.layers import experts, grouped, tiles
from model.layers.grouped import Routing
from model.layers.projection import Projection
from model.weights import nf4, nvfp4, rounding

COUNT, HIDDEN, INNER, CHOICES = 6, 64, 128, 2


class Layer(torch.nn.Module):
    """What transformers hands to an experts implementation."""

    def __init__(self, form, rank, dtype, device, count=COUNT):
        super().__init__()
        torch.manual_seed(0)
        self.up_proj = Projection(count, INNER, HIDDEN, form, dtype, device)
        self.down_proj = Projection(count, HIDDEN, INNER, form, dtype, device)
        for its in (self.up_proj, self.down_proj):
            for expert in range(count):
                its.put(expert, torch.randn(its.out_features, its.in_features) * 0.1)
            if rank:
                its.adapt(rank, 2 * rank)
                its.lora_b.data.normal_(std=0.05)

    def forward(self, x, index, share):
        return experts.forward(self, x, index, share)


def loop(layer, x, index, share):
    """The definition, in float64, with autograd's own backward. Returns the output and the leaves it was
    computed from.
    """
    leaves = {
        "x": x.detach().double().cpu().requires_grad_(),
        "share": share.detach().double().cpu().requires_grad_(),
    }
    for name in ("up_proj", "down_proj"):
        its = getattr(layer, name)
        for factor in ("lora_a", "lora_b") if its.rank else ():
            leaves[f"{name}.{factor}"] = getattr(its, factor).detach().double().cpu().requires_grad_()

    def multiply(name, expert, rows):
        its = getattr(layer, name)
        y = rows @ its.dense()[expert].double().cpu().T
        if its.rank:
            y = y + its.scale * rows @ leaves[f"{name}.lora_a"][expert].T @ leaves[f"{name}.lora_b"][expert].T
        return y

    rows = []
    for t in range(len(x)):
        parts = [
            leaves["share"][t, k]
            * multiply("down_proj", e, multiply("up_proj", e, leaves["x"][t]).relu() ** 2)
            for k, e in enumerate(index[t].tolist())
        ]
        rows.append(sum(parts))
    return torch.stack(rows), leaves


def inputs(tokens, dtype, device, count=COUNT, choose=None):
    torch.manual_seed(1)
    index = (
        torch.stack([torch.randperm(count)[:CHOICES] for _ in range(tokens)])
        if choose is None
        else torch.full((tokens, CHOICES), choose)
    )
    x = torch.randn(tokens, HIDDEN, device=device).to(dtype).requires_grad_()
    share = torch.rand(tokens, CHOICES, device=device).requires_grad_()
    return x, index.to(device), share


def compare(layer, x, index, share, tolerance):
    found = layer(x, index, share)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    wanted, leaves = loop(layer, x, index, share)
    assert relative(found, wanted) < tolerance
    (found.float() * weight.to(found.device)).sum().backward()
    (wanted * weight.double()).sum().backward()
    for name, leaf in leaves.items():
        tensor = {"x": x, "share": share}.get(name)
        tensor = layer.get_parameter(name) if tensor is None else tensor
        assert tensor.grad is not None and relative(tensor.grad, leaf.grad) < tolerance, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("form", ["bf16", "nf4", "nvfp4"])
def test_experts_are_the_loop_over_experts(form, dtype, tolerance, device):
    compare(Layer(form, 8, dtype, device), *inputs(40, dtype, device), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [0, 1, 3, 16, 64])
def test_any_rank(rank, device):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        compare(Layer("nf4", rank, dtype, device), *inputs(24, dtype, device), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_idle_experts_and_all_tokens_to_one(dtype, device):
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for tokens, choose in ((1, None), (3, None), (17, 4)):
        layer = Layer("bf16", 4, dtype, device)
        x, index, share = inputs(tokens, dtype, device, choose=choose)
        compare(layer, x, index, share, tolerance)
        idle = sorted(set(range(COUNT)) - set(index.flatten().tolist()))
        assert idle and not any(
            getattr(layer.up_proj, name).grad[idle].any() for name in ("lora_a", "lora_b")
        )


@pytest.mark.trap("dense-expert-gradient")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["nf4", "nvfp4"])
def test_no_gradient_and_no_dense_copy_of_packed_weights(form, device):
    layer = Layer(form, 4, torch.float32, device)
    x, index, share = inputs(16, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        out = layer(x, index, share)
    assert {name for name, p in layer.named_parameters()} == {
        f"{its}_proj.lora_{side}" for its in ("up", "down") for side in "ab"
    }
    largest = max(tensor.numel() for tensor in kept)
    assert largest <= 16 * CHOICES * INNER < COUNT * HIDDEN * INNER, (
        "something of the size of a weight stack is held for the backward"
    )
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_when_the_up_projection_is_computed_again(dtype, device):
    layer = Layer("nf4", 4, dtype, device)
    x, index, share = inputs(16, dtype, device)
    with torch.no_grad():
        routing = Routing.of(index, COUNT)
        y, u = experts.run(x, routing, share, layer.up_proj, layer.down_proj)
        found = [
            experts.gradients(y, x, routing, share, its, layer.up_proj, layer.down_proj) for its in (u, None)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_step_twice_gives_the_same_bits(device):
    found = []
    for _ in range(2):
        layer = Layer("nf4", 8, torch.bfloat16, device)
        x, index, share = inputs(200, torch.bfloat16, device)
        layer(x, index, share).float().sum().backward()
        found.append((x.grad, layer.up_proj.lora_a.grad, layer.down_proj.lora_b.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_rounded_products_are_those_of_the_export(device):
    """Quantiser in the loop: the forward multiplies with what the exporter writes for W + BA; the gradient
    passes straight through.
    """
    layer = Layer("bf16", 4, torch.float32, device)
    for its in (layer.up_proj, layer.down_proj):
        its.rounded = True
        merged = (its.dense().float() + its.scale * its.lora_b @ its.lora_a).to(torch.bfloat16)
        exported = nvfp4.unpack(nvfp4.pack(merged))
        assert torch.equal(its.forward_weights(), exported) and not torch.equal(exported, merged.float())
    x, index, share = inputs(24, torch.float32, device)
    layer(x, index, share).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    plain = Layer("bf16", 0, torch.float32, device)
    for mine, its in ((plain.up_proj, layer.up_proj), (plain.down_proj, layer.down_proj)):
        mine.weight.copy_(its.forward_weights().flatten(0, 1))
    y, dx = plain(x, index, share), x.grad.clone()
    x.grad = None
    y.sum().backward()
    assert torch.allclose(dx, x.grad, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_has_the_bits_of_packing_and_unpacking(dtype, device):
    torch.manual_seed(0)
    ties = torch.randint(-24, 25, (8, 64)) / 4
    wide = torch.randn(8, 64) * torch.logspace(-8, 3, 64)
    for matrix in (torch.randn(8, 64), ties, wide, torch.zeros(8, 64)):
        matrix = matrix.to(device, dtype)[None]
        assert torch.equal(rounding.rounded(matrix, torch.float32), nvfp4.unpack(nvfp4.pack(matrix)))
    with pytest.raises(ValueError, match="multiple of 16, found 40"):
        rounding.rounded(torch.zeros(4, 40, device=device), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["bf16", "nf4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_is_a_stack_of_one(form, dtype, device):
    torch.manual_seed(0)
    its = Projection(1, 96, 64, form, dtype, device)
    its.put(0, torch.randn(96, 64))
    its.adapt(4, 8)
    its.lora_b.data.normal_()
    x = torch.randn(2, 5, 64, device=device).to(dtype).requires_grad_()
    y = its(x)
    leaves = [t.detach().double().cpu().requires_grad_() for t in (x, its.lora_a, its.lora_b)]
    wanted = leaves[0] @ (its.dense()[0].double().cpu() + its.scale * leaves[2][0] @ leaves[1][0]).T
    y.float().square().sum().backward()
    wanted.square().sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for found, leaf in zip((x, its.lora_a, its.lora_b), leaves, strict=True):
        assert relative(found.grad, leaf.grad) < tolerance
    assert relative(y, wanted) < tolerance


@pytest.mark.parametrize("form", ["bf16", "nf4", "nvfp4"])
def test_several_matrices_at_once_are_the_same_as_one_after_the_other(form):
    torch.manual_seed(0)
    # a scale of its own each
    matrices = torch.randn(5, 32, 64) * torch.tensor([1.0, 3.0, 0.1, 2.0, 5.0])[:, None, None]
    single, several = (Projection(5, 32, 64, form, torch.float32) for _ in range(2))
    for number, matrix in enumerate(matrices):
        single.put(number, matrix)
    several.put(0, matrices[:3])
    several.put(3, matrices[3:])
    for name, buffer in single.named_buffers():
        assert torch.equal(buffer.view(torch.uint8), getattr(several, name).view(torch.uint8)), name
    with pytest.raises(ValueError, match="3 matrices from 3 on, expected 5 in all"):
        several.put(3, matrices[:3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("form", ["nf4", "nvfp4"])
def test_weights_that_are_held_decoded_give_the_same_bits_step_after_step(form, rank, rounded, device):
    layer = Layer(form, rank, torch.bfloat16, device)
    x, index, share = inputs(24, torch.bfloat16, device)
    its = [layer.up_proj, layer.down_proj]
    for projection in its:
        projection.rounded = rounded

    def steps():
        found = []
        for number in range(2):  # the factors of a step are not those of the one before
            for projection in its if rank else ():
                torch.manual_seed(number)
                projection.lora_a.data.normal_(std=0.1)
                projection.lora_b.data.normal_(std=0.1)
            leaves = [
                x,
                share,
                *(factor for projection in its if rank for factor in projection.trainable_factors),
            ]
            y = layer(x, index, share)
            found += [y, *torch.autograd.grad(y.float().square().sum(), leaves)]
        return found

    wanted, multiple = steps(), grouped.ALIGNMENT if grouped.in_one_launch(x) else 1
    for projection in its:
        before, room = projection.dense().clone(), projection.decoded_bytes(multiple)
        projection.keep_decoded(multiple)
        assert torch.equal(projection.dense(), before) and projection.decoded.nbytes == room
        projection.weight.zero_()  # what is packed is not read any more
    assert all(torch.equal(a, b) for a, b in zip(steps(), wanted, strict=True))


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(64, 96\), expected \(96, 64\)"):
        Projection(1, 96, 64).put(0, torch.zeros(64, 96))
    with pytest.raises(ValueError, match="a stack of 2 matrices"):
        Projection(2, 96, 64)(torch.zeros(1, 64))
    with pytest.raises(ValueError, match="unknown form 'int8'"):
        Projection(1, 96, 64, "int8")


@pytest.mark.parametrize("device", DEVICES)
def test_nf4_is_the_table_and_the_codes_of_bitsandbytes(device):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    assert torch.allclose(nf4.table(), table, atol=1e-6)
    torch.manual_seed(0)
    # Blocks whose largest value is a power of two: there the BF16 scale loses nothing, and both decode to the
    # same numbers.
    weight = torch.randn(32, 128, device=device).clamp(-0.99, 0.99)
    weight[:, :: nf4.BLOCK] = 1.0
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=nf4.BLOCK, quant_type="nf4", compress_statistics=False
    )
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state).view_as(weight).float()
    assert torch.allclose(nf4.unpack(nf4.pack(weight)), theirs, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_nf4_rounds_to_the_nearest_code(device):
    torch.manual_seed(0)
    weight = torch.randn(3, 16, 128, device=device)
    packed = nf4.pack(weight)
    found = nf4.unpack(packed)
    levels = nf4.table().to(device) * packed.weight_scale.float().repeat_interleave(nf4.BLOCK, -1)[..., None]
    nearest = (levels - weight[..., None]).abs().amin(-1)
    assert torch.allclose((found - weight).abs(), nearest, atol=1e-6)
    assert not nf4.unpack(nf4.pack(torch.zeros(1, 64, device=device))).any()
    with pytest.raises(ValueError, match="multiple of 64, found 96"):
        nf4.pack(torch.zeros(4, 96))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("rank", [0, 3, 16])
def test_our_own_grouped_products_on_gpus_for_which_torch_has_none(monkeypatch, rank):
    monkeypatch.setattr(grouped, "TORCH_KERNELS", ())
    compare(Layer("nf4", rank, torch.bfloat16, "cuda"), *inputs(300, torch.bfloat16, "cuda"), 3e-2)
    compare(Layer("nf4", rank, torch.bfloat16, "cuda"), *inputs(1, torch.bfloat16, "cuda"), 3e-2)


def test_tiles_cover_every_row_once_and_idle_experts_have_none():
    ends = torch.tensor([0, 300, 300, 428, 429], dtype=torch.int32)
    expert, first, end = (value.tolist() for value in tiles.tiles(ends, 429))
    covered = [
        (e, row)
        for e, a, b in zip(expert, first, end, strict=True)
        for row in range(a, min(b, a + tiles.ROWS))
    ]
    assert covered == [
        (e, row)
        for e, (a, b) in enumerate([(0, 0), (0, 300), (300, 300), (300, 428), (428, 429)])
        for row in range(a, b)
    ]


def test_sorting_by_expert_and_back():
    index = torch.tensor([[3, 1], [0, 3], [3, 2]])
    routing = Routing.of(index, 5)
    assert index.flatten()[routing.order].tolist() == [0, 1, 2, 3, 3, 3] and routing.token.tolist() == [
        1,
        0,
        2,
        0,
        1,
        2,
    ]
    assert routing.ends.tolist() == [1, 2, 3, 6, 6] and routing.spans == [
        (0, 0, 1),
        (1, 1, 2),
        (2, 2, 3),
        (3, 3, 6),
    ]
    assert torch.equal(torch.arange(6)[routing.order][routing.inverse], torch.arange(6))


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm_is_its_definition_forward_and_backward(device):
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm

    from model.layers import norm

    torch.manual_seed(0)
    its = NemotronHRMSNorm(96, 1e-5).to(device).requires_grad_(False)
    its.weight.data.normal_()
    norm.attach(its)
    x = torch.randn(2, 7, 96, device=device, requires_grad=True)
    exact = x.detach().double().cpu().requires_grad_()
    wanted = its.weight.double().cpu() * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    its(x).pow(3).sum().backward()
    wanted.pow(3).sum().backward()
    assert relative(its(x), wanted) < 1e-6 and relative(x.grad, exact.grad) < 1e-5
