"""The command line: a user's mistake is one line and status 2 before anything is written; help comes at once."""

import errno
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import typer
import yaml
from conftest import CliResult, write_tiny_workspace
from grasp_lora.cli.experiments import compare
from rich.console import Console
from safetensors.torch import load_file, save_file

from grasp_lora.cli import app
from grasp_lora.cli.progress import TerminalProgress
from grasp_lora.engine import predict as predicting
from grasp_lora.engine import single
from grasp_lora.engine.comparison import ComparisonSettings
from grasp_lora.engine.session import Session
from grasp_lora.method.merging import MERGE_RULES, MergeSettings
from grasp_lora.models.adapters import fresh_adapter
from grasp_lora.models.live import adapter_weights
from grasp_lora.models.reading import CONFIG_FILE, OUR_FILE, WEIGHTS_FILE
from grasp_lora.models.settings import LoraSettings
from grasp_lora.recipes.gone import GONE_COMMANDS
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import schema_text
from grasp_lora.recipes.text import builtin_recipes
from grasp_lora.storage.claims import claim

TORCH = Path(torch.__file__).parent
COMMANDS = (
    "run", "demo", "check", "recipes", "init", "schema", "predict", "merge", "export", "learn", "finetune", "evaluate",
    "compare", "report",
)  # fmt: skip

Cli = Callable[..., CliResult]


def refusal(result: CliResult) -> str:
    """The one line that a refused command says, and nothing else."""
    assert (result.status, result.out) == (2, ""), result.err
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    return result.err


def output(result: CliResult) -> str:
    assert result.status == 0, result.err
    return result.out


