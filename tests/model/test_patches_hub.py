"""model/families/nemotron_h/patches.py on a small module of our own that has the hub file's sites; what is
patched runs, and computes what it should.
"""

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from model.families.nemotron_h import patches
from model.families.nemotron_h.patches import ABSENT, PATCHED, THERE, TO_PATCH, PatchError
from model.layers import mamba

REPO = Path(__file__).resolve().parents[2]
NAMES = ["a norm", "b router", "b sum", "c idle input", "d idle call", "e tied keys", "f stream"]
EXPERTS, TOP, WIDTH = 8, 2, 16

HEAD = '''\
"""Stands for the hub's file: its sites as they are there, everything else our own."""
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

try:
    #from mamba_ssm.ops.triton.layernorm_gated import RMSNorm
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
except ImportError:
    raise ImportError("mamba-ssm is required by the Mamba model but cannot be imported")
'''
NORM = """
class Norm(nn.Module):
    def __init__(self, width, group):
        super().__init__()
        self.weight, self.group = nn.Parameter(torch.ones(width)), group

    def forward(self, y, gate):
        return rmsnorm_fn(x=y, weight=self.weight, bias=None, z=gate, eps=1e-5, group_size=self.group, norm_before_gate=False)
"""  # noqa: E501
BLOCK = """
class NemotronHBlock(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states, cache_params=None):
        with torch.cuda.stream(torch.cuda.default_stream(hidden_states.device)):
            # a remark
            residual = hidden_states
            return residual + self.mixer(hidden_states)
"""
MOE = """
class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())


class NemotronHMOE(nn.Module):
    def __init__(self, count, top, width):
        super().__init__()
        self.gate, self.experts = NemotronHTopkRouter(count, top, width), nn.ModuleList(Expert(width) for _ in range(count))

    def moe(self, hidden_states, topk_indices, topk_weights):
        final_hidden_states = torch.zeros_like(hidden_states, dtype=topk_weights.dtype)
        for number, expert in enumerate(self.experts):
            token_indices, places = torch.where(topk_indices == number)
            if token_indices.numel() > 0:
                weighted_output = expert(hidden_states[token_indices]) * topk_weights[token_indices, places, None]
                final_hidden_states.index_add_(0, token_indices, weighted_output)
            else:
                # a remark
                expert_dtype = expert.down_proj.weight.dtype
                final_hidden_states = final_hidden_states + expert(torch.zeros_like(hidden_states[:1]).to(expert_dtype))
        return final_hidden_states.type(hidden_states.dtype)

    def forward(self, hidden_states):
        rows = hidden_states.flatten(0, -2)
        return self.moe(rows, *self.gate(rows)).view_as(hidden_states)
"""  # noqa: E501
ROUTER = """
class NemotronHTopkRouter(nn.Module):
    def __init__(self, count, top, width):
        super().__init__()
        self.top, self.weight = top, nn.Parameter(torch.randn(count, width))

    def forward(self, hidden_states):
        router_logits = F.linear(hidden_states.type(torch.float32), self.weight.type(torch.float32))
        scores = router_logits.sigmoid()

        if self.top:
            topk_weights, topk_indices = scores.topk(self.top)
        return topk_indices, topk_weights
"""
CAUSAL = """
class NemotronHForCausalLM(nn.Module):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self):
        super().__init__()
"""
HUB = HEAD + NORM + BLOCK + MOE + ROUTER + CAUSAL
VARIANTS = {
    "as it is": HUB,
    "without the commented import": HUB.replace(
        "    #from mamba_ssm.ops.triton.layernorm_gated import RMSNorm\n", ""
    ),
    "cache_params renamed": HUB.replace("cache_params", "past_key_values"),
    "classes in another order": HEAD + CAUSAL + ROUTER + MOE + BLOCK + NORM,
    "no remarks": re.sub(r" +# a remark\n", "", HUB),
    "another docstring in the router": HUB.replace(
        "        router_logits",
        '        """How tokens are shared out.\n\n        Twice.\n        """\n        router_logits',
    ),
    "single quotes": (
        HUB.replace(
            '("mamba-ssm is required by the Mamba model but cannot be imported")', "('mamba-ssm is required')"
        ).replace('["lm_head.weight"]', "['lm_head.weight']")
    ),
}
# Newer copies of the file that need nothing at two of the sites.
NEWER = HUB.replace(
    '    _tied_weights_keys = ["lm_head.weight"]\n', '    _keys_to_ignore_on_load_unexpected = [r"mtp.*"]\n'
).replace(
    "        with torch.cuda.stream(torch.cuda.default_stream(hidden_states.device)):\n",
    '        if hidden_states.device.type == "cuda":\n            context ='
    " torch.cuda.stream(torch.cuda.default_stream(hidden_states.device))\n        else:\n            context"
    " = contextlib.nullcontext()\n\n        with context:\n",
)


