"""The command line: a user's mistake is one line and status 2 before anything is written; help comes at once."""

import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import forked
import pytest
import torch
import yaml
from conftest import CliResult, write_tiny_workspace
from rich.console import Console
from safetensors.torch import load_file, save_file

from grasp_lora.__main__ import main as start
from grasp_lora.cli import STOPPED, app, set_up_libraries
from grasp_lora.cli.comparisons import compare
from grasp_lora.engine.comparison import ComparisonSettings
from grasp_lora.engine.results import Prediction
from grasp_lora.engine.session import Session
from grasp_lora.method.merging import MERGE_RULES
from grasp_lora.models.adapter_files import CONFIG_FILE, OUR_FILE, WEIGHTS_FILE
from grasp_lora.models.adapters import fresh_adapter
from grasp_lora.models.live import adapter_weights
from grasp_lora.models.model_settings import LoraSettings
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import schema_text
from grasp_lora.recipes.text import builtin_recipes
from grasp_lora.report.bars import TerminalProgress
from grasp_lora.storage.threads import waiting_turns
from grasp_lora.training import probes

JUDGE = ("judge", "adapter", "--rows", "target.jsonl", "--language", "de", "--backbone", "tiny-llama")
COMMANDS = ["run", "demo", "check", "recipes", "init", "predict", "merge", "export", "judge", "compare"]

Cli = Callable[..., CliResult]
Mistake = Callable[[Path], object]


def refusal(result: CliResult, out: str | None = "") -> str:
    """The one line that a refused command says, and nothing else; `out=None` is for one that had begun."""
    assert result.status == 2, result.err
    assert out is None or result.out == out
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    return result.err


def output(result: CliResult) -> str:
    assert result.status == 0, result.err
    return result.out


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


def source_adapter(change: Mistake) -> Mistake:
    """Merge an adapter that something is wrong with."""
    return lambda workspace: (change(workspace / "adapter"), recipe(source__adapters=["adapter"])(workspace))


