"""The audit of any checkpoint, in the image of this stage; `build.py audit` starts it. The stage's output
does not depend on it, so it is in no key.

    python -m stages.quantize.audit FOLDER [--base FOLDER] [--vllm VERSION]
"""

from __future__ import annotations

from model import checkpoint_audit

if __name__ == "__main__":
    checkpoint_audit.main()
