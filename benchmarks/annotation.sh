#!/bin/sh
# The whole benchmark of annotation: docs/results/annotation.md.
#
#     sh benchmarks/annotation.sh DATA OUT [SEEDS]
#
# DATA holds the .h5ad files named below; each command writes a folder of OUT with report.md, report.json, report.png and
# rows.jsonl, and takes up where it was left. CellTypist needs the extra "eval". PYTHON names another interpreter, MODEL
# another model. Fine-tuning takes minutes for each run: add --methods lora --methods finetune and the other methods.
set -eu

DATA=${1:?the folder with the .h5ad files}
OUT=${2:?the folder for results}
SEEDS=${3:-5}
HERE=$(dirname "$0")
MAPS=$HERE/label_maps
mkdir -p "$OUT"

evaluate() {
    name=$1
    shift
    "${PYTHON:-python}" -c "from scdiva.cli import main; main()" evaluate annotation "$@" \
        --model "${MODEL:-scdiva-blood-tiny}" --seeds "$SEEDS" --out "$OUT/$name"
}

# within sets: 80/20, few labels, one type left out at a time
for set in pbmc3k zheng_sorted7_3500 breast_immune_spectra_1k heart_san_1k pdac_moncada_1.9k sc_mixology_cell_lines; do
    evaluate "$set" "$DATA/$set.h5ad" --per-type 5 --per-type 20 --open-set
done

# across sets, over labels in common; CD4 and CD8 T cells apart, and merged
evaluate pbmc3k_to_zheng "$DATA/pbmc3k.h5ad" --map "$MAPS/pbmc3k.tsv" \
    --test "$DATA/zheng_sorted7_3500.h5ad" --test-map "$MAPS/zheng_sorted7_3500.tsv" \
    --merge "$MAPS/merged_t_cells.tsv" --per-type 5 --per-type 20
evaluate zheng_to_pbmc3k "$DATA/zheng_sorted7_3500.h5ad" --map "$MAPS/zheng_sorted7_3500.tsv" \
    --test "$DATA/pbmc3k.h5ad" --test-map "$MAPS/pbmc3k.tsv" \
    --merge "$MAPS/merged_t_cells.tsv" --per-type 5 --per-type 20
evaluate zheng_to_pbmc4k "$DATA/zheng_sorted7_3500.h5ad" --map "$MAPS/zheng_sorted7_3500.tsv" \
    --test "$DATA/pbmc4k_sub.h5ad" --test-map "$MAPS/pbmc4k_sub.tsv" \
    --merge "$MAPS/merged_t_cells.tsv" --per-type 5 --per-type 20
# 832 cells whose labels are the authors'; the others were transferred or given by rule
evaluate pbmc3k_to_kang "$DATA/pbmc3k.h5ad" --map "$MAPS/pbmc3k.tsv" \
    --test "$DATA/perturb_kang_ifnb.h5ad" --test-map "$MAPS/perturb_kang_ifnb.tsv" \
    --filter "cell_type_source=Seurat annotation" \
    --merge "$MAPS/merged_t_cells.tsv" --per-type 5 --per-type 20

# across sets that had no part in choosing methods: blood and tumour, normal pancreas and tumour
evaluate breast_to_pbmc3k "$DATA/breast_immune_spectra_1k.h5ad" --map "$MAPS/breast_immune_spectra_1k.tsv" \
    --test "$DATA/pbmc3k.h5ad" --test-map "$MAPS/pbmc3k.tsv" \
    --merge "$MAPS/merged_t_cells.tsv" --per-type 5 --per-type 20
evaluate pbmc3k_to_breast "$DATA/pbmc3k.h5ad" --map "$MAPS/pbmc3k.tsv" \
    --test "$DATA/breast_immune_spectra_1k.h5ad" --test-map "$MAPS/breast_immune_spectra_1k.tsv" \
    --merge "$MAPS/merged_t_cells.tsv" --per-type 5 --per-type 20
evaluate baron_to_pdac "$DATA/pancreas_baron_h1.h5ad" --map "$MAPS/pancreas_baron_h1.tsv" \
    --test "$DATA/pdac_moncada_1.9k.h5ad" --test-map "$MAPS/pdac_moncada_1.9k.tsv" --per-type 5 --per-type 20
evaluate pdac_to_baron "$DATA/pdac_moncada_1.9k.h5ad" --map "$MAPS/pdac_moncada_1.9k.tsv" \
    --test "$DATA/pancreas_baron_h1.h5ad" --test-map "$MAPS/pancreas_baron_h1.tsv" --per-type 5 --per-type 20

# across donors: three to train on, the fourth to test on, each in turn
[ -e "$OUT/pancreas_baron.h5ad" ] || "${PYTHON:-python}" "$HERE/merge.py" "$OUT/pancreas_baron.h5ad" \
    "$DATA/pancreas_baron_h1.h5ad:donor" "$DATA/pancreas_baron_h234.h5ad:batch"
evaluate pancreas_donors "$OUT/pancreas_baron.h5ad" --group-key batch --per-type 5 --per-type 20