# What is wrong: how it is made, and what the line has to say: the value that arrived, and what to do or what is allowed.
MISTAKES: dict[str, tuple[Mistake, str, str]] = {
    "unknown key": (recipe(lora__rnk=2), "lora.rnk", "'rank'"),
    "no source": (recipe(data__source=None), "no source", r"give data\.source .*source\.adapters"),
    "no round": (recipe(controller__rounds__every=99), "10 optimizer steps .*99", r"lower controller\.rounds\.every"),
    "no such module": (recipe(lora__target_modules=["c_attn"]), "'c_attn'", "it has: .*q_proj"),
    "missing data": (lambda folder: (folder / "target.jsonl").unlink(), r"'target\.jsonl' is missing", r"[Ss]et data\.root"),
    "long examples": (
        recipe(data__max_tokens=2000, data__prompt="{prompt}" + 510 * "x"),
        r"source_train row source.jsonl, line \d+ has \d+ tokens and an answer .*512", r"lower data\.max_tokens \(now 2000\)",
    ),
    "long answers": (recipe(generation__max_new_tokens=500), r"test row target.jsonl, line \d+ .*\d+ tokens.*500.*512", "lower"),
    "adapter of another shape": (recipe(source__adapters=["wide"]), r"adapter .*q_proj.*shape .*\(\d+, \d+\)", "use an adapter"),
    "adapters of unequal ranks": (
        recipe(source__adapters=["adapter"], target__adapter="rank3", merge={"rule": "paper_sum"}),
        r"'paper_sum'.*\[2, 3\]", "'exact'",
    ),
    "adapter of another backbone": (
        source_adapter(lambda folder: change_json(folder / OUR_FILE, backbone_fingerprint="0123456789abcdef")),
        "0123456789abcdef", "tiny-llama has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_recipe_is_one_line_and_nothing_is_written(mistake: str, cli: Cli, workspace: Path) -> None:
    make, value, fix = MISTAKES[mistake]
    make(workspace)
    before = contents(workspace)
    line = refusal(cli("run", "tiny.yaml", "--output", "out"))
    assert re.search(value, line), line
    assert re.search(fix, line), line
    assert contents(workspace) == before
    assert not (workspace / "out").exists()


@pytest.fixture(scope="module")
def shared_workspace(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path, adapters: Path) -> Path:
    """A working folder of which nothing is to change."""
    folder = tmp_path_factory.mktemp("shared") / "work"
    write_tiny_workspace(folder, tiny_backbone_folder)
    return Path(shutil.copytree(adapters, folder, dirs_exist_ok=True))


TWICE = ("merge", "adapter", "adapter")
COMPARE = ("compare", "tiny.yaml")


@pytest.mark.parametrize(
    ("arguments", "value", "fix"),
    [
        (("run", "nope"), "'nope'", "neither a file, as seen from .*, nor a built-in name .*demo-ar"),
        (("run", "tiny.yaml", "-s", "seed"), "'seed'", r"a\.b=value"),
        (("run", "tiny.yaml", "-o", "tiny.yaml"), r"tiny\.yaml: ", "Not a directory"),
        (("run", "tiny.yaml", "-o", "."), "not empty", "another with --output"),
        (("predict", "adapter"), "the list of prompts is empty", "give a text"),
        (("predict", "adapter", "a", "--max-new-tokens", "0"), "max_new_tokens: ", "greater than or equal to 1"),
        (("predict", "adapter", "a", "--device", "tpu"), "device: ", "'auto', 'cpu'"),
        (("predict", "moved", "a"), r"'\./gone': there is no such folder", "--backbone"),
        (("predict", "adapter", "a", "--chat"), "no chat template", "leave .*--chat out"),
        ((*TWICE, "-o", "out", "--weight", "1"), "1 merge weights for 2 adapters", "give one per"),
        ((*TWICE, "-o", "."), "not an empty folder", "another with --output"),
        ((*TWICE, "-o", "tiny.yaml/out"), r"tiny\.yaml cannot be made", "another folder with --output"),
        (("merge", "adapter", "wide", "-o", "out"), "shape .*q_proj", "of the same backbone"),
        (("export", "adapter", "-o", "out"), "--fold", "--gguf"),
        ((*JUDGE, "--save", "."), "not an empty folder", "another"),
        (("judge", "gone", "--rows", "target.jsonl", "--language", "de"), "adapter gone", "check the name"),
        (("recipes", "mlqa-xx"), "'mlqa-xx'", "there are: .*mlqa-ar"),
        (("init", "nothing.csv", "-l", "de"), r"nothing\.csv", "No such file"),
        (("init", "adapter", "-l", "de"), "adapter", r"suffix ''; allowed: \.json"),
        ((*COMPARE, "--methods", "grsp"), "'grsp'", "allowed: .*grasp"),
        ((*COMPARE, "--seeds", "1,x"), "seeds.*'x'", "integer"),
        ((*COMPARE, "--on", "spark"), "--on is spark", "allowed: ray"),
        ((*COMPARE, "--workers", "2"), "--on is None; allowed: ray", "start this command several times"),
        # What typer says itself.
        (("run",), "Missing argument", r"\(see grasp-lora run --help\)"),
        (("merge", "a", "-o", "b\nc\x1b[2J", "--rank"), "--rank", r"\(see grasp-lora .*--help\)"),
        (("comprae",), "comprae", r"\(see grasp-lora --help\)"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line_and_nothing_is_written(
    arguments: tuple[str, ...], value: str, fix: str, cli: Cli, shared_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared_workspace)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    before = contents(shared_workspace)
    line = refusal(cli(*arguments))
    assert re.search(value, line), line
    assert re.search(fix, line), line
    assert contents(shared_workspace) == before


def test_a_probe_loss_that_is_not_finite_names_the_example_and_keeps_the_adapters(
    cli: Cli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (finished_run / "store").glob("controller*"):
        shutil.rmtree(step)
    monkeypatch.setattr(probes, "losses_after", lambda _, prompts, *more: torch.full([len(prompts)], torch.nan))
    line = refusal(cli("run", "tiny.yaml", "-o", finished_run), out=None)
    example = re.search(r"loss of example (\S+) is nan", line)
    assert example, line
    assert example[1] in {row.id for row in Session(*load_recipe("tiny.yaml")).splits.micro_dev}
    steps = {done.parent.name.split("-")[0] for done in (finished_run / "store").glob("*/done.json")}
    assert steps >= {"source", "target"}
    assert "controller" not in steps


def test_every_command_is_listed_and_has_help(cli: Cli) -> None:
    listed = output(cli("--help"))
    assert len(app.registered_commands) == len(COMMANDS)
    for command in COMMANDS:
        assert f" {command} " in listed
        result = cli(command, "--help")
        assert f"Usage: grasp-lora {command}" in output(result)
        assert result.err == ""
    nothing = cli()
    assert nothing.status == 2
    assert "Usage: grasp-lora" in nothing.out + nothing.err
    assert "error" not in nothing.out + nothing.err


def test_options_are_what_the_settings_say(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert set(MERGE_RULES) <= set(re.findall(r"\w+", output(cli("merge", "--help"))))
    options = {name: option.default for name, option in inspect.signature(compare).parameters.items()}
    settings = ComparisonSettings()
    assert options["seeds"] is options["grid"] is None  # which leaves the settings' own
    assert ",".join(map(str, settings.seeds)) in output(cli("compare", "--help"))
    assert options["reference"] is options["planned"] is None


def test_recipes_lists_all_and_prints_one_and_the_schema(cli: Cli, tmp_path: Path) -> None:
    listed = dict(line.split(maxsplit=1) for line in output(cli("recipes")).splitlines())
    assert list(listed) == builtin_recipes()
    assert "Arabic questions" in listed["mlqa-ar"]
    file = tmp_path / "mine.yaml"
    file.write_text(output(cli("recipes", "mlqa-ar")), encoding="utf-8")
    assert load_recipe(file)[0] == load_recipe("mlqa-ar")[0]
    assert output(cli("recipes", "--schema")) == schema_text()
    assert output(cli("--version")) == f"grasp-lora {version('grasp-lora')}\n"


def test_an_error_of_ours_keeps_its_traceback(cli: Cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("could not broadcast")

    monkeypatch.setattr("grasp_lora.engine.preflight.preflight", fail)
    with pytest.raises(ValueError, match="could not broadcast"):
        cli("check", "tiny.yaml")


def test_a_refusal_keeps_what_it_comes_from(tiny_workspace: Path) -> None:
    """Who calls the functions in a script sees the error of the library under ours."""
    Path("tiny.yaml").write_text("name: [1,\n")
    with pytest.raises(ValueError, match="no valid YAML") as caught:
        load_recipe("tiny.yaml")
    assert isinstance(caught.value.__cause__, yaml.YAMLError)


def test_check_says_what_to_expect(cli: Cli, tiny_workspace: Path) -> None:
    before = contents(tiny_workspace)
    result = cli("check", "tiny.yaml", "--set", "seed=7")
    assert "source_train 12, source_dev 4, train 10, dev 6, micro_dev 4, test 8" in output(result)
    assert "3 rounds" in result.out
    assert result.out.endswith(". Next: grasp-lora run tiny.yaml --set seed=7\n")
    assert result.err == ""
    assert contents(tiny_workspace) == before


def test_steps_work_one_by_one(cli: Cli, workspace: Path) -> None:
    elsewhere = workspace / "recipes"
    elsewhere.mkdir()
    recipe(data__source=None, data__root="..", backbone__name="../tiny-llama")(workspace)
    (workspace / "tiny.yaml").rename(elsewhere / "tiny.yaml")  # adapters of the command line start from here

    def call(*arguments: str) -> str:
        return output(cli(*arguments, "--backbone", "tiny-llama"))

    assert "ranks [5]" in call("merge", "adapter", "rank3", "-o", "merged")
    shutil.copytree("merged", "other/merged")
    table = call("judge", "merged", "other/merged", "--rows", "target.jsonl", "--language", "de")
    assert "other/merged" in table  # two of one name are told apart
    prompts = ("target 1: what?", "target 2: what?")
    assert call("predict", "merged", *prompts, "--max-new-tokens", "3").count("\n") == 2
    assert "-> exported" in call("export", "merged", "--gguf", "-o", "exported")


def test_a_working_folder_that_is_gone_is_one_line(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "a,b\n" * 40)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = cli("init", "../rows.csv", "-l", "de")
    assert (result.status, result.err) == (2, "error: [Errno 2] No such file or directory\n")


def test_no_print_fails_where_the_output_lacks_a_letter(tmp_path: Path) -> None:
    """A redirected output on Windows is often cp1252, which has no Arabic, no tick and no box."""
    code = (
        "from grasp_lora.cli import main\nfrom grasp_lora.cli.terminal import say, set_up_outputs\n"
        "set_up_outputs()\nsay('✓ –')\nimport sys\nsys.argv = ['grasp-lora', 'check', 'تجربة:key:']\nmain()"
    )
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ascii_only, capture_output=True, check=False, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "\\u2713 \\u2013\n", 1), done.stderr
    assert "\\u062a" in done.stderr
    assert ":key:" in done.stderr, "no name of ours is an emoji"


CALL = (
    "import sys\nfrom grasp_lora.cli import main\n"
    "def call(*arguments):\n    sys.argv = ['grasp-lora', *arguments]\n"
    "    try:\n        main()\n    except SystemExit as end:\n        return end.code\n"
)


def test_where_there_is_no_terminal_a_mistake_is_one_line_and_a_run_is_quiet(tiny_workspace: Path) -> None:
    code = "assert call('run', 'tiny.yaml', '-s', 'data.target.files=[no.jsonl]') == 2\nassert not call('run', 'tiny.yaml')\n"
    result = forked.python(["-c", CALL + code], tiny_workspace)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"error: [^\n]+'no\.jsonl' is missing[^\n]+\n", result.stderr), result.stderr
    assert len(result.stdout.splitlines()) < 40
    assert "\r" not in result.stdout


def test_quick_commands_do_without_torch_and_shells_complete_recipes(tiny_workspace: Path) -> None:
    code = (
        "for words in ('--help', 'init --help', 'compare --help', 'recipes', 'recipes mlqa-ar'):\n"
        "    assert not call(*words.split())\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\nassert not heavy, heavy\n"
        "import os\nos.environ |= {'_GRASP_LORA_COMPLETE': 'complete_bash', 'COMP_WORDS': 'grasp-lora run ', 'COMP_CWORD': '2'}\n"
        "print('offered:')\ncall()\n"
    )
    done = subprocess.run([sys.executable, "-c", CALL + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {*builtin_recipes(), "tiny.yaml"} <= set(done.stdout.partition("offered:")[2].splitlines())


def test_the_end_of_a_run_names_systems_and_metrics_as_the_report_does(cli: Cli, finished_run: Path) -> None:
    shown = output(cli("run", "tiny.yaml", "--output", finished_run))
    for name in (
        "Backbone alone",
        "Merged, not trained",
        "Exact match",
        "Not usable yet (test ROUGE-L 0.0): the merge of both adapters, pruned at",
    ):
        assert name in shown
    assert "exact_match" not in shown


def test_the_first_answers_of_a_system_are_printed_as_they_come() -> None:
    rows = [
        Prediction("1", "six\x1b[31m years", ("six years",), 1.0, {"f1": 50.0}, {}),
        Prediction("2", "سالم", ("سالم", "الشيخ سالم"), 1.0, {"f1": 100.0}, {}),
        Prediction("3", "third", ("3",), 1.0, {"f1": 0.0}, {}),
    ]
    for answers in (0, 2):
        text = io.StringIO()
        TerminalProgress(Console(file=text, width=200), answers).scored("grasp", rows)
        lines = text.getvalue().splitlines()
        assert len(lines) == answers
    assert "≈ F1 50" in lines[0]
    assert "\x1b" not in lines[0]
    assert "✓ right" in lines[1]
    assert "سالم" in lines[1]


class TestInterrupted:
    LINE = "stopped by SIGINT before it began; run the same command again\n"

    def test_before_anything_begins(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("grasp_lora.recipes.load.load_recipe", interrupt)
        assert cli("check", "demo-ar") == CliResult(75, "", self.LINE)

    def test_while_the_command_line_is_imported(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Interrupts:
            def find_spec(self, name: str, *_: object) -> None:
                if name == "grasp_lora.cli":
                    raise KeyboardInterrupt

        monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
        for name in [name for name in sys.modules if name.startswith("grasp_lora.cli")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr("grasp_lora.cli", raising=False)
        with pytest.raises(SystemExit, match="75"):
            start()
        assert capsys.readouterr().err == self.LINE

    @pytest.mark.parametrize("swallows", [False, True])
    def test_while_a_library_is_imported_which_may_make_another_error_of_it(
        self, tmp_path: Path, swallows: bool
    ) -> None:
        ends = "raise ImportError('read this advice') from None" if swallows else "raise"
        fake = f"import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    {ends}\n"
        (tmp_path / "numpy.py").write_text(fake, encoding="utf-8")
        # A process in the background may ignore the signal from its start.
        code = "from signal import *; signal(SIGINT, default_int_handler); from grasp_lora.__main__ import main; main()"
        path = os.pathsep.join([str(tmp_path), *sys.path])
        command = [sys.executable, "-c", code, "check", "demo-ar"]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (75, "", self.LINE)

    def test_while_the_report_is_written(self, finished_run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        replace, page = Path.replace, finished_run / "report.html"
        outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it

        def interrupt(draft: Path, place: Path) -> Path:
            if place.name == page.name:
                os.kill(os.getpid(), signal.SIGINT)
            return replace(draft, place)

        page.unlink()
        monkeypatch.setattr(Path, "replace", interrupt)
        try:
            result = cli("run", "tiny.yaml", "--output", "run")
        finally:
            signal.signal(signal.SIGINT, outside)
        assert result.status == STOPPED
        assert "stopped by SIGINT while the report was written; run the same command again to go on" in result.err
        assert not list(finished_run.glob("report.html*"))


@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, waiting_turns()), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_briefly_unless_the_user_says_how(
    own: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(own)
    monkeypatch.setattr(os, "environ", environment)
    set_up_libraries()
    assert environment.get("GOMP_SPINCOUNT") == spins
    assert {name: environment[name] for name in own} == own
