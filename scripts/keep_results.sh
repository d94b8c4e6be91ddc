#!/usr/bin/env bash
# Copy what tables need of every cell with an evaluation, from a folder of `mixlora reproduce` to one that git keeps:
# configuration, losses, scores and answers (packed: pack_predictions.py); no weights.
# Usage: scripts/keep_results.sh [runs/reproduce/mini [results/mini]]
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
source=${1:-runs/reproduce/mini}
kept=${2:-results/mini}

packed() { "$here/.venv/bin/python" "$here/scripts/pack_predictions.py" "$1" "$kept"; }

mkdir -p "$kept"
kept=$(realpath "$kept")
if [ -f "$kept/cells.parquet" ]; then packed unpack; fi
cd "$source"
for cell in */; do
  cell=${cell%/}
  compgen -G "$cell/eval*/results.json" >/dev/null || continue
  for file in "$cell"/{cell.json,config.yaml,result.json,metrics.jsonl,versions.json,parameters.json} \
    "$cell"/eval*/{results.json,predictions.jsonl} "$cell"/interference/{interference.json,timing.jsonl} "$cell"/tsne*/tsne.json; do
    if [ -f "$file" ]; then
      mkdir -p "$kept/$(dirname "$file")"
      sed "s#$here/##g; s#$HOME/#~/#g" "$file" >"$kept/$file" # where pictures lay is nobody else's business
    fi
  done
done
packed pack
echo "kept $(find "$kept" -name cell.json | wc -l) cells in $kept"