@pytest.fixture(autouse=True)
def no_mamba_ssm(monkeypatch):
    # what Python raises ImportError for, installed or not, and imported before or not
    for name in {"mamba_ssm", *(name for name in sys.modules if name.startswith("mamba_ssm."))}:
        monkeypatch.setitem(sys.modules, name, None)


def run(text):
    module = types.ModuleType("hub")
    exec(compile(text, "modeling_nemotron_h.py", "exec"), module.__dict__)
    return module


def states(text):
    return {row.site: row.state for row in patches.survey(text)}


def moe(text=None):
    torch.manual_seed(0)
    return run(text or patches.patched(HUB)).NemotronHMOE(EXPERTS, TOP, WIDTH)


def unpatched(name):
    """HUB with every site patched but one."""
    text = HUB
    for site in patches.SITES:
        text = text if site.name == name else site.original.sub(site.replacement, text)
    return text


# --- the sites, found and changed


@pytest.mark.parametrize("text", VARIANTS.values(), ids=VARIANTS)
def test_every_site_is_patched_once_and_the_result_runs(text):
    assert states(text) == dict.fromkeys(NAMES, TO_PATCH)
    new = patches.patched(text)
    assert states(new) == dict.fromkeys(NAMES, THERE)
    assert patches.patched(new) == new
    module = run(new)
    tokens = torch.randn(3, 5, WIDTH)
    mixer = module.NemotronHMOE(EXPERTS, TOP, WIDTH)
    assert torch.equal(module.NemotronHBlock(mixer)(tokens), tokens + mixer(tokens))


def test_what_a_newer_copy_already_has_is_left_alone():
    assert {name for name, state in states(NEWER).items() if state == THERE} == {"e tied keys", "f stream"}
    assert "cuda.stream(torch.cuda.default_stream(hidden_states.device)) if" not in patches.patched(NEWER)


@pytest.mark.parametrize("name", NAMES)
def test_one_site_patched_already_is_kept_and_the_others_are_patched(name):
    site = next(site for site in patches.SITES if site.name == name)
    partly = site.original.sub(site.replacement, HUB)
    assert states(partly) == {**dict.fromkeys(NAMES, TO_PATCH), name: THERE}
    assert patches.patched(partly) == patches.patched(HUB)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("a norm", 'raise ImportError("mamba-ssm is required', 'raise ImportError("mamba_ssm is required'),
        ("b router", "router_logits = F.linear(", "router_logits = torch.matmul("),
        (
            "b sum",
            "index_add_(0, token_indices, weighted_output)",
            "index_add_(0, token_indices, weighted_output, alpha=1)",
        ),
        (
            "c idle input",
            "expert_dtype = expert.down_proj.weight.dtype",
            "expert_dtype = expert.up_proj.weight.dtype",
        ),
        ("d idle call", "else:\n                # a remark\n", "elif number:\n                # a remark\n"),
        (
            "e tied keys",
            '_tied_weights_keys = ["lm_head.weight"]',
            '_tied_weights_keys = ["lm_head.weight", "head.bias"]',
        ),
        (
            "f stream",
            "with torch.cuda.stream(torch.cuda.default_stream(hidden_states.device)):",
            "with torch.cuda.device(hidden_states.device):",
        ),
    ],
)
def test_a_site_that_is_missing_stops_the_whole_file(tmp_path, capsys, name, old, new):
    assert HUB.count(old) == 1
    path = tmp_path / patches.FILE
    path.write_text(HUB.replace(old, new))
    assert patches.main([str(path)]) == 1
    said = capsys.readouterr()
    assert re.search(rf"^{name} +{ABSENT} ", said.out, re.MULTILINE) and PATCHED not in said.out
    assert (
        f"found: {name} {ABSENT}\nexpected: every site exactly once" in said.err
        and "nothing was changed" in said.err
    )
    assert path.read_text() == HUB.replace(old, new) and list(tmp_path.iterdir()) == [path]


