from stages import job
from stages.package.package import run

job.main(run)
