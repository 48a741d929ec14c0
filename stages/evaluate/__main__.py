from stages.evaluate.evaluate import run
from stages.job import main

main(run)
