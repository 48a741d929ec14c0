"""Milliseconds and bytes per second of decoding one expert stack at the real widths, compared with unpacking
in torch: `python -m bench.decode`.
"""

from functools import partial

import torch

from bench.grouped import measured
from model.layers.projection import Projection
from model.weights import nf4, nvfp4


def main() -> None:
    for form in ("nf4", "nvfp4"):
        for out, inside in ((1856, 2688), (2688, 1856)):
            projection = Projection(128, out, inside, form, torch.bfloat16, "cuda")
            for expert in range(128):
                projection.put(expert, torch.randn(out, inside, device="cuda") * 0.02)
            exact = (nf4 if form == "nf4" else nvfp4).unpack(projection.stored_weights())
            room = torch.empty(128, out, inside + 16, dtype=torch.bfloat16, device="cuda")[:, :, :inside]
            for target in (None, room):
                equal = torch.equal(projection.dense(target), exact.to(torch.bfloat16))
                milliseconds = measured(partial(projection.dense, target))
                moved = (
                    sum(b.numel() * b.element_size() for b in projection.buffers()) + 2 * 128 * out * inside
                )
                print(
                    f"{form:6s} ({out}, {inside}) {'contiguous' if target is None else 'with room':10s}"
                    f" {milliseconds:6.2f} ms {moved / milliseconds / 1e9:5.2f} TB/s "
                    f" {'equal to torch' if equal else 'DIFFERS from torch'}"
                )


if __name__ == "__main__":
    main()
