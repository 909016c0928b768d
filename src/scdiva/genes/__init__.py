"""Genes: the vocabulary, and how the genes of any file are aligned to it.

Everything works offline, from the tables shipped in ``scdiva/genes/tables``. A gene *index* ``g`` (0 to G-1) is the
column of a counts matrix in vocabulary order; a *row* ``g + 2`` is the token that stands for the gene in a model.
"""

from scdiva.genes.alignment import GeneAlignment, GeneStatus, align_genes
from scdiva.genes.species import detect_species, require_human
from scdiva.genes.tables_io import gene_table, mouse_to_human
from scdiva.genes.vocabulary import FIRST_GENE_ROW, MASK_ROW, N_ROWS_AFTER_GENES, PAD_ROW, GeneVocabulary

__all__ = [
    "FIRST_GENE_ROW",
    "MASK_ROW",
    "N_ROWS_AFTER_GENES",
    "PAD_ROW",
    "GeneAlignment",
    "GeneStatus",
    "GeneVocabulary",
    "align_genes",
    "detect_species",
    "gene_table",
    "mouse_to_human",
    "require_human",
]
