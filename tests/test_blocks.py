"""What stands in the shell and Python blocks of README, guide and how-to can be done.

In the gate: the command line takes every command, every program that is not run is named with the reason, and the Python runs.
In `make slow`: the commands of a page run one after the other, in the folder of a newcomer.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import typer.main
from datasets import Dataset
from random_examples import random_like, read_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grasp_lora.cli import UsageError, app
from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.metrics import score
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.masks import prune_count
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.rules import Round, best_reward
from grasp_lora.method.search import RatioSearch
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.models.adapters import fresh_adapter, save_adapter
from grasp_lora.models.model_settings import LoraSettings
from grasp_lora.recipes.load import load_recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
EXTEND = "method/extend.md"
PAGES = [README, *sorted((ROOT / "docs").glob("guide/*.md")), *sorted((ROOT / "docs").glob("how-to/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)

NOT_RUN = {  # the first words of a command -> why no test runs it
    "make demo": "minutes, and the wheel's demo is run by tests/test_packaging.py",
    "make test": "it is what runs these tests",
    "pip install": "needs the network; the extras that it names are looked up",
    "torchrun": "tests/engine/test_ranks.py starts two processes; its command is parsed here",
    "CUDA_VISIBLE_DEVICES=": "needs GPUs; its command is parsed here",
    "vllm serve": "needs vLLM and a GPU",
    "grasp-lora init my-examples.xlsx --language sw --column": "the columns of another file; tests/recipes/test_init.py",
    "grasp-lora predict runs/NAME": "tests/cli/test_predict.py; another page asks a finished run",
    "hf upload": "needs the network",
    "srun": "needs SLURM; its command is parsed here",
    "grasp-lora compare my-examples.yaml --on ray": "tests/cli/test_ray.py runs one; needs GPUs or a cluster",
    "llama-cli": "needs llama.cpp",
    "ollama create": "needs Ollama",
}
STAND_INS = {  # in what is run: a word of the pages -> what stands for it here
    "demo-ar": "tiny.yaml",
    "RECIPE": "recipe.yaml",
    "ORG/MODEL-INSTRUCT": "tiny-chat",
}
ADDED = {  # what keeps it short, or on the tiny model; the last one of an option counts
    "init": ["--backbone", "tiny-llama"],
    "compare": ["--methods", "merged,continued,grasp", "--seeds", "42"],
}
SHIM = """#!{python}
import sys
sys.path.insert(0, {source!r})
from grasp_lora.cli import main
words = [{stand_ins!r}.get(word, word) for word in sys.argv[1:]]
added = [] if "tiny-chat" in words else {added!r}.get(words[0], [])
if words[0] == "init" and "--source" not in words:  # english-qa, which is no adapter of the tiny model
    added = [*added, "--source", "english.jsonl"]
