from stages.data.prepare import run
from stages.job import main

main(run)
