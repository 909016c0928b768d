#!/bin/sh
# The tables of docs/results/perturbation.md: sh benchmarks/perturbation.sh DATA OUT
# DATA holds perturb_kang_ifnb.h5ad, perturb_papalexi_eccite303.h5ad and perturb_gasperini_k562_tss366.h5ad.
set -eu
data=$1
out=$2
mkdir -p "$out"
kang="--perturbation-key perturbation --control control --context-key cell_type --kind treatment --split unseen_context"
scdiva evaluate perturbation "$data/perturb_kang_ifnb.h5ad" $kang --seeds 5 --out "$out/kang"
scdiva evaluate perturbation "$data/perturb_kang_ifnb.h5ad" $kang --seeds 5 \
  --filter "cell_type_source=Seurat annotation" --out "$out/kang_author_labels"
scdiva evaluate perturbation "$data/perturb_papalexi_eccite303.h5ad" --perturbation-key perturbation --control control \
  --batch-key batch --library-size-key n_umis_full --split unseen_single --folds 0 --seeds 3 --out "$out/papalexi"
gasperini="--perturbation-key perturbation --control control --batch-key batch --exclude enhancer_only --split seen"
scdiva evaluate perturbation "$data/perturb_gasperini_k562_tss366.h5ad" $gasperini --seeds 3 --out "$out/gasperini"
python benchmarks/perturbation_simulated.py "$out/simulated" --seeds 3
