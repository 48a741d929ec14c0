from stages import job
from stages.data.prepare import run

job.main(run)
