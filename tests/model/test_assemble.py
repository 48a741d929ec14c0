"""The native class with our own parts computes what the native class and PEFT compute, packed or not, and
holds what it should.
"""

import json
import shutil

import peft
import pytest
import small
import torch
from devices import DEVICES, relative

from model import adapter, assemble, lora
from model.families.nemotron_h import names, native, targets
from model.layers import loss, recompute
from model.layers.documents import Documents
from model.layers.projection import Projection
from model.weights import nvfp4
from model.weights.checkpoint import Checkpoint
from model.weights.origin import Origin
from stages.base import tiny

LENGTHS = (70, 1, 33, 130, 7)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.base(tmp_path_factory.mktemp("made") / "base")


def tuned(base, preset="all", **options):
    """A model with an adapter whose B is not zero."""
    model = assemble.load(Checkpoint(base), **options)
    adapter.attach(model, preset, 4, 8, 0)
    torch.manual_seed(3)
    for module in adapter.adapted(model).values():
        module.lora_b.data.copy_(0.05 * torch.randn(module.lora_b.shape))
    return model


def tokens(count=sum(LENGTHS)):
    return torch.randint(20, 500, (count,), generator=torch.Generator().manual_seed(4))


def logits(model, ids, lengths=None):
    return model.lm_head(assemble.hidden_states(model, ids, Documents(tuple(lengths or (len(ids),)))))


@pytest.mark.parametrize("device", DEVICES)
def test_a_document_has_the_logits_of_the_native_class(base, device):
    ids = tokens().to(device)
    with torch.no_grad():
        wanted = native.load(base, device=device)(input_ids=ids[None], use_cache=False).logits[0]
        assert relative(logits(assemble.load(Checkpoint(base), device=device), ids), wanted) < (
            1e-5 if device == "cpu" else 3e-3
        )


@pytest.mark.trap("packing-leaks")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("form", "dtype"), [("bf16", torch.float32), ("nf4", torch.float32), ("nvfp4", torch.bfloat16)]
)
def test_a_packed_document_has_the_logits_of_the_document_alone(base, form, dtype, device):
    model, ids = tuned(base, form=form, dtype=dtype, device=device), tokens().to(device)
    with torch.no_grad():
        packed = logits(model, ids, LENGTHS)
        leaking = logits(model, ids)
        for a, b in Documents(LENGTHS).spans:
            alone = logits(model, ids[a:b])
            assert relative(packed[a:b], alone) < (
                1e-5 if (dtype, device) == (torch.float32, "cpu") else 3e-2
            )
            if a:
                assert relative(leaking[a:b], alone) > 0.05, (
                    "without boundaries it has to be far off, or this test shows nothing"
                )


@pytest.mark.parametrize("device", DEVICES)
def test_packed_and_alone_give_the_adapter_the_same_gradient(base, device):
    model, ids = tuned(base, device=device), tokens().to(device)
    parts = Documents(LENGTHS).spans
    assemble.loss(model, ids, ids, Documents(LENGTHS)).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    # A document's first token is predicted by nothing alone, and by its neighbour's last when packed: leave
    # it out of both.
    labels = ids.clone()
    labels[[a for a, _ in parts]] = -100
    assemble.loss(model, ids, labels, Documents(LENGTHS)).backward()
    masked = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for a, b in parts:
        if b - a > 1:
            assemble.loss(model, ids[a:b], ids[a:b], Documents((b - a,))).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert relative(masked[name], p.grad) < (1e-4 if device == "cpu" else 2e-2), name
    assert any(relative(packed[name], masked[name]) > 1e-3 for name in packed)