def test_a_site_that_is_there_twice_stops_the_whole_file(tmp_path, capsys):
    path = tmp_path / patches.FILE
    path.write_text(twice := HUB + CAUSAL.replace("NemotronHForCausalLM", "NemotronHForTwo"))
    assert patches.main([str(path)]) == 1
    assert "found: e tied keys found 2 times\n" in capsys.readouterr().err and path.read_text() == twice
    # one as it was, one as it becomes
    half = patches.patched(HUB) + CAUSAL.replace("NemotronHForCausalLM", "NemotronHForTwo")
    assert states(half)["e tied keys"] == "found 2 times"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\n", "no class NemotronHBlock, NemotronHForCausalLM, NemotronHTopkRouter"),
        # a NemotronH without experts
        (HUB.replace("class NemotronHTopkRouter", "class Router"), "no class NemotronHTopkRouter"),
        # the class inside transformers
        (HUB.replace("from transformers.utils", "from ...utils"), "no import from transformers"),
        (HUB.replace("class Norm(nn.Module):", "class Norm(nn.Module)"), "text that is not Python"),
        ("\0", "text that is not Python"),
    ],
)
def test_a_file_that_it_does_not_know_is_refused(tmp_path, capsys, text, found):
    path = tmp_path / "other.py"
    path.write_text(text)
    assert patches.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert (
        f"found: {found}" in said and "expected: the hub's modeling_nemotron_h.py" in said and "do: " in said
    )
    assert path.read_text() == text


def test_bytes_that_are_not_text_a_missing_file_and_an_empty_folder_are_refused(tmp_path, capsys):
    (tmp_path / "other.py").write_bytes(b"\xff\xfe")
    assert patches.main([str(tmp_path / "other.py")]) == 1
    assert patches.main([str(tmp_path / "none.py")]) == 1
    assert patches.main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "not UTF-8" in said and "none.py" in said and f"no {patches.FILE} under" in said


# --- the command


def test_the_command_prints_a_table_and_a_second_run_changes_no_byte(tmp_path, capsys):
    path = tmp_path / patches.FILE
    path.write_text(HUB)
    path.chmod(0o640)
    assert patches.main([str(path), "--check"]) == 1
    assert TO_PATCH in capsys.readouterr().out and path.read_text() == HUB
    assert patches.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "site          line  state    what it does",
        "a norm          10  patched  a gated norm in plain torch where mamba-ssm does not import",
        "b router        69  patched  the router computes outside autocast, in float32",
        "b sum           52  patched  an expert's output is cast to the dtype of the sum",
        "c idle input    55  patched  an idle expert's input has the dtype of a real one",
        "d idle call     53  patched  an idle expert is called only where torch.distributed runs",
        "e tied keys     77  patched  _tied_weights_keys is a mapping, so that saving works",
        "f stream        27  patched  no CUDA stream for tensors that are not on CUDA",
    ]
    once, when = path.read_bytes(), path.stat().st_mtime_ns
    for arguments in ([str(path)], [str(path), "--check"]):
        assert patches.main(arguments) == 0
        assert capsys.readouterr().out.count(THERE) == len(NAMES)
    assert path.read_bytes() == once and path.stat().st_mtime_ns == when
    assert path.stat().st_mode & 0o777 == 0o640 and list(tmp_path.iterdir()) == [path]


