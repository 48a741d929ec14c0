from stages import job
from stages.merge.merge import run

job.main(run)
