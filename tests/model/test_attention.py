"""Attention in one call equals attention a document at a time, whatever the lengths."""

import pytest
import torch
from devices import DEVICES, relative

from model.layers import attention
from model.layers.documents import Documents

LENGTHS = (1, 2, 127, 128, 129, 1000)
HEADS, KEYS, SIZE = 4, 2, 64
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def inputs(dtype, device="cpu", tokens=sum(LENGTHS)):
    """query, key and value as transformers gives them, (1, heads, tokens, size), and a gradient of the
    output.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (1, HEADS, tokens, SIZE),
        (1, KEYS, tokens, SIZE),
        (1, KEYS, tokens, SIZE),
        (1, tokens, HEADS, SIZE),
    ]
    made = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes
    ]
    return [part.requires_grad_() for part in made[:3]], made[3]


def definition(query, key, value, lengths):
    """softmax(q k / sqrt(size)) v with a mask of tokens squared: causal, and nothing of another document."""
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    place = torch.arange(len(index), device=query.device)
    seen = (index[:, None] == index[None, :]) & (place[:, None] >= place[None, :])
    key, value = (part.repeat_interleave(HEADS // KEYS, 1) for part in (key, value))
    scores = (query @ key.transpose(-1, -2) * SIZE**-0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def results(way, parts, given):
    out = way(*parts)
    return [out, *torch.autograd.grad(out, parts, given)]


def test_in_float64_it_is_the_definition_gradients_too():
    parts, given = inputs(torch.float64)
    documents = Documents(LENGTHS)
    found = results(
        lambda *parts: attention.forward(None, *parts, None, scaling=SIZE**-0.5, documents=documents)[0],
        parts,
        given,
    )
    wanted = results(lambda *parts: definition(*parts, LENGTHS), parts, given)
    assert all(relative(a, b) < 1e-12 for a, b in zip(found, wanted, strict=True))


@GPU
def test_one_call_on_a_gpu_is_as_near_to_float64_as_a_call_a_document():
    exact, given = inputs(torch.float64, "cuda")
    wanted = results(lambda *parts: definition(*parts, LENGTHS), exact, given)
    errors = {}
    for way in (attention.in_one_call, attention.by_document):
        parts, _ = inputs(torch.bfloat16, "cuda")
        rows = [part.transpose(1, 2)[0] for part in parts]
        out = way(*rows, Documents(LENGTHS), SIZE**-0.5)[None]
        found = [out, *torch.autograd.grad(out, parts, given.to(torch.bfloat16))]
        errors[way] = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
    assert all(
        one < 1.5 * each
        for one, each in zip(errors[attention.in_one_call], errors[attention.by_document], strict=True)
    ), errors


@GPU
def test_on_a_gpu_the_model_takes_one_call(monkeypatch):
    taken = []
    monkeypatch.setattr(attention, "by_document", lambda *a: taken.append(a))
    parts, _ = inputs(torch.bfloat16, "cuda")
    attention.forward(None, *parts, None, scaling=SIZE**-0.5, documents=Documents(LENGTHS))
    assert not taken


@pytest.mark.parametrize("device", DEVICES)
def test_without_documents_every_row_is_one(device):
    query, key, value = (torch.randn(3, heads, 20, SIZE, device=device) for heads in (HEADS, KEYS, KEYS))
    found, _ = attention.forward(None, query, key, value, None, scaling=SIZE**-0.5)
    wanted = torch.cat(
        [definition(query[i : i + 1], key[i : i + 1], value[i : i + 1], (20,)) for i in range(3)]
    )
    assert found.shape == (3, 20, HEADS, SIZE) and relative(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"attention_mask": torch.ones(1)}, "takes documents, not a mask"),
        ({"dropout": 0.1}, "has no dropout"),
        ({"documents": Documents((5, 4))}, "documents of 9 tokens"),
    ],
)
def test_what_it_cannot_do_is_refused(wrong, said):
    parts, _ = inputs(torch.float32, tokens=10)
    with pytest.raises(ValueError, match=said):
        attention.forward(None, *parts, **{"attention_mask": None, **wrong})
