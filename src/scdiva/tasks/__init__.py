"""Tasks: one file per task; arrays in, a result dataclass out."""
