"""Fine-tuning (stage.toml): alone, or as several ranks that torchrun starts."""

import os
import sys

from nemotron import determinism, kernel_cache
from stages import job
from stages.train import ranks

if __name__ == "__main__":
    params = job.read(sys.argv[1]).params if len(sys.argv) == 2 else {"ranks": 1, "deterministic": False}
    if params["ranks"] > 1 and not ranks.started():
        ranks.launch(params["ranks"], sys.argv[1])

    # All before torch is loaded. Graphs of a dozen sizes share one pool of memory; in segments of fixed sizes
    # each leaves pieces that the next cannot use, a gigabyte a graph on an H100.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if params["deterministic"]:
        determinism.before_torch()
    # ranks share their folder
    kernel_cache.prepare(job.warning if os.environ.get("RANK", "0") == "0" else lambda message, remedy: None)
    from stages.train import fit

    job.main(fit.run)
