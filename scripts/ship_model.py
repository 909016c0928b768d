"""Put a trained run into the package: ``python scripts/ship_model.py RUN``.

Weights go in as bfloat16; the run's configuration, log and curve go to ``docs/runs/NAME``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from scdiva.config import LoopConfig, RunConfig, apply_overrides, load_config, save_config
from scdiva.models.scdiva import ScDiVa

LIMIT_MB = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--presets", type=Path, default=Path("src/scdiva/presets"))
    parser.add_argument("--docs", type=Path, default=Path("docs/runs"))
    parser.add_argument(
        "--start-from", default="", help="what the kept configuration calls the model of the first stage"
    )
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
    # a fine-tuning run has no [model] and no files; the folder of the corpus is nobody else's
    text = (arguments.run / "config.toml").read_text(encoding="utf-8")
    kind = RunConfig if "[model]" in text else LoopConfig
    overrides = ["data.root=."] + ([f"start_from={arguments.start_from}"] if kind is RunConfig else [])
    save_config(apply_overrides(load_config(arguments.run / "config.toml", kind), overrides), kept / "config.toml")
    print(f"{target}: {size:.1f} MB; {kept}")


if __name__ == "__main__":
    main()