@pytest.mark.parametrize("preset", targets.PRESETS)
@pytest.mark.trap("expert-adapter-misread")
def test_peft_reads_the_adapter_that_we_write(base, tmp_path, preset):
    model, ids = tuned(base, preset), tokens()
    adapter.save(model, tmp_path, preset, 4, 8)
    theirs = peft.PeftModel.from_pretrained(native.load(base), tmp_path)
    with torch.no_grad():
        ours = logits(model, ids)
        assert relative(ours, theirs(input_ids=ids[None], use_cache=False).logits[0]) < 1e-5
        assert relative(ours, native.load(base)(input_ids=ids[None], use_cache=False).logits[0]) > 0.01, (
            "the adapter has to do something"
        )
    again = assemble.load(Checkpoint(base))
    adapter.attach(again, preset, 4, 8, 1)
    adapter.load(again, tmp_path)
    assert all(torch.equal(value, adapter.state(again)[name]) for name, value in adapter.state(model).items())


def test_the_adapter_names_its_base(base, tmp_path):
    model = tuned(base, "attention")
    for origin, named in ((None, (None, None)), (Origin("some/base", 40 * "a"), ("some/base", 40 * "a"))):
        adapter.save(model, tmp_path, "attention", 4, 8, origin)
        config = json.loads((tmp_path / adapter.CONFIG).read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == named


def test_an_adapter_of_other_layers_is_not_put_back(base, tmp_path):
    adapter.save(tuned(base, "attention"), tmp_path, "attention", 4, 8)
    with pytest.raises(ValueError, match="an adapter with other tensors"):
        adapter.load(tuned(base, "mamba"), tmp_path)


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_is_cross_entropy_of_full_logits_whatever_the_chunk(base, device):
    model, ids = tuned(base, device=device), tokens().to(device)
    labels = torch.where(
        torch.rand(len(ids), generator=torch.Generator().manual_seed(5)).to(device) < 0.3, ids, -100
    )
    full = torch.nn.functional.cross_entropy(
        logits(model, ids, LENGTHS)[:-1].float(), labels[1:], ignore_index=-100, reduction="sum"
    )
    full.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for chunk in (1, 17, 1024):
        model.zero_grad()
        positions, targets = loss.trained_targets(labels)
        found = loss.cross_entropy(
            assemble.hidden_states(model, ids, Documents(LENGTHS))[positions],
            model.lm_head.weight,
            targets,
            chunk,
        )
        found.backward()
        assert found.item() == pytest.approx(full.item(), rel=1e-5)
        assert all(
            relative(p.grad, wanted[name]) < 1e-4 for name, p in model.named_parameters() if p.requires_grad
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sure", [1, 8])
def test_distillation_is_the_divergence_over_the_likeliest_tokens_and_the_rest(device, sure):
    """Against autograd on the definition in float64, also for models whose rest is far below the rounding
    of one.
    """
    torch.manual_seed(0)
    hidden = sure * torch.randn(30, 16, device=device)
    head = torch.randn(50, 16, device=device)
    targets = torch.randint(0, 50, (30,), device=device)
    said = hidden @ head.t() + sure * torch.randn(30, 50, device=device)
    index, logs = loss.likeliest(said, 5)
    teacher, leaf = said.double().log_softmax(-1), hidden.double().requires_grad_()
    student = (leaf @ head.double().t()).log_softmax(-1)
    p, q = (
        torch.cat(
            [every.gather(1, index), every.scatter(1, index, -torch.inf).logsumexp(-1, keepdim=True)], -1
        )
        for every in (teacher, student)
    )
    assert relative(logs.exp(), p.exp()) < 1e-5 and (sure == 1 or p.exp()[:, -1].min() < 1e-12)
    wanted = (p.exp() * (p - q)).sum()
    wanted.backward()
    for chunk in (7, 1024):
        given = hidden.clone().requires_grad_()
        found, entropy = loss.distillation(given, head, targets, index, logs, chunk)
        (3 * found).backward()
        assert (
            found.item() == pytest.approx(wanted.item(), rel=1e-4)
            and relative(given.grad, 3 * leaf.grad) < 1e-3
        )
        assert entropy.item() == pytest.approx(-student.gather(1, targets[:, None]).sum().item(), rel=1e-5)
    assert (
        0
        < found.item()
        < torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True).item() * 1.0001
    )
    given = hidden.clone().requires_grad_()
    found, _ = loss.distillation(given, head, targets, *loss.likeliest(hidden @ head.t(), 5))
    found.backward()
    assert abs(found) < 1e-3 and given.grad.abs().max() < 1e-3, (
        "a student that says what the teacher says has nothing to learn"
    )


def test_gradient_checkpointing_changes_no_gradient(base):
    found = []
    for checkpointed in (False, True):
        model = tuned(base, form="nf4").train()
        if checkpointed:
            recompute.attach(model)
        assemble.loss(model, tokens(), tokens(), Documents(LENGTHS)).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(*found, strict=True))


