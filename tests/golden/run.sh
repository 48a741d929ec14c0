#!/usr/bin/env bash
# train, as it was started. Its output goes where the job says.
set -euo pipefail
cd '/home/annie/a clone'
exec env -i HOME=/tmp/home python -m stages.train 03-train.json
