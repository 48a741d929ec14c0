"""Fine-tuning with TRL and PEFT (stage.toml)."""

from stages import job
from stages.train import fit

if __name__ == "__main__":
    job.main(fit.run)