def test_blocks_that_keep_everything_change_no_gradient_and_run_once(base, monkeypatch):
    """None, the last three and all blocks keep theirs; each that does not runs its norm once more in the
    backward.
    """
    found, model = {}, tuned(base, form="nf4").train()
    recompute.attach(model)
    runs = []
    for block in model.model.layers:
        ahead = block.norm.forward
        monkeypatch.setattr(block.norm, "forward", lambda x, ahead=ahead: (runs.append(1), ahead(x))[1])
    blocks = len(model.model.layers)
    for count in (0, 3, blocks):
        recompute.keep_last(model, count)
        model.zero_grad()
        runs.clear()
        assemble.loss(model, tokens(), tokens(), Documents(LENGTHS)).backward()
        found[count] = [p.grad for p in model.parameters() if p.requires_grad]
        assert len(runs) == 2 * blocks - count
    assert all(
        torch.allclose(a, b, atol=1e-5, rtol=1e-4)
        for count in (3, blocks)
        for a, b in zip(found[0], found[count], strict=True)
    )


def test_shorter_packs_keep_more_blocks_and_the_longest_none(base):
    config = assemble.load(Checkpoint(base)).config
    kinds = ["linear_attention", "moe"] * 20
    counts = [
        recompute.blocks_that_fit(config, kinds, tokens, 16_384)
        for tokens in (16_384, 8_192, 4_096, 1_024, 128)
    ]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == len(kinds) and counts[1] < counts[3]


