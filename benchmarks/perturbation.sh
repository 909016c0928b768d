#!/bin/sh
# The baselines of perturbation: docs/results/perturbation.md.
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

# only these methods: the model is fine-tuned for every split, which takes long
methods() {
    for method in no_change mean "$@" ridge random_condition; do
        printf -- '--methods %s ' $method
    done
}
CONTEXT=$(methods additive nearest_context)
SINGLE=$(methods nearest_perturbation random_forest knn)
CORPUS="$SINGLE --methods ridge_corpus --methods random_forest_corpus --methods knn_corpus"

# interferon beta in each cell type; types of half of the cells are transferred labels, those of the second run are not
KANG="$DATA/perturb_kang_ifnb.h5ad --kind treatment --context-key cell_type --split unseen_context --no-corpus $CONTEXT"
evaluate kang $KANG --seeds "$SEEDS"
evaluate kang_author $KANG --seeds "$SEEDS" --filter "cell_type_source=Seurat annotation"

# knock-outs one at a time
evaluate papalexi "$DATA/perturb_papalexi_eccite303.h5ad" --batch-key batch --library-size-key n_umis_full \
    --split unseen_single --folds 0 --min-coverage 0 $CORPUS --seeds "$SEEDS"
evaluate gasperini "$DATA/perturb_gasperini_k562_tss366.h5ad" --exclude enhancer_only --batch-key batch \
    --split unseen_single --folds 0 --min-coverage 0 $CORPUS --seeds "$SEEDS"

# the simulator
"$PYTHON" -c "
import numpy as np, sys
from scdiva.datasets import simulate_perturbations
simulate_perturbations(np.random.default_rng(0)).to_adata().write_h5ad(sys.argv[1])
" "$OUT/simulated.h5ad"
evaluate simulated_unseen_single "$OUT/simulated.h5ad" --split unseen_single --no-corpus $SINGLE --seeds "$SEEDS"
evaluate simulated_combination "$OUT/simulated.h5ad" --split combination --no-corpus $SINGLE --methods additive \
    --seeds "$SEEDS"

# what it does to the figures if control cells are shared between prediction and truth
"$PYTHON" "$HERE/perturbation_shared_controls.py" "$DATA"
