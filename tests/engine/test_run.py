"""A whole run in its folder: complete and consistent files, resume, determinism, and every way to start."""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from grasp_lora.engine.finished import refuse_other_template
from grasp_lora.report.run_record import STAGES
from recorder import Recorder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lora import api
from grasp_lora.engine.progress import Progress
from grasp_lora.engine.session import Session
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.evaluation.metrics import score
from grasp_lora.method.masks import prune_count
from grasp_lora.models.backbone import fingerprint, load_backbone
from grasp_lora.models.reading import WEIGHTS_FILE, read_adapter
from grasp_lora.recipes.load import load_recipe
from grasp_lora.report.pages import write_report
from grasp_lora.storage.claims import LOCK_FILE, claim
from grasp_lora.training.controller import GraspController, PrunedTraining
from grasp_lora.training.trainer import BestOnDev

SYSTEMS = ("zero_shot", "source", "target", "merged", "grasp")
FILES = {
    "recipe.yaml", "run.json", "data.json", "prompt.jsonl", "metrics.json", "cost.json", "report.html", "report.md",
    *(f"{adapter}/{file}" for adapter in ("source", "target", "merged", "final", "adapter")
      for file in ("adapter_config.json", "adapter_model.safetensors", "grasp_lora.json")),
    *(f"{stage}/history.jsonl" for stage in ("source", "target", "controller", "final")),
    "controller/rounds.jsonl", "controller/timings.jsonl", "controller/ratio.json", "final/sparsity.json",
    *(f"evaluation/{name}.jsonl" for name in (*SYSTEMS, "prompts")), "adapter/README.md",
}  # fmt: skip


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def files_of(folder: Path, store: bool = False) -> dict[str, bytes]:
    """The files of a run folder, those of its store where they are asked for."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files if store else {name: content for name, content in files.items() if not name.startswith("store/")}


def execute(*overrides: str, folder: str = "run", progress: Progress | None = None) -> dict[str, Any]:
    result = api.run("tiny.yaml", overrides, folder, progress)
    assert result.folder == Path(folder)
    metrics: dict[str, Any] = read(result.folder / "metrics.json")
    assert result.ratio.ratio == metrics["prune_ratio"]
    return metrics


def record(run: Path, step: str) -> Any:
    """What came of a step of a run."""
    [file] = (run / "store/records").glob(f"{step}-*.json")
    return read(file)["result"]


def reopen(run: Path, *steps: str) -> None:
    """Let a finished run have these steps still to do."""
    (run / "metrics.json").unlink()
    for step in steps:
        files = list((run / "store/records").glob(f"{step}-*.json"))
        assert files
        for file in files:
            file.unlink()


def same_result(one: Path, other: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", "merged/adapter_model.safetensors", "controller/rounds.jsonl",
                 "controller/ratio.json", "final/history.jsonl", "evaluation/grasp.jsonl", "metrics.json"):  # fmt: skip
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


class Watching(Recorder):
    """Remembers the stages, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []
        self.skipped: list[str] = []

    @property
    def done(self) -> list[str]:
        """The kinds of steps that were done."""
        return [step.split()[0] for step in self.did]

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def finished(self, name: str, seconds: float, summary: Mapping[str, Any], *, skipped: bool) -> None:
        if skipped:
            self.skipped.append(name)


