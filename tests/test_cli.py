"""The command line: a user's mistake is one line and status 2 before anything is written; help comes at once."""

import errno
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

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from grasp_lora.bench.session import Session
from grasp_lora.method.merging import MERGE_RULES
from grasp_lora.models.adapter_config import CONFIG_FILE
from grasp_lora.models.reading import WEIGHTS_FILE
from grasp_lora.recipes.load import builtin_recipes, load_recipe

COMMANDS = (
    "run", "demo", "check", "recipes", "init", "predict", "merge", "export", "learn", "finetune", "evaluate", "compare", "sweep",
    "report",
)  # fmt: skip

Cli = Callable[..., object]


def standard_input(content: bytes) -> io.TextIOWrapper:
    """What `sys.stdin` is where content is piped in and the locale is C."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; links are not followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_recipe(workspace: Path, **changes: object) -> None:
    """Change settings by dotted path (`__` for the dot)."""
    recipe = workspace / "tiny.yaml"
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def write_adapter(workspace: Path, name: str = "adapter", rank: int = 2) -> Path:
    """Write an untrained adapter of the tiny backbone."""
    from grasp_lora.models.adapters import adapter_weights, fresh_adapter
    from grasp_lora.models.settings import LoraSettings

    session = Session(*load_recipe(workspace / "tiny.yaml"))
    with fresh_adapter(session.backbone.model, LoraSettings(rank=rank, alpha=4), seed=1) as model:
        weights = adapter_weights(model)
    session.save(workspace / name, weights)
    return workspace / name


def change_config(adapter: Path, **changes: object) -> None:
    file = adapter / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(adapter: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    tensors = {name: change(tensor).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, adapter / WEIGHTS_FILE, metadata={"format": "pt"})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


def use_adapter(workspace: Path, **changes: object) -> None:
    adapter = write_adapter(workspace)
    change_config(adapter, **changes)
    edit_recipe(workspace, source__adapters=["adapter"])


def missing_data(workspace: Path) -> None:
    (workspace / "target.jsonl").unlink()


def empty_data(workspace: Path) -> None:
    (workspace / "target.jsonl").write_text(" \n")


def malformed_data(workspace: Path) -> None:
    with (workspace / "target.jsonl").open("a") as file:
        file.write('{"prompt": "a", \n')


def answer_elsewhere(workspace: Path) -> None:
    question = {"id": "q1", "question": "who?", "answers": [{"text": "nobody", "answer_start": 0}]}
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "Somebody came.", "qas": [question]}]}]}
    (workspace / "target.json").write_text(json.dumps(squad))
    edit_recipe(workspace, data__task="qa", data__target__files=["target.json"])


def overlapping_splits(workspace: Path) -> None:
    target = {"language": "de", "train_files": ["target.jsonl"], "test_files": ["test.jsonl"]}
    shutil.copy(workspace / "target.jsonl", workspace / "test.jsonl")
    edit_recipe(workspace, data__target=target)


def widen(adapter: Path) -> None:
    """Make it one of a backbone twice as wide, at the same rank 2."""
    change_weights(adapter, lambda tensor: torch.cat([tensor, tensor], dim=int(tensor.shape[0] == 2)))


def wide_adapter(workspace: Path) -> None:
    use_adapter(workspace)
    widen(workspace / "adapter")


def unequal_ranks(workspace: Path) -> None:
    write_adapter(workspace, "one", rank=2)
    write_adapter(workspace, "two", rank=3)
    edit_recipe(workspace, source__adapters=["one"], target__adapter="two", merge={"rule": "paper_sum"})


def broken_adapter(workspace: Path) -> None:
    use_adapter(workspace)
    change_weights(workspace / "adapter", with_nan)


def other_backbone(workspace: Path) -> None:
    use_adapter(workspace)
    file = workspace / "adapter" / "grasp_lora.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"backbone_fingerprint": "0123456789abcdef"}))


def invalid_yaml(workspace: Path) -> None:
    (workspace / "tiny.yaml").write_text("name: tiny\ndata: [1,\nseed: 3\n")


def yaml_alias(workspace: Path) -> None:
    with (workspace / "tiny.yaml").open("a") as file:
        file.write("report_to: &x [wandb]\nmetrics: *x\n")


def key_twice(workspace: Path) -> None:
    with (workspace / "tiny.yaml").open("a") as file:
        file.write("seed: 1\nseed: 2\n")


def changes(**settings: object) -> Callable[[Path], None]:
    return lambda workspace: edit_recipe(workspace, **settings)


MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown key": (changes(lora__rnk=2), r"unknown key 'lora\.rnk'; did you mean 'rank'\?"),
    "unknown top key": (changes(lorra={}), r"unknown key 'lorra'; did you mean 'lora'\?"),
    "wrong type": (changes(lora__rank="many"), r"lora\.rank: .*valid integer.*'many'"),
    "section expected": (changes(final=3), r"final: must be a section of keys and values \(it is 3\)"),
    "list expected": (changes(metrics="f1"), r"metrics: must be a list.*'f1'"),
    "language no": (changes(data__target__language=False), r"language: must be a text \(it is False\); put it in quotes"),
    "ratio bounds crossed": (
        changes(controller__policy={"ratio_min": 0.9, "ratio_max": 0.2}),
        r"controller\.policy: ratio bounds are \[0\.9, 0\.2\]; both must lie in \[0, 1\] and ratio_min must be below",
    ),
    "ratio bounds in percent": (
        changes(controller__policy={"ratio_min": 10, "ratio_max": 80}),
        r"ratio bounds are \[10\.0, 80\.0\]; both must lie in \[0, 1\]",
    ),
    "given ratio in percent": (changes(final__prune_ratio=40), r"prune_ratio is 40\.0; it must be a fraction in \[0, 1\]"),
    "unknown preset": (changes(controller__policy="papr"), r"no policy preset 'papr'; allowed: default, paper, random"),
    "unknown metric": (changes(metrics=["f2"]), r"there is no metric 'f2'; allowed: exact_match"),
    "micro-dev of size 0": (
        changes(data__target__micro_dev=0),
        r"probe_on is 'micro_dev', but data\.target\.micro_dev is 0; give it examples, or",
    ),
    "too few examples": (changes(data__target__test=400), r"asked for test 400.*40 examples in 40 groups.*Lower test"),
    "all too long": (changes(data__max_tokens=9), r"all 40 examples are longer than max_tokens 9.*Raise max_tokens"),
    "no source": (changes(data__source=None), r"there is no source: give data\.source .* or source\.adapters"),
    "no round": (changes(controller__probe_every=99), r"10 optimizer steps and probes every 99.*lower controller\.probe_every"),
    "merge weights": (changes(merge={"weights": [1, 1, 1]}), r"merge\.weights has 3 numbers for 2 adapters; give one for each"),
    "no such module": (changes(lora__target_modules=["c_attn"]), r"no linear module 'c_attn'; it has: .*q_proj"),
    "no such backbone": (changes(backbone__name="./nowhere"), r"Backbone folder '\./nowhere' does not exist"),
    "missing data": (missing_data, r"data file 'target\.jsonl' is missing; tried .*Set data\.root"),
    "empty data": (empty_data, r"target\.jsonl is empty"),
    "long examples": (
        changes(data__max_tokens=2000, data__prompt="{prompt}" + 510 * "x"),
        r"the source_train example \S+ has \d+ tokens, but the model's context holds 512; lower data\.max_tokens \(now 2000\)",
    ),
    "long answers": (
        changes(generation__max_new_tokens=500),
        r"the test example \S+ has a prompt of \d+ tokens, and up to 500 are generated, but the model's context holds 512; lower",
    ),
    "a language by its name": (
        changes(data__target__language="swahili"), r"'swahili' is no language code; give one of two or three letters"
    ),
    "malformed data": (malformed_data, r"target\.jsonl, line 41: not valid JSON"),
    "answer elsewhere": (answer_elsewhere, r"question q1: the answer 'nobody' does not stand in its context"),
    "overlapping splits": (overlapping_splits, r"splits overlap: .*test.* share \d+ ids.*remove the shared ones"),
    "adapter of another shape": (wide_adapter, r"adapter .*q_proj.*shape .*, but .* has \(\d+, \d+\); use an adapter"),
    "adapters of unequal ranks": (unequal_ranks, r"'paper_sum' needs equal ranks, but the adapters have \[2, 3\]; use 'exact'"),
    "DoRA": (lambda workspace: use_adapter(workspace, use_dora=True), r"adapter adapter uses DoRA.*plain LoRA"),
    "NaN in an adapter": (broken_adapter, r"adapter .*holds NaN or infinity.*train it again"),
    "adapter of another backbone": (other_backbone, r"fingerprint 0123456789abcdef, but tiny-llama has .*other weights"),
    "missing adapter": (changes(source__adapters=["nowhere/at/all"]), r"adapter nowhere/at/all: there is no such folder"),
    "invalid YAML": (invalid_yaml, r"no valid YAML in line 4: expected .*from line 2 on"),
    "YAML alias": (yaml_alias, r"uses a YAML alias \(\*name\) in line 14; write the values out"),
    "key twice": (key_twice, r"in line 14: the key 'seed' stands twice; remove one"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_mistake_in_the_recipe_is_one_line_and_nothing_is_written(
    mistake: str, command: str, cli: Cli, tiny_workspace: Path
) -> None:
    make, message = MISTAKES[mistake]
    make(tiny_workspace)
    before = contents(tiny_workspace)
    result = cli(command, "tiny.yaml", *(["--output", "out"] if command == "run" else []))
    assert result.status == 2
    assert result.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    assert re.search(message, result.err), result.err
    assert contents(tiny_workspace) == before
    assert not (tiny_workspace / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nope"], r"there is no recipe 'nope': neither a file nor a built-in name \(demo-ar, "),
        (["run", "tiny.yaml", "-s", "seed"], r"override 'seed' must look like a\.b=value"),
        (["run", "tiny.yaml", "-s", "name.x=1"], r"override 'name\.x=1': name is no section"),
        (["run", "tiny.yaml", "-s", "seed={"], r"override 'seed=\{': the value is no valid YAML"),
        (["run", "tiny.yaml", "-s", "seed=2024-99-99"], r"the value is no valid YAML; put text in quotes"),
        (["run", "tiny.yaml", "-s", "lora.rank=0"], r"LoRA rank is 0; it must be at least 1"),
        (["run", "tiny.yaml", "-o", "tiny.yaml"], r"tiny\.yaml is a file; give a folder"),
        (["run", "tiny.yaml", "-o", "."], r"is not empty and no run folder; choose another with --output"),
        (["demo", "--language", "xx"], r"demo language is 'xx'; allowed: ar, zh"),
        (["predict", "adapter", "a", " "], r"prompt 2 is empty; give the adapter something to answer"),
        (["predict", "adapter"], r"there are no prompts; give them as arguments or one a line on standard input"),
        (["predict", "adapter", "a", "--max-new-tokens", "0"], r"max_new_tokens is 0: use a whole number of at least 1"),
        (["predict", "adapter", "a", "--device", "tpu"], r"device is 'tpu': use 'auto', 'cpu' or 'cuda'"),
        (["predict", "no/such/adapter", "a"], r"adapter no/such/adapter: there is no such folder"),
        (["predict", "moved", "a"], r"Backbone folder '\./gone' does not exist.*--backbone takes another"),
        (["merge", "adapter", "adapter", "-o", "out", "--weight", "1"], r"1 merge weights for 2 adapters; give one per"),
        (["merge", "adapter", "adapter", "-o", "out", "--rank", "2"], r"'exact' does not take a rank.*choose one of svd"),
        (["merge", "adapter", "adapter", "-o", "out", "--rule", "sum"], r"merge rule is 'sum'; allowed: exact, "),
        (["merge", "adapter", "adapter", "-o", "."], r"exists and is not an empty folder; choose another with --output"),
        (["merge", "adapter", "rank3", "-o", "out", "--rule", "ties"], r"'ties' needs equal ranks.*use 'exact' or 'svd'"),
        (["merge", "adapter", "wide", "-o", "out"], r"adapters differ in the shape .*q_proj.*of the same backbone"),
        (["learn", "tiny.yaml", "-a", "nowhere/at/all", "-o", "out"], r"adapter nowhere/at/all: there is no such folder"),
        (["learn", "tiny.yaml", "-a", "adapter", "-o", "."], r"exists and is not an empty folder"),
        (["finetune", "tiny.yaml", "-a", "adapter", "--ratio", "40", "-o", "out"], r"the prune ratio is 40\.0; it must be a"),
        (["evaluate", "tiny.yaml", "-a", "adapter", "-o", "."], r"exists and is not an empty folder"),
        (["report", "."], r"no run folder"),
        (["init", "nothing.csv", "-l", "de"], r"data file 'nothing\.csv' is missing"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tiny_workspace)
    write_adapter(tiny_workspace, "rank3", rank=3)
    widen(write_adapter(tiny_workspace, "wide"))
    write_adapter(tiny_workspace, "moved")
    change_config(tiny_workspace / "moved", base_model_name_or_path="./gone")
    before = contents(tiny_workspace)
    monkeypatch.setattr("sys.stdin", standard_input(b""))
    result = cli(*arguments)
    assert result.status == 2
    assert result.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    assert re.search(message, result.err), result.err
    assert contents(tiny_workspace) == before


def test_a_run_folder_of_another_recipe_is_refused_with_what_differs(cli: Cli, tiny_workspace: Path) -> None:
    out = tiny_workspace / "out"
    out.mkdir()
    recipe, _ = load_recipe(tiny_workspace / "tiny.yaml")
    (out / "run.json").write_text(json.dumps({"recipe_hash": recipe.fingerprint()}))
    (out / "recipe.yaml").write_text(recipe.to_yaml())
    before = contents(out)
    result = cli("run", "tiny.yaml", "-o", "out", "-s", "seed=7", "-s", "lora.rank=4")
    assert result.status == 2
    assert re.fullmatch(
        r"error: out holds a run of another recipe \(seed is 42 there and 7 here, lora\.rank is 2 there and 4 here\); "
        r"choose another folder with --output, or delete it\n",
        result.err,
    )
    assert contents(out) == before


def test_a_probe_loss_that_is_not_finite_names_the_example_and_keeps_the_stages(
    cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grasp_lora.training.probes as probing

    measure = probing.example_losses

    def overflow(model: torch.nn.Module, batch: dict, **options: object) -> torch.Tensor:
        losses = measure(model, batch, **options)
        return losses if torch.is_grad_enabled() or not broken else losses * float("nan")

    broken: list[bool] = []
    monkeypatch.setattr(probing, "example_losses", overflow)
    monkeypatch.setattr(
        Session, "merge", lambda self, *rest, merge=Session.merge: (broken.append(True), merge(self, *rest))[1]
    )
    result = cli("run", "tiny.yaml", "-o", "out")
    assert result.status == 2
    assert "Traceback" not in result.err
    ids = {example.id for example in Session(*load_recipe("tiny.yaml")).splits.micro_dev}
    found = re.fullmatch(
        r"error: (?:probe of [^\n:]+: )?the loss of example (\S+) is nan, not a finite number; [^\n]+\n", result.err
    )
    assert found, result.err
    assert found[1] in ids
    done = {path.stem for path in (tiny_workspace / "out" / "stages").iterdir()}
    assert done == {"data", "source", "target", "merge"}
    assert not (tiny_workspace / "out" / "adapter").exists()


def test_training_that_diverges_says_to_lower_the_learning_rate(cli: Cli, tiny_workspace: Path) -> None:
    # So that the weights themselves overflow: a norm may turn what is merely huge, such as 1e30, into zeros and a finite loss.
    result = cli("run", "tiny.yaml", "-o", "out", "-s", "target.training.learning_rate=3e37")
    assert result.status == 2
    assert re.fullmatch(r"error: [^\n]*lower the learning rate[^\n]*\n", result.err), result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["run", "a", "--bogus"], "--bogus"),
        (["finetune", "tiny.yaml", "--ratio", "much"], "'much'"),
        (["comprae"], "Did you mean 'compare'? (see grasp-lora --help)"),
        (["merge", "a", "-o", "b\nc\x1b[2J", "--rank"], "--rank"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_with_the_way_to_help(
    arguments: list[str], message: str, cli: Cli, tiny_workspace: Path
) -> None:
    before = contents(tiny_workspace)
    result = cli(*arguments)
    assert result.status == 2
    assert re.fullmatch(r"error: [^\n]+ \(see grasp-lora( \w+)? --help\)\n", result.err), result.err
    assert message in result.err
    assert contents(tiny_workspace) == before


def test_without_arguments_there_is_help(cli: Cli) -> None:
    result = cli()
    assert result.status == 2
    assert "Usage: grasp-lora" in result.out + result.err
    assert "error" not in result.out + result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, cli: Cli) -> None:
    result = cli(command, "--help")
    assert result.status == 0
    assert f"Usage: grasp-lora {command}" in result.out
    assert result.err == ""


def test_help_lists_all_commands(cli: Cli) -> None:
    result = cli("--help")
    assert result.status == 0
    assert all(f" {command} " in result.out for command in COMMANDS)


def test_help_of_merge_names_all_rules(cli: Cli) -> None:
    words = set(re.findall(r"\w+", cli("merge", "--help").out))
    assert set(MERGE_RULES) <= words


def test_recipes_prints_one(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(cli("recipes", "mlqa-ar").out, encoding="utf-8")
    assert load_recipe(file)[0] == load_recipe("mlqa-ar")[0]
    result = cli("recipes", "mlqa-xx")
    assert result.status == 2
    assert result.err.startswith("error: there is no built-in recipe 'mlqa-xx'; there are: ")


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"grasp-lora {version('grasp-lora')}\n"


def test_recipes_lists_all(cli: Cli) -> None:
    result = cli("recipes")
    assert result.status == 0
    assert result.out.split() == builtin_recipes()
    assert "demo-ar" in result.out.split()


def test_an_error_of_ours_keeps_its_traceback(cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Session, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Session, "prepare", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("check", "tiny.yaml")


def test_check_says_what_to_expect(cli: Cli, tiny_workspace: Path) -> None:
    before = contents(tiny_workspace)
    result = cli("check", "tiny.yaml")
    assert result.status == 0
    assert result.err == ""
    assert "source_train 12, source_dev 4, train 10, dev 6, micro_dev 4, test 8" in result.out
    assert "controller will run 3 rounds" in result.out
    assert contents(tiny_workspace) == before


def test_steps_work_one_by_one(cli: Cli, tiny_workspace: Path) -> None:
    write_adapter(tiny_workspace, "one")
    write_adapter(tiny_workspace, "two", rank=3)
    elsewhere = tiny_workspace / "recipes"
    elsewhere.mkdir()
    edit_recipe(tiny_workspace, data__source=None, data__root="..", backbone__name="../tiny-llama")
    (tiny_workspace / "tiny.yaml").rename(elsewhere / "tiny.yaml")  # adapters of the command line start from here

    def call(*arguments: str) -> str:
        result = cli(*arguments)
        assert result.status == 0, result.err
        return result.out

    assert "ranks [5]" in call("merge", "one", "two", "-o", "merged", "--backbone", "tiny-llama")
    assert "3 rounds" in call("learn", "recipes/tiny.yaml", "-a", "merged", "-o", "learned")
    ratio = json.loads((tiny_workspace / "learned/ratio.json").read_text())["prune_ratio"]
    assert 0.1 <= ratio <= 0.8
    assert "best at step" in call("finetune", "recipes/tiny.yaml", "-a", "merged", "--ratio", str(ratio), "-o", "tuned")
    table = call("evaluate", "recipes/tiny.yaml", "-a", "merged", "-a", "tuned", "-o", "measured")
    assert "merged" in table
    assert "tuned" in table
    metrics = json.loads((tiny_workspace / "measured/metrics.json").read_text())
    assert set(metrics["systems"]) == {"merged", "tuned"}
    answers = call(
        "predict", "tuned", "target 1: what?", "target 2: what?", "--backbone", "tiny-llama", "--max-new-tokens", "3"
    )
    assert answers.count("\n") == 2


def test_adapters_of_the_same_name_stay_apart(cli: Cli, tiny_workspace: Path) -> None:
    write_adapter(tiny_workspace, "a/adapter")
    write_adapter(tiny_workspace, "b/adapter")
    result = cli("evaluate", "tiny.yaml", "-a", "a/adapter", "-a", "b/adapter", "-o", "out")
    assert result.status == 0, result.err
    assert set(json.loads((tiny_workspace / "out/metrics.json").read_text())["systems"]) == {"a/adapter", "b/adapter"}
    assert {path.name for path in (tiny_workspace / "out").iterdir()} == {
        "a--adapter.jsonl", "b--adapter.jsonl", "metrics.json"
    }  # fmt: skip


def test_prompts_come_from_standard_input(cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tiny_workspace)
    monkeypatch.setattr("sys.stdin", standard_input(b"one\n\ntwo\nthree\n"))
    result = cli("predict", "adapter", "--backbone", "tiny-llama", "--max-new-tokens", "2")
    assert result.status == 0, result.err
    assert result.out.count("\n") == 3


@pytest.mark.parametrize(
    ("arguments", "piped", "message"),
    [
        ((), "لغة\nسؤال".encode("cp1256"), "line 1 on standard input is not UTF-8"),
        ((), "a\n问题".encode("gbk"), "line 2 on standard input is not UTF-8"),
        (("--jsonl",), b'"a"\n"\\ud800"\n', "prompt 2 is no valid text"),
        (("ok", "\udce9"), b"", "prompt 2 is no valid text"),
    ],
)
def test_prompts_that_are_no_text_are_refused(
    cli: Cli,
    tiny_workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    piped: bytes,
    message: str,
) -> None:
    write_adapter(tiny_workspace)
    monkeypatch.setattr("sys.stdin", standard_input(piped))
    result = cli("predict", "adapter", *arguments, "--backbone", "tiny-llama")
    assert result.status == 2
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    assert message in result.err


def test_a_merge_answers_as_its_parents_do(cli: Cli, tiny_workspace: Path) -> None:
    folders = [write_adapter(tiny_workspace, name) for name in ("one", "two")]
    answers = {"max_new_tokens": 7, "stop": [], "chat_template": False}
    for folder in folders:
        info = json.loads((folder / "grasp_lora.json").read_text())
        (folder / "grasp_lora.json").write_text(json.dumps(info | {"answers": answers}))
    result = cli("merge", "one", "two", "--backbone", "tiny-llama", "-o", "alike")
    assert result.status == 0, result.err
    assert "tell predict" not in result.out
    assert json.loads(Path("alike/grasp_lora.json").read_text())["answers"] == answers

    info = json.loads((folders[1] / "grasp_lora.json").read_text())
    (folders[1] / "grasp_lora.json").write_text(json.dumps(info | {"answers": answers | {"max_new_tokens": 8}}))
    result = cli("merge", "one", "two", "--backbone", "tiny-llama", "-o", "unlike")
    assert result.status == 0, result.err
    assert "tell predict" in result.out
    assert "answers" not in json.loads(Path("unlike/grasp_lora.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (("merge", "adapter", "adapter", "--backbone", "tiny-llama", "-o", "out"), "save_adapter"),
        (("evaluate", "tiny.yaml", "-a", "adapter", "-o", "out"), "write_json"),
    ],
)
def test_a_full_disk_is_one_line_in_a_single_step(
    cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], written: str
) -> None:
    from grasp_lora.bench import single as steps

    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_adapter(tiny_workspace)
    monkeypatch.setattr(steps, written, full)
    result = cli(*arguments)
    assert result.status == 2
    assert re.fullmatch(r"error: out cannot be written \([^\n]*No space left on device\)[^\n]+\n", result.err), (
        result.err
    )
    assert "goes on" not in result.err
    assert written == "write_json" or not Path("out").exists()


class TestSubprocess:
    """The installed command, in a process of its own: exit status, quietness, start-up."""

    @staticmethod
    def call(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB_DISABLE", "TRANSFORMERS"))
        }
        return subprocess.run(
            [sys.executable, "-c", "from grasp_lora.cli import main; main()", *arguments],
            cwd=folder, env=kept | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def test_answers_are_utf8_whatever_a_pipe_is_said_to_be(self, tiny_workspace: Path) -> None:
        write_adapter(tiny_workspace)
        code = (
            "from grasp_lora.bench import single as steps\nfrom grasp_lora.cli import main\n"
            "steps.generate = lambda *arguments: ['لغة 语言']\nmain()\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, "predict", "adapter", "x", "--backbone", "tiny-llama"],
            cwd=tiny_workspace, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode("utf-8").splitlines() == ["لغة 语言"]

    @pytest.mark.parametrize("mistake", ["unknown key", "missing data", "invalid YAML"])
    def test_a_mistake_is_one_line(self, mistake: str, tiny_workspace: Path) -> None:
        make, message = MISTAKES[mistake]
        make(tiny_workspace)
        before = contents(tiny_workspace)
        result = self.call("run", "tiny.yaml", "-o", "out", folder=tiny_workspace)
        assert result.returncode == 2
        assert result.stdout == ""
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
        assert re.search(message, result.stderr)
        assert contents(tiny_workspace) == before

    def test_a_run_is_quiet_where_there_is_no_terminal(self, tiny_workspace: Path) -> None:
        result = self.call("run", "tiny.yaml", "-o", "out", folder=tiny_workspace)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert len(result.stdout.splitlines()) < 25
        assert "\r" not in result.stdout

    def test_help_needs_no_torch(self, tmp_path: Path) -> None:
        code = (
            "import sys\nfrom grasp_lora.cli import main\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
            "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'yaml'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        for arguments in (["--help"], ["init", "--help"]):
            subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, check=True, capture_output=True)


def test_an_adapter_is_asked_and_answers_as_it_was_trained(
    cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grasp_lora.bench import single as steps

    asked: list[tuple[list[str], Any]] = []

    def generate(model: Any, tokenizer: Any, prompts: list[list[int]], settings: Any) -> list[str]:
        asked.append(([tokenizer.decode(ids) for ids in prompts], settings))
        return ["one\ntwo"] * len(prompts)

    monkeypatch.setattr(steps, "generate", generate)
    folder = write_adapter(tiny_workspace)
    info = json.loads((folder / "grasp_lora.json").read_text()) if (folder / "grasp_lora.json").is_file() else {}
    info["answers"] = {"max_new_tokens": 7, "stop": [], "chat_template": False}
    (folder / "grasp_lora.json").write_text(json.dumps(info))
    monkeypatch.setattr("sys.stdin", standard_input(b'"a\\nb"\n"<bos>c"\n'))
    result = cli("predict", "adapter", "--backbone", "tiny-llama", "--jsonl")
    assert result.status == 0, result.err
    assert result.out == '"one\\ntwo"\n' * 2
    [(prompts, settings)] = asked
    assert prompts == ["<bos>a\nb", "<bos>c"]  # one BOS token each
    assert (settings.max_new_tokens, settings.stop) == (7, ())

    assert (
        cli("predict", "adapter", "x", "--backbone", "tiny-llama", "--stop", "#", "--max-new-tokens", "3").status == 0
    )
    assert (asked[-1][1].max_new_tokens, asked[-1][1].stop) == (3, ("#",))

    result = cli("predict", "adapter", "x", "--backbone", "tiny-llama", "--chat")
    assert result.status == 2
    assert "so prompts can only be plain texts; leave --chat out" in result.err

    monkeypatch.setattr("sys.stdin", standard_input(b"plain\n"))
    result = cli("predict", "adapter", "--backbone", "tiny-llama", "--jsonl")
    assert "prompt 1 on standard input is no JSON" in result.err

    info["answers"]["stop"] = "x"
    (folder / "grasp_lora.json").write_text(json.dumps(info))
    err = cli("predict", "adapter", "x", "--backbone", "tiny-llama").err
    assert "answers.stop is 'x'; input should be a valid list; delete that file" in err


def test_a_run_says_how_its_adapter_answers(finished_run: Path) -> None:
    info = json.loads((finished_run / "adapter" / "grasp_lora.json").read_text())
    assert set(info["answers"]) == {"max_new_tokens", "stop", "chat_template"}
