"""The audit of any checkpoint, in the image of this stage: `build.py audit` starts it. It decides nothing of
what the stage makes, and is in no key.

    python -m stages.quantize.audit FOLDER [--base FOLDER] [--vllm VERSION]
"""

from __future__ import annotations

from model import checkpoint_audit

if __name__ == "__main__":
    checkpoint_audit.main()