def standard_input(content: bytes) -> io.TextIOWrapper:
    """What `sys.stdin` is where content is piped in and the locale is C."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; links are not followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(adapter: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: change(tensor).contiguous() for name, tensor in load_file(adapter / WEIGHTS_FILE).items()}
    save_file(tensors, adapter / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Path:
    """Adapters so little trained that no loss changes: `adapter` of rank 2, `rank3`, `wide` (of another backbone), `moved`."""
    folder = tmp_path_factory.mktemp("adapters")
    session = Session(*load_recipe(write_tiny_workspace(folder / "work", tiny_backbone_folder)))
    for name, rank in {"adapter": 2, "rank3": 3}.items():
        with fresh_adapter(session.backbone.model, LoraSettings(rank=rank, alpha=4), seed=1) as model:
            session.save(folder / name, adapter_weights(model))
        change_weights(folder / name, lambda tensor: tensor if tensor.any() else torch.full_like(tensor, 1e-12))
    shutil.rmtree(folder / "work")
    for name in ("wide", "moved"):
        shutil.copytree(folder / "adapter", folder / name)
    # Twice as wide, at the same rank 2.
    change_weights(folder / "wide", lambda tensor: torch.cat([tensor, tensor], dim=int(tensor.shape[0] == 2)))
    change_json(folder / "moved" / CONFIG_FILE, base_model_name_or_path="./gone")
    return folder


@pytest.fixture
def workspace(tiny_workspace: Path, adapters: Path) -> Path:
    """The working folder with `tiny.yaml` and all adapters."""
    return Path(shutil.copytree(adapters, tiny_workspace, dirs_exist_ok=True))


Mistake = Callable[[Path], None]


def recipe(**changes: object) -> Mistake:
    """Change settings of the recipe by dotted path (`__` for the dot)."""

    def edit(workspace: Path) -> None:
        content = yaml.safe_load((workspace / "tiny.yaml").read_text(encoding="utf-8"))
        for path, value in changes.items():
            *sections, key = path.split("__")
            place = content
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        (workspace / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    return edit


def appended(file: str, text: str) -> Mistake:
    return lambda workspace: (workspace / file).write_text((workspace / file).read_text() + text)  # type: ignore[func-returns-value]


def source_adapter(change: Mistake, name: str = "adapter") -> Mistake:
    """Merge an adapter that something is wrong with."""

    def make(workspace: Path) -> None:
        change(workspace / name)
        recipe(source__adapters=[name])(workspace)

    return make


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


def answer_elsewhere(workspace: Path) -> None:
    question = {"id": "q1", "question": "who?", "answers": [{"text": "nobody", "answer_start": 0}]}
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "Somebody came.", "qas": [question]}]}]}
    (workspace / "target.json").write_text(json.dumps(squad))
    recipe(data__task="qa", data__target__files=["target.json"])(workspace)


def overlapping_splits(workspace: Path) -> None:
    shutil.copy(workspace / "target.jsonl", workspace / "test.jsonl")
    target = {"language": "de", "train_files": ["target.jsonl"], "test_files": ["test.jsonl"]}
    recipe(data__target=target)(workspace)


POLICY, TARGET = "controller__policy", "data__target__"
# What is wrong: how it is made, and what the line has to say: the value that arrived, and what to do or what is allowed.
MISTAKES: dict[str, tuple[Mistake, str, str]] = {
    "unknown key": (recipe(lora__rnk=2), "lora.rnk", "'rank'"),
    "unknown top key": (recipe(lorra={}), "lorra", "'lora'"),
    "wrong type": (recipe(lora__rank="many"), "lora.rank is 'many'", "must be a whole number"),
    "section expected": (recipe(final=3), "final: .*3", "section of keys and values"),
    "list expected": (recipe(metrics="f1"), "metrics: .*'f1'", "list"),
    "language no": (recipe(**{TARGET + "language": False}), "language: .*False", "in quotes"),
    "ratio bounds crossed": (recipe(**{POLICY: {"ratio_min": 0.9, "ratio_max": 0.2}}), r"policy: .*0\.9, 0\.2", r"\[0, 1\]"),
    "ratio bounds in percent": (recipe(**{POLICY: {"ratio_min": 10, "ratio_max": 80}}), r"10\.0, 80\.0", r"\[0, 1\]"),
    "given ratio in percent": (recipe(final__prune_ratio=40), r"prune_ratio is 40\.0", r"\[0, 1\]"),
    "unknown preset": (recipe(controller__preset="papr"), "'papr'", "allowed: .*paper"),
    "unknown metric": (recipe(metrics=["f2"]), "'f2'", "allowed: .*exact_match"),
    "micro-dev of size 0": (recipe(**{TARGET + "micro_dev": 0}), r"micro_dev is 0", "give it examples"),
    "too few examples": (recipe(**{TARGET + "test": 400}), "test 400.*40 examples", "Lower test"),
    "all too long": (recipe(data__max_tokens=9), "40 examples .*max_tokens 9", "Raise max_tokens"),
    "no source": (recipe(data__source=None), "no source", r"give data\.source .*source\.adapters"),
    "no round": (recipe(controller__rounds__every=99), "10 optimizer steps .*99", r"lower controller\.rounds\.every"),
    "merge weights": (recipe(merge={"weights": [1, 1, 1]}), "3 numbers for 2 adapters", "give one for each"),
    "no such module": (recipe(lora__target_modules=["c_attn"]), "'c_attn'", "it has: .*q_proj"),
    "no such backbone": (recipe(backbone__name="./nowhere"), r"'\./nowhere'", "does not exist"),
    "missing data": (lambda folder: (folder / "target.jsonl").unlink(), r"'target\.jsonl' is missing", r"Set data\.root"),
    "empty data": (lambda folder: (folder / "target.jsonl").write_text(" \n") and None, r"target\.jsonl", "is empty"),
    "long examples": (
        recipe(data__max_tokens=2000, data__prompt="{prompt}" + 510 * "x"),
        r"source_train example \S+ has \d+ tokens.*512", r"lower data\.max_tokens \(now 2000\)",
    ),
    "long answers": (recipe(generation__max_new_tokens=500), r"test example \S+ .*\d+ tokens.*500.*512", "lower"),
    "a language by its name": (recipe(**{TARGET + "language": "swahili"}), "'swahili'", "two or three letters"),
    "malformed data": (appended("target.jsonl", '{"prompt": "a", \n'), r"target\.jsonl, line 41", "not valid JSON"),
    "answer elsewhere": (answer_elsewhere, "question q1: .*'nobody'", "context"),
    "overlapping splits": (overlapping_splits, r"test.* share \d+ ids", "remove the shared ones"),
    "adapter of another shape": (recipe(source__adapters=["wide"]), r"adapter .*q_proj.*shape .*\(\d+, \d+\)", "use an adapter"),
    "adapters of unequal ranks": (
        recipe(source__adapters=["adapter"], target__adapter="rank3", merge={"rule": "paper_sum"}),
        r"'paper_sum'.*\[2, 3\]", "'exact'",
    ),
    "DoRA": (source_adapter(lambda folder: change_json(folder / CONFIG_FILE, use_dora=True)), "adapter .*DoRA", "plain LoRA"),
    "NaN in an adapter": (source_adapter(lambda folder: change_weights(folder, with_nan)), "adapter .*NaN", "train it again"),
    "adapter of another backbone": (
        source_adapter(lambda folder: change_json(folder / OUR_FILE, backbone_fingerprint="0123456789abcdef")),
        "0123456789abcdef", "tiny-llama has",
    ),
    "missing adapter": (recipe(source__adapters=["nowhere/at/all"]), "adapter nowhere/at/all", "no such folder"),
    "invalid YAML": (lambda folder: (folder / "tiny.yaml").write_text("name: tiny\ndata: [1,\nseed: 3\n") and None,
                     "line 4", "from line 2 on"),
    "YAML alias": (appended("tiny.yaml", "report_to: &x [wandb]\nmetrics: *x\n"), r"\*name\) in line 14", "write the values out"),
    "key twice": (appended("tiny.yaml", "seed: 1\nseed: 2\n"), "'seed' .*twice", "remove one"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_recipe_is_one_line_and_nothing_is_written(mistake: str, cli: Cli, workspace: Path) -> None:
    make, value, fix = MISTAKES[mistake]
    make(workspace)
    before = contents(workspace)
    for arguments in (("run", "tiny.yaml", "--output", "out"), ("check", "tiny.yaml")):
        line = refusal(cli(*arguments))
        assert re.search(value, line), line
        assert re.search(fix, line), line
    assert contents(workspace) == before
    assert not (workspace / "out").exists()


TWICE = ("merge", "adapter", "adapter")


@pytest.fixture(scope="module")
def shared_workspace(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path, adapters: Path) -> Path:
    """A working folder of which nothing is to change."""
    folder = tmp_path_factory.mktemp("shared") / "work"
    write_tiny_workspace(folder, tiny_backbone_folder)
    return Path(shutil.copytree(adapters, folder, dirs_exist_ok=True))


@pytest.mark.parametrize(
    ("arguments", "value", "fix"),
    [
        (("run", "nope"), "'nope'", "neither a file nor a built-in name .*demo-ar"),
        (("run", "tiny.yaml", "-s", "seed"), "'seed'", r"a\.b=value"),
        (("run", "tiny.yaml", "-s", "name.x=1"), r"'name\.x=1'", "name is no section"),
        (("run", "tiny.yaml", "-s", "seed={"), r"'seed=\{'", "no valid YAML"),
        (("run", "tiny.yaml", "-s", "seed=2024-99-99"), "seed=2024-99-99", "in quotes"),
        (("run", "tiny.yaml", "-s", "lora.rank=0"), "rank is 0", "at least 1"),
        (("run", "tiny.yaml", "-o", "tiny.yaml"), r"tiny\.yaml is a file", "give a folder"),
        (("run", "tiny.yaml", "-o", "."), "not empty", "another with --output"),
        (("demo", "--language", "xx"), "'xx'", "allowed: ar, zh"),
        (("predict", "adapter", "a", " "), "prompt 2 is empty", "give"),
        (("predict", "adapter"), "no prompts", "standard input"),
        (("predict", "adapter", "a", "--max-new-tokens", "0"), "max_new_tokens is 0", "at least 1"),
        (("predict", "adapter", "a", "--device", "tpu"), "'tpu'", "'auto', 'cpu' or 'cuda'"),
        (("predict", "no/such/adapter", "a"), "adapter no/such/adapter", "no such folder"),
        (("predict", "moved", "a"), r"'\./gone' does not exist", "--backbone"),
        ((*TWICE, "-o", "out", "--weight", "1"), "1 merge weights for 2 adapters", "give one per"),
        ((*TWICE, "-o", "out", "--rank", "2"), "'exact' does not take a rank", "choose one of .*svd"),
        ((*TWICE, "-o", "out", "--density", "0.5"), "'exact' does not take a density", "choose one of ties, dare_ties"),
        ((*TWICE, "-o", "out", "--rule", "sum"), "'sum'", "allowed: exact, "),
        ((*TWICE, "-o", "."), "not an empty folder", "another with --output"),
        (("merge", "adapter", "rank3", "-o", "out", "--rule", "ties"), "'ties' needs equal ranks", "use 'exact' or 'svd'"),
        (("merge", "adapter", "wide", "-o", "out"), "shape .*q_proj", "of the same backbone"),
        (("learn", "tiny.yaml", "-a", "nowhere/at/all", "-o", "out"), "adapter nowhere/at/all", "no such folder"),
        (("learn", "tiny.yaml", "-a", "adapter", "-o", "."), "not an empty folder", "another with --output"),
        (("finetune", "tiny.yaml", "-a", "adapter", "--ratio", "40", "-o", "out"), r"40\.0", r"\[0, 1\]"),
        (("evaluate", "tiny.yaml", "-a", "adapter", "-o", "."), "not an empty folder", "another with --output"),
        (("recipes", "mlqa-xx"), "'mlqa-xx'", "there are: .*mlqa-ar"),
        (("report", "."), r"\.", "no run folder"),
        (("init", "nothing.csv", "-l", "de"), r"'nothing\.csv'", "missing"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line_and_nothing_is_written(
    arguments: tuple[str, ...], value: str, fix: str, cli: Cli, shared_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared_workspace)
    monkeypatch.setattr("sys.stdin", standard_input(b""))
    before = contents(shared_workspace)
    line = refusal(cli(*arguments))
    assert re.search(value, line), line
    assert re.search(fix, line), line
    assert contents(shared_workspace) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run",), "Missing argument"),
        (("run", "a", "--bogus"), "--bogus"),
        (("finetune", "tiny.yaml", "--ratio", "much"), "'much'"),
        (("comprae",), "'compare'"),
        (("merge", "a", "-o", "b\nc\x1b[2J", "--rank"), "--rank"),
        (
            ("finetune", "tiny.yaml", "-a", "ad en", "--adapter=ad-sw", "--ratio", "0.5", "-o", "out"),
            "--adapter takes one value and is given 2: 'ad en' ad-sw; "
            "merge them first: grasp-lora merge 'ad en' ad-sw --output merged",
        ),
        (("run", "tiny.yaml", "--output", "a", "-ob"), "--output takes one value and is given 2: a b; give it once"),
        (
            ("compare", "tiny.yaml", "--seeds", "1", "--seeds", "2,3"),
            "is given 2: 1 2,3; give all in one: --seeds 1,2,3",
        ),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_with_the_way_to_help(
    arguments: tuple[str, ...], says: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(cli(*arguments))
    assert re.search(r" \(see grasp-lora( \w+)? --help\)\n$", line), line
    assert says in line
    assert not contents(tmp_path)


def test_every_option_that_takes_one_value_is_refused_twice(cli: Cli) -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for option in command.params:
            if option.param_type_name != "option" or option.multiple or option.is_flag:
                continue
            needed = [one for one in command.params if one.required and one is not option]
            words = [word for one in needed for word in ([one.opts[0], "1"] if one.opts[0].startswith("-") else ["1"])]
            line = refusal(cli(name, *words, *[option.opts[0], "1"] * 2))
            assert f"{option.opts[0]} takes one value and is given 2: 1 1; " in line, (name, option.name)


def test_flags_and_what_may_be_repeated_are_taken_twice(cli: Cli) -> None:
    twice = ("-v", "-v", "--set", "seed=1", "--set", "seed=2", "--allow-code", "--allow-code")
    assert "neither a file nor a built-in name" in refusal(cli("run", "nope", *twice))
    assert "Usage: grasp-lora run" in output(cli("run", "-o", "a", "-o", "b", "--help"))


def test_a_run_folder_of_another_recipe_is_refused_with_what_differs(cli: Cli, finished_run: Path) -> None:
    before = contents(finished_run)
    line = refusal(cli("run", "tiny.yaml", "-o", finished_run, "-s", "seed=7", "-s", "lora.rank=4"))
    for part in ("seed is 42 there and 7 here", "lora.rank is 2 there and 4 here", "--output"):
        assert part in line
    assert contents(finished_run) == before


def test_a_probe_loss_that_is_not_finite_names_the_example_and_keeps_the_stages(
    cli: Cli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grasp_lora.training.probes as probing

    measure = probing.example_losses

    def overflow(model: torch.nn.Module, batch: dict[str, Any], **options: object) -> torch.Tensor:
        losses = measure(model, batch, **options)
        return losses if torch.is_grad_enabled() else losses * float("nan")

    for file in (finished_run / "metrics.json", *(finished_run / "store" / "records").glob("controller*")):
        file.unlink()  # the adapters are there, the controller is run anew
    shutil.rmtree(finished_run / "adapter")
    monkeypatch.setattr(probing, "example_losses", overflow)
    line = refusal_of_a_run(cli("run", "tiny.yaml", "-o", finished_run))
    ids = {example.id for example in Session(*load_recipe("tiny.yaml")).splits.micro_dev}
    found = re.search(r"loss of example (\S+) is nan", line)
    assert found, line
    assert found[1] in ids
    assert set(json.loads((finished_run / "cost.json").read_text())) == {"data", "source", "target", "merge"}
    assert not (finished_run / "adapter").exists()


def refusal_of_a_run(result: CliResult) -> str:
    """The one line of a run that fails after some stages."""
    assert result.status == 2
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    return result.err


def test_training_that_diverges_says_to_lower_the_learning_rate(cli: Cli, tiny_workspace: Path) -> None:
    # So that the weights themselves overflow: a norm may turn what is merely huge, such as 1e30, into zeros and a finite loss.
    line = refusal_of_a_run(cli("run", "tiny.yaml", "-o", "out", "-s", "target.training.learning_rate=3e37"))
    assert "lower the learning rate" in line


def test_without_arguments_there_is_help(cli: Cli) -> None:
    result = cli()
    assert result.status == 2
    assert "Usage: grasp-lora" in result.out + result.err
    assert "error" not in result.out + result.err


def test_every_command_is_listed_and_has_help(cli: Cli) -> None:
    listed = output(cli("--help"))
    assert len(app.registered_commands) == len(COMMANDS)
    for command in COMMANDS:
        assert f" {command} " in listed
        result = cli(command, "--help")
        assert f"Usage: grasp-lora {command}" in output(result)
        assert result.err == ""


def test_help_of_options_is_what_the_settings_say(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert set(MERGE_RULES) <= set(re.findall(r"\w+", output(cli("merge", "--help"))))
    for command, settings, said in (
        ("merge", MergeSettings, "share of weights that TIES and DARE keep"),
        ("compare", ComparisonSettings, "the method that the others are compared with"),
    ):
        assert said in (settings.__doc__ or "")
        assert said[1:] in output(cli(command, "--help"))


def test_options_of_compare_begin_as_its_settings_do(cli: Cli) -> None:
    options = {name: option.default for name, option in inspect.signature(compare).parameters.items()}
    settings = ComparisonSettings()
    assert options["seeds"] is None  # which leaves the settings' own
    assert ",".join(map(str, settings.seeds)) in output(cli("compare", "--help"))
    assert options["grid"] == ",".join(map(str, settings.grid))
    assert options["reference"] == settings.reference


def test_recipes_lists_all_and_prints_one(cli: Cli, tmp_path: Path) -> None:
    listed = dict(line.split(maxsplit=1) for line in output(cli("recipes")).splitlines())
    assert list(listed) == builtin_recipes()
    assert "Arabic questions" in listed["mlqa-ar"]
    file = tmp_path / "mine.yaml"
    file.write_text(output(cli("recipes", "mlqa-ar")), encoding="utf-8")
    assert load_recipe(file)[0] == load_recipe("mlqa-ar")[0]


def test_version_and_schema_are_printed(cli: Cli) -> None:
    assert output(cli("--version")) == f"grasp-lora {version('grasp-lora')}\n"
    assert output(cli("recipes", "--schema")) == schema_text()


def test_an_error_of_ours_keeps_its_traceback(cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(session: Session, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("grasp_lora.engine.preflight.check", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("check", "tiny.yaml")


def test_check_says_what_to_expect(cli: Cli, tiny_workspace: Path) -> None:
    before = contents(tiny_workspace)
    result = cli("check", "tiny.yaml")
    assert "source_train 12, source_dev 4, train 10, dev 6, micro_dev 4, test 8" in output(result)
    assert "3 rounds" in result.out
    assert result.err == ""
    assert contents(tiny_workspace) == before


def test_steps_work_one_by_one(cli: Cli, workspace: Path) -> None:
    elsewhere = workspace / "recipes"
    elsewhere.mkdir()
    recipe(data__source=None, data__root="..", backbone__name="../tiny-llama")(workspace)
    (workspace / "tiny.yaml").rename(elsewhere / "tiny.yaml")  # adapters of the command line start from here

    def call(*arguments: str) -> str:
        return output(cli(*arguments))

    assert "ranks [5]" in call("merge", "adapter", "rank3", "-o", "merged", "--backbone", "tiny-llama")
    assert "3 rounds" in call("learn", "recipes/tiny.yaml", "-a", "merged", "-o", "learned")
    ratio = json.loads((workspace / "learned/ratio.json").read_text())["prune_ratio"]
    assert 0.1 <= ratio <= 0.8
    assert "best at step" in call("finetune", "recipes/tiny.yaml", "-a", "merged", "--ratio", str(ratio), "-o", "tuned")
    table = call("evaluate", "recipes/tiny.yaml", "-a", "merged", "-a", "tuned", "-o", "measured")
    assert {"merged", "tuned"} <= set(re.findall(r"\w+", table))
    assert set(json.loads((workspace / "measured/metrics.json").read_text())["systems"]) == {"merged", "tuned"}
    prompts = ("target 1: what?", "target 2: what?")
    assert call("predict", "tuned", *prompts, "--backbone", "tiny-llama", "--max-new-tokens", "3").count("\n") == 2


@pytest.mark.parametrize(
    ("rule", "changes"),
    [("smooth_fit", "controller.training.learning_rate=1e-30"), ("surrogate", "data.target.micro_dev=1")],
    ids=["flat probes", "one example"],
)
def test_where_probes_say_nothing_learn_says_so(cli: Cli, workspace: Path, rule: str, changes: str) -> None:
    settings = ("-s", f"controller.rule={rule}", "-s", changes)
    said = output(cli("learn", "tiny.yaml", "-a", "adapter", "-o", "learned", *settings))
    assert "nothing was learned about the prune ratio (95 % interval 10 to 80 %); " in said
    ratio = json.loads((workspace / "learned/ratio.json").read_text())
    assert (ratio["low"], ratio["high"]) == (0.1, 0.8)


def test_a_run_that_learned_nothing_and_kept_no_step_says_both(
    cli: Cli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grasp_lora.training.probes as probing

    measure = probing.example_losses

    def flat(model: torch.nn.Module, batch: dict[str, Any], **options: object) -> torch.Tensor:
        losses = measure(model, batch, **options)
        return losses if torch.is_grad_enabled() else torch.ones_like(losses)

    records = finished_run / "store" / "records"
    for file in (finished_run / "metrics.json", *records.glob("controller*"), *records.glob("final*")):
        file.unlink()
    monkeypatch.setattr(probing, "example_losses", flat)
    said = output(cli("run", "tiny.yaml", "-o", finished_run))
    assert "nothing was learned about the prune ratio (95 % interval 10 to 80 %); " in said
    assert "no step lowered the dev loss, so the fine-tuning was discarded (best step 0)" in said
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert (metrics["nothing_learned_about_ratio"], metrics["best_step"]) == (True, 0)
    for name in ("report.html", "report.md", "adapter/README.md"):
        text = (finished_run / name).read_text().replace("\u00a0", " ")
        assert "Nothing was learned about the prune ratio (95 % interval 10 to 80 %); " in text
        assert "the fine-tuning was discarded (best step 0)" in text
        assert "Prune 2" not in text


def test_adapters_of_the_same_name_stay_apart(cli: Cli, tiny_workspace: Path, adapters: Path) -> None:
    for parent in "ab":
        shutil.copytree(adapters / "adapter", tiny_workspace / parent / "adapter")
    output(cli("evaluate", "tiny.yaml", "-a", "a/adapter", "-a", "b/adapter", "-o", "out"))
    assert set(json.loads((tiny_workspace / "out/metrics.json").read_text())["systems"]) == {"a/adapter", "b/adapter"}
    assert {path.name for path in (tiny_workspace / "out").iterdir()} == {
        "a--adapter.jsonl", "b--adapter.jsonl", "metrics.json"
    }  # fmt: skip


def test_prompts_come_from_standard_input(cli: Cli, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", standard_input(b"one\ntwo\nthree\n\n"))
    assert output(cli("predict", "adapter", "--backbone", "tiny-llama", "--max-new-tokens", "2")).count("\n") == 3


@pytest.mark.parametrize(
    ("arguments", "piped", "says"),
    [
        ((), "لغة\nسؤال".encode("cp1256"), "line 1 on standard input is not UTF-8"),
        ((), "a\n问题".encode("gbk"), "line 2 on standard input is not UTF-8"),
        (("--jsonl",), b"plain\n", "prompt 1 on standard input is no JSON"),
        (("--jsonl",), b'"a"\n"\\ud800"\n', "prompt 2 is no valid text"),
        (
            ("--jsonl",),
            b'{"text": "a"}\n',
            'prompt 1 on standard input must be a JSON text, such as "one\\ntwo", or an object with',
        ),
        (("ok", "\udce9"), b"", "prompt 2 is no valid text"),
        (
            (),
            b"one\n\ntwo\n",
            "line 2 on standard input is blank; remove it",
        ),
    ],
)
def test_prompts_that_are_no_text_are_refused(
    cli: Cli, workspace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], piped: bytes, says: str
) -> None:
    monkeypatch.setattr("sys.stdin", standard_input(piped))
    assert says in refusal(cli("predict", "adapter", *arguments, "--backbone", "tiny-llama"))


def test_an_adapter_is_asked_and_answers_as_it_was_trained(
    cli: Cli, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], Any]] = []

    def generate(model: Any, tokenizer: Any, prompts: list[list[int]], settings: Any, **more: Any) -> list[str]:
        asked.append(([tokenizer.decode(ids) for ids in prompts], settings))
        return ["one\ntwo"] * len(prompts)

    monkeypatch.setattr(predicting, "generate", generate)
    ask = ("predict", "adapter", "--backbone", "tiny-llama")
    answers = {"max_new_tokens": 7, "stop": [], "chat_template": False}
    change_json(workspace / "adapter" / OUR_FILE, answers=answers)
    monkeypatch.setattr("sys.stdin", standard_input(b'"a\\nb"\n{"id": "7", "prompt": "<bos>c"}\n'))
    assert output(cli(*ask, "--jsonl")) == '"one\\ntwo"\n' * 2
    [(prompts, settings)] = asked
    assert prompts == ["<bos>a\nb", "<bos>c"]  # one BOS token each
    assert (settings.max_new_tokens, settings.stop) == (7, ())

    assert "answer 1 has several lines, so there are more lines than prompts; add --jsonl" in cli(*ask, "a", "b").err
    assert "several lines" not in cli(*ask, "a").err
    output(cli(*ask, "x", "--stop", "#", "--max-new-tokens", "3"))
    assert (asked[-1][1].max_new_tokens, asked[-1][1].stop) == (3, ("#",))
    assert "leave --chat out" in refusal(cli(*ask, "x", "--chat"))

    change_json(workspace / "adapter" / OUR_FILE, answers=answers | {"stop": "x"})
    line = refusal(cli(*ask, "x"))
    assert "answers.stop is 'x'" in line
    assert "delete that file" in line


def test_no_print_fails_where_the_output_lacks_a_letter(tmp_path: Path) -> None:
    """A redirected output on Windows is often cp1252, which has no Arabic, no tick and no box."""
    folder = tmp_path / "تجربة:key:"
    folder.mkdir()
    command = [sys.executable, "-m", "grasp_lora", "check", str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "\\u062a" in done.stderr
    assert ":key:" in done.stderr, "no name of ours is an emoji"
    code = "from grasp_lora.cli.terminal import lasting_outputs, say\nwith lasting_outputs():\n    say('✓ –')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "\\u2713 \\u2013\n"), done.stderr


@pytest.mark.parametrize("command", GONE_COMMANDS)
def test_a_command_that_is_gone_says_what_to_do_instead(cli: Callable[..., CliResult], command: str) -> None:
    result = cli(command, "tiny.yaml", "--param", "x=1..2")
    assert (result.status, result.err) == (2, f"error: {command} is gone: {GONE_COMMANDS[command]}\n")


def test_an_error_of_a_library_is_no_mistake_of_the_user(
    tiny_workspace: Path, cli: Callable[..., CliResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise ValueError("could not broadcast")

    monkeypatch.setattr("grasp_lora.api.compare", broken)
    with pytest.raises(ValueError, match="could not broadcast"):
        cli("compare", "tiny.yaml")


def test_scores_are_whole_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from grasp_lora.cli.terminal import print_scores
    from grasp_lora.engine.run_folder import Metrics, SystemScores

    names = ("exact_match", "f1", "rougeL", "bleu", "chrf++", "similarity", "bertscore")
    one = SystemScores(dev_loss=1.23456, test_loss=2.34567, metrics=dict.fromkeys(names, 56.78))
    title = "runs/tydiqa-sw-seed-42-with-source-adapter [v2]"
    print_scores(Metrics.model_construct(systems={title: one}, signatures=dict.fromkeys(names, ""), delivered=None))
    said = capsys.readouterr().out
    for text in (title, "1.2346", "2.3457", *names):
        assert text in said


def test_answers_are_utf8_whatever_a_pipe_is_said_to_be(
    cli: Cli, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "generate", lambda *arguments, **more: ["لغة 语言"])
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", pipe)
    assert cli("predict", "adapter", "x", "--backbone", "tiny-llama").status == 0
    pipe.flush()
    assert pipe.buffer.getvalue().decode("utf-8") == "لغة 语言\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("tokens", "stop", "alike"), [(7, [], True), (8, [], True), (7, ["x"], False)])
def test_a_merge_answers_as_its_parents_do(
    tokens: int, stop: list[str], alike: bool, cli: Cli, workspace: Path
) -> None:
    shutil.copytree(workspace / "adapter", workspace / "other")
    answers = {"max_new_tokens": 7, "stop": [], "chat_template": False}
    change_json(workspace / "adapter" / OUR_FILE, answers=answers)
    change_json(workspace / "other" / OUR_FILE, answers=answers | {"max_new_tokens": tokens, "stop": stop})
    said = output(cli("merge", "adapter", "other", "--backbone", "tiny-llama", "-o", "merged"))
    assert ("tell predict" in said) is not alike
    assert json.loads((workspace / "merged" / OUR_FILE).read_text()).get("answers") == (
        answers | {"max_new_tokens": tokens} if alike else None  # a longer answer is no other one
    )


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ((*TWICE, "--backbone", "tiny-llama", "-o", "out"), "save_adapter"),
        (("evaluate", "tiny.yaml", "-a", "adapter", "-o", "out"), "write_json"),
    ],
)
def test_a_full_disk_is_one_line_in_a_single_step(
    cli: Cli, workspace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], written: str
) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(single, written, full)
    line = refusal(cli(*arguments))
    assert "out cannot be written" in line
    assert "No space left on device" in line
    assert "goes on" not in line
    assert written == "write_json" or not Path("out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (*TWICE, "--backbone", "tiny-llama"),
        ("export", "adapter", "--gguf", "--backbone", "tiny-llama"),
        ("learn", "tiny.yaml", "-a", "adapter"),
        ("finetune", "tiny.yaml", "-a", "adapter", "--ratio", "0.5"),
        ("evaluate", "tiny.yaml", "-a", "adapter"),
        ("init", "target.jsonl", "-l", "de"),
        ("run", "tiny.yaml"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_of_two_that_write_the_same_the_second_is_refused(
    cli: Cli, workspace: Path, arguments: tuple[str, ...]
) -> None:
    before = contents(workspace)
    with claim(Path("out"), wait=False):
        if arguments[0] == "run":
            Path("out").mkdir()
            with claim(Path("out"), wait=False, inside=True):
                line = refusal(cli(*arguments, "-o", "out"))
            Path("out").rmdir()
        else:
            line = refusal(cli(*arguments, "-o", "out"))
    assert "out is being written by another process" in line
    assert contents(workspace) == before


@pytest.mark.parametrize(
    ("command", "outputs", "status", "said"),
    [
        ("recipes", ">/dev/full", 2, "error: standard output cannot be written (No space left on device): .*"),
        ("recipes", ">&-", 2, "error: standard output cannot be written (Bad file descriptor): .*"),
        ("schema", "| true", 2, "error: standard output cannot be written (Broken pipe): .*"),
        ("recipes none", ">&-", 2, "error: there is no built-in recipe 'none'.*"),
        ("recipes none", ">/dev/full 2>&-", 2, ""),
        ("recipes", ">/dev/null 2>&-", 0, ""),
        ("recipes", "2>/dev/full >/dev/full <&-", 2, ""),
    ],
)  # fmt: skip
def test_an_output_that_is_full_or_closed_is_one_line(
    command: str, outputs: str, status: int, said: str, tmp_path: Path
) -> None:
    line = f"{sys.executable} -m grasp_lora {command} {outputs}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    pattern = re.escape(said).replace(re.escape(".*"), "[^\n]*") + ("\n" if said else "")
    assert re.fullmatch(pattern, done.stderr), done.stderr


def test_a_run_whose_output_is_full_goes_on_to_its_end(
    cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "__stdout__", full)
        result = cli("run", "tiny.yaml", "-s", "data.target.test=0")
    assert result.status == 2
    assert re.fullmatch(r"error: standard output cannot be written \(No space left on device\): [^\n]+\n", result.err)
    assert Path("runs/tiny/report.html").is_file()


def test_a_closed_standard_input_holds_no_prompts(
    cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "there are no prompts" in refusal(cli("predict", "adapter"))


def test_a_run_says_how_its_adapter_answers(finished_run: Path) -> None:
    info = json.loads((finished_run / "adapter" / OUR_FILE).read_text())
    assert set(info["answers"]) == {"max_new_tokens", "stop", "chat_template", "task", "prompt"}


CALL = (
    "import sys\nfrom grasp_lora.cli import main\n"
    "def call(*arguments):\n    sys.argv = ['grasp-lora', *arguments]\n"
    "    try:\n        main()\n    except SystemExit as end:\n        return end.code\n"
)


def in_a_process(code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that has `call`, the installed command with its exit status, in a process of its own."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB_DISABLE", "TRANSFORMERS"))
    }
    return subprocess.run(
        [sys.executable, "-c", CALL + code],
        cwd=folder, env=kept | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_where_there_is_no_terminal_a_mistake_is_one_line_and_a_run_is_quiet(tiny_workspace: Path) -> None:
    code = "assert call('run', 'tiny.yaml', '-s', 'data.target.files=[no.jsonl]') == 2\nassert not call('run', 'tiny.yaml')\n"
    result = forked.python(["-c", CALL + code], tiny_workspace)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"error: [^\n]+'no\.jsonl' is missing[^\n]+\n", result.stderr), result.stderr
    assert len(result.stdout.splitlines()) < 27
    assert "\r" not in result.stdout


@pytest.mark.skipif(not list(TORCH.glob("lib/libgomp*.so*")), reason="torch brings no GNU OpenMP here")
@pytest.mark.parametrize(
    ("code", "own", "spins"),
    [
        ("call('--version')", {}, "0"),
        ("call('--version')", {"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
        ("call('--version')", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import grasp_lora", {}, "as without it"),
    ],
)
def test_threads_wait_passively_under_the_command_line_unless_the_user_says_otherwise(
    code: str, own: dict[str, str], spins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)  # a command may have been called in this process
    [library] = TORCH.glob("lib/libgomp*.so*")

    def said(code: str) -> str:
        """How often OpenMP looks before it sleeps, in its own words when it is loaded, as torch does when it is imported."""
        loading = f"{code}\nimport ctypes\nctypes.CDLL({str(library)!r})"
        found = re.search(
            "GOMP_SPINCOUNT = '(.*)'", in_a_process(loading, tmp_path, OMP_DISPLAY_ENV="VERBOSE", **own).stderr
        )
        assert found
        return found[1]

    usual = said("pass")
    assert usual != "0"
    assert said(code) == (usual if spins == "as without it" else spins)


def test_help_recipes_and_schema_need_no_torch(tmp_path: Path) -> None:
    code = (
        "for words in ('--help', '--version', 'init --help', 'compare --help', 'recipes', 'recipes mlqa-ar', 'schema'):\n"
        "    assert not call(*words.split())\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'yaml'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    result = in_a_process(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_first_answers_of_a_system_are_printed_as_they_come() -> None:
    rows = [
        {
            "id": "1",
            "prediction": "six\x1b[31m years",
            "references": ["six years"],
            "loss": 1.0,
            "scores": {"f1": 50.0},
        },
        {"id": "2", "prediction": "سالم", "references": ["سالم", "الشيخ سالم"], "loss": 1.0, "scores": {"f1": 100.0}},
        {"id": "3", "prediction": "third", "references": ["3"], "loss": 1.0, "scores": {"f1": 0.0}},
    ]
    for answers in (0, 2):
        console = Console(file=io.StringIO(), width=200)
        TerminalProgress(console, answers).scored("grasp", rows)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(lines) == answers
    assert "≈ F1 50" in lines[0]
    assert "\x1b" not in lines[0]
    assert "✓ right" in lines[1]
    assert "سالم" in lines[1]
    TerminalProgress(console, 2).scored("grasp", [])  # a run without a test set
