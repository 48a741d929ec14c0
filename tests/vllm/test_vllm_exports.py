"""A real vLLM's loader on every export: each layout, in W4A4 and in W4A16, answers as the weights do that
its codes stand for.

vLLM runs in this process, with the flags of model/families/nemotron_h/serving.py as its own command line
reads them. A W4A16 export is also held against vLLM itself on the decoded weights in BF16, which is the same
arithmetic.
"""

import functools
import gc
from dataclasses import dataclass, replace

import exported
import pytest
import torch

from model.families.nemotron_h.layout import LAYOUTS
from model.families.nemotron_h.serving import NEMOTRON_H
from model.families.serve import installed, quantised
from model.weights import nvfp4

# six chunks of the Mamba scan
PROMPT = torch.randint(3, 500, (381,), generator=torch.Generator().manual_seed(1)).tolist()
# Mean difference of log p. W4A16: vLLM computes in BF16 (measured 0.0030 to 0.0034); W4A4 rounds activations
# to 4 bits too (0.004 to 0.069).
NEAR = {"w4a4": 0.15, "w4a16": 0.01}
# ways to read a checkpoint wrongly, which the measure has to tell (measured at 4.2 to 149 times the right
# one)
WRONG = {
    "nibbles swapped": lambda p: nvfp4.unpack(replace(p, weight=p.weight << 4 | p.weight >> 4)),
    "a scale lost": lambda p: nvfp4.unpack(p) / 2,
}


@dataclass(frozen=True)
class Answer:
    """Eight greedy tokens after PROMPT, and log p of the twenty likeliest tokens (and of the one that
    came) at each of its 388 places, the first left out.
    """

    greedy: list[int]
    places: list[dict[int, float]]

    @torch.no_grad()
    def difference(self, model):
        """|log p of vLLM - log p of `model`|, float64, for every token that vLLM names."""
        expected = (
            model(input_ids=torch.tensor([PROMPT + self.greedy]), use_cache=False)
            .logits[0]
            .float()
            .log_softmax(-1)
        )
        return torch.cat(
            [
                (torch.tensor(list(place.values()), dtype=torch.float64) - row[list(place)]).abs()
                for place, row in zip(self.places, expected, strict=False)
            ]
        )

    def apart(self, other):
        """|log p - `other`'s log p| of the tokens that both name at a place of the prompt."""
        pairs = zip(self.places[: len(PROMPT) - 1], other.places, strict=False)
        return torch.tensor(
            [abs(place[token] - its[token]) for place, its in pairs for token in place.keys() & its.keys()],
            dtype=torch.float64,
        )


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """(folder, what it is) -> the Answer of a vLLM in this process, of which nothing is left afterwards."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def asked(folder, checkpoint):
        flags = NEMOTRON_H.serve(installed(), "cpu", checkpoint, 512, 4)
        for name, value in flags.env.items():
            patch.setenv(name, value)
        options = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", str(folder), *flags.args])
        engine = LLM.from_engine_args(EngineArgs.from_cli_args(options))
        try:
            settings = SamplingParams(
                temperature=0,
                max_tokens=8,
                ignore_eos=True,
                detokenize=False,
                logprobs=20,
                prompt_logprobs=20,
            )
            made = engine.generate([{"prompt_token_ids": PROMPT}], settings, use_tqdm=False)[0]
        finally:
            del engine
            gc.collect()
            cleanup_dist_env_and_memory()
        output = made.outputs[0]
        return Answer(
            list(output.token_ids),
            [
                {token: its.logprob for token, its in place.items()}
                for place in (*made.prompt_logprobs[1:], *output.logprobs)
            ],
        )

    with pytest.MonkeyPatch.context() as patch:
        # One process: a second would import vLLM again for each checkpoint.
        for name, value in {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }.items():
            patch.setenv(name, value)
        yield asked


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return exported.base(tmp_path_factory.mktemp("source") / "base")


@pytest.fixture(scope="module")
def served(base, ask, tmp_path_factory):
    """(layout, format) -> that export, and what vLLM answers about it."""

    @functools.cache
    def made(chosen, form):
        folder = exported.export(base, tmp_path_factory.mktemp("made") / "nvfp4", chosen, form)
        return folder, ask(folder, quantised(folder))

    return made


@pytest.mark.parametrize("form", NEAR)
@pytest.mark.parametrize("chosen", LAYOUTS)
def test_every_export_answers_as_its_decoded_weights_do(base, served, chosen, form):
    folder, answer = served(chosen, form)
    assert len(answer.places) == 388 and all(len(place) >= 20 for place in answer.places)
    right = answer.difference(exported.decoded(base, folder)).mean()
    assert right < NEAR[form]
    for fault, read in WRONG.items():
        assert answer.difference(exported.decoded(base, folder, read)).mean() > 3 * right, fault


@pytest.mark.parametrize("chosen", LAYOUTS)
def test_weights_alone_answer_as_vllm_does_about_the_decoded_checkpoint(base, served, ask, tmp_path, chosen):
    folder, answer = served(chosen, "w4a16")
    apart = answer.apart(ask(exported.in_bf16(base, folder, tmp_path / "twin"), quantised(folder)))
    assert len(apart) > 20 * 370
    assert apart.mean() < 1e-3  # measured: every bit the same
