"""Names and abbreviations that annotations use and the Cell Ontology does not, or uses for something else.

Written by hand, after the annotations of scanpy's and Seurat's tutorials, Azimuth and CellTypist. An entry is compared
by its words, in any order, without "cell": ``"CD4 naive"`` also stands for "Naive CD4+ cells". Names whose meaning
depends on the author stay out: "MDC" (myeloid or monocyte-derived?), "Stromal", "Cycling", "Endo", "T/NK".
"""

from __future__ import annotations

from collections.abc import Mapping

ANYWHERE: Mapping[str, str] = {
    # T cells
    "T": "CL:0000084",
    "CD3+ T": "CL:0000084",
    "CD4": "CL:0000624",
    "CD4 T": "CL:0000624",
    "CD8": "CL:0000625",
    "CD8 T": "CL:0000625",
    "CD4 naive": "CL:0000895",
    "CD4 Tn": "CL:0000895",
    "CD4+/CD45RA+/CD25- naive T": "CL:0000895",
    "CD8 naive": "CL:0000900",
    "CD8 Tn": "CL:0000900",
    "CD8 naive cytotoxic T": "CL:0000900",
    "CD8+/CD45RA+ naive cytotoxic": "CL:0000900",
    "CD4 memory": "CL:0000897",
    "CD4+/CD45RO+ memory": "CL:0001204",
    "CD8 memory": "CL:0000909",
    "CD4 Tcm": "CL:0000904",
    "CD4 central memory": "CL:0000904",
    "CD8 Tcm": "CL:0000907",
    "CD8 central memory": "CL:0000907",
    "CD4 Tem": "CL:0000905",
    "CD4 effector memory": "CL:0000905",
    "CD8 Tem": "CL:0000913",
    "CD8 effector memory": "CL:0000913",
    "CD4 Temra": "CL:0001087",
    "CD8 Temra": "CL:0001062",
    "CD4 CTL": "CL:0000934",
    "CD4 cytotoxic": "CL:0000934",
    "CD8 CTL": "CL:0000794",
    "CD8 cytotoxic": "CL:0000794",
    "CD4 exhausted": "CL:0020030",
    "CD8 exhausted": "CL:0020031",
    "CTL": "CL:0000910",
    "Temra": "CL:4030002",
    "Tex": "CL:0011025",
    "Th": "CL:0000912",
    "Th1": "CL:0000545",
    "Th2": "CL:0000546",
    "Th17": "CL:0000899",
    "Tfh": "CL:0002038",
    "Treg": "CL:0000815",
    # CD4+ regulatory T cells are sorted and defined by CD25; the Cell Ontology has no term without it
    "CD4 Treg": "CL:0000792",
    "CD4 CD25 Treg": "CL:0000792",
    "gdT": "CL:0000798",
    "gd T": "CL:0000798",
    "Tgd": "CL:0000798",
    "MAIT": "CL:0000940",
    "MAIT T": "CL:0000940",
    "NKT": "CL:0000814",
    "DN thymocyte": "CL:0002489",
    "double-negative thymocyte": "CL:0002489",
    "DP thymocyte": "CL:0000809",
    # NK cells and innate lymphoid cells
    "NK": "CL:0000623",
    "CD56 NK": "CL:0000623",
    "CD16 NK": "CL:0000939",
    "CD56bright NK": "CL:0000938",
    "CD56dim NK": "CL:0000939",
    "ILC": "CL:0001065",
    "ILC2": "CL:0001069",
    "ILC3": "CL:0001071",
    # B cells
    "B": "CL:0000236",
    "B naive": "CL:0000788",
    "B memory": "CL:0000787",
    "B GC": "CL:0000844",
    "GCB": "CL:0000844",
    "plasma": "CL:0000786",
    # monocytes and macrophages
    "Mono": "CL:0000576",
    "CD14 Mono": "CL:0001054",
    "Classical Mono": "CL:0000860",
    "cMono": "CL:0000860",
    # CD16+ without CD14 is the non-classical monocyte of blood. CL's synonym "CD16+ monocyte" is the wider CD14+ CD16+
    # one, which does not contain it
    "CD16 Mono": "CL:0002396",
    "FCGR3A Mono": "CL:0002396",
    "ncMono": "CL:0000875",
    "Nonclassical Mono": "CL:0000875",
    "CD14 CD16 Mono": "CL:0002397",
    "Mac": "CL:0000235",
    "MΦ": "CL:0000235",
    "Mast": "CL:0000097",
    # dendritic cells; "DC1" and "DC2" as they are used today, not as in CL's synonyms, where DC2 is a plasmacytoid one
    "DC": "CL:0000451",
    "cDC": "CL:0000990",
    "cDC1": "CL:0002394",
    "DC1": "CL:0002394",
    "cDC2": "CL:0002399",
    "DC2": "CL:0002399",
    "mDC": "CL:0000782",
    "myeloid DC": "CL:0000782",
    "moDC": "CL:0011031",
    "pDC": "CL:0000784",
    "plasmacytoid DC": "CL:0000784",
    "ASDC": "CL:0017009",
    # platelets and red cells
    "Mk": "CL:0000556",
    "RBC": "CL:0000232",
    "Ery": "CL:0000232",
    "Eryth": "CL:0000232",
    # progenitors
    "HSC": "CL:0000037",
    "HSPC": "CL:0008001",
    "MPP": "CL:0000837",
    "CLP": "CL:0000051",
    "CMP": "CL:0000049",
    "GMP": "CL:0000557",
    "MEP": "CL:0000050",
    "MkP": "CL:0000553",
    # other; words that are types only with "cell"
    "stem": "CL:0000034",
    "germ": "CL:0000586",
    "goblet": "CL:0000160",
    "tuft": "CL:0002204",
    "Paneth": "CL:0000510",
    "Schwann": "CL:0002573",
    "Kupffer": "CL:0000091",
    "Sertoli": "CL:0000216",
    "Leydig": "CL:0000178",
    "Merkel": "CL:0000242",
    "microglia": "CL:0000129",
    "WBC": "CL:0000738",
    "immune": "CL:0000738",
    "LEC": "CL:0002138",
    "SMC": "CL:0000192",
    "VSMC": "CL:0000359",
    "OPC": "CL:0002453",
}
"""Abbreviations that mean one thing in any tissue."""