def test_in_a_folder_every_copy_is_patched_and_a_link_of_the_hubs_cache_becomes_a_file(tmp_path):
    blob, copy = tmp_path / "blobs" / "a81defb1", tmp_path / "modules" / patches.FILE
    link = tmp_path / "snapshots" / "cbd3fa9f" / patches.FILE
    for path in (blob, link, copy):
        path.parent.mkdir(parents=True)
    blob.write_text(HUB)
    shutil.copy(blob, copy)
    link.symlink_to(blob)
    assert patches.main([str(tmp_path)]) == 0
    assert blob.read_text() == HUB  # its name in the cache is its digest
    assert not link.is_symlink() and link.read_text() == copy.read_text() == patches.patched(HUB)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, capsys, monkeypatch):
    path = tmp_path / patches.FILE
    path.write_text(HUB)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(patches.os, "fsync", full)
    assert patches.main([str(path)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert path.read_text() == HUB and list(tmp_path.iterdir()) == [path]


def test_the_command_of_the_readme(tmp_path):
    (tmp_path / patches.FILE).write_text(HUB)
    text = " ".join((REPO / "docs/stages.md").read_text().split())
    command = re.search(r"`python -m (model\.families\.nemotron_h\.patches) FOLDER`", text)
    # -S: no package at all
    done = subprocess.run(
        [sys.executable, "-S", "-m", command[1], str(tmp_path)], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count(PATCHED) == len(NAMES), done.stderr
    assert (tmp_path / patches.FILE).read_text() == patches.patched(HUB)


# --- what the patched file computes


def test_without_the_patch_the_import_is_an_error():
    with pytest.raises(ImportError, match="mamba-ssm is required"):
        run(HUB)


@pytest.mark.trap("gate-after-the-norm")
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_the_gate_comes_before_the_norm_and_the_norm_is_per_group(dtype, near):
    torch.manual_seed(0)
    width, group = 24, 8
    norm = run(patches.patched(HUB)).Norm(width, group).to(dtype)
    norm.weight.data = torch.randn(width, dtype=dtype)
    y, z = (3 * torch.randn(2, 5, width)).to(dtype), torch.randn(2, 5, width, dtype=torch.float32).to(dtype)
    found = norm(y, z)

    x, gate, weight = y.double(), z.double(), norm.weight.double()
    gate = gate / (1 + torch.exp(-gate))
    wanted = (
        torch.cat(
            [
                part / (part.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
                for part in (x * gate).split(group, -1)
            ],
            -1,
        )
        * weight
    )
    wrong = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight * gate  # the notebook's

    def error(other):
        return ((other.double() - wanted).norm() / wanted.norm()).item()

    assert error(found) < near and error(wrong) > 0.3
    assert found.dtype == dtype and torch.equal(
        found, mamba.gated_norm(y, z, norm.weight, 1e-5, group, "torch")
    )


def test_the_norm_refuses_what_the_hubs_file_never_asks_for():
    rmsnorm_fn, x = run(patches.patched(HUB)).rmsnorm_fn, torch.ones(1, 4)
    for other in (
        {"z": x},
        {"z": None, "norm_before_gate": False},
        {"z": x, "norm_before_gate": False, "bias": x[0]},
    ):
        with pytest.raises(NotImplementedError, match="gate comes before"):
            rmsnorm_fn(x, x[0], **other)


def test_mamba_ssm_stays_in_use_where_it_imports(monkeypatch):
    name = "mamba_ssm.ops.triton.layernorm_gated"
    for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", name):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    sys.modules[name].rmsnorm_fn = object()
    assert run(patches.patched(HUB)).rmsnorm_fn is sys.modules[name].rmsnorm_fn


@pytest.mark.trap("router-in-bf16")
@pytest.mark.parametrize("as_patched", [False, True])
def test_the_router_is_kept_out_of_autocast(as_patched):
    gate = moe(None if as_patched else unpatched("b router")).gate
    tokens = torch.randn(7, WIDTH)
    indices, shares = gate(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (tokens @ tokens.T).dtype == torch.bfloat16
        found = gate(tokens)
    assert (found[1].dtype == torch.float32) == as_patched
    assert not as_patched or (torch.equal(found[0], indices) and torch.equal(found[1], shares))


def test_experts_of_another_dtype_than_the_shares_are_added_up():
    model, tokens = moe(), torch.randn(6, WIDTH)
    indices, shares = model.gate(tokens)
    shares = shares.bfloat16()
    with pytest.raises(RuntimeError, match="index_add_"):
        moe(unpatched("b sum")).moe(tokens, indices, shares)
    found = model.moe(tokens, indices, shares)
    wanted = sum(
        shares[:, i, None] * torch.stack([model.experts[e](tokens[n]) for n, e in enumerate(indices[:, i])])
        for i in range(TOP)
    )
    assert found.dtype == tokens.dtype and torch.allclose(
        found, wanted, atol=0.02 * wanted.abs().max().item()
    )


@pytest.mark.parametrize("distributed", [False, True])
def test_idle_experts_are_called_only_where_torch_distributed_runs(monkeypatch, distributed):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: distributed)
    model, token = moe(), torch.randn(1, WIDTH)
    model(token).sum().backward()
    used = sum(all(p.grad is not None for p in expert.parameters()) for expert in model.experts)
    assert used == (EXPERTS if distributed else TOP)
    assert torch.equal(model(token), moe(unpatched("d idle call"))(token))  # what the call adds is zero


def test_an_idle_expert_in_four_bits_still_gets_a_gradient(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    class Packed(torch.nn.Module):
        """Like bitsandbytes' Linear4bit under a LoRA: a weight in uint8, and the output in the dtype of
        the input.
        """

        def __init__(self):
            super().__init__()
            self.down_proj = torch.nn.Linear(WIDTH, WIDTH)
            self.down_proj.weight = torch.nn.Parameter(
                torch.zeros(WIDTH, WIDTH, dtype=torch.uint8), requires_grad=False
            )
            self.lora = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x):
            return (x.to(self.lora.dtype) @ self.lora).to(x.dtype)

    for site, learns in (("", EXPERTS), ("c idle input", TOP)):
        model = moe(unpatched(site) if site else None)
        model.experts = torch.nn.ModuleList(Packed() for _ in range(EXPERTS))
        model(torch.randn(1, WIDTH)).sum().backward()
        assert sum(expert.lora.grad is not None for expert in model.experts) == learns


@pytest.mark.trap("save-stops-after-the-config")
def test_tied_weights_keys_can_be_asked_for_their_keys():
    tied = run(patches.patched(HUB)).NemotronHForCausalLM._tied_weights_keys
    assert list(tied.keys()) == []
    assert isinstance(run(unpatched("e tied keys")).NemotronHForCausalLM._tied_weights_keys, list)


def test_the_block_asks_for_no_stream_on_a_cpu(monkeypatch):
    def asked(*arguments):
        raise RuntimeError("found no NVIDIA driver")

    monkeypatch.setattr(torch.cuda, "default_stream", asked)
    tokens = torch.randn(2, WIDTH)
    assert torch.equal(run(patches.patched(HUB)).NemotronHBlock(torch.nn.Identity())(tokens), 2 * tokens)
    with pytest.raises(RuntimeError, match="NVIDIA"):
        run(unpatched("f stream")).NemotronHBlock(torch.nn.Identity())(tokens)


def test_a_patch_that_does_not_do_what_it_says_is_not_written(monkeypatch):
    site = patches.SITES[1]
    monkeypatch.setattr(
        patches,
        "SITES",
        (patches.Site(site.name, site.purpose, site.original, site.patched, lambda match: match[0]),),
    )
    with pytest.raises(PatchError, match="b router not as it should be"):
        patches.patched(HUB)
