"""Steps through CUDA graphs are the steps without them, for every length; and a pack is padded by little."""

import pytest
import small
import torch
from devices import relative

from model import adapter, assemble
from model.layers import graphs, recompute
from model.layers.documents import Documents
from model.weights.checkpoint import Checkpoint

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def test_a_pack_is_padded_by_at_most_an_eighth_to_few_sizes():
    sizes = {tokens: graphs.padded_size(tokens) for tokens in range(1, 20_000)}
    assert all(size >= tokens and size % 128 == 0 for tokens, size in sizes.items())
    assert all(size - tokens < max(128, tokens / 8 + 1) for tokens, size in sizes.items())
    assert len(set(sizes.values())) < 50


@GPU
@pytest.mark.parametrize(("form", "checkpointed"), [("nf4", False), ("nf4", True), ("rounded", True)])
def test_steps_are_those_without_graphs(tmp_path, form, checkpointed):
    """Several lengths, two packs a step, and a step after a step: the gradients of each are its own."""
    base = small.base(tmp_path / "base")
    model = assemble.load(Checkpoint(base), "bf16" if form == "rounded" else form, torch.bfloat16, "cuda")
    adapter.attach(model, "all", 4, 8, 0)
    for module in assemble.exported(model):
        module.rounded = form == "rounded"
    torch.manual_seed(3)
    for module in adapter.adapted(model).values():
        module.lora_b.data.copy_(0.05 * torch.randn(module.lora_b.shape))
    if checkpointed:
        recompute.attach(model, 1024)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(packs):
        for p in parameters:
            p.grad = None
        losses = []
        for lengths in packs:
            ids = torch.randint(
                20, 500, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths))
            ).cuda()
            found = assemble.loss(model, ids, ids, Documents(lengths))
            found.backward()
            losses.append(found.item())
        return torch.tensor(losses), torch.cat([p.grad.flatten().clone() for p in parameters])

    steps = [[(70, 1, 33)], [(128,), (5, 200, 7, 1)], [(300, 20)], [(70, 1, 33)]]
    wanted = [step(packs) for packs in steps]
    captured = assemble.capture(model)
    captured.prepare([Documents(lengths) for lengths in steps[0]])
    before = len(captured.captured)
    found = [step(packs) for packs in steps]
    assert before == 1 and len(captured.captured) > 1
    for (loss, gradient), (wanted_loss, wanted_gradient) in zip(found, wanted, strict=True):
        assert relative(loss, wanted_loss) < 5e-3 and relative(gradient, wanted_gradient) < 5e-2