sys.argv[1:] = words + added
main()
"""


def commands(page: Path) -> list[str]:
    """The commands of a page's shell blocks, without remarks."""
    lines = [
        line
        for language, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if not language
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return [command for line in lines if (command := re.sub(r"\s+# .*$", "", line).strip())]


def why_not_run(command: str) -> str | None:
    """The reason of the table, or None for what is run."""
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


ALL = [(page, command) for page in PAGES for command in commands(page)]
IDS = [f"{page.name}-{number}" for number, (page, _) in enumerate(ALL)]


def test_there_are_blocks_and_every_reason_has_its_command():
    assert len(ALL) > 30
    idle = [start for start in NOT_RUN if not any(command.startswith(start) for _, command in ALL)]
    assert not idle, f"no page shows {', '.join(idle)} any more"


@pytest.mark.parametrize(("page", "command"), ALL, ids=IDS)
def test_a_command_is_one_that_the_program_takes(page, command):
    if found := re.search(r"(?:grasp-lora|-m grasp_lora) (\w+)\s*([^;<]*)", command):
        name, arguments = found.groups()
        group: Any = typer.main.get_command(app)
        assert name in group.commands, f"{page.name}: {command}"
        try:
            group.commands[name].make_context(name, shlex.split(arguments))
        except UsageError as error:
            pytest.fail(f"{page.name}: {command}: {error.format_message()}")
        return
    assert why_not_run(command), f"{page.name}: no test runs {command}, and no reason is given"
    if command.startswith("pip install"):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(re.findall(r"\[(\w+)\]", command)) <= project["optional-dependencies"].keys(), command


@pytest.fixture
def newcomer(tiny_workspace: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The working folder of somebody who has the files that the pages name."""
    columns = ("context", "question", "answer")
    rows = [(f"Maandishi {row}: mto {row % 7}.", f"Swali {row}?", f"mto {row % 7}") for row in range(60)]
    english = [(f"Text {row}e: river {row % 7}.", f"Question {row}?", f"river {row % 7}") for row in range(80)]
    table = pandas.DataFrame(rows, columns=columns)
    table.to_csv("my-examples.csv", index=False)
    table.to_excel("my-examples.xlsx", index=False)
    table.to_excel("new-rows.xlsx", index=False)
    pandas.DataFrame(english, columns=columns).to_json("english.jsonl", orient="records", lines=True)
    recipe = Path("tiny.yaml").read_text(encoding="utf-8")
    Path("recipe.yaml").write_text(recipe.replace("name: tiny\n", "name: mine\n"), encoding="utf-8")
    shutil.copytree("tiny-llama", "tiny-chat")
    tiny_tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'][0] }}: {{ turn['content'] }} | {% endfor %}a: "
    )
    tiny_tokenizer.save_pretrained("tiny-chat")
    tiny_tokenizer.chat_template = None
    write_adapter("english-adapter")
    write_adapter("swahili-adapter", seed=1)
    Path("mine.py").write_text(python_of(EXTEND), encoding="utf-8")
    return tiny_workspace


def write_adapter(name: str, seed: int = 0) -> None:
    """Write an adapter of random weights for the backbone in `tiny-llama`."""
    backbone = AutoModelForCausalLM.from_pretrained("tiny-llama")
    with fresh_adapter(backbone, LoraSettings(rank=2, target_modules=("q_proj",)), seed) as model:
        weights = random_like(model, torch.Generator().manual_seed(seed), 1.0, scaling=0.1)
    save_adapter(Path(name), weights, backbone, backbone_name="tiny-llama", dropout=0.0)


def test_a_spreadsheet_becomes_a_checked_recipe(newcomer, cli):
    install, init, check, *_ = commands(ROOT / "docs" / "how-to" / "spreadsheet.md")
    assert install.startswith("pip install")
    assert cli(*shlex.split(init, comments=True)[1:], *ADDED["init"], "--source", "english.jsonl").status == 0
    result = cli(*shlex.split(check)[1:])
    assert result.status == 0, result.err
    shown = (ROOT / "docs" / "how-to" / "spreadsheet.md").read_text(encoding="utf-8")
    counts = r"Of 60 rows (\d+) are to learn from and (\d+) for the test"
    told = re.search(counts, shown)
    assert told is not None
    test = int(load_recipe("my-examples.yaml")[0].data.target.test or 0)
    assert list(map(int, told.groups())) == [60 - test, test]


def python_of(page: str, heading: str = "") -> str:
    """All Python blocks of a page, or of what stands under one heading, one after the other."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    if heading:
        text = re.split(r"^##+ ", re.split(rf"^##+ {heading}\n", text, flags=re.M)[1], maxsplit=1, flags=re.M)[0]
    return "\n".join(code for language, code in FENCE.findall(text) if language == "python")


def test_every_page_with_python_is_run():
    found = {page.name for page in PAGES if "```python" in page.read_text(encoding="utf-8")}
    assert found == {"README.md", "script.md", "search-settings.md", "serve.md"}
    script = "guide/script.md"
    headings = re.findall(r"^##+ (.+)$", (ROOT / "docs" / script).read_text(encoding="utf-8"), re.MULTILINE)
    run = ["The whole job", "In your own training", "The final run", "A reward of your own", "Merge, prune, save"]
    assert [heading for heading in headings if python_of(script, heading)] == run


def test_the_guide_learns_a_ratio_and_trains_at_it(tiny_workspace, capsys):
    for seed, name in enumerate(("english", "swahili")):
        write_adapter(name, seed)
    parts = [read_adapter(name).weights for name in ("english", "swahili")]
    backbone = AutoModelForCausalLM.from_pretrained("tiny-llama")
    save_adapter(Path("merged"), merge(parts, MergeSettings()), backbone, backbone_name="tiny-llama", dropout=0.0)
    rows = [{"prompt": f"question {number}:", "completion": f" answer {number % 3}"} for number in range(8)]
    names: dict[str, Any] = {"BACKBONE": "tiny-llama", "train": Dataset.from_list(rows), "dev_rows": rows[:4]}
    exec(compile(without_gpu(python_of("guide/script.md", "In your own training")), "script.md", "exec"), names)
    assert "RatioEstimate(ratio=" in capsys.readouterr().out
    final = python_of("guide/script.md", "The final run")
    exec(compile(without_gpu(final), "script.md", "exec"), names)
    ratio = names["controller"].learned.ratio
    for name, tensor in load_file("final/adapter_model.safetensors").items():
        for part in tensor.chunk(2, dim=0 if "lora_A" in name else 1):  # of one adapter, within which weights compete
            assert int((part == 0).sum()) == prune_count(ratio, part.numel())
    for page, heading in (("guide/script.md", "A reward of your own"), ("../README.md", "")):
        code = python_of(page, heading)
        assert len(code.splitlines()) <= 40
        exec(compile(without_gpu(code), page, "exec"), names)
        assert "RatioEstimate(ratio=" in capsys.readouterr().out


def test_the_recipe_that_the_guide_shows_is_the_one_that_comes_along(tmp_path):
    page = (ROOT / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
    [text] = [code for language, code in FENCE.findall(page) if language == "yaml"]
    shown = tmp_path / "shown.yaml"
    shown.write_text(text, encoding="utf-8")
    assert load_recipe(shown)[0] == load_recipe("mlqa-ar")[0]


def without_gpu(code: str) -> str:
    """What such a machine needs; everything else is the page's."""
    return re.sub(r'SFTConfig\("[\w-]+"', r"\g<0>, use_cpu=True, bf16=False, activation_checkpointing=False", code)


def test_adapters_are_merged_and_pruned_as_the_page_does(tiny_workspace):
    write_adapter("english-adapter")
    write_adapter("arabic-adapter", seed=1)
    names: dict[str, Any] = {"BACKBONE": "tiny-llama"}
    exec(compile(python_of("guide/script.md", "Merge, prune, save"), "script.md", "exec"), names)
    loaded = {name: tensor for name, tensor in names["model"].named_parameters() if "lora_" in name}
    assert len(loaded) == 4
    # Two adapters of rank 2 and width 32: each loses 25.6 weights of a factor, rounded down.
    assert {(tensor.numel(), int((tensor == 0).sum())) for tensor in loaded.values()} == {(128, 50)}


def test_a_metric_of_ones_own_is_scored_as_the_page_does(finished_run, cli):
    Path("mine.py").write_text(python_of(EXTEND), encoding="utf-8")
    [command] = [one for one in commands(ROOT / "docs/method/extend.md") if one.startswith("grasp-lora compare")]
    words = ["tiny.yaml" if word == "my-examples.yaml" else word for word in shlex.split(command)[1:]]
    result = cli(*words, "-o", "run")
    assert result.status == 0, result.err
    assert "train the" not in result.out  # all was done by the run
    rows = read_rows(Path("run/evaluation/grasp.jsonl"))
    begun = [100.0 * any(row["prediction"][:1] == good[:1] for good in row["references"]) for row in rows]
    content = json.loads(Path("run/compare/compare.json").read_text(encoding="utf-8"))
    [grasp] = [row for row in content["rows"] if row["method"] == "grasp"]
    assert grasp["scores"]["mine:first_letter"]["mean"] == pytest.approx(sum(begun) / len(begun))


@pytest.mark.filterwarnings("ignore")  # of optuna's own
def test_settings_are_searched_as_the_page_does(tiny_workspace, capsys):
    pytest.importorskip("optuna")
    shutil.copy("tiny.yaml", "my-examples.yaml")
    write_adapter("runs/my-examples/source")
    code = python_of("how-to/search-settings.md").replace("n_trials=20", "n_trials=2")
    exec(compile(code, "search-settings.md", "exec"), {})
    metrics = [json.loads(file.read_text(encoding="utf-8")) for file in Path("runs/search").glob("*/metrics.json")]
    losses = [each["systems"]["grasp"]["dev_loss"] for each in metrics]
    assert len(losses) == 2
    assert f"{min(losses)}\n" in capsys.readouterr().out


def test_an_adapter_is_asked_in_peft_as_the_page_does(finished_run, capsys):
    shutil.copytree(finished_run, "runs/my-examples")
    exec(compile(python_of("how-to/serve.md"), "serve.md", "exec"), {"BACKBONE": "tiny-llama"})
    said = capsys.readouterr().out
    assert said.count("\n") == 1  # the answer alone, to the end of its line
    assert "Question" not in said


@pytest.mark.slow
def test_the_jobs_are_called_as_the_page_does(tiny_workspace, capsys):
    Path("data").mkdir()
    for name in ("source.jsonl", "target.jsonl"):
        Path(name).rename(f"data/{name}")
    code = python_of("guide/script.md", "The whole job").replace('"mlqa-ar"', '"tiny.yaml"')
    names: dict[str, Any] = {}
    exec(compile(code, "script.md", "exec"), names)
    said = capsys.readouterr().out
    assert "RatioEstimate(ratio=" in said
    assert said.endswith("runs/tiny\n")  # the run that is there is read: no step begins
    assert (names["recipe"].name, names["folder"]) == ("tiny", Path())
    assert Path("runs/tiny/compare/compare.json").is_file()


def test_the_policy_and_the_merge_rule_of_the_page_do_what_it_says():
    names: dict[str, Any] = {"__name__": "extend"}
    exec(compile(python_of(EXTEND), EXTEND, "exec"), names)
    search = RatioSearch(names["Ladder"](), best_reward)
    low, high = search.ask()
    assert low < search.current_ratio < high
    assert search.tell(Round(search.current_ratio, (low, high), (1.0,), ((1.5,), (0.5,)))).committed
    assert search.current_ratio == high
    assert search.tell(Round(high, (low, high), (1.0,), ((2.0,), (3.0,)))).ratio == high

    pairs = [LoraPair(torch.full((1, 2), value), torch.full((2, 1), value), 1.0) for value in (1.0, -3.0)]
    adapters = [AdapterWeights({"layer": pair}) for pair in pairs]
    alone = merge(adapters[:1], MergeSettings(rule=names["largest_wins"], weights=(1.0,)))["layer"]
    torch.testing.assert_close(alone.delta(), pairs[0].delta())
    both = merge(adapters, MergeSettings(rule=names["largest_wins"], weights=(1.0, 1.0)))["layer"]
    torch.testing.assert_close(both.delta(), pairs[1].delta())


def test_a_recipe_names_them_where_code_is_allowed(tiny_workspace, monkeypatch):
    named = (
        "merge.rule=mine:largest_wins",
        "controller.policy={kind: 'mine:Ladder', step: 0.1}",
        "metrics=[mine:first_letter]",
    )
    (tiny_workspace / "mine.py").write_text(python_of(EXTEND), encoding="utf-8")
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for setting in named:
        with pytest.raises(RecipeError, match=r"names code, 'mine:\w+'; read it, then allow it with --allow-code"):
            load_recipe("tiny.yaml", [setting])
    recipe, _ = load_recipe("tiny.yaml", named, allow_code=True)
    assert (type(recipe.controller.policy).__name__, recipe.controller.policy.step) == ("Ladder", 0.1)  # type: ignore[attr-defined]
    found = score(recipe.metrics, ["Paris", "Rome"], [["paris", "Pau"], ["Bern"]], "en")
    assert next(iter(found.values())).value == 50.0
    monkeypatch.delitem(sys.modules, "mine")


TO_RUN = [page for page in PAGES if any(why_not_run(command) is None for command in commands(page))]
BEFORE = ROOT / "docs" / "how-to" / "spreadsheet.md"  # other pages begin where it ends


@pytest.mark.slow
@pytest.mark.parametrize("page", TO_RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_one_after_the_other(page, newcomer):
    programs = newcomer / "programs"
    programs.mkdir()
    shim = programs / "grasp-lora"
    names = {"python": sys.executable, "source": str(ROOT / "src"), "stand_ins": STAND_INS, "added": ADDED}
    shim.write_text(SHIM.format(**names), encoding="utf-8")
    shim.chmod(0o755)
    mine = commands(page)
    if not any(command.startswith("grasp-lora init") for command in mine) and any(
        "my-examples" in command for command in mine
    ):
        begin = commands(BEFORE)
        mine = [*begin[: 1 + next(n for n, one in enumerate(begin) if one.startswith("grasp-lora run "))], *mine]
    script = "\n".join(command for command in mine if why_not_run(command) is None)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(newcomer), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-e", "-c", script], input="Swali?\n", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
