"""Fine-tuning (stage.toml): alone, or as several ranks that torchrun starts."""

import os
import sys

from stages import job
from stages.train import ranks, start

if __name__ == "__main__":
    # Only these two parameters matter before torch is loaded. fit.run reads all, and reports missing ones.
    params = job.read(sys.argv[1]).params if len(sys.argv) == 2 else {}
    if params.get("ranks", 1) > 1 and not ranks.under_torchrun():
        ranks.launch(params["ranks"], sys.argv[1])

    # All ranks share one folder, so one warning is enough.
    warn = job.warning if os.environ.get("RANK", "0") == "0" else lambda message, remedy: None
    start.before_torch(warn, params.get("deterministic", False))
    from stages.train import fit

    job.main(fit.run)
