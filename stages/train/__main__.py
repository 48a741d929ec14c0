"""Fine-tuning (stage.toml): alone, or as several ranks that torchrun starts."""

import os
import sys

from stages import job
from stages.train import ranks, start

if __name__ == "__main__":
    # These two count before torch is loaded. fit.run reads them all, and names what is missing in an event.
    params = job.read(sys.argv[1]).params if len(sys.argv) == 2 else {}
    if params.get("ranks", 1) > 1 and not ranks.under_torchrun():
        ranks.launch(params["ranks"], sys.argv[1])

    # ranks share their folder
    warn = job.warning if os.environ.get("RANK", "0") == "0" else lambda message, remedy: None
    start.before_torch(warn, params.get("deterministic", False))
    from stages.train import fit

    job.main(fit.run)
