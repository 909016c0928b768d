#!/bin/sh
# The whole benchmark of gene networks: docs/results/grn.md.
#
#     sh benchmarks/grn.sh DATA TRUTHS OUT
#
# DATA holds the .h5ad files named below, TRUTHS the tables of known regulation (several are under licences that keep
# them out of this repository: docs/evaluation.md). Each command writes a folder of OUT with report.md, report.json and
# rows.jsonl, and takes up where it was left. PYTHON names another interpreter, MODEL another model.
set -eu

DATA=${1:?the folder with the .h5ad files}
TRUTHS=${2:?the folder with the tables of known regulation}
OUT=${3:?the folder for results}
HERE=$(dirname "$0")
mkdir -p "$OUT"

evaluate() {
    name=$1
    shift
    "${PYTHON:-python}" -c "from scdiva.cli import main; main()" evaluate grn "$@" \
        --truth "$TRUTHS/grn_union_signed.tsv.gz" --truth "$TRUTHS/grn_collectri.tsv.gz" \
        --truth "$TRUTHS/grn_trrust_v2_human.tsv.gz" --truth "$TRUTHS/grn_encode_tfchip_subset.parquet" \
        --model "${MODEL:-scdiva-blood-tiny}" --out "$OUT/$name"
}

PBMC="$DATA/frozen_pbmc_donorA.h5ad $DATA/pbmc_10study_3k.h5ad"

# methods were chosen on the first; the others confirm, and were in no training corpus
# shellcheck disable=SC2086 # two files
evaluate pbmc $PBMC
for set in breast_immune_spectra_1k pbmc4k_soupx_1.1k pancreas_baron_h1; do
    evaluate "$set" "$DATA/$set.h5ad"
done

# regressions: on 200 targets, and boosting, the better of the two, on all 4,237 (minutes)
evaluate breast_immune_spectra_1k_regressions "$DATA/breast_immune_spectra_1k.h5ad" --seeds 1 \
    --sampled-targets 200 --methods spearman --methods boosting --methods extra_trees --methods response
evaluate breast_immune_spectra_1k_boosting "$DATA/breast_immune_spectra_1k.h5ad" --seeds 1 \
    --sampled-targets 5000 --methods spearman --methods boosting --methods response

# what the trunk says: minutes
evaluate breast_immune_spectra_1k_attention "$DATA/breast_immune_spectra_1k.h5ad" --max-cells 1000 \
    --methods attention --methods embedding --methods gene_embedding --methods response
evaluate breast_immune_spectra_1k_knockout "$DATA/breast_immune_spectra_1k.h5ad" --max-cells 100 --methods knockout

# what else was tried, and the SPI1 regulon
# shellcheck disable=SC2086
"${PYTHON:-python}" "$HERE/grn_variants.py" "$TRUTHS" "$OUT/grn_variants.md" "$DATA" pbmc=$(echo $PBMC | tr ' ' ,) \
    breast="$DATA/breast_immune_spectra_1k.h5ad"
# shellcheck disable=SC2086
"${PYTHON:-python}" "$HERE/grn_popularity.py" "$TRUTHS" pbmc=$(echo $PBMC | tr ' ' ,) \
    breast_immune_spectra_1k="$DATA/breast_immune_spectra_1k.h5ad" \
    pbmc4k_soupx_1.1k="$DATA/pbmc4k_soupx_1.1k.h5ad" pancreas_baron_h1="$DATA/pancreas_baron_h1.h5ad" \
    >"$OUT/grn_popularity.md"
# shellcheck disable=SC2086
"${PYTHON:-python}" "$HERE/grn_spi1.py" "$TRUTHS/grn_SPI1_targets.tsv" "$OUT" $PBMC
