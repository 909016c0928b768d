"""Light start, lazy names, and rules for the source that no single module can keep."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import scdiva

SOURCES = sorted(Path(scdiva.__file__).parent.rglob("*.py"))
HEAVY = ("torch", "anndata", "scanpy", "lightning", "sklearn", "matplotlib", "zarr")


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import scdiva",
        "import scdiva; dir(scdiva); scdiva.__version__",
        "sys.argv = ['scdiva', '--help']\nfrom scdiva.cli import main\ntry: main()\nexcept SystemExit: pass",
        "sys.argv = ['scdiva', 'embed', '--help']\nfrom scdiva.cli import main\ntry: main()\nexcept SystemExit: pass",
        "sys.argv = ['scdiva', 'perturb', '--help']\nfrom scdiva.cli import main\ntry: main()\nexcept SystemExit: pass",
        "sys.argv = ['scdiva', '--version']\nfrom scdiva.cli import main\ntry: main()\nexcept SystemExit: pass",
        "import scdiva.config, scdiva.errors",
    ],
)
def test_a_light_start_loads_nothing_heavy(code):
    assert loaded_after(code) == set()


def test_the_probe_itself_sees_what_is_loaded():
    assert "torch" in loaded_after("import torch")


def test_every_public_name_is_there():
    for name in scdiva.__all__:
        assert getattr(scdiva, name) is not None
        assert name in dir(scdiva)
    for module in (scdiva.pp, scdiva.tl, scdiva.pl, scdiva.datasets):
        for name in module.__all__:
            assert callable(getattr(module, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = scdiva.no_such_name


@pytest.mark.parametrize("name", ["load_model", "PerturbationModel"])
def test_models_of_every_family_are_named_at_the_top_and_loaded_when_used(name):
    assert name in scdiva.__all__
    light = f"import scdiva; dir(scdiva); assert '{name}' not in vars(scdiva)"
    assert loaded_after(light) == set()
    assert getattr(scdiva, name).__name__ == name


def calls(tree: ast.AST) -> list[tuple[str, set[str | None], int]]:
    return [
        (ast.unparse(node.func), {keyword.arg for keyword in node.keywords}, node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(Path(scdiva.__file__).parent)))
def test_nothing_is_unpickled_and_no_global_seed_is_set(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported.isdisjoint({"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"})
    assert "allow_pickle=True" not in text
    assert not re.search(r"weights_only\s*=\s*False", text)
    for name, keywords, line in calls(tree):
        if name in ("torch.load", "load_from_checkpoint"):
            assert "weights_only" in keywords, f"line {line}"
        if name in ("np.load", "numpy.load"):
            assert "allow_pickle" in keywords, f"line {line}"
        forbidden = ("np.random.seed", "torch.manual_seed", "random.seed", "pl.seed_everything", "seed_everything")
        assert name not in forbidden, f"global seed in line {line}"


def test_errors_say_what_was_found_expected_and_how_to_fix_it():
    from scdiva import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.ScdivaError)]
    assert len(classes) >= 10
    for kind in classes:
        error = kind("two suns", expected="one sun", fix="look again")
        assert str(error) == "two suns (expected: one sun; fix: look again)"
        assert (error.found, error.expected, error.fix) == ("two suns", "one sun", "look again")


def test_errors_survive_the_way_out_of_a_worker_process():
    import copy

    from scdiva.errors import GeneError

    again = copy.copy(GeneError("a", expected="b", fix="c"))  # the same protocol as between processes
    assert isinstance(again, GeneError)
    assert str(again) == "a (expected: b; fix: c)"