IN_TISSUE: Mapping[str, Mapping[str, str]] = {
    "blood": {
        "CD34": "CL:0008001",
    },
    "pancreas": {
        "alpha": "CL:0000171",
        "beta": "CL:0000169",
        "delta": "CL:0000173",
        "epsilon": "CL:0005019",
        "gamma": "CL:0002275",
        "PP": "CL:0002275",
        "acinar": "CL:0002064",
        "ductal": "CL:0002079",
        "duct": "CL:0002079",
        "endocrine": "CL:0008024",
        "stellate": "CL:0002410",
        "PSC": "CL:0002410",
        # the Cell Ontology has no terms for the two states
        "activated stellate": "CL:0002410",
        "quiescent stellate": "CL:0002410",
    },
    "brain": {
        "Astro": "CL:0000127",
        "Oligo": "CL:0000128",
        "Micro": "CL:0000129",
        "Exc": "CL:0000679",
        "Ex": "CL:0000679",
        "Inh": "CL:0000617",
        "In": "CL:0000617",
    },
    "lung": {
        "AT1": "CL:0002062",
        "AT2": "CL:0002063",
        "club": "CL:0000158",
    },
    "heart": {
        "CM": "CL:0000746",
    },
}
"""Abbreviations that mean something in one tissue only."""

AMBIGUOUS: Mapping[str, tuple[str, ...]] = {
    "NK T": ("CL:0000623", "CL:0000084", "CL:0000814"),
    "MDC": ("CL:0000782", "CL:0011031"),
}
"""Labels that authors use for different things, with the terms they may mean; never matched.

"T_NK" mostly is "T or NK", which has the words of "NK T cell".
"""
