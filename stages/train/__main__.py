"""Fine-tuning (stage.toml): alone, or as several ranks that torchrun starts."""

import os
import sys

from stages import job
from stages.train import ranks

if __name__ == "__main__":
    count = job.read(sys.argv[1]).params["ranks"] if len(sys.argv) == 2 else 1
    if count > 1 and not ranks.started():
        ranks.launch(count, sys.argv[1])

    # Before torch is loaded. Graphs of a dozen sizes share one pool of memory; in segments of fixed sizes each leaves pieces that the
    # next cannot use, a gigabyte a graph on an H100.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from stages.train import fit

    job.main(fit.run)
