"""A whole run in its folder: complete and consistent files, going on, determinism, and every way to start."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from peft import PeftModel
from recorder import (
    WEIGHTS,
    Recorder,
    files_of,
    forget,
    read,
    result_of,
    rows_of,
    run_tiny,
    session_of,
    step_folders,
    weights_in,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lora.engine.run_folder import METRICS_FILE, begin, check_place
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.evaluation.metrics import score
from grasp_lora.method.masks import prune_count
from grasp_lora.models import backbone as backbones
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.models.adapters import attached
from grasp_lora.models.backbone import fingerprint
from grasp_lora.models.live import live_factors
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import LOCK_FILE, claim
from grasp_lora.storage.writing import discard
from grasp_lora.training.controller import GraspController
from grasp_lora.training.pruned import PrunedTraining

SYSTEMS = ("zero_shot", "source", "target", "merged", "unpruned", "grasp")
FINAL = "final-0.[1-9]*"  # the final run at the learned ratio; beside it stands that of nothing pruned
FILES = {
    "recipe.yaml", "run.json", "data.json", "prompt.jsonl", "metrics.json", "cost.json",
    *(f"{adapter}/{file}" for adapter in ("source", "target", "merged", "unpruned", "final", "adapter")
      for file in ("adapter_config.json", "adapter_model.safetensors", "grasp_lora.json")),
    *(f"{stage}/history.jsonl" for stage in ("source", "target", "controller", "unpruned", "final")),
    "controller/rounds.jsonl", "controller/timings.jsonl", "controller/ratio.json", "final/sparsity.json",
    *(f"evaluation/{name}.jsonl" for name in (*SYSTEMS, "prompts")),
}  # fmt: skip
REPORT = {"report.html", "adapter/README.md"}
TIMED = {"cost.json", "controller/timings.jsonl", *REPORT}


def same_result(one: Path, other: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", "merged/adapter_model.safetensors", "controller/rounds.jsonl",
                 "controller/ratio.json", "final/history.jsonl", "evaluation/grasp.jsonl", "metrics.json"):  # fmt: skip
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


class TestFiles:
    def test_there_is_every_file_of_a_run_folder_and_no_other(self, reference_run: Path) -> None:
        assert set(files_of(reference_run)) - REPORT == FILES

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

    def test_the_rounds_are_consistent(self, reference_run: Path) -> None:
        rounds = rows_of(reference_run / "controller/rounds.jsonl")
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
        timings = rows_of(reference_run / "controller/timings.jsonl")
        assert [entry["round"] for entry in timings] == [1, 2, 3]
        learned = read(reference_run / "controller/ratio.json")
        assert learned["rounds"] == 3
        assert 0.1 <= learned["low"] <= learned["ratio"] <= learned["high"] <= 0.8

    def test_measured_sparsity_is_the_learned_ratio(self, reference_run: Path) -> None:
        ratio = read(reference_run / "controller/ratio.json")["ratio"]
        rows = read(reference_run / "final/sparsity.json")
        assert {row["segment"] for row in rows} == {"source", "target"}
        for row in rows:
            assert row["weights"] - row["kept"] == prune_count(ratio, row["weights"])
        tensors = load_file(reference_run / "adapter" / WEIGHTS)
        zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
        assert zeros == sum(row["weights"] - row["kept"] for row in rows)
        assert sum(tensor.numel() for tensor in tensors.values()) == sum(row["weights"] for row in rows)

    def test_the_best_step_is_the_minimum_of_the_history(self, reference_run: Path) -> None:
        for stage, step in (("source", "source"), ("target", "target"), ("final", FINAL)):
            history = [row for row in rows_of(reference_run / stage / "history.jsonl") if "dev_loss" in row]
            best = min(history, key=lambda row: row["dev_loss"])
            trained = result_of(reference_run, step)
            assert (trained["best_step"], trained["dev_loss"]) == (best["step"], best["dev_loss"])

    def test_the_metrics_are_what_the_predictions_give(self, reference_run: Path) -> None:
        metrics = read(reference_run / "metrics.json")
        assert set(metrics["systems"]) == set(SYSTEMS)
        test_ids = read(reference_run / "data.json")["ids"]["test"]
        for system, values in metrics["systems"].items():
            rows = rows_of(reference_run / "evaluation" / f"{system}.jsonl")
            assert [row["id"] for row in rows] == test_ids
            assert values["test_loss"] == pytest.approx(math.fsum(row["loss"] for row in rows) / len(rows), rel=1e-12)
            names = list(values["metrics"])
            scores = score(names, [row["prediction"] for row in rows], [tuple(row["references"]) for row in rows], "de")
            assert values["metrics"] == {name: entry.value for name, entry in scores.items()}
            assert metrics["signatures"] == {name: entry.signature for name, entry in scores.items()}
        final = result_of(reference_run, FINAL)
        assert metrics["systems"]["grasp"]["dev_loss"] == pytest.approx(final["dev_loss"], rel=1e-6)
        assert metrics["best_step"] == final["best_step"]
        assert (metrics["test_examples"], metrics["language"]) == (8, "de")
        learned = read(reference_run / "controller/ratio.json")
        assert metrics["prune_ratio"] == learned["ratio"]
        assert metrics["prune_ratio_interval"] == [learned["low"], learned["high"]]
        ours = metrics["systems"][metrics["delivered"]["name"]]["metrics"]
        assert metrics["differences"].keys() == metrics["systems"].keys() - {metrics["delivered"]["name"]}
        for name, each in metrics["differences"].items():
            theirs = metrics["systems"][name]["metrics"]
            assert (each["ours"], each["theirs"]) == (ours[each["metric"]], theirs[each["metric"]])
            assert each["score"]["low"] <= each["ours"] - each["theirs"] <= each["score"]["high"]
        assert metrics["nothing_learned_about_ratio"] is (learned["high"] - learned["low"] >= 0.75 * (0.8 - 0.1))
        assert [row["id"] for row in rows_of(reference_run / "evaluation/prompts.jsonl")] == test_ids

    def test_the_cost_is_that_of_the_steps(self, reference_run: Path) -> None:
        cost = read(reference_run / "cost.json")
        [final] = step_folders(reference_run, FINAL)
        assert set(cost) == {
            "source",
            "target",
            "controller",
            "final-0.00",
            final.name.rpartition("-")[0],
            "evaluation",
        }
        for name in set(cost) - {"evaluation"}:
            [step] = step_folders(reference_run, name)
            assert cost[name] == read(step / "done.json")["seconds"] >= 0

    def test_no_file_names_a_place_of_this_machine(self, tiny_workspace: Path, reference_run: Path) -> None:
        """Also where the recipe gives absolute paths."""
        folder = tiny_workspace / "absolute"
        given = shutil.copytree(reference_run / "source", tiny_workspace / "given")
        changes = (f"backbone.name={tiny_workspace}/tiny-llama", f"source.adapters=[{given}]", f"data.root={tiny_workspace}",
                   f"bertscore.models={{de: {tiny_workspace}/encoder}}", "data.source=null")  # fmt: skip
        run_tiny(*changes, folder=folder)
        for run in (reference_run, folder):
            places = {str(run.parent), str(run.parent.parent), str(Path.home())}
            places |= {str(link.resolve()) for link in run.parent.glob("tiny-llama")}
            for name, content in files_of(run, store=True).items():
                for place in places:
                    assert place.encode() not in content, f"{name} holds {place}"

    def test_the_adapter_works_in_plain_peft(self, reference_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(reference_run.parent)
        backbone = AutoModelForCausalLM.from_pretrained("tiny-llama", dtype=torch.float32)
        model, losses = PeftModel.from_pretrained(backbone, "run/adapter"), []
        rows = {example.id: example for example in session_of().splits.dev}
        for identity in read("run/data.json")["ids"]["dev"]:
            prompt, answer = list(rows[identity].prompt_ids), list(rows[identity].completion_ids)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
        assert fmean(losses) == pytest.approx(result_of("run", FINAL)["dev_loss"], rel=1e-6)

    def test_the_merge_holds_each_parent_under_its_own_name(self, reference_run: Path) -> None:
        adapters = {name: read_adapter(reference_run / name).weights for name in ("source", "target", "merged")}
        for module, merged in adapters["merged"].items():
            assert [segment.name for segment in merged.segments] == ["source", "target"]
            first = 0
            for segment in merged.segments:
                part = slice(first, first := first + segment.rank)
                delta = merged.scaling * merged.B[:, part] @ merged.A[part]
                parent = adapters[segment.name][module]
                torch.testing.assert_close(
                    delta, 0.5 * parent.scaling * parent.B @ parent.A
                )  # the exact merge: 1/N each


class TestAgain:
    def test_a_finished_run_does_nothing_again_and_changes_nothing(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, recorder = files_of(finished_run, store=True), Recorder()
        monkeypatch.setattr("grasp_lora.training.trainer.finetune", lambda *_, **__: pytest.fail("it is trained again"))
        first = run_tiny(progress=recorder)
        assert not recorder.did
        assert files_of(finished_run, store=True) == before
        assert first.metrics == run_tiny().metrics

    @pytest.mark.parametrize("steps", [("answers",), ("controller", "final-*", "dev-losses")])
    def test_steps_that_are_gone_are_done_again_and_no_others(self, steps: tuple[str, ...], finished_run: Path) -> None:
        before, recorder = files_of(finished_run), Recorder()
        forget(finished_run, *steps)
        run_tiny(progress=recorder)
        assert {name.partition("-0")[0] for name in recorder.did} == {step.removesuffix("-*") for step in steps}
        assert recorder.repeated
        after = files_of(finished_run)
        assert set(after) - REPORT == set(before) - REPORT
        for name in set(before) - TIMED:
            assert after[name] == before[name], name

    def test_what_the_folder_has_lost_is_written_again(self, finished_run: Path) -> None:
        before = files_of(finished_run)
        for lost in ("recipe.yaml", "cost.json", "controller/rounds.jsonl", "adapter", "evaluation"):
            discard(finished_run / lost)
        run_tiny()
        assert {name: before[name] for name in before if name not in REPORT} == {
            name: content for name, content in files_of(finished_run).items() if name not in REPORT
        }

    @pytest.mark.parametrize("name", [WEIGHTS, "grasp_lora.json", "adapter_config.json"])
    def test_a_store_that_was_half_copied_is_mended_before_it_is_handed_over(
        self, name: str, finished_run: Path
    ) -> None:
        before = weights_in("run/adapter")
        for file in (finished_run / "store").glob(f"*/adapter/{name}"):
            file.write_bytes(file.read_bytes()[:100])
        run_tiny()
        assert weights_in("run/adapter") == before

    @pytest.mark.parametrize(
        ("part", "method", "calls", "step"),
        [
            (GraspController, "run_round", 1, "controller"),
            (Session, "save", 2, "final"),  # source and target come before
        ],
        ids=["round", "save"],
    )
    def test_an_interrupted_run_goes_on_to_the_same_bits(
        self, part: type, method: str, calls: int, step: str, tiny_workspace: Path, reference_run: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        original, called = getattr(part, method), []

        def interrupted(self: object, *arguments: object, **options: object) -> object:
            called.append(method)
            if len(called) > calls:
                raise KeyboardInterrupt
            return original(self, *arguments, **options)

        first, second = Recorder(), Recorder()
        with monkeypatch.context() as patch:
            patch.setattr(part, method, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_tiny(progress=first)
        assert not Path("run/metrics.json").exists()
        run_tiny(progress=second)
        assert second.did[0].startswith(step)
        assert set(first.did) <= set(second.repeated)
        same_result(Path("run"), reference_run)
        assert set(files_of("run")) - REPORT == FILES
        assert not list(Path("run/store").glob("*/work"))

    def test_a_run_goes_on_with_the_threads_that_it_began_with(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = finished_run / "run.json"
        run = read(file)
        assert run["threads"] == torch.get_num_threads()
        asked = list[int]()
        monkeypatch.setattr("grasp_lora.engine.run.use_idle_cores", lambda device, begun_with: asked.append(begun_with))
        file.write_text(json.dumps(run | {"threads": 7}), encoding="utf-8")
        run_tiny()
        del run["threads"]  # of an earlier version
        file.write_text(json.dumps(run), encoding="utf-8")
        run_tiny()
        assert asked == [7, 0]

    def test_a_kill_while_the_files_are_written_is_mended(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """metrics.json is gone first and comes last, so that a folder with it is whole."""
        before = files_of(finished_run)
        for name in ("adapter.part", "final.part"):
            (finished_run / name).mkdir()
            (finished_run / name / WEIGHTS).write_bytes(b"half")

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("grasp_lora.engine.run_folder.restate_answers", killed)
            with pytest.raises(KeyboardInterrupt):
                run_tiny()
        assert not (finished_run / METRICS_FILE).exists()
        run_tiny()
        assert {name: content for name, content in files_of(finished_run).items() if name not in REPORT} == {
            name: content for name, content in before.items() if name not in REPORT
        }

    def test_a_second_writer_is_refused_and_changes_nothing(self, finished_run: Path) -> None:
        forget(finished_run, "final-*")
        before = files_of(finished_run)
        with (
            claim(finished_run, wait=False, inside=True),
            pytest.raises(RecipeError, match=r"run is being written by another process; .*choose another folder with"),
        ):
            run_tiny()
        assert files_of(finished_run) == before
        run_tiny()

    def test_a_folder_that_a_run_was_killed_in_before_it_began_is_a_new_one(self, tiny_workspace: Path) -> None:
        Path("run").mkdir()
        for name in (LOCK_FILE, "run.json.part"):
            Path("run", name).write_text("{")
        begin(Path("run"), session_of())
        check_place(Path("run"))

    def test_out_of_memory_says_what_helps_and_with_that_what_is_done_stays(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, recorder = files_of(finished_run), Recorder()
        forget(finished_run, "final-*")

        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes."
            )

        with monkeypatch.context() as patch:
            patch.setattr("grasp_lora.training.trainer.example_losses", fail)
            with pytest.raises(GraspError, match=r"^too little memory for the training .*gradient_checkpointing"):
                run_tiny()
        run_tiny("backbone.gradient_checkpointing=true", progress=recorder)
        assert [name.partition("-")[0] for name in recorder.did] == ["final"] * 2
        after = files_of(finished_run)
        for name in (f"adapter/{WEIGHTS}", "metrics.json"):
            assert after[name] == before[name]

    def test_adapters_that_learned_nothing_are_said_to_be_the_cause(self, tiny_workspace: Path) -> None:
        nothing = [f"{stage}.training.learning_rate=1e-30" for stage in ("source", "target")]
        with pytest.raises(
            GraspError, match=r"no step lowered a dev loss .*; lower source.training.learning_rate \(now 1e-30\)"
        ):
            run_tiny(*nothing)

    def test_an_adapter_says_how_its_own_recipe_asks(self, finished_run: Path) -> None:
        shutil.copytree("run/store", "other/store")
        changes = ["generation.max_new_tokens=9", "generation.stop=['.']"]
        recorder = Recorder()
        run_tiny(*changes, folder="other", progress=recorder)
        assert not recorder.trained
        for name in ("source", "target", "merged", "unpruned", "final", "adapter"):
            answers = read(Path("other", name, "grasp_lora.json"))["answers"]
            assert (answers["max_new_tokens"], answers["stop"]) == (9, ["."])


def changed_data() -> None:
    rows = Path("target.jsonl").read_text(encoding="utf-8")
    Path("target.jsonl").write_text(rows.replace(" 3", " 4"), encoding="utf-8")


def other_weights() -> None:
    """Change a few weights, which the fingerprint does not see."""
    model = AutoModelForCausalLM.from_pretrained("own")
    before = fingerprint(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 1:3] += 1.0
    assert fingerprint(model) == before
    model.save_pretrained("own")


GIVEN = ("data.source=null", "source.adapters=[given]")


class TestOther:
    """A folder that was begun with something else is refused in one line, and nothing in it changes."""

    @pytest.fixture
    def other(self, finished_run: Path) -> Callable[..., None]:
        """Give `other(change, message)`: begin a run from a copy of its backbone, change something, and find it refused."""

        def check(change: Callable[[], object], message: str, *changes: str) -> None:
            shutil.copytree("tiny-llama", "own")
            Path("other").mkdir()
            changes = (*changes, "backbone.name=own")
            begin(Path("other"), session_of(*changes))
            before = files_of("other", store=True)
            change()
            with pytest.raises(RecipeError, match=message):
                run_tiny(*changes, folder="other")
            assert files_of("other", store=True) == before

        return check

    def test_rows(self, other: Callable[..., None]) -> None:
        other(
            changed_data,
            "other was begun with other rows than the recipe's files hold now; put those back, or choose another",
        )

    def test_of_other_rows_the_source_adapter_can_be_kept(self, finished_run: Path) -> None:
        changed_data()
        for place in ("run/source", r"run/store/source-\w+/adapter"):
            with pytest.raises(
                RecipeError, match=rf"or delete it\. .*: --set 'source\.adapters=\[\"{place}\"\]'$"
            ) as error:
                run_tiny()
            shutil.rmtree("run/source", ignore_errors=True)  # as in a run that was stopped before its end
        [option], recorder = shlex.split(str(error.value).partition("--set ")[2]), Recorder()
        run_tiny(option, folder="other", progress=recorder)
        assert "source" not in recorder.trained
        shutil.rmtree("run/store")
        with pytest.raises(RecipeError, match=r"or delete it$"):
            run_tiny()

    def test_weights_of_a_given_adapter(self, other: Callable[..., None]) -> None:
        def change() -> None:
            shutil.copy(f"run/target/{WEIGHTS}", f"given/{WEIGHTS}")

        shutil.copytree("run/source", "given")
        other(change, "other was begun with other given adapters than", *GIVEN)

    def test_scaling_of_a_given_adapter(self, other: Callable[..., None]) -> None:
        def change() -> None:
            file = Path("given/adapter_config.json")
            file.write_text(file.read_text().replace('"lora_alpha": 4', '"lora_alpha": 16'))

        shutil.copytree("run/source", "given")
        other(change, "other was begun with other given adapters than", *GIVEN)

    def test_backbone(self, other: Callable[..., None], make_tiny_model: Callable[..., Any]) -> None:
        other(
            lambda: make_tiny_model("llama", seed=5).save_pretrained("own"), "other was begun with other backbone than"
        )

    def test_a_few_weights_of_the_backbone(self, other: Callable[..., None]) -> None:
        other(other_weights, "other was begun with other backbone than")

    def test_config_of_the_backbone(self, other: Callable[..., None]) -> None:
        def change() -> None:
            file = Path("own/config.json")
            file.write_text(re.sub(r'("rms_norm_eps": )[^,]+', r"\g<1>0.5", file.read_text()))

        other(change, "other was begun with other backbone than")

    def test_number_format(self, other: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        def change() -> None:
            monkeypatch.setattr(backbones, "find_dtype", lambda *_: "bfloat16")

        monkeypatch.setattr(backbones, "find_dtype", lambda *_: "float32")
        message = (
            "other was begun with backbone.dtype float32, which is bfloat16 here; set it to that, or choose another"
        )
        other(change, message, "backbone.dtype=auto")

    def test_recipe(self, finished_run: Path) -> None:
        before = files_of(finished_run)
        with pytest.raises(
            RecipeError,
            match=r"\(seed is 42 there and 7 here\); to go on with it, repeat --set seed=42, or choose another",
        ):
            run_tiny("seed=7")
        assert files_of(finished_run) == before

    @pytest.mark.parametrize("change", ["report_to=[]", "backbone.gradient_checkpointing=true", "data.root=."])
    def test_what_does_not_decide_the_result_may_change(self, change: str, finished_run: Path) -> None:
        recorder = Recorder()
        run_tiny(change, progress=recorder)
        assert not recorder.did

    def test_what_is_no_experiments_folder(self, tiny_workspace: Path) -> None:
        Path("own").mkdir()
        Path("own/notes.txt").write_text("mine")
        for folder, message in (
            ("own", "own is not empty and no experiment's; choose another with --output"),
            ("tiny.yaml", "tiny.yaml: Not a directory"),
            ("tiny.yaml/a/b", "Not a directory"),
        ):
            with pytest.raises(RecipeError, match=message):
                run_tiny(folder=folder)
        assert [file.name for file in Path("own").iterdir()] == ["notes.txt"]


class TestWays:
    """Ways to start and to finish other than the reference run's."""

    def test_a_given_ratio_leaves_out_the_controller(self, tiny_workspace: Path) -> None:
        recorder = Recorder()
        run_tiny("final.prune_ratio=0.5", progress=recorder)
        metrics = read("run/metrics.json")
        assert "controller" not in recorder.did
        assert not Path("run/controller").exists()
        assert (metrics["prune_ratio"], metrics["prune_ratio_interval"]) == (0.5, None)
        assert "controller" not in read("run/cost.json")
        assert all(2 * row["kept"] == row["weights"] for row in read("run/final/sparsity.json"))

    def test_given_adapters_are_used_and_not_trained(self, finished_run: Path) -> None:
        shutil.copytree("run/source", "mine")
        shutil.copytree("run/target", "theirs")
        run_tiny("data.source=null", "source.adapters=[mine]", "target.adapter=theirs", folder="given")
        # The same parents in the same order give the same merge; all that follows is the same as well.
        same_result(finished_run, Path("given"))
        assert not Path("given/source").exists()
        assert not Path("given/target").exists()
        assert [parent["name"] for parent in read("given/run.json")["parents"]] == ["mine", "theirs"]
        assert set(read("given/metrics.json")["systems"]) == set(SYSTEMS)

    def test_two_source_adapters(self, finished_run: Path) -> None:
        shutil.copytree("run/source", "one")
        shutil.copytree("run/target", "two")
        run_tiny("data.source=null", "source.adapters=[one, two]", "merge.weights=[0.5, 0.25, 0.25]", folder="given")
        systems = read("given/metrics.json")["systems"]
        assert set(systems) == {*SYSTEMS, "source_2"}
        assert {row["segment"] for row in read("given/final/sparsity.json")} == {"source", "source_2", "target"}
        assert rows_of("given/evaluation/source_2.jsonl")[0]["id"]

    def test_without_a_dev_set_the_last_step_is_kept(self, tiny_workspace: Path) -> None:
        run_tiny("data.target.dev=0", "data.source.dev=0")
        for stage, steps in (("source", 6), ("target", 10), (FINAL, 10)):
            trained = result_of("run", stage)
            assert (trained["steps"], trained["best_step"], trained["dev_loss"]) == (steps, steps, None)
        systems = read("run/metrics.json")["systems"]
        assert {values["dev_loss"] for values in systems.values()} == {None}
        assert systems["grasp"]["test_loss"] > 0

    def test_without_a_test_set_there_is_still_an_adapter(self, tiny_workspace: Path) -> None:
        run_tiny("data.target.test=0")
        grasp = read("run/metrics.json")["systems"]["grasp"]
        assert grasp["test_loss"] is None
        assert grasp["dev_loss"] > 0
        assert Path("run/adapter", WEIGHTS).is_file()

    def test_the_way_of_the_paper(self, tiny_workspace: Path) -> None:
        run_tiny(
            "controller.preset=paper", "controller.rule=best_reward", "merge.rule=paper_apart",
            "final.mode=reselect",
        )  # fmt: skip
        metrics, rounds = read("run/metrics.json"), rows_of("run/controller/rounds.jsonl")
        rewards = [pair for entry in rounds for pair in zip(entry["rewards"], entry["candidates"], strict=True)]
        assert metrics["prune_ratio"] == max(rewards, key=lambda pair: pair[0])[1]
        assert read("run/controller/ratio.json")["rule"] == "best_reward"
        rows = read("run/final/sparsity.json")
        assert {row["segment"] for row in rows} == {"source", "target"}
        for row in rows:
            assert row["weights"] - row["kept"] == prune_count(metrics["prune_ratio"], row["weights"])
        # What is saved is an ordinary adapter of the parents' rank, and is what was measured while it trained.
        for name in ("merged", "adapter"):
            assert {pair.rank for pair in read_adapter(Path("run") / name).weights.values()} == {2}
        history = [row["dev_loss"] for row in rows_of("run/final/history.jsonl") if "dev_loss" in row]
        assert metrics["systems"]["grasp"]["dev_loss"] == pytest.approx(min(history), rel=1e-6)

    def test_a_controller_run_can_stop_by_its_dev_loss(self, tiny_workspace: Path) -> None:
        # Nothing moves, neither weights nor masks, so that the first of four epochs is one without a new best.
        run_tiny(
            "controller.training={epochs: 4, learning_rate: 1.0e-30, patience: 1}",
            "controller.policy={ratio_min: 0.4, ratio_max: 0.401}",
            "final.training.epochs=0.1",
        )
        rounds = rows_of("run/controller/rounds.jsonl")
        assert [row["step"] for row in rounds] == [3, 6, 9]
        losses = [row["dev_loss"] for row in rows_of("run/controller/history.jsonl") if "dev_loss" in row]
        assert len(losses) == 2
        assert losses[1] == losses[0]
        probed = sum(1 + len(set(row["candidates"])) for row in rounds)
        assert result_of("run", "controller")["measured_examples"] == 4 * probed + 6 * 2  # micro-dev; dev twice

    def test_a_ratio_is_not_learned_from_the_round_before_training_alone(self, finished_run: Path) -> None:
        still = ("controller.training={epochs: 4, learning_rate: 1.0e-30, patience: 1}", "controller.rounds.at_ends=true",
                 "controller.policy={ratio_min: 0.4, ratio_max: 0.401}", "controller.rounds.every=15")  # fmt: skip
        with pytest.raises(
            GraspError, match=r"stopped by its dev loss at step 10, before a round .*controller\.rounds\.every"
        ):
            run_tiny(*still, folder="other")

    @pytest.mark.parametrize("score", ["magnitude", "input_aware", "gradient_of_delta"])
    def test_a_held_mask_stays_exactly_as_it_was_chosen(self, score: str, finished_run: Path, tmp_path: Path) -> None:
        """The zeros of a final run are those of its first step."""
        session = session_of(f"mask.score={score}", "final.training.epochs=0.3", "final.training.patience=null")
        merged, zeros = session.read("run/merged").weights, []
        begin = PrunedTraining.on_train_begin

        def noted(self: Any, *given: Any, **more: Any) -> Any:
            result = begin(self, *given, **more)
            zeros.append({name: factor.detach() == 0 for name, factor in live_factors(more["model"]).items()})
            return result

        from grasp_lora.engine.results import Adapter
        from grasp_lora.engine.store import Store

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PrunedTraining, "on_train_begin", noted)
            final = Steps(session, Store(tmp_path / "store")).finetune(Adapter("merged", lambda: merged), 0.5)
        assert final.made is not None
        assert final.made.result.best_step == 3
        with attached(session.backbone.model, final.weights) as model:
            finished = {name: factor.detach() == 0 for name, factor in live_factors(model).items()}
        assert any(mask.any() for mask in finished.values())
        for name, mask in finished.items():
            assert torch.equal(mask, zeros[0][name]), name

    def test_rounds_on_examples_in_turn(self, tiny_workspace: Path) -> None:
        rounds = [f"controller.rounds.{one}" for one in ("pool=both", "in_turn=3", "every=5", "patience=null")]
        metrics = run_tiny("controller.preset=grasp", *rounds).metrics  # the tiny recipe's rule compares no rounds
        rows = rows_of("run/controller/rounds.jsonl")
        assert [row["step"] for row in rows] == [0, 5, 10]
        assert [row["places"] for row in rows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
        assert all(len(row["baseline_losses"]) == 3 for row in rows)
        assert len({loss for row in rows for loss in row["baseline_losses"]}) == 9  # of 4 micro-dev and 6 dev examples
        assert metrics.prune_ratio == read("run/controller/ratio.json")["ratio"]
