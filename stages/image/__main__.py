from stages import job
from stages.image.image import run

job.main(run)
