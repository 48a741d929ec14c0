"""The audit of any checkpoint, in the image of this stage; `build.py audit` starts it. The stage's output
does not depend on it, so it is in no key.

    python -m stages.quantize.audit FOLDER [--base FOLDER [--deep]] [--vllm VERSION]
"""

from __future__ import annotations

from model import checkpoint_audit
from stages import job


def progress(done: int, total: int) -> None:
    job.progress(done / 1e9, total / 1e9, "GB", "comparing")


if __name__ == "__main__":
    checkpoint_audit.main(progress)
