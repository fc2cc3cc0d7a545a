"""The quick commands do without torch; shells complete recipes; a dry run writes nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CliResult

from grasp_lora.recipes.text import builtin_recipes

Cli = Callable[..., CliResult]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tiny-llama" not in str(path)
    }


def test_quick_commands_do_without_torch_and_shells_complete_recipes(tiny_workspace: Path) -> None:
    code = (
        "import sys\nfrom grasp_lora.cli import main\n"
        "sys.argv = ['grasp-lora', 'recipes']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import os\nos.environ |= {'_GRASP_LORA_COMPLETE': 'complete_bash', 'COMP_WORDS': 'grasp-lora run ', 'COMP_CWORD': '2'}\n"
        "sys.argv = ['grasp-lora']\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny_workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    offered = done.stdout.splitlines()
    assert {*builtin_recipes(), "tiny.yaml"} <= set(offered)


def test_a_comparison_and_its_dry_run(cli: Cli, finished_run: Path) -> None:
    before = contents(finished_run.parent)
    small = (
        "--methods",
        "target_only,merged,continued,grid,grasp,delivered,lorahub",
        "--seeds",
        "42,7",
        "-o",
        "run",
    )
    result = cli("compare", "tiny.yaml", *small, "--dry-run")
    assert result.status == 0, result.err
    assert contents(finished_run.parent) == before
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines()]
    rows = {row[0]: row[1:] for row in cells if len(row) == 4}
    assert rows["source"][:3] == ["1", "0", "0"]  # the run has trained it
    assert rows["target"][:3] == ["1", "1", str(2 * 10 + 2 * 6)]  # that of the other seed: ten rows, dev twice
    assert rows["controller"][:2] == ["1", "1"]
    assert rows["final 0.10"][1] == "2"
    assert "nothing was trained or written" in result.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-s", "lora.rnk=2"), "'rank'"),
        (("-s", "data.target.files=[no.jsonl]"), "no.jsonl"),
        (("--methods", "grsp"), "grsp"),
        (("-s", "data.target.test=0"), "test split"),
        (("-s", "lora.target_modules=all-linea"), "'all-linea'"),
    ],
)
def test_a_dry_run_of_a_broken_recipe_is_one_line(
    refused: Callable[..., None], arguments: tuple[str, ...], says: str
) -> None:
    refused("compare", [*arguments, "--dry-run"], says)
