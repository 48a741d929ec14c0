"""Measures calibrating and packing a model of random weights, which are generated while they are read:
`python -m bench.calibrate [--layers 52] [--conversations 256]`.

Weights are on the device before a layer's clock starts, so only computing is measured: the forward with its
maxima, and the packing of every quantised matrix. Reading them depends on the disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from bench import operations
from bench.row import synchronize
from bench.weights import Random
from model import layouts, walk
from model.weights import nvfp4
from stages.quantize import calibrate

Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=52)
    parser.add_argument("--conversations", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", type=Path, help="a hub config.json instead of the real widths")
    options = parser.parse_args()
    device, cuda = torch.device(options.device), options.device == "cuda"
    config = (
        json.loads(options.config.read_text())
        if options.config
        else operations.sizes(options.layers) | {"num_hidden_layers": options.layers}
    )
    dtype = torch.bfloat16 if cuda else torch.float32
    rows = list(torch.randint(0, config["vocab_size"], (options.conversations, options.tokens)))
    seconds = {"filling": 0.0, "forward": 0.0, "packing": 0.0}

    def clocked(part: str, work: Callable[[], Result]) -> Result:
        synchronize(device)
        began = time.perf_counter()
        result = work()
        synchronize(device)
        seconds[part] += time.perf_counter() - began
        return result

    with tempfile.TemporaryDirectory() as folder:
        source = Random(config, Path(folder))
        layers = walk.Layers(config, dtype, options.device)
        forward = walk.Walk(
            walk.packed(rows), source.tensor("backbone.embeddings.weight"), dtype, options.device
        )
        quantised = layouts.quantised(config, "nvidia")
        for number in range(len(layers)):
            block = clocked("filling", partial(layers.fill, number, source.tensor))
            maxima = calibrate.Maxima(block)
            clocked("forward", partial(forward.through, block))
            maxima.close()
            for name in (name for name in quantised if name.startswith(f"backbone.layers.{number}.")):
                weight = source.tensor(f"{name}.weight").to(device)
                clocked("packing", partial(nvfp4.pack, weight))
            print(f"layer {number + 1} of {len(layers)}", end="\r", flush=True)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
    print(
        f"{name}, {len(layers)} layers, {options.conversations} x {options.tokens} tokens, {len(quantised):,}"
        f" matrices{peak}"
    )
    for part, value in seconds.items():
        print(f"{part:8s} {value:8.2f} s")
    print(f"computing {seconds['forward'] + seconds['packing']:6.2f} s")


if __name__ == "__main__":
    main()
