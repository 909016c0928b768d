#!/bin/sh
# The whole benchmark of integration: docs/results/integration.md.
#
#     sh benchmarks/integration.sh DATA OUT [SEEDS]
#
# DATA holds the .h5ad files named below; each command writes a folder of OUT with report.md, report.json, report.png and
# rows.jsonl, and takes up where it was left. Harmony, scVI, scANVI and half of the metrics need the extra "eval". PYTHON
# names another interpreter, MODEL another model. Most of the time goes to scVI and scANVI.
set -eu

DATA=${1:?the folder with the .h5ad files}
OUT=${2:?the folder for results}
SEEDS=${3:-3}
HERE=$(dirname "$0")
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"

merge() {
    name=$1
    shift
    [ -e "$OUT/$name.h5ad" ] || "$PYTHON" "$HERE/merge.py" "$OUT/$name.h5ad" "$@"
}

merge baron "$DATA/pancreas_baron_h1.h5ad:donor" "$DATA/pancreas_baron_h234.h5ad:batch"
merge lines "$DATA/sc_mixology_cell_lines.h5ad:batch" "$DATA/cell_lines_10x_5cl_supercell.h5ad"
merge tech "$DATA/pbmc_3tech_1k.h5ad:batch" --label-key cell_type_pred  # predicted labels: not the truth

for set in baron lines tech; do
    "$PYTHON" -c "from scdiva.cli import main; main()" evaluate integration "$OUT/$set.h5ad" --batch-key batch \
        --label-key cell_type --model "${MODEL:-scdiva-blood-tiny}" --seeds "$SEEDS" --out "$OUT/$set"
done
# the published protocol trains the whole network: minutes per seed
"$PYTHON" -c "from scdiva.cli import main; main()" evaluate integration "$OUT/baron.h5ad" --batch-key batch \
    --label-key cell_type --model "${MODEL:-scdiva-blood-tiny}" --seeds "$SEEDS" --out "$OUT/baron_published" \
    --methods pca --methods harmony --methods random --methods scanvi --methods scdiva_labels \
    --methods scdiva_published --methods oracle
"$PYTHON" "$HERE/unseen_batch.py" "$OUT/baron.h5ad" --out "$OUT/unseen_batch.json"
