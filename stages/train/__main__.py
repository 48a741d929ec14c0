"""Fine-tuning (stage.toml): alone, or as several ranks that torchrun starts."""

import sys

from stages import job
from stages.train import ranks

if __name__ == "__main__":
    count = job.read(sys.argv[1]).params["ranks"] if len(sys.argv) == 2 else 1
    if count > 1 and not ranks.started():
        ranks.launch(count, sys.argv[1])

    from stages.train import fit

    job.main(fit.run)
