"""What is Annie's on the host: tables and pictures of behaviour, comparison, audit, serving and chat.

forge runs any stages; this package knows the stages of this repository by name, and the files in their
artifacts.
"""

# The folders of stages/ whose artifacts are read here.
DATA, TRAIN, QUANTIZE = "data", "train", "quantize"
EVALUATE, PACKAGE = "evaluate", "package"
SERVER = "server/stages/serving"  # in an artifact of PACKAGE: the programs that serve it
REPORT, ADAPTER = "report", "peft-adapter"  # the artifact types of EVALUATE and TRAIN
