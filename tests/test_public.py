"""The public surface: every name is there and typed, for a script as for a type checker."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import grasp_lora as gl
from grasp_lora import api
from grasp_lora.recipes.text import builtin_text

SCRIPT = """\
import grasp_lora as gl
from transformers import PreTrainedTokenizerBase


def adapt(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> float:
    recipe, base = gl.load_recipe("demo-ar", ["seed=7"])
    result: gl.RunResult = gl.run("demo-ar", overrides={"seed": 7}, folder="runs/mine")
    low, high = result.ratio.low, result.ratio.high
    scores: float | None = result.metrics.systems["grasp"].metrics["f1"]
    folder, comparison = gl.compare("demo-ar", seeds=(7,))
    titles: list[str] = [row.title for row in comparison.rows]
    controller = gl.GraspController.from_rows(rows, tokenizer)
    learned: gl.RatioEstimate = controller.learned
    merged = gl.merge([gl.read_adapter(result.adapter).weights], gl.MergeSettings("exact"))
    print(recipe.name, base, low, high, scores, folder, titles, len(merged))
    return learned.ratio
"""
MISTAKES = """\
import grasp_lora as gl

ratio: str = gl.run("demo-ar").ratio.ratio
gl.run(3)
gl.nothing
"""


def test_every_public_name_is_there_and_says_what_it_is():
    for name in gl.__all__:
        found = getattr(gl, name)
        assert found.__doc__, name
    assert [name for name in dir(gl) if not name.startswith("__")] == sorted(gl.__all__)  # as completion offers them
    assert {"__doc__", "__version__"} <= set(dir(gl))
    with pytest.raises(AttributeError, match="nothing"):
        gl.nothing  # noqa: B018


def test_the_package_is_imported_quickly():
    heavy = "name in sys.modules for name in ('torch', 'transformers', 'pydantic')"
    code = f"import sys, grasp_lora; dir(grasp_lora); sys.exit(any({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def python_with_the_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python in whose site-packages the wheel lies, and nothing of the sources."""
    folder = tmp_path_factory.mktemp("without-sources")
    venv.create(folder / "venv", symlinks=True)
    [site] = (folder / "venv").glob("lib/*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        assert "grasp_lora/py.typed" in archive.namelist()
        assert not any(name.startswith(("tests/", "lab/", "docs/")) for name in archive.namelist())
        archive.extractall(site)
    return folder / "venv/bin/python"


@pytest.mark.parametrize(("script", "mistakes"), [(SCRIPT, 0), (MISTAKES, 3)])
def test_a_script_is_type_checked_against_the_installed_wheel(script, mistakes, python_with_the_wheel, tmp_path):
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "--python-executable"]
    checked = subprocess.run(
        [*command, str(python_with_the_wheel), "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert len(errors) == mistakes, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "grasp"}, r"^methods: must be a list, such as \[first, second\] \(it is 'grasp'\)$"),
        ({"seeds": ("x",)}, r"^seeds\.0: .*valid integer.* \(it is 'x'\)"),
        ({"method": ("grasp",)}, r"^unknown key 'method'; did you mean 'methods'\?$"),
        ({"trails": 3}, r"^unknown key 'trails'; known here: methods, seeds, "),
    ],
)
def test_settings_of_a_wrong_type_are_named_before_anything_is_loaded(settings, message):
    with pytest.raises(gl.RecipeError, match=message):
        gl.compare("no recipe", **settings)


def test_the_home_folder_is_found_in_names_of_recipes_and_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(builtin_text("demo-ar"), encoding="utf-8")
    assert gl.load_recipe("~/mine.yaml")[1] == tmp_path
    monkeypatch.setattr(api.running, "run", lambda session, place, grid: pytest.fail(f"in {place}"))
    with pytest.raises(pytest.fail.Exception, match=f"^in {tmp_path}/out$"):
        gl.run("~/mine.yaml", folder="~/out")
