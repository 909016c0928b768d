"""Put a trained run into the package: ``python scripts/ship_model.py RUN``.

Weights go in as bfloat16; the run's configuration, log and curve go to ``docs/runs/NAME``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from scdiva.config import RunConfig, apply_overrides, load_config, save_config
from scdiva.models.scdiva import ScDiVa

LIMIT_MB = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--presets", type=Path, default=Path("src/scdiva/presets"))
    parser.add_argument("--docs", type=Path, default=Path("docs/runs"))
    arguments = parser.parse_args()
    model = ScDiVa.from_pretrained(arguments.run / "bundle", device="cpu")
    target = arguments.presets / model.name
    model.save_pretrained(target, dtype="bfloat16", overwrite=True)
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    if size > LIMIT_MB:
        raise SystemExit(f"{target} has {size:.1f} MB; the package takes at most {LIMIT_MB} MB")
    kept = arguments.docs / model.name
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("log.csv", "curve.png"):
        shutil.copyfile(arguments.run / name, kept / name)
    # the folder of the corpus is nobody else's
    save_config(
        apply_overrides(load_config(arguments.run / "config.toml", RunConfig), ["data.root=."]), kept / "config.toml"
    )
    print(f"{target}: {size:.1f} MB; {kept}")


if __name__ == "__main__":
    main()