@pytest.mark.trap("router-in-bf16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["bf16", "nf4", "nvfp4"])
def test_router_and_float32_tensors_keep_every_bit(base, form, dtype):
    stored, model = Checkpoint(base), assemble.load(Checkpoint(base), form, dtype)
    here = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    exact = [
        name
        for name in stored.entries
        if name.endswith(("gate.weight", "A_log", ".D", "e_score_correction_bias"))
    ]
    assert len(exact) == 2 * 2 + 2 * 2
    for name in exact:
        assert torch.equal(here[names.native(name)], stored.tensor(name).float()), name


@pytest.mark.trap("experts-not-quantised")
@pytest.mark.parametrize(("form", "bits"), [("nf4", 4.25), ("nvfp4", 4.5)])
def test_every_expert_is_packed_and_what_the_export_leaves_in_bf16_is_not(base, form, bits):
    model = assemble.load(Checkpoint(base), form, torch.bfloat16)
    groups = assemble.bytes_by_group(model)
    weights = 2 * 2 * 4 * 128 * 64  # layers, projections, experts, shape
    assert (
        groups["experts"]["bytes"] == pytest.approx(weights * bits / 8, rel=1e-3)
        and groups["experts"]["four_bit"] == weights / 2
    )
    assert (
        groups["attention"]["four_bit"] == 0
        and groups["mamba"]["four_bit"] > 0
        and groups["shared"]["four_bit"] > 0
    )
    forms = {
        name: m.form
        for name, m in model.named_modules()
        if isinstance(m, assemble.Projection) and ".experts." not in name
    }
    assert {name for name, its in forms.items() if its == "bf16"} == {
        f"model.layers.3.mixer.{its}_proj" for its in "qkvo"
    } | {f"model.layers.2.mixer.{its}_proj" for its in ("in", "out")}


@pytest.mark.trap("experts-not-trained")
def test_and_10_every_adapter_tensor_gets_a_gradient_out_proj_too(base):
    model = assemble.load(Checkpoint(base))
    for module in model.modules():
        if isinstance(module, assemble.Projection):
            module.adapt(4, 8)
            module.lora_b.data.normal_(std=0.02)
    assemble.loss(model, tokens(), tokens(), Documents(LENGTHS)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("out_proj" in name for name in trained) == 2 * 2
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


def test_weights_are_held_decoded_in_the_room_that_is_given_the_first_blocks_first(base):
    def loaded():
        model = assemble.load(Checkpoint(base), "nf4", torch.float32, "cpu")
        return model, [
            module for module in model.modules() if isinstance(module, Projection) and module.form == "nf4"
        ]

    model, packed = loaded()
    sizes = [module.decoded_bytes() for module in packed]
    assert assemble.keep_decoded(model, min(sizes) - 1) == (0, 0)
    assert assemble.keep_decoded(model, sum(sizes[:3])) == (3, sum(sizes[:3]))
    assert [module.decoded is not None for module in packed] == [True] * 3 + [False] * (len(packed) - 3)
    model, packed = loaded()
    assert assemble.keep_decoded(model, 1e12) == (
        len(packed),
        sum(sizes),
    ), "those that are BF16 anyway stay as they are"


@pytest.mark.trap("quantiser-before-adapter")
def test_rounded_weights_are_bit_for_bit_what_the_export_writes(base, tmp_path):
    model = tuned(base)
    adapter.save(model, tmp_path, "all", 4, 8)
    stored = Checkpoint(base)
    merged = lora.Adapter(tmp_path, stored)
    exported = assemble.exported(model)
    names = {id(module): name for name, module in adapter.adapted(model).items()}
    assert {names[id(m)].rsplit(".", 1)[-1] for m in exported} == {"in_proj", "up_proj", "down_proj"}
    for module in exported:
        module.rounded = True
        hub = names[id(module)].replace("model.", "backbone.", 1)
        for expert, found in enumerate(module.forward_weights()):
            name = f"{hub.replace('.experts.', f'.experts.{expert}.')}.weight"
            # Merge's own arithmetic, and the exporter's.
            weight = (stored.tensor(name).float() + merged.delta(name)).to(torch.bfloat16)
            assert torch.equal(found, nvfp4.unpack(nvfp4.pack(weight))), name
            # quantised first, adapter after
            other = nvfp4.unpack(nvfp4.pack(stored.tensor(name))) + merged.delta(name)
            assert relative(other, found) > 0.02, "the order has to matter, or this test shows nothing"


def test_a_checkpoint_that_is_not_what_its_config_says_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "other")
    config = json.loads((base / "config.json").read_text())
    for change, message in (
        ({"moe_intermediate_size": 128}, r"shape \(64, 128\), expected \(128, 128\)"),
        ({"n_routed_experts": 5}, r"experts\.4\..* is in config.json only"),
    ):
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            assemble.load(Checkpoint(tmp_path / "other"))


def test_random_weights_make_a_model_of_any_size():
    model = assemble.random(tiny.config("ME*", 128, 4, 512), "nvfp4", torch.float32, "cpu")
    assert torch.isfinite(assemble.loss(model, tokens(50), tokens(50), Documents((50,))))


def test_every_random_expert_is_filled_and_none_twice():
    """Experts are made several at a time, and what is not filled would be whatever the memory held."""
    count = assemble.TOGETHER + 3
    its = (
        assemble.random(tiny.config("ME*", 128, count, 512), "nf4", torch.float32, "cpu")
        .model.layers[1]
        .mixer.experts
    )
    for stack in (its.up_proj.dense(), its.down_proj.dense()):
        assert len(stack) == count and all(0.015 < matrix.std() < 0.025 for matrix in stack)
        assert len({tuple(matrix[0, :8].tolist()) for matrix in stack}) == count


@pytest.mark.parametrize("lengths", [(), (3, 0)])
def test_documents_have_tokens(lengths):
    with pytest.raises(ValueError, match="at least one token"):
        Documents(lengths)
