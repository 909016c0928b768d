"""The files around the package: configurations, examples and documents are true of the code."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from scdiva.config import RunConfig, apply_overrides, load_config
from scdiva.models.scdiva.presets import PRESETS
from scdiva.tasks.pretrain import pretrain

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_load_and_name_no_folder_of_one_machine(path):
    config = load_config(path, RunConfig)
    assert config.data.files
    assert not Path(config.data.root).is_absolute()
    # "." is a user's own folder
    assert all(file.licence or file.path == "." for file in config.data.files)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_size_has_its_configuration(name):
    assert load_config(REPOSITORY / "configs" / f"{name}.toml", RunConfig).model == PRESETS[name]


SHRUNK = {
    "native": ["model.n_latent=4", "model.n_embedding=4", "model.n_hidden=8"],
    "official": ["model.n_layers=1", "model.width=8", "model.n_heads=2", "model.n_hidden=16", "model.max_tokens=32"],
}
SHRUNK_TRUNK = [f"model.trunk.{key}" for key in ("width=8", "n_heads=2", "n_hidden=16", "n_layers=1", "max_tokens=32")]


def shrunk(path: Path, data: Path) -> RunConfig:
    """The same run on its three smallest files, with the smallest network, for two steps."""
    config = load_config(path, RunConfig)
    named = [file for file in config.data.files if (data / file.path).is_file()]
    few = tuple(sorted(named, key=lambda file: (data / file.path).stat().st_size)[:3])
    if not few:  # a whole folder
        few = tuple(file.model_copy(update={"path": "breast_scdeconr_small.h5ad"}) for file in config.data.files[:1])
    overrides = [f"data.root={str(data)!r}", "data.num_workers=0", "data.min_cells_per_gene=3", 'start_from=""']
    overrides += [f"training.{key}" for key in ("max_steps=2", "n_validation_cells=64", "batch_size=16")]
    overrides += SHRUNK[config.model.architecture]
    if config.model.architecture == "native" and config.model.trunk.n_layers:
        overrides += SHRUNK_TRUNK
    small = config.model_copy(update={"data": config.data.model_copy(update={"files": few})})
    return apply_overrides(small, overrides)


@pytest.mark.shared
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_run_when_shrunk_to_two_steps(path, shared_data, tmp_path):
    config = shrunk(path, shared_data)
    trained = pretrain(config, tmp_path / "run", progress=False)
    assert trained.fit.last_step == 2
    assert trained.model.config == config.model


@pytest.mark.shared
def test_the_bundled_model_is_trained_in_two_stages(shared_data, tmp_path):
    folder = REPOSITORY / "configs"
    assert load_config(folder / "blood-tiny.toml", RunConfig).start_from == "runs/blood-tiny-anchor/bundle"
    first = pretrain(shrunk(folder / "blood-tiny-anchor.toml", shared_data), tmp_path / "anchor", progress=False)
    second = apply_overrides(shrunk(folder / "blood-tiny.toml", shared_data), [f"start_from={str(first.path)!r}"])
    trained = pretrain(second, tmp_path / "run", progress=False)
    assert trained.model.vocabulary == first.model.vocabulary
    assert trained.model.details["training"]["base_model"] == "scdiva-blood-tiny-anchor"
    assert trained.model.labels.fields == ("tissue", "assay")


def test_the_bundled_model_was_trained_by_the_configuration_in_the_repository():
    kept = load_config(REPOSITORY / "docs" / "runs" / "scdiva-blood-tiny" / "config.toml", RunConfig)
    assert kept == load_config(REPOSITORY / "configs" / "blood-tiny.toml", RunConfig)


def test_the_example_follows_a_cell_through_every_stage(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["follow_one_cell.py"])
    runpy.run_path(str(REPOSITORY / "examples" / "follow_one_cell.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert [line[0] for line in printed.splitlines() if line[:1].isdigit()] == list("12345678")
    assert "z_BZ (1, 128)" in printed


def test_links_between_the_documents_lead_somewhere():
    for document in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_python_file_of_the_readme_tree_exists():
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("```\nsrc/scdiva/\n")[1].split("```")[0]
    names = [name for line in tree.splitlines() if line.startswith("  ") for name in line.split("  ")[1].split()]
    assert len(names) > 20
    for name in names:
        assert (REPOSITORY / "src" / "scdiva" / name).exists(), name


def test_no_text_names_a_folder_of_one_machine():
    pattern = re.compile(r"/work/|/tmp/|/root/|/home/")
    for folder in ("src", "docs", "configs", "examples", "benchmarks", "scripts"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".toml", ".json", ".csv"):
                found = pattern.search(path.read_text(encoding="utf-8"))
                assert found is None, f"{path.relative_to(REPOSITORY)}: {found}"