class TestFiles:
    def test_there_is_every_file_of_a_run_folder_and_no_other(self, reference_run: Path) -> None:
        assert set(files_of(reference_run)) == FILES

    def test_the_saved_recipe_is_the_same_recipe(self, reference_run: Path) -> None:
        recipe, _ = load_recipe(reference_run.parent / "tiny.yaml")
        saved, _ = load_recipe(reference_run / "recipe.yaml")
        assert saved == recipe
        assert saved.fingerprint() == recipe.fingerprint() == read(reference_run / "run.json")["recipe_hash"]

    def test_run_json_names_what_the_run_rests_on(self, reference_run: Path) -> None:
        run = read(reference_run / "run.json")
        assert (run["name"], run["seed"], run["backbone"]["name"]) == ("tiny", 42, "tiny-llama")
        assert len(run["backbone"]["fingerprint"]) == 16
        assert {"torch", "transformers", "peft"} <= set(run["libraries"])
        assert run["parents"] == []

    def test_the_data_are_disjoint_and_as_asked(self, reference_run: Path) -> None:
        ids = read(reference_run / "data.json")["ids"]
        sizes = {name: len(members) for name, members in ids.items()}
        assert sizes == {"source_train": 12, "source_dev": 4, "train": 10, "dev": 6, "micro_dev": 4, "test": 8}
        assert len({member for members in ids.values() for member in members}) == sum(sizes.values())

    def test_the_rounds_are_consistent(self, reference_run: Path) -> None:
        rounds = read_lines(reference_run / "controller/rounds.jsonl")
        assert [entry["step"] for entry in rounds] == [3, 6, 9]
        ratio = 0.4
        for number, entry in enumerate(rounds, start=1):
            assert entry["round"] == number
            assert len(entry["candidates"]) == len(entry["candidate_losses"]) == len(entry["rewards"]) == 3
            assert all(0.1 <= candidate <= 0.8 for candidate in entry["candidates"])
            baseline = math.fsum(entry["baseline_losses"]) / 4
            for losses, reward in zip(entry["candidate_losses"], entry["rewards"], strict=True):
                assert len(losses) == 4
                assert reward == pytest.approx(baseline - math.fsum(losses) / 4, abs=1e-12)
            assert entry["ratio_before"] == ratio
            assert entry["committed"] == (max(entry["rewards"]) >= 0)
            ratio = entry["ratio"]
            assert abs(ratio - entry["ratio_before"]) <= 0.1 + 1e-12
            # One weight at most is rounded down in each of the 8 factors of 2 adapters.
            assert entry["measured_sparsity"] == pytest.approx(ratio, abs=16 / 896)
        timings = read_lines(reference_run / "controller/timings.jsonl")
        assert [entry["round"] for entry in timings] == [1, 2, 3]
        learned = read(reference_run / "controller/ratio.json")
        assert learned["rounds"] == 3
        assert 0.1 <= learned["low"] <= learned["prune_ratio"] <= learned["high"] <= 0.8
        assert len({len(column) for column in learned["curve"].values()}) == 1

    def test_measured_sparsity_is_the_learned_ratio(self, reference_run: Path) -> None:
        ratio = read(reference_run / "controller/ratio.json")["prune_ratio"]
        rows = read(reference_run / "final/sparsity.json")
        assert {row["segment"] for row in rows} == {"source", "target"}
        for row in rows:
            assert row["weights"] - row["kept"] == prune_count(ratio, row["weights"])
        tensors = load_file(reference_run / "adapter/adapter_model.safetensors")
        zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
        assert zeros == sum(row["weights"] - row["kept"] for row in rows)
        assert sum(tensor.numel() for tensor in tensors.values()) == sum(row["weights"] for row in rows)

    def test_the_best_step_is_the_minimum_of_the_history(self, reference_run: Path) -> None:
        for stage in ("source", "target", "final"):
            history = [row for row in read_lines(reference_run / stage / "history.jsonl") if "dev_loss" in row]
            best = min(history, key=lambda row: row["dev_loss"])
            summary = record(reference_run, f"{stage}*")
            assert (summary["best_step"], summary["dev_loss"]) == (best["step"], best["dev_loss"])

    def test_the_metrics_are_what_the_predictions_give(self, reference_run: Path) -> None:
        metrics = read(reference_run / "metrics.json")
        assert set(metrics["systems"]) == set(SYSTEMS)
        test_ids = read(reference_run / "data.json")["ids"]["test"]
        for system, values in metrics["systems"].items():
            rows = read_lines(reference_run / "evaluation" / f"{system}.jsonl")
            assert [row["id"] for row in rows] == test_ids
            assert values["test_loss"] == pytest.approx(math.fsum(row["loss"] for row in rows) / len(rows), rel=1e-12)
            names = list(values["metrics"])
            scores = score(names, [row["prediction"] for row in rows], [tuple(row["references"]) for row in rows], "de")
            assert values["metrics"] == {name: entry.value for name, entry in scores.items()}
            assert metrics["signatures"] == {name: entry.signature for name, entry in scores.items()}
        assert metrics["systems"]["grasp"]["dev_loss"] == pytest.approx(
            record(reference_run, "final*")["dev_loss"], rel=1e-6
        )
        assert (metrics["test_examples"], metrics["language"]) == (8, "de")
        learned = read(reference_run / "controller/ratio.json")
        assert metrics["prune_ratio"] == learned["prune_ratio"]
        assert metrics["prune_ratio_interval"] == [learned["low"], learned["high"]]
        assert metrics["nothing_learned_about_ratio"] is (learned["high"] - learned["low"] >= 0.75 * (0.8 - 0.1))
        assert metrics["best_step"] == record(reference_run, "final*")["best_step"]
        cost = read(reference_run / "cost.json")
        assert set(cost) == set(STAGES) - {"continued", "all_rows"}  # this run hands over GRASP's result
        assert all(seconds >= 0 for seconds in cost.values())

    def test_no_file_names_a_place_of_this_machine(self, reference_run: Path, tiny_backbone_folder: Path) -> None:
        places = {
            str(reference_run.parent),
            str(reference_run.parent.parent),
            str(tiny_backbone_folder),
            str(Path.home()),
        }
        for name, content in files_of(reference_run, store=True).items():
            for place in places:
                assert place.encode() not in content, f"{name} holds {place}"

    def test_the_adapter_works_in_plain_peft_in_a_process_of_its_own(self, reference_run: Path) -> None:
        code = f"""
import json, math, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("tiny-llama")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny-llama", dtype=torch.float32), "run/adapter")
rows = [json.loads(line) for line in open("target.jsonl")]
losses = []
for identity in {read(reference_run / "data.json")["ids"]["dev"]!r}:
    row = rows[int(identity.rsplit(":", 1)[1]) - 1]
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
assert not any(name.startswith("grasp_lora") for name in sys.modules)
print(math.fsum(losses) / len(losses))
"""
        result = forked.python(["-c", code], cwd=reference_run.parent)
        assert result.returncode == 0, result.stderr
        expected = record(reference_run, "final*")["dev_loss"]
        assert float(result.stdout) == pytest.approx(expected, rel=1e-6)

    def test_the_merge_holds_each_parent_under_its_own_name(self, finished_run: Path) -> None:
        adapters = {name: read_adapter(finished_run / name).weights for name in ("source", "target", "merged")}
        for module, merged in adapters["merged"].items():
            assert [segment.name for segment in merged.segments] == ["source", "target"]
            first = 0
            for segment in merged.segments:
                own = slice(first, first := first + segment.rank)
                part = merged.scaling * merged.B[:, own] @ merged.A[own]
                parent = adapters[segment.name][module]
                torch.testing.assert_close(
                    part, 0.5 * parent.scaling * parent.B @ parent.A
                )  # the exact merge: 1/N each


