"""The cause of a vLLM's end, found in its own log."""

import signal

import pytest

from stages.evaluate.server_log import cause

ENGINE, SERVER = "(EngineCore pid=15732) ", "(APIServer pid=15309) "
AT = "ERROR 11-26 17:24:09 [core.py:1510] "


def log(*last, engine=()):
    """A log in vLLM 0.32's form: noise, the engine's traceback twice (logged, then as its process ends),
    the API server's pointer to it.
    """
    return [
        SERVER
        + "WARNING 11-26 17:22:30 [system_utils.py:255] This can cause fd limit errors like `OSError: [Errno"
        " 24] Too many open files`.",
        SERVER + "INFO 11-26 17:22:30 [compilation.py:317] Enabled custom fusions: norm_quant",
        *(
            line
            for text in engine
            for line in (
                ENGINE + AT + "Traceback (most recent call last):",
                ENGINE + AT + '  File "core.py", line 1482, in run',
                ENGINE + AT + text,
            )
        ),
        ENGINE + "Process EngineCore:",
        *(line for text in engine for line in (ENGINE + "Traceback (most recent call last):", ENGINE + text)),
        SERVER + "Traceback (most recent call last):",
        SERVER + '  File "async_llm.py", line 12, in build',
        *last,
        "sys:1: ResourceWarning: unclosed socket",
    ]


POINTER = (
    SERVER + "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)
KNOWN = {
    "no FP8 cache": (
        log(POINTER, engine=["NotImplementedError: FP8 KV cache on CPU requires x86 with AVX-512 or AMX."]),
        "FP8 KV cache on CPU",
        "kv_cache: auto",
    ),
    "a worker points to its cause": (
        log(
            POINTER,
            engine=[
                "NotImplementedError: FP8 KV cache on CPU requires x86 with AVX-512 or AMX.",
                (
                    "Exception: WorkerProc initialization failed due to an exception in a background process."
                    " See stack trace for root cause."
                ),
            ],
        ),
        "FP8 KV cache",
        "kv_cache: auto",
    ),
    "no memory on the GPU": (
        log(POINTER, engine=["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."]),
        "CUDA out of memory",
        "memory_share",
    ),
    "no room for the cache": (
        log(POINTER, engine=["ValueError: No available memory for the cache blocks."]),
        "No available memory",
        "memory_share",
    ),
    "a torn file": (
        log(
            POINTER,
            engine=[
                "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata"
            ],
        ),
        "incomplete metadata",
        "torn",
    ),
    "a message of several lines": (
        log(
            SERVER + "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
            SERVER
            + "  Value error, User-specified max_model_len (512) is greater than the derived max_model_len"
            " [type=value_error]",
        ),
        "User-specified max_model_len",
        "Lower max_model_len",
    ),
    "a flag": (
        ["usage: vllm serve [model_tag] [options]", "vllm: error: unrecognized arguments: --no-such-flag 3"],
        "unrecognized arguments: --no-such-flag",
        "",
    ),
    "nothing that is known": (
        log(POINTER, engine=["KeyError: 'backbone.layers.7'"]),
        "KeyError: 'backbone.layers.7'",
        "",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_exception_that_stopped_it_is_named_with_its_remedy(name):
    lines, text, remedy = KNOWN[name]
    found = cause(lines, 1)
    assert text in found.text and remedy in found.remedy and bool(remedy) == bool(found.remedy)
    assert "root cause" not in found.text and "pid=" not in found.text


def test_an_exception_that_was_caught_is_not_the_cause():
    lines = log(
        POINTER, engine=["ImportError: no triton", "ValueError: No available memory for the cache blocks."]
    )
    assert cause(lines, 1).text.startswith("ValueError")


@pytest.mark.parametrize("code", [-signal.SIGKILL, 137])
def test_a_server_that_was_killed_most_often_ran_out_of_memory(code):
    found = cause(log(), code, memory_gb=1.25)
    assert "signal 9" in found.text and "memory ran out (1.2 GB are available now)" in found.remedy


def test_a_log_that_says_nothing_has_no_cause():
    assert cause(["INFO 11-26 17:22:30 [x.py:1] loading"], 1) is None
    assert cause([], None) is None
