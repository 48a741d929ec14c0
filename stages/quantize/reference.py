"""Activation maxima as ModelOpt finds them, to check stages/quantize/calibrate.py. The whole model is in
memory.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as quantization
import torch

from model import layouts
from model.families import registry
from stages import job
from stages.job import StageError


def preset(config: dict[str, Any], layout: str) -> dict[str, Any]:
    """ModelOpt's preset for this architecture; linears that `layout` leaves in BF16 are disabled by name."""
    settings: dict[str, Any] = copy.deepcopy(quantization.MAMBA_MOE_NVFP4_AGGRESSIVE_CFG)
    family = registry.of(config)
    for module in layouts.excluded(config, layout):
        settings["quant_cfg"].append(
            {"quantizer_name": f"*{family.native(module).removeprefix('model.')}.*", "enable": False}
        )
    return settings


@torch.no_grad()
def maxima(
    folder: Path, config: dict[str, Any], layout: str, rows: list[torch.Tensor], device: str
) -> dict[str, torch.Tensor]:
    """Hub name -> largest absolute input, float32 scalar, of each quantised linear.

    The experts of a layer share one maximum per projection, so an expert without tokens has a scale too.
    """
    # A CPU emulates BF16 products, which is several times slower than float32.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = registry.of(config).load(folder, dtype).to(device).eval()

    def calibrate(calibrated: torch.nn.Module) -> None:
        for number, ids in enumerate(rows, 1):
            calibrated(input_ids=ids[None].to(device), use_cache=False)
            job.progress(number, len(rows), "conversations", "calibrating with ModelOpt")

    quantization.quantize(model, preset(config, layout), calibrate)
    modules = dict(model.named_modules())
    largest = {}
    for linear in layouts.linears(config, layout):
        name = linear.name
        if linear.index is None:
            quantizer = modules[linear.module].input_quantizer
        else:
            quantizer = modules[f"{linear.module}_input_quantizer"]
        amax = quantizer.amax
        if amax is None or not torch.isfinite(amax).all() or not (amax > 0).all():
            raise StageError(
                f"the activations of {name} have the maximum {amax}",
                "a positive number",
                "The calibration conversations never reach that layer, or the model overflows: check the data"
                " and the merged model.",
            )
        largest[name] = amax.float().max().cpu()
    return largest
