#!/usr/bin/env bash
# What stages.train.warm compiles and tunes on this GPU, and that the next process does neither. About five minutes on an H100.
#
#   bench/warm_check.sh [FOLDER]      PYTHON=... names the train environment's python (default: python3)
#
# Five processes, each of which says what it compiled, loaded and tuned, and in how many seconds:
#   searching   model/layers/tuning.json has nothing for this GPU, and nothing is kept yet: as on a GPU of next year
#   again       the same once more: 0 compiled, 0 tuned
#   seeded      another folder, which begins as a copy of the first one: 0 compiled, 0 tuned
#   table       model/layers/tuning.json as it is, nothing kept: on a GPU that it has, 0 tuned
#   table-again the same once more: 0 compiled, 0 tuned
# Exit 1 where a 0 is none. FOLDER is made, and kept: FOLDER/*/job.json, FOLDER/*/warm.json, FOLDER/*.log
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
python=${PYTHON:-python3}
mkdir -p "$folder/hidden"
folder=$(cd "$folder" && pwd)
cp -r "$here/model" "$here/stages" "$folder/hidden/"
echo '{"gpus": {}}' > "$folder/hidden/model/layers/tuning.json"

# The job of stages.train.warm: every parameter of stage train, with those of a 30B model on one GPU.
job() { # NAME -> FOLDER/NAME/job.json
    mkdir -p "$folder/$1/output" "$folder/$1/scratch"
    "$python" - "$here/stages/train/stage.toml" "$folder/$1" <<'PYTHON'
import json, sys, tomllib
from pathlib import Path

contract, folder = Path(sys.argv[1]), Path(sys.argv[2])
params = {name: its["default"] for name, its in tomllib.loads(contract.read_text())["parameters"].items()}
params |= {"method": "qlora", "targets": "all", "precision": "bfloat16", "gradient_checkpointing": True}
job = {"stage": "warm", "params": params, "inputs": {}, "sources": {}, "secrets": {}, "output": str(folder / "output"),
       "scratch": str(folder / "scratch"), "seed": 7, "device": "cuda", "provenance": {}}
(folder / "job.json").write_text(json.dumps(job, indent=1))
PYTHON
}

warm() { # NAME, CODE, KERNELS, SEED, then words that have to be 0
    local name=$1 code=$2 kernels=$3 seed=$4 began=$SECONDS
    shift 4
    job "$name"
    mkdir -p "$folder/$kernels"
    if ! (cd "$code" && ANNIE_KERNELS="$folder/$kernels" ANNIE_KERNELS_SEED="$seed" PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" "$python" -m stages.train.warm "$folder/$name/job.json") \
        > "$folder/$name.log" 2>&1; then
        tail -n 20 "$folder/$name.log"
        echo "$name: failed; expected exit status 0. The whole log: $folder/$name.log" >&2
        exit 1
    fi
    mv "$folder/$name/output/warm.json" "$folder/$name/warm.json"
    "$python" - "$name" "$folder/$name/warm.json" $((SECONDS - began)) "$@" <<'PYTHON'
import json, sys

name, path, seconds, *zero = sys.argv[1:]
made = json.load(open(path))
print(f"{name:12s} {made['compiled']:4d} compiled {made['loaded']:4d} loaded {made['tuned']:4d} tuned {made['bytes'] / 1e6:7.1f} MB {seconds:>5s} s  {made['folder']}", flush=True)
if wrong := [f"{made[word]} {word}" for word in zero if made[word]]:
    sys.exit(f"{name}: {', '.join(wrong)}; expected 0. {path} and the log beside it say more")
PYTHON
}

none=$folder/no-seed
warm searching "$folder/hidden" kernels-a "$none"
warm again "$folder/hidden" kernels-a "$none" compiled tuned
warm seeded "$folder/hidden" kernels-b "$folder/kernels-a" compiled tuned
warm table "$here" kernels-c "$none"
warm table-again "$here" kernels-c "$none" compiled tuned
cmp -s <("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["kernels"]["chosen"])' "$folder/searching/warm.json") \
       <("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["kernels"]["chosen"])' "$folder/again/warm.json") \
    || { echo "again: other configurations than in the search; expected the same. Compare $folder/{searching,again}/warm.json" >&2; exit 1; }
echo "all as expected; kept in $folder"
