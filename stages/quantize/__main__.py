from model.layers import kernel_cache
from stages import job

kernel_cache.prepare(job.warning)  # before torch is loaded
from stages.quantize.quantize import run  # noqa: E402

job.main(run)
