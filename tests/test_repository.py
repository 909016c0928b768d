"""The files around the package: configurations, examples and documents are true of the code."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from scdiva.config import RunConfig, apply_overrides, load_config
from scdiva.tasks.pretrain import pretrain

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_load_and_name_no_folder_of_one_machine(path):
    config = load_config(path, RunConfig)
    assert config.data.files
    assert not Path(config.data.root).is_absolute()
    assert all(file.licence for file in config.data.files)


@pytest.mark.shared
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_run_when_shrunk_to_two_steps(path, shared_data, tmp_path):
    config = load_config(path, RunConfig)
    smallest = sorted(config.data.files, key=lambda file: (shared_data / file.path).stat().st_size)[:3]
    small = apply_overrides(
        config.model_copy(update={"data": config.data.model_copy(update={"files": tuple(smallest)})}),
        [
            f"data.root={str(shared_data)!r}",
            "model.n_latent=4",
            "model.n_embedding=4",
            "training.max_steps=2",
            "training.n_validation_cells=64",
            "training.batch_size=32",
        ],
    )
    trained = pretrain(small, tmp_path / "run", progress=False)
    assert trained.fit.last_step == 2
    assert trained.model.n_latent == 4


def test_the_bundled_model_was_trained_by_the_configuration_in_the_repository():
    kept = load_config(REPOSITORY / "docs" / "runs" / "scdiva-blood-tiny" / "config.toml", RunConfig)
    assert kept == load_config(REPOSITORY / "configs" / "blood-tiny.toml", RunConfig)


def test_the_example_follows_a_cell_through_every_stage(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["follow_one_cell.py"])
    runpy.run_path(str(REPOSITORY / "examples" / "follow_one_cell.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert [line[0] for line in printed.splitlines() if line[:1].isdigit()] == list("1234567")
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
