from stages.job import main
from stages.quantize.quantize import run

main(run)
