#!/bin/sh
# Effects of perturbations, ours beside baselines: docs/results/perturbation.md.
#
#     sh benchmarks/perturbation.sh DATA OUT [SEEDS]
#
# DATA holds the .h5ad files named below; each command writes a folder of OUT with report.md, report.json and rows.jsonl,
# and takes up where it was left. PYTHON names another interpreter, MODEL another model (for its gene embeddings).
set -eu

DATA=${1:?the folder with the .h5ad files}
OUT=${2:?the folder for results}
SEEDS=${3:-3}
HERE=$(dirname "$0")
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"

evaluate() {
    name=$1
    shift
    "$PYTHON" -c "from scdiva.cli import main; main()" evaluate perturbation "$@" --perturbation-key perturbation \
        --control control --model "${MODEL:-scdiva-blood-tiny}" --out "$OUT/$name"
}

# only these methods; where the network is trained for every split, it takes minutes for each
methods() {
    for method in no_change mean "$@" ridge random_condition; do
        printf -- '--methods %s ' $method
    done
}
CONTEXT=$(methods scdiva additive nearest_context)
SINGLE=$(methods scdiva_simple nearest_perturbation random_forest knn ridge_corpus random_forest_corpus knn_corpus \
    ridge_sets random_forest_sets)

# interferon beta in each cell type; types of half of the cells are transferred labels, those of the second run are not
KANG="$DATA/perturb_kang_ifnb.h5ad --kind treatment --context-key cell_type --split unseen_context --no-corpus $CONTEXT"
evaluate kang $KANG --seeds "$SEEDS"
evaluate kang_author $KANG --seeds "$SEEDS" --filter "cell_type_source=Seurat annotation"

# knock-outs one at a time; in five folds also with the network
PAPALEXI="$DATA/perturb_papalexi_eccite303.h5ad --batch-key batch --library-size-key n_umis_full --min-coverage 0"
evaluate papalexi $PAPALEXI --split unseen_single --folds 0 $SINGLE --seeds "$SEEDS"
evaluate papalexi_network $PAPALEXI --split unseen_single --folds 5 --methods scdiva $SINGLE --seeds 1
GASPERINI="$DATA/perturb_gasperini_k562_tss366.h5ad --exclude enhancer_only --batch-key batch --min-coverage 0"
evaluate gasperini $GASPERINI --split unseen_single --folds 0 $SINGLE --seeds "$SEEDS"
evaluate gasperini_seen $GASPERINI --split seen --methods scdiva_simple --methods no_change --methods additive \
    --seeds "$SEEDS"

# the simulator, where it is known which pairs interact
"$PYTHON" "$HERE/perturbation_simulated.py" "$OUT/simulated" --seeds "$SEEDS"

# what it does to the figures if control cells are shared between prediction and truth
"$PYTHON" "$HERE/perturbation_shared_controls.py" "$DATA"