class TestAgain:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes."),
            MemoryError(),
        ],
    )
    def test_out_of_memory_is_one_line_that_says_what_helps_and_what_is_done_stays(
        self, error: Exception, finished_run: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = files_of(finished_run)
        reopen(finished_run, "final*")

        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("grasp_lora.training.trainer.example_losses", fail)
            result = cli("run", "tiny.yaml", "-o", "run")
        assert result.status == 2
        assert re.fullmatch(
            r"error: the memory does not suffice for the training \(.+\); set backbone\.gradient_checkpointing to true, or "
            r"lower data\.max_tokens \(the longest example has \d+ tokens\), or set backbone\.dtype "
            r".*What is done stays\n", result.err
        )  # fmt: skip
        # As the message says, or that of answers.
        execute("backbone.gradient_checkpointing=true")
        after = files_of(finished_run)
        for name in ("source/adapter_model.safetensors", "adapter/adapter_model.safetensors", "metrics.json"):
            assert after[name] == before[name]
        assert len(list(Path("run/store/records").glob("source-*"))) == 1

    def test_answers_that_were_lost_are_written_again_and_damaged_ones_are_named(
        self, finished_run: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers, again = finished_run / "store/answers", ("run", "tiny.yaml", "-o", "run")
        examine = Session.examine

        def others(self: Session, adapter: Any) -> Any:
            losses, _ = examine(self, adapter)
            return losses, [example.references[0] for example in self.splits.test]

        for changed in (False, True):
            shutil.rmtree(answers)
            reopen(finished_run)
            with monkeypatch.context() as patch:
                if changed:
                    patch.setattr(Session, "examine", others)
                result = cli(*again)
            assert result.status == 0, result.err
            assert ("written again and are not those that were scored" in result.err + result.out) is changed
        reopen(finished_run)
        file = min(answers.iterdir())
        file.write_text(file.read_text(encoding="utf-8")[:-5], encoding="utf-8")
        result = cli(*again)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert f"{file.name} are damaged; remove the file, and they are written again" in result.err

    def test_the_same_recipe_in_another_folder_gives_the_same_bits(self, finished_run: Path) -> None:
        execute(folder="again")
        same_result(finished_run, Path("again"))

    def test_a_finished_run_sees_that_its_data_were_changed(self, finished_run: Path, cli: Callable[..., Any]) -> None:
        before, data = files_of(finished_run), Path("target.jsonl").read_text(encoding="utf-8")
        Path("target.jsonl").write_text(data.replace(" 3", " 4"), encoding="utf-8")
        result = cli("run", "tiny.yaml", "-o", "run")
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert "error: run was begun with other data than the recipe's files hold now; put those back, or" in result.err
        assert files_of(finished_run) == before

    def test_a_finished_run_looks_once_at_data_that_hold_the_same_examples(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Path("target.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n")
        before = read(finished_run / "metrics.json")
        monkeypatch.setattr(Session, "finetune", lambda *_: pytest.fail("it is trained again"))
        assert execute() == before
        monkeypatch.setattr("grasp_lora.engine.session.load_backbone", lambda *_: pytest.fail("it is loaded again"))
        assert execute() == before

    def test_a_finished_run_looks_at_its_examples_where_the_chat_template_was_turned_off(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded: list[Any] = []
        monkeypatch.setattr(
            "grasp_lora.engine.session.load_backbone",
            lambda *given: (loaded.append(given), load_backbone(*given))[1],
        )
        before = execute()
        assert not loaded
        assert execute("data.chat_template=false") == before  # the rows hold no conversations
        assert len(loaded) == 1

    def test_a_run_does_not_go_on_with_the_prompts_of_another_template(self, tmp_path: Path) -> None:
        now = {"data.chat_template": "False", "backbone": "b"}
        refuse_other_template(tmp_path, now, now)
        refuse_other_template(tmp_path, {}, now)  # begun before this was noted
        with pytest.raises(RecipeError, match=r"begun with data\.chat_template None, and now it is False.*--output"):
            refuse_other_template(tmp_path, now | {"data.chat_template": "None"}, now)

    def test_a_finished_run_sees_that_a_given_adapter_was_changed(
        self, finished_run: Path, cli: Callable[..., Any]
    ) -> None:
        shutil.copytree("run/source", "given")
        given = ["--set", "data.source=null", "--set", "source.adapters=[given]", "-o", "other"]
        assert cli("run", "tiny.yaml", *given).status == 0
        shutil.copytree("run/target", "given", dirs_exist_ok=True)
        result = cli("run", "tiny.yaml", *given)
        assert result.status == 2
        assert "error: other was begun with other parents than the recipe's files hold now" in result.err

    def test_a_finished_run_sees_that_the_scaling_of_a_given_adapter_was_changed(
        self, finished_run: Path, cli: Callable[..., Any]
    ) -> None:
        shutil.copytree("run/source", "given")
        given = ["--set", "data.source=null", "--set", "source.adapters=[given]", "-o", "other"]
        assert cli("run", "tiny.yaml", *given).status == 0
        config = read(Path("given/adapter_config.json"))
        Path("given/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4 * config["lora_alpha"]}))
        assert "other was begun with other parents" in cli("run", "tiny.yaml", *given).err

    def test_a_finished_run_sees_that_the_weights_of_its_backbone_were_changed(
        self, finished_run: Path, cli: Callable[..., Any]
    ) -> None:
        own = shutil.copytree("tiny-llama", "own")
        changes = ["--set", "backbone.name=own", "-o", "other"]
        assert cli("run", "tiny.yaml", *changes).status == 0
        model = AutoModelForCausalLM.from_pretrained("own")
        with torch.no_grad():
            model.model.norm.weight.mul_(2.0)
        model.save_pretrained(own)
        assert "other was begun with other backbone" in cli("run", "tiny.yaml", *changes).err

    def test_the_command_that_is_printed_finds_a_backbone_beside_a_recipe_in_another_folder(
        self, finished_run: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("recipes/models").mkdir(parents=True)
        shutil.copytree("tiny-llama", "recipes/models/own")
        for name in ("tiny.yaml", "source.jsonl", "target.jsonl"):
            shutil.copy(name, "recipes")
        result = cli("run", "recipes/tiny.yaml", "--set", "backbone.name=models/own", "-o", "runs/other")
        assert result.status == 0, result.err
        assert "grasp-lora predict runs/other/adapter --jsonl < runs/other/prompt.jsonl" in result.out
        expected = cli("predict", "runs/other/adapter", "source 1: what?")
        assert expected.status == 0, expected.err
        monkeypatch.chdir("runs/other")  # as the report has it
        assert cli("predict", "adapter", "source 1: what?").out == expected.out

    def test_a_few_changed_weights_of_the_backbone_are_refused(
        self, finished_run: Path, cli: Callable[..., Any], make_tiny_model: Callable[..., Any]
    ) -> None:
        own = shutil.copytree("tiny-llama", "own")
        changes = ["--set", "backbone.name=own", "-o", "other"]
        assert cli("run", "tiny.yaml", *changes).status == 0
        model = AutoModelForCausalLM.from_pretrained("own")
        before = fingerprint(model)
        with torch.no_grad():
            model.model.embed_tokens.weight[3, 1:3] += 1.0
        assert fingerprint(model) == before
        model.save_pretrained(own)
        for command in (["run", "tiny.yaml"], ["compare", "tiny.yaml", "--methods", "merged", "--reference", "merged"]):
            result = cli(*command, *changes)
            assert (result.status, result.err.count("\n")) == (2, 1)
            assert "other weights of the backbone (weights in torch.float32 " in result.err

    @pytest.mark.parametrize("command", ["run", "compare", "compare --dry-run"])
    def test_a_changed_config_of_the_backbone_is_refused(
        self, command: str, finished_run: Path, cli: Callable[..., Any]
    ) -> None:
        Path("own").mkdir()
        for file in Path("tiny-llama").iterdir():
            shutil.copy(file, "own")
        changes = ["tiny.yaml", "--set", "backbone.name=own", "-o", "other"]
        assert cli("run", *changes).status == 0
        config, before = read(Path("own/config.json")), files_of(Path("other"))
        name, *more = command.split()
        asked = [name, *changes, *more]
        if name == "compare":
            asked += ["--methods", "merged", "--reference", "merged", "--seeds", "42"]
        Path("own/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        result = cli(*asked)
        assert (result.status, result.err.count("\n")) == (2, 1)
        said = "were done with another config or other weights of the backbone (rms_norm_eps 1e-06, now 0.5); put that back"
        assert said in result.err
        assert files_of(Path("other")) == before
        # What computes nothing may change, and a store of an older version is taken as it is.
        Path("own/config.json").write_text(json.dumps(config | {"use_cache": False, "transformers_version": "9"}))
        assert cli(*asked).status == 0
        Path("own/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        Path("other/store/backbones.json").unlink()
        assert cli(*asked).status == 0
        assert not Path("other/store/backbones.json").exists()

    def test_a_finished_run_scores_anew_by_code_that_was_changed(self, finished_run: Path) -> None:
        code = (
            "from grasp_lora.evaluation.metrics import Metric, MetricScore\n"
            "def score(outputs):\n"
            "    rows = (VALUE,) * len(outputs.predictions)\n"
            "    return MetricScore('own', VALUE, 'own', rows)\n"
            "metric = Metric(score, 'own')\n"
        )
        found = []
        for value in ("1.0", "20.0"):  # of other length, or the compiled file of the same second would count
            Path("scored_by.py").write_text(code.replace("VALUE", value))
            for name in [name for name in sys.modules if name == "scored_by"]:
                del sys.modules[name]  # as in a process of its own
            changes = {"metrics": ["scored_by:metric"]}
            metrics = api.run("tiny.yaml", changes, "other", allow_code=True).metrics
            found.append(metrics.systems["grasp"].metrics["scored_by:metric"])
        assert found == [1.0, 20.0]

    def test_a_finished_run_that_looks_again_is_not_finished_until_it_has(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Path("target.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n")

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        before = read(finished_run / "metrics.json")
        with monkeypatch.context() as patch:
            patch.setattr("grasp_lora.engine.run.choose", killed)
            with pytest.raises(KeyboardInterrupt):
                execute()
        assert not (finished_run / "metrics.json").exists()
        assert execute() == before

    @pytest.mark.parametrize("lost", ["recipe.yaml", "cost.json", "data.json", "adapter/adapter_config.json"])
    def test_a_file_that_a_finished_run_has_lost_is_written_again(self, finished_run: Path, lost: str) -> None:
        (finished_run / lost).unlink()
        execute()
        assert (finished_run / lost).is_file()

    def test_an_adapter_that_was_moved_away_is_there_again(self, finished_run: Path) -> None:
        before = files_of(finished_run)
        Path("run/adapter").rename("elsewhere")
        execute()
        assert (
            files_of(finished_run)["adapter/adapter_model.safetensors"] == before["adapter/adapter_model.safetensors"]
        )

    def test_a_step_that_has_to_be_done_again_counts_once_and_is_not_called_done(self, finished_run: Path) -> None:
        shutil.rmtree("run/store/adapters")
        Path("run/metrics.json").unlink()
        before, done = read(finished_run / "cost.json"), {}

        class Watch(Progress):
            def finished(self, name: str, seconds: float, summary: Mapping[str, Any], *, skipped: bool) -> None:
                done[name] = not skipped

        execute(progress=Watch())
        assert done["source"]
        assert done["target"]
        assert read(finished_run / "cost.json")["source"] == before["source"]

    def test_adapters_that_learned_nothing_are_said_to_be_the_cause(self, finished_run: Path) -> None:
        nothing = [f"{stage}.training.learning_rate=1e-30" for stage in ("source", "target")]
        with pytest.raises(
            GraspError, match=r"no step lowered a dev loss .*; lower source.training.learning_rate \(now 1e-30\)"
        ):
            execute(*nothing, folder="nothing")

    def test_an_adapter_says_how_its_own_recipe_asks(self, finished_run: Path) -> None:
        shutil.copytree("run/store", "other/store")
        changes = ["generation.max_new_tokens=9", "generation.stop=['.']"]
        execute(*changes, folder="other")
        for name in ("source", "target", "merged", "final", "adapter"):
            answers = read(Path("other", name, "grasp_lora.json"))["answers"]
            assert (answers["max_new_tokens"], answers["stop"], answers["allow_empty"]) == (9, ["."], True)
            assert "allow_empty" not in read(Path("run", name, "grasp_lora.json"))["answers"]

    def test_another_seed_gives_another_adapter(self, finished_run: Path) -> None:
        execute("seed=43", folder="other")
        name = "adapter/adapter_model.safetensors"
        assert (Path("other") / name).read_bytes() != (finished_run / name).read_bytes()

    def test_a_complete_run_is_skipped_and_left_as_it_is(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = files_of(finished_run)
        monkeypatch.setattr("grasp_lora.engine.session.load_backbone", lambda _: pytest.fail("loaded the backbone"))
        recorder = Watching()
        metrics = execute(progress=recorder)
        assert recorder.stages == ["report"]
        assert recorder.done == recorder.found == []
        assert metrics == read(finished_run / "metrics.json")
        assert files_of(finished_run) == before

    @pytest.mark.parametrize("steps", [(), ("test-losses",), ("final*",), ("controller", "final*", "dev-losses")])
    def test_steps_without_a_record_are_done_again_and_no_others(
        self, steps: tuple[str, ...], finished_run: Path
    ) -> None:
        before = files_of(finished_run)
        reopen(finished_run, *steps)
        recorder = Watching()
        execute(progress=recorder)
        assert {step.split("-")[0].rstrip("*") for step in steps} == set(recorder.done)
        assert recorder.found
        after = files_of(finished_run)
        assert set(after) == set(before)
        for name in set(before) - {"cost.json", "report.html", "report.md", "controller/timings.jsonl"}:
            assert after[name] == before[name], name

    @pytest.mark.parametrize(
        ("part", "method", "after", "step"),
        [
            (PrunedTraining, "on_optimizer_step", 5, "controller"),
            (GraspController, "run_round", 1, "controller"),
            (BestOnDev, "_evaluate", 5, "final"),  # the fifth look at a dev set is the last one, in the final run
            (Session, "save", 4, "final"),  # source, target and the merge that is shown come before
            (Session, "examine", 2, "test"),
        ],
        ids=["controller", "round", "final", "save", "evaluate"],
    )
    def test_an_interrupted_run_goes_on_to_the_same_bits(
        self, part: type, method: str, after: int, step: str, tiny_workspace: Path, reference_run: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        calls = 0
        original = getattr(part, method)

        def interrupted(self: object, *arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls > after - (method == "save"):
                raise KeyboardInterrupt
            return original(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(part, method, interrupted)
            with pytest.raises(KeyboardInterrupt):
                execute()
        done = {file.stem.split("-")[0] for file in Path("run/store/records").iterdir()}
        recorder = Watching()
        execute(progress=recorder)
        assert recorder.done[0] == step
        assert done <= {step.split()[0] for step in recorder.found}
        same_result(Path("run"), reference_run)
        assert set(files_of(Path("run"))) == FILES
        assert not list(Path("run/store/work").iterdir())

    def test_a_second_writer_is_refused_and_changes_nothing(self, finished_run: Path) -> None:
        with claim(finished_run, wait=False, inside=True):
            assert execute()["test_examples"] == 8  # a complete run is only read
            reopen(finished_run)
            before = files_of(finished_run)
            with pytest.raises(
                RecipeError, match=r"run is being written by another process; .*choose another folder with"
            ):
                execute()
            assert files_of(finished_run) == before
        execute()

    def test_what_a_kill_left_behind_is_removed(self, finished_run: Path) -> None:
        [file] = (finished_run / "store/records").glob("controller-*.json")
        key = file.stem.rpartition("-")[2]
        reopen(finished_run, "final*")
        # The work of a step whose record was written, a draft in the store and one in the run folder.
        for name in (f"store/work/{key}/controller/checkpoint-9", "adapter.part"):
            (finished_run / name).mkdir(parents=True)
            (finished_run / name / "weights.safetensors").write_bytes(b"half")
        execute()
        assert set(files_of(finished_run)) == FILES
        assert not list((finished_run / "store/work").iterdir())

    @pytest.mark.parametrize("broken", ["cut off", "missing"])
    def test_a_store_that_was_half_copied_is_mended_before_it_is_handed_over(
        self, finished_run: Path, broken: str
    ) -> None:
        handed_over = (finished_run / "adapter" / WEIGHTS_FILE).read_bytes()
        reopen(finished_run)
        for weights in (finished_run / "store/adapters").glob(f"*/{WEIGHTS_FILE}"):
            weights.write_bytes(weights.read_bytes()[:100]) if broken == "cut off" else weights.unlink()
        execute()
        assert (finished_run / "adapter" / WEIGHTS_FILE).read_bytes() == handed_over

    @pytest.mark.parametrize("left", [(LOCK_FILE,), (LOCK_FILE, "run.json.part")])
    def test_a_folder_that_a_run_was_killed_in_before_it_began_is_a_new_one(
        self, left: tuple[str, ...], tiny_workspace: Path
    ) -> None:
        Path("run").mkdir()
        for name in left:
            (Path("run") / name).write_text("{")
        execute("data.target.test=0")
        assert Path("run/adapter/adapter_model.safetensors").is_file()

    def test_the_time_of_an_interrupted_stage_counts_up(
        self, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = GraspController.run_round

        def slow(self: GraspController, *arguments: Any) -> Any:
            if len(self.search.history) == 2:
                raise KeyboardInterrupt
            time.sleep(0.3)
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(GraspController, "run_round", slow)
            with pytest.raises(KeyboardInterrupt):
                execute("report_to=[]")
        execute("report_to=[]")
        assert read(Path("run/cost.json"))["controller"] >= 0.6  # two rounds before the checkpoint

    def test_other_data_than_the_run_began_with_are_refused(self, finished_run: Path) -> None:
        reopen(finished_run, "final*")
        lines = Path("target.jsonl").read_text().splitlines()
        Path("target.jsonl").write_text("\n".join(line.replace("what", "which") for line in lines))
        before = files_of(finished_run)
        with pytest.raises(RecipeError, match="run was begun with other data than the recipe's files hold now"):
            execute()
        assert files_of(finished_run) == before

    def test_another_backbone_under_the_same_name_is_refused(
        self, finished_run: Path, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any
    ) -> None:
        reopen(finished_run, "final*")
        Path("tiny-llama").unlink()
        make_tiny_model("llama", seed=5).save_pretrained("tiny-llama")
        tiny_tokenizer.save_pretrained("tiny-llama")
        with pytest.raises(RecipeError, match="begun with other backbone than"):
            execute()

    def test_the_folder_of_another_recipe_is_refused(self, finished_run: Path) -> None:
        with pytest.raises(RecipeError, match=r"another recipe \(seed is 42 there and 7 here\); choose another folder"):
            execute("seed=7")

    @pytest.mark.parametrize("change", ["report_to=[]", "backbone.gradient_checkpointing=true", "data.root=."])
    def test_what_does_not_decide_the_result_may_change(self, change: str, finished_run: Path) -> None:
        execute(change)

    @pytest.mark.parametrize(
        ("damaged", "content", "way_out"),
        [
            ("store/records/controller-*.json", "{", "delete it"),
            ("metrics.json", "{", "Delete it"),
            ("controller/ratio.json", "[]", "Delete it"),
        ],
    )
    def test_a_damaged_file_says_which_and_what_to_do(
        self, damaged: str, content: str, way_out: str, finished_run: Path
    ) -> None:
        [file] = finished_run.glob(damaged)
        file.write_text(content)
        if "store" in damaged:
            reopen(finished_run, "final*")
        with pytest.raises(RecipeError, match=f"{re.escape(file.name)}.*{way_out}"):
            execute()

    @pytest.mark.parametrize("name", ["rounds.jsonl", "timings.jsonl", "history.jsonl"])
    def test_rows_that_a_power_cut_took_are_missed_and_come_back_from_the_record(
        self, name: str, finished_run: Path, cli: Callable[..., Any]
    ) -> None:
        file = finished_run / "controller" / name
        whole = file.read_bytes()
        for left in (b"", whole[: whole.index(b"\n") + 1], whole[:-1]):
            file.write_bytes(left)
            for command in (("run", "tiny.yaml", "-o", "run"), ("report", "run")):
                result = cli(*command)
                assert result.status == 2
                assert re.fullmatch(
                    rf"error: run/controller/{name} is damaged: it holds \d of \d rows\. Delete it and run .*\n",
                    result.err,
                )
        file.unlink()
        execute()
        assert file.read_bytes() == whole

    def test_a_report_of_an_unfinished_run_does_not_stay(self, finished_run: Path) -> None:
        reopen(finished_run, "final*")
        (finished_run / "report.html").write_text("so far")
        execute()
        assert "so far" not in (finished_run / "report.html").read_text(encoding="utf-8")[:10]

    def test_a_report_made_while_another_choice_is_under_way_does_not_stay(self, finished_run: Path) -> None:
        class Looks(Progress):
            def stage(self, name: str) -> None:
                if name == "all_rows":
                    write_report(finished_run)

        card, tables = finished_run / "adapter/README.md", finished_run / "report.md"
        before = card.read_text(encoding="utf-8")
        execute("final.all_rows=true", progress=Looks())
        assert card.read_text(encoding="utf-8") != before
        assert "not complete" not in tables.read_text(encoding="utf-8")


class TestWays:
    """Ways to start and to finish other than the reference run's."""

    def test_a_given_ratio_leaves_out_the_controller(self, finished_run: Path) -> None:
        recorder = Watching()
        metrics = execute("final.prune_ratio=0.5", folder="given", progress=recorder)
        assert "controller" not in recorder.stages
        assert not Path("given/controller").exists()
        assert metrics["prune_ratio"] == 0.5
        assert metrics["prune_ratio_interval"] is None
        assert "controller" not in read(Path("given/cost.json"))
        assert all(2 * row["kept"] == row["weights"] for row in read(Path("given/final/sparsity.json")))
        again = Watching()
        execute("final.prune_ratio=0.5", folder="given", progress=again)
        assert again.done == []

    def test_given_adapters_are_used_and_not_trained(self, finished_run: Path) -> None:
        shutil.copytree(finished_run / "source", "mine")
        shutil.copytree(finished_run / "target", "theirs")
        execute("data.source=null", "source.adapters=[mine]", "target.adapter=theirs", folder="given")
        # The same parents in the same order give the same merge; all that follows is the same as well.
        same_result(finished_run, Path("given"))
        assert not Path("given/source").exists()
        assert not Path("given/target").exists()
        parents = read(Path("given/run.json"))["parents"]
        assert [parent["name"] for parent in parents] == ["mine", "theirs"]
        assert set(read(Path("given/metrics.json"))["systems"]) == set(SYSTEMS)

    def test_two_source_adapters(self, finished_run: Path) -> None:
        shutil.copytree(finished_run / "source", "one")
        shutil.copytree(finished_run / "target", "two")
        metrics = execute(
            "data.source=null", "source.adapters=[one, two]", "merge.weights=[0.5, 0.25, 0.25]", folder="given"
        )
        assert set(metrics["systems"]) == {"zero_shot", "source", "source_2", "target", "merged", "grasp"}
        assert {row["segment"] for row in read(Path("given/final/sparsity.json"))} == {"source", "source_2", "target"}
        assert read_lines(Path("given/evaluation/source_2.jsonl"))[0]["id"]

    @pytest.mark.parametrize("changed", ["weights", "scaling"])
    def test_changed_parents_are_refused_on_resume(self, finished_run: Path, changed: str) -> None:
        shutil.copytree(finished_run / "source", "mine")
        changes = ("data.source=null", "source.adapters=[mine]")
        execute(*changes, folder="given")
        reopen(Path("given"), "final*")
        if changed == "weights":
            shutil.copy(finished_run / "target/adapter_model.safetensors", "mine/adapter_model.safetensors")
        else:
            config = read(Path("mine/adapter_config.json"))
            Path("mine/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 10 * config["lora_alpha"]}))
        with pytest.raises(RecipeError, match="given was begun with other parents than"):
            execute(*changes, folder="given")

    def test_without_a_dev_set_the_last_step_is_kept(self, tiny_workspace: Path) -> None:
        metrics = execute("data.target.dev=0", "data.source.dev=0")
        for stage, steps in (("source", 6), ("target", 10), ("final", 10)):
            summary = record(Path("run"), f"{stage}*")
            assert (summary["steps"], summary["best_step"], summary["dev_loss"]) == (steps, steps, None)
        assert {values["dev_loss"] for values in metrics["systems"].values()} == {None}
        assert metrics["systems"]["grasp"]["test_loss"] > 0

    def test_without_a_test_set_there_is_still_an_adapter(self, tiny_workspace: Path) -> None:
        metrics = execute("data.target.test=0")
        assert metrics["systems"]["grasp"]["test_loss"] is None
        assert metrics["systems"]["grasp"]["dev_loss"] > 0
        assert Path("run/adapter/adapter_model.safetensors").is_file()

    def test_the_way_of_the_paper(self, tiny_workspace: Path) -> None:
        metrics = execute(
            "controller.preset=paper", "controller.rule=best_reward", "merge.rule=paper_apart",
            "final.mode=reselect",
        )  # fmt: skip
        rounds = read_lines(Path("run/controller/rounds.jsonl"))
        rewards = [
            (reward, candidate)
            for entry in rounds
            for reward, candidate in zip(entry["rewards"], entry["candidates"], strict=True)
        ]
        assert metrics["prune_ratio"] == max(rewards, key=lambda pair: pair[0])[1]
        assert read(Path("run/controller/ratio.json"))["rule"] == "best_reward"
        rows = read(Path("run/final/sparsity.json"))
        assert {row["segment"] for row in rows} == {"source", "target"}
        for row in rows:
            assert row["weights"] - row["kept"] == prune_count(metrics["prune_ratio"], row["weights"])
        merged = yaml.safe_load(Path("run/recipe.yaml").read_text())["controller"]
        assert (merged["policy"]["kind"], merged["rule"]) == ("gaussian", "best_reward")
        # What is saved is an ordinary adapter of the parents' rank, and is what was measured while it trained.
        for name in ("merged", "adapter"):
            assert {pair.rank for pair in read_adapter(Path("run") / name).weights.values()} == {2}
        history = [row["dev_loss"] for row in read_lines(Path("run/final/history.jsonl")) if "dev_loss" in row]
        assert metrics["systems"]["grasp"]["dev_loss"] == pytest.approx(min(history), rel=1e-6)

    def test_a_controller_run_can_stop_by_its_dev_loss(self, tiny_workspace: Path) -> None:
        # Nothing moves, neither weights nor masks, so that the first of four epochs is one without a new best.
        execute(
            "controller.training={epochs: 4, learning_rate: 1.0e-30, patience: 1}",
            "controller.policy={ratio_min: 0.4, ratio_max: 0.401}",
            "final.training.epochs=0.1",
        )
        rounds = read_lines(Path("run/controller/rounds.jsonl"))
        assert [row["step"] for row in rounds] == [3, 6, 9]
        history = read_lines(Path("run/controller/history.jsonl"))
        losses = [row["dev_loss"] for row in history if "dev_loss" in row]
        assert len(losses) == 2
        assert losses[1] == losses[0]
        probed = sum(1 + len(set(row["candidates"])) for row in rounds)
        assert record(Path("run"), "controller*")["measured_examples"] == 4 * probed + 6 * 2  # micro-dev; dev twice

    def test_a_controller_run_that_is_to_stop_by_dev_needs_one(self, refused: Callable[..., None]) -> None:
        changes = ("--set", "controller.training.patience=1", "--set", "data.target.dev=0")
        refused(
            "run", changes, "controller.training.patience is 1, but data.target.dev is 0; give it examples, or set that"
        )

    @pytest.mark.parametrize(
        "changes",
        [
            ("mask.score=input_aware",),
            ("mask.score=gradient_of_delta",),
            ("merge.rule=svd", "merge.rank=3"),
            ("controller.preset=late", "mask.score=input_aware"),
        ],
        ids=["input_aware", "gradient_of_delta", "svd", "late"],
    )
    def test_other_masks_and_merges_run_through(self, changes: tuple[str, ...], tiny_workspace: Path) -> None:
        metrics = execute(*changes)
        assert 0.1 <= metrics["prune_ratio"] <= 0.8
        assert math.isfinite(metrics["systems"]["grasp"]["test_loss"])


def test_going_on_in_another_dtype_is_said(finished_run, caplog):
    started = read(finished_run / "run.json")
    assert started["dtype"] == "float32"
    (finished_run / "run.json").write_text(json.dumps(started | {"dtype": "bfloat16"}), encoding="utf-8")
    reopen(finished_run)
    with caplog.at_level("WARNING", logger="grasp_lora"):
        execute()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "was begun in bfloat16 and goes on in float32" in said
