from stages.job import main
from stages.merge.merge import run

main(run)
