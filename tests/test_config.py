from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scdiva.config import (
    DataConfig,
    FileConfig,
    LoopConfig,
    OptimConfig,
    RunConfig,
    TrainingConfig,
    apply_overrides,
    atomic_path,
    changed_keys,
    dump_config,
    load_config,
    parse_config,
    save_config,
)
from scdiva.errors import ConfigError

_text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
_files = st.builds(
    FileConfig,
    path=_text,
    layer=st.none() | _text.filter(bool),
    batch_key=st.none() | _text.filter(bool),
    exclude_batches=st.lists(_text, max_size=3).map(tuple),
)
_share = st.floats(0, 1, exclude_max=True)
_configs = st.builds(
    RunConfig,
    seed=st.integers(0, 2**53),
    name=_text,
    data=st.builds(
        DataConfig, root=_text, files=st.lists(_files, max_size=3).map(tuple), heldout_fraction=_share.filter(bool)
    ),
    optim=st.builds(
        OptimConfig,
        lr=st.floats(1e-12, 1e3),
        betas=st.tuples(_share, _share),
        schedule=st.sampled_from(["cosine", "constant"]),
    ),
    training=st.builds(TrainingConfig, max_steps=st.integers(1, 10**9), max_minutes=st.floats(0, 1e6)),
)


@given(_configs)
@settings(max_examples=60, deadline=None)
def test_round_trip(config):
    assert parse_config(dump_config(config)) == config


def test_a_file_names_only_what_differs(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('seed = 4\n[optim]\nlr = 1\n[[data.files]]\npath = "a.h5ad"\nbatch_key = ""\n')
    config = load_config(path)
    assert config.seed == 4
    assert config.optim == OptimConfig(lr=1.0)
    assert config.data.files == (FileConfig(path="a.h5ad", batch_key=None),)
    save_config(config, path)
    assert load_config(path) == config


def test_frozen():
    with pytest.raises(ValidationError):
        LoopConfig().seed = 3


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("[optim]\nlearning_rte = 1", "unknown key optim.learning_rte", "remove it"),
        ("[optim]\nlrr = 1", "unknown key optim.lrr", "did you mean optim.lr?"),
        ("[trainin]\nmax_steps = 1", "unknown key trainin", "did you mean training?"),
        ('[[data.files]]\npath = "a"\nlayr = "x"', "unknown key data.files.0.layr", "did you mean data.files.0.layer?"),
        ("[[data.files]]\nlayer = 'x'", "data.files.0.path = nothing", "correct data.files.0.path"),
        ('[training]\nmax_steps = "10"', 'training.max_steps = "10"', "correct"),
        ("[training]\nmax_steps = 1.5", "training.max_steps = 1.5", "correct"),
        ("[training]\nmax_steps = true", "training.max_steps = true", "correct"),
        ("[optim]\nlr = -1", "optim.lr = -1", "correct"),
        ("[optim]\nlr = nan", "optim.lr = NaN", "correct"),
        ("[optim]\nlr = 2024-01-01", "optim.lr", "correct"),
        ("[optim]\nbetas = [0.9]", "optim.betas", "correct"),
        ('[optim]\nschedule = "step"', "optim.schedule", "correct"),
        ("[objective]\nrho_min = 0.9\nrho_max = 0.1", "objective", "correct"),
        ("[optim\nlr = 1", "is not TOML", "correct that line"),
    ],
)
def test_errors_name_the_key(text, found, fix):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert found in caught.value.found
    assert fix in caught.value.fix
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "binary.toml"):
        with pytest.raises(ConfigError, match="cannot read"):
            load_config(path)


def test_overrides():
    config = RunConfig(data=DataConfig(files=(FileConfig(path="a"), FileConfig(path="b"))))
    changed = apply_overrides(
        config,
        ["optim.lr=1e-5", "model.init=random", "data.files.1.layer=counts", "optim.betas=[0.8, 0.9]", 'name="x=y"'],
    )
    assert changed.optim.lr == 1e-5
    assert changed.model.init == "random"
    assert [file.layer for file in changed.data.files] == [None, "counts"]
    assert changed.optim.betas == (0.8, 0.9)
    assert changed.name == "x=y"
    assert changed_keys(config, changed) == ["data.files", "model.init", "name", "optim.betas", "optim.lr"]
    assert apply_overrides(config, []) == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("optim.lr", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("optim.lrr=3", "did you mean optim.lr?"),
        ("optin.lr=3", "did you mean optim?|unknown key"),
        ("optim.lr.x=3", "unknown key"),
        ("optim.lr=fast", "optim.lr"),
        ("data.files.0.path=x", "not an item"),
        ("seed=1\noptim.lr = 5", "seed"),
    ],
)
def test_bad_overrides(entry, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(RunConfig(), [entry])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.toml"
    save_config(LoopConfig(seed=1), path)

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert load_config(path, LoopConfig).seed == 1
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_every_field_is_documented():
    sections = [RunConfig]
    while sections:
        for name, field in (section := sections.pop()).model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            if hasattr(field.annotation, "model_fields"):
                sections.append(field.annotation)


def test_no_torch():
    code = "import sys, scdiva.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
