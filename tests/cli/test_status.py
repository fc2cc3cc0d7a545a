"""`status` says how far a folder is and changes nothing; the quick commands do without torch; shells complete recipes."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CliResult

from grasp_lora.bench.checks import check_folder
from grasp_lora.recipes.builtin import builtin_recipes
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import claim

Cli = Callable[..., CliResult]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tiny-llama" not in str(path)
    }


def stopped_inside(run: Path) -> None:
    """Make of a finished run one that was stopped at a checkpoint of its final run."""
    (run / "metrics.json").unlink()
    cost = json.loads((run / "cost.json").read_text())
    (run / "cost.json").write_text(json.dumps({stage: cost[stage] for stage in ("data", "source", "target", "merge")}))
    for step, whole in ((20, True), (40, True), (60, False)):
        checkpoint = run / f"store/work/abc/final-0.40/checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 100}))
        if whole:
            (checkpoint / "manifest.json").write_text(json.dumps({"seconds": step * 3.0}))


def test_status_of_a_run_that_is_finished_stopped_or_under_way(cli: Cli, finished_run: Path) -> None:
    result = cli("status", finished_run)
    assert result.status == 0, result.err
    assert "run tiny" in result.out
    assert "; finished" in result.out
    assert "continued" not in result.out  # which this recipe leaves out
    assert re.search(r"next: grasp-lora predict \S+/adapter --jsonl < \S+/prompt\.jsonl", result.out)
    stopped_inside(finished_run)
    before = contents(finished_run)
    said = cli("status", finished_run).out
    assert "still to do: controller, final, evaluate, deliver" in said
    assert "stopped: final-0.40, step 40 of at most 100 at its last checkpoint, after 2 min; at most 3 min left" in said
    assert "grasp-lora run tiny.yaml --output" in said
    with claim(finished_run, wait=False, inside=True), claim(finished_run / "store/work/abc", wait=False):
        said = cli("status", finished_run).out
        assert "running: another process" in said
        assert "under way: final-0.40, by another process, step 40" in said
        assert "next: wait; a run has its folder for itself" in said
    assert contents(finished_run) == before
    fresh = finished_run / "store/work/def"
    (fresh / "target").mkdir(parents=True)
    with claim(fresh, wait=False):
        begun = r"under way: target, by another process, before its first checkpoint, begun \d+\.\d s ago"
        assert re.search(begun, cli("status", finished_run).out)
    assert "stopped: target, before its first checkpoint\n" in cli("status", finished_run).out
    (fresh / "failed.json").write_text(
        json.dumps({"step": "target", "error": "the loss is not finite", "made_with": {}})
    )
    said = cli("status", finished_run).out
    assert "failed: target: the loss is not finite\n" in said
    assert "stopped: target" not in said
    (finished_run / "grasp-lora.lock").write_text("{}")  # of a process that was killed
    assert "running" not in cli("status", finished_run).out
    (finished_run / "recipe.yaml").write_text("final: {}")  # of a version that handed over GRASP's result
    assert "still to do: controller, final, evaluate\n" in cli("status", finished_run).out


def begun(folder: Path, overrides: list[str], *, allow_code: bool = False, **told: object) -> Path:
    """Make the folder of a run of `tiny.yaml` that was stopped before its first stage."""
    recipe, _ = load_recipe("tiny.yaml", overrides, allow_code=allow_code)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(folder))
    info = {
        "grasp_lora": "0.1.0", "recipe_hash": recipe.fingerprint(), "name": recipe.name, "seed": 1, "created": "today",
        "backbone": {"name": "tiny-llama", "fingerprint": "abc"}, "recipe_folder": os.path.relpath(".", folder),
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info | told))
    return folder


def commands_of(cli: Cli, folder: Path) -> list[str]:
    """The words of the command that `status` names."""
    [line] = re.findall(
        r"^next: the command that began it goes on.*, such as grasp-lora (.*)$", cli("status", folder).out, re.M
    )
    return shlex.split(line)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["target.training.epochs=40.0"],
        ["lora.rank=3", "final.prune_ratio=0.5", "metrics=[f1, chrf]"],
        ["controller.preset=late"],
        ["controller.policy.kind=spread"],
        ["data.source=null", "source.adapters=[adapter]"],
        ["data.prompt='Say: {prompt} #1'", 'generation.stop=["\\n"]'],
        ["data.prompt='it''s {prompt}'", 'data.completion="{completion}\\nEnd"'],
        ["backbone.device=cpu"],  # which does not decide the result
        ["backbone.name={here}/tiny-llama"],
    ],
)
def test_status_of_a_stopped_run_gives_a_command_that_is_taken(
    overrides: list[str], cli: Cli, tiny_workspace: Path
) -> None:
    overrides = [one.replace("{here}", str(tiny_workspace)) for one in overrides]
    folder = begun(Path("runs/it's k"), overrides)
    words = commands_of(cli, folder)
    assert words[:2] == ["run", "tiny.yaml"]
    assert words[-2:] == ["--output", str(folder)]
    changes = words[2:-2]
    assert changes[::2] == ["--set"] * (len(changes) // 2)
    again, wanted = (load_recipe("tiny.yaml", one)[0] for one in (changes[1::2], overrides))
    assert again == wanted
    check_folder(folder, again)  # which refuses another recipe
    if len(overrides) == 1 and "controller" not in overrides[0]:
        assert changes[1::2] == overrides


def test_status_says_which_settings_it_cannot_tell(cli: Cli, tiny_workspace: Path) -> None:
    lacks = "goes on, with the --set that it had, such as grasp-lora run tiny.yaml --output runs/"
    assert lacks in cli("status", begun(Path("runs/other"), ["seed=7"], recipe_hash="another")).out
    (tiny_workspace / "of_status.py").write_text("from grasp_lora import Uniform\nclass Mine(Uniform):\n    pass\n")
    own = ["controller.policy={kind: 'of_status:Mine'}"]
    code = begun(Path("runs/code"), own, allow_code=True, inputs={"code.of_status:Mine": "abc"})
    assert (
        "with the --set that it had, such as grasp-lora run tiny.yaml --allow-code --output" in cli("status", code).out
    )
    found = {"source.files.0": "abc", "target.files.0": "abc", "backbone": "abc"}
    assert "goes on, such as" in cli("status", begun(Path("runs/here"), [], inputs=found)).out
    (tiny_workspace / "target.jsonl").unlink()
    assert "goes on, with the --set data.root=FOLDER that it had, such as" in cli("status", Path("runs/here")).out
    (tiny_workspace / "tiny.yaml").unlink()
    assert lacks in cli("status", Path("runs/here")).out


def test_status_of_what_is_no_experiment(cli: Cli, finished_run: Path) -> None:
    (finished_run.parent / "empty").mkdir()
    for folder, says in (
        ("nowhere", "is not there"),
        ("empty", "holds no run"),
        (".", "holds some: run"),
        ("tiny.yaml", "is a file"),
    ):
        result = cli("status", folder)
        assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
        assert says in result.err
    for file, content in (
        ("recipe.yaml", "- a"),
        ("recipe.yaml", "final: 3"),
        (next((finished_run / "store/records").glob("*.json")).relative_to(finished_run), '{"seconds": null}'),
        ("cost.json", "{"),
    ):
        before = (finished_run / file).read_text()
        (finished_run / file).write_text(content)
        result = cli("status", finished_run)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert f"{file} is damaged" in result.err
        (finished_run / file).write_text(before)


def test_quick_commands_do_without_torch_and_shells_complete_recipes(finished_run: Path) -> None:
    code = (
        "import sys\nfrom grasp_lora.cli import main\n"
        f"for arguments in (['recipes'], ['status', {str(finished_run)!r}]):\n"
        "    sys.argv = ['grasp-lora', *arguments]\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert not end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import os\nos.environ |= {'_GRASP_LORA_COMPLETE': 'complete_bash', 'COMP_WORDS': 'grasp-lora run ', 'COMP_CWORD': '2'}\n"
        "sys.argv = ['grasp-lora']\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=finished_run.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    offered = done.stdout.splitlines()
    assert {*builtin_recipes(), "tiny.yaml"} <= set(offered)


def test_a_comparison_and_its_dry_run(cli: Cli, finished_run: Path) -> None:
    before = contents(finished_run.parent)
    small = (
        "--methods",
        "target_only,merged,continued,grid,grasp,delivered,grasp_single,lorahub",
        "--seeds",
        "42,7",
        "-o",
        "run",
    )
    result = cli("compare", "tiny.yaml", *small, "--dry-run")
    assert result.status == 0, result.err
    assert contents(finished_run.parent) == before
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines()]
    rows = {row[0]: row[1:] for row in cells if len(row) == 5}
    assert rows["source"][:3] == ["1", "0", "0"]  # the run has trained it
    assert rows["target"][:3] == ["1", "1", str(2 * 10 + 2 * 6)]  # that of the other seed: ten rows, dev twice
    assert rows["controller"][:2] == ["1", "1"]
    assert rows["final 0.10"][1] == "2"
    assert "nothing was trained or written" in result.out
    assert "min on this machine" in result.out


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


def test_status_of_a_sweep_says_how_many_trials_are_left(cli: Cli, finished_run: Path) -> None:
    file = finished_run / "sweep/sweep.json"
    file.parent.mkdir()
    for trials, best, says in (
        ([], None, "sweep, 0 of 20 trials done\n"),
        ([{}, {}], None, "sweep, 2 of 20 trials done; none could be finished"),
        ([{}, {}], 2, "sweep, 2 of 20 trials done; the best is number 2"),
    ):
        file.write_text(json.dumps({"name": "tiny", "trials": trials, "best": best, "asked": 20}))
        said = cli("status", finished_run).out
        assert says in said
        assert "grasp-lora sweep tiny.yaml --output" in said
    file.write_text(json.dumps({"name": "tiny", "trials": [{}, {}], "best": 1}))  # of an earlier version
    said = cli("status", finished_run).out
    assert "sweep, 2 of 2 trials done; the best is number 1" in said
    assert "grasp-lora sweep" not in said
