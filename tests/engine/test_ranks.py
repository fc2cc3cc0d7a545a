"""A run in two processes, as torchrun starts them: data parallel, one writer, and with `backbone.shard` a split backbone."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import run_ranks
from recorder import forget, read, result_of, rows_of, run_tiny, step_folders

from grasp_lora.errors import GraspError
from grasp_lora.models import backbone as backbones
from grasp_lora.storage.checkpoints import complete
from grasp_lora.storage.processes import STARTED, distribute, is_first, on_first_process, world_size
from grasp_lora.training.training_settings import TrainingSettings

TWO_A_STEP = [
    *(f"{stage}.training.accumulation=2" for stage in ("source", "target", "final")),
    "controller.training.batch_size=2",  # it has no accumulation
]
CHANGES = [*TWO_A_STEP, "controller.rounds.every=2"]


def launch(*changes: str, during: Callable[[subprocess.Popen[str]], None] | None = None) -> tuple[int, str]:
    """Run `tiny.yaml` into the folder `run` in two processes; return the exit status and the output of both. A hang ends."""
    return run_ranks(2, command(*changes), during=during)


def launch_forked(*changes: str, folder: str = "run") -> tuple[int, str]:
    """The same without torchrun itself and the imports."""
    done = forked.python(command(*changes, folder=folder), count=2)
    return done.returncode, done.stdout + done.stderr


def command(*changes: str, folder: str = "run") -> list[str]:
    settings = [part for change in changes for part in ("--set", change)]
    return ["-m", "grasp_lora", "run", "tiny.yaml", "--output", folder, *settings]


def test_two_processes_take_as_many_steps_as_one_and_go_on_where_they_were(tiny_workspace: Path) -> None:
    status, output = launch_forked(*CHANGES)
    assert status == 0, output
    assert output.count("adapter run/adapter") == 1, "only the first process speaks"
    assert output.count("answer the test prompts") == len(step_folders("run", "answers"))
    results = [result_of("run", name) for name in ("source", "target", "controller", "final-0.[1-9]*")]
    # 12 examples of the source in fours; 10 of the target in twos, with a round after every other step
    assert [result["steps"] for result in results] == [3, 5, 5, 5]
    assert len(results[2]["rounds"]) == 2
    metrics = read("run/metrics.json")
    assert [row["id"] for row in rows_of("run/evaluation/grasp.jsonl")] == read("run/data.json")["ids"]["test"]
    assert not Path("run/grasp-lora.lock").exists()
    forget("run", "final-*", "answers", "scores")
    status, output = launch_forked(*CHANGES)
    assert status == 0, output
    assert read("run/metrics.json") == metrics


@pytest.mark.slow
def test_two_processes_that_a_signal_stopped_end_in_the_same_bits(tiny_workspace: Path) -> None:
    changes = [*CHANGES, "target.training.epochs=60", "target.training.patience=null"]

    def stop(process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 600
        while (
            not list(Path("run/store").glob("target-*/work/checkpoint-*/manifest.json")) and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)

    status, output = launch(*changes, during=stop)
    assert status != 0
    assert len(re.findall(r"stopped by SIGTERM at .*target.* step", output)) == 1, output[-3000:]
    assert list(Path("run/store").glob("target-*/work/checkpoint-*/manifest.json"))
    status, output = launch(*changes)
    assert status == 0, output
    resumed, metrics = Path("run/target/adapter_model.safetensors").read_bytes(), read("run/metrics.json")
    shutil.rmtree("run")
    assert launch(*changes)[0] == 0
    assert Path("run/target/adapter_model.safetensors").read_bytes() == resumed
    assert read("run/metrics.json") == metrics


def test_another_number_of_processes_goes_on_with_the_next_stage(tiny_workspace: Path, cli: Callable[..., Any]) -> None:
    """Two processes are interrupted inside the target's training; one process begins that anew and keeps the source's."""
    changes = [*CHANGES, "target.training.epochs=4", "target.training.patience=null"]
    settings = [part for change in changes for part in ("--set", change)]
    assert cli("run", "tiny.yaml", "--output", "alone", *settings).status == 0
    status, output = launch_forked(*changes)
    assert status == 0, output
    [target] = step_folders("run", "target")
    assert [target.name] == [step.name for step in step_folders("alone", "target")]
    assert read(target / "done.json")["made_with"]["processes"] == "2"
    # As after a kill: the source's step is done, of the target's training there is a checkpoint of two processes.
    for step in Path("run/store").iterdir():
        if not step.name.startswith("source-"):
            shutil.rmtree(step)
    checkpoint = target / "work/checkpoint-2"
    checkpoint.mkdir(parents=True)
    for rank in (0, 1):
        (checkpoint / f"rng_state_{rank}.pth").touch()
    complete(checkpoint, 1.0)
    result = cli("run", "tiny.yaml", "--output", "run", *settings)
    assert result.status == 0, result.err
    assert "was saved by another number of processes; the training begins anew" in result.err
    made_with = [read(step_folders("run", name)[0] / "done.json")["made_with"] for name in ("source", "target")]
    assert [processes["processes"] for processes in made_with] == ["2", "1"]
    for file in ("target/adapter_model.safetensors", "target/history.jsonl"):
        assert Path("run", file).read_bytes() == Path("alone", file).read_bytes()


def test_what_cannot_be_shared_is_refused(tiny_workspace: Path) -> None:
    status, output = launch_forked()
    assert status != 0
    assert "error: target.training: an optimizer step takes batch_size 1 times accumulation 1 examples" in output
    assert "2 processes cannot share evenly; make their product a multiple of 2" in output
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "each"), [(1, 8, 2, (1, 4)), (4, 3, 6, (2, 1)), (3, 5, 1, (3, 5))]
)
def test_a_step_is_shared_evenly(batch_size: int, accumulation: int, processes: int, each: tuple[int, int]) -> None:
    settings = TrainingSettings(batch_size=batch_size, accumulation=accumulation)
    own = settings.shared_by(processes)
    assert (own.batch_size, own.accumulation) == each
    for examples in (1, 7, 50):
        assert own.steps_per_epoch(-(-examples // processes)) == settings.steps_per_epoch(examples)


def test_commands_of_one_process_say_so(
    tiny_workspace: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for command in ("compare", "check"):
        result = cli(command, "tiny.yaml")
        assert (result.status, result.err) == (2, f"error: {command} runs in one process; start it without torchrun\n")


def test_without_all_that_torchrun_tells_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ({}, {"RANK": "1"}, {"WORLD_SIZE": "4"}, {"RANK": "0", "LOCAL_RANK": "", "WORLD_SIZE": ""}):
        for name in STARTED:
            monkeypatch.delenv(name, raising=False)
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        assert (world_size(), is_first()) == (1, True)
        assert on_first_process(lambda: 3) == 3
        assert distribute([1, 2, 3], lambda items: [2 * item for item in items]) == [2, 4, 6]


def test_each_does_its_part_and_all_get_the_whole(tmp_path: Path) -> None:
    script = tmp_path / "part.py"
    script.write_text(
        """
import os
from grasp_lora.storage.processes import distribute, join, leave, on_first_process

join("cpu")
rank, parts = os.environ["RANK"], []
for items in ([1, 2, 3], [4], []):
    parts.append(distribute(items, lambda mine: [(rank, item) for item in mine]))
print(f"<{rank} {parts} {on_first_process(lambda: rank)}>", flush=True)
leave()
""",
        encoding="utf-8",
    )
    done = forked.python([str(script)], cwd=tmp_path, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in "01":
        assert f"<{rank} [[('0', 1), ('0', 2), ('1', 3)], [('0', 4)], []] 0>" in done.stdout


# backbone.shard: what comes out is as if it were not split, within rounding, as only a whole model reads shared contexts once.

HELD = """
import json, os, sys
import torch
from grasp_lora.models.backbone import fingerprint, load_backbone
from grasp_lora.models.generation import answer
from grasp_lora.models.model_settings import BackboneSettings, GenerationSettings
from grasp_lora.storage.processes import join, leave

join("cpu")
whole = load_backbone(BackboneSettings("tiny-llama", dtype="float32", device="cpu"))
split = load_backbone(BackboneSettings("tiny-llama", dtype="float32", device="cpu", shard=True))
total = sum(weight.numel() for weight in whole.model.parameters())


def held():
    weights = split.model.parameters()
    return sum((weight.to_local() if hasattr(weight, "to_local") else weight).numel() for weight in weights) / total


found = {"loaded": held(), "alike": split.fingerprint == whole.fingerprint == fingerprint(split.model)}
prompts = [[5, 6, 7], [8] * 30, [9, 10]][: 3 * (1 - int(os.environ["RANK"]))]  # one process has nothing to answer
settings = GenerationSettings(max_new_tokens=9)
answers = answer(split.model, split.tokenizer, prompts, settings)
found |= {"answered": held(), "same": answers == answer(whole.model, whole.tokenizer, prompts, settings)}
print(json.dumps(found))
leave()
"""


def results(folder: str) -> dict[str, Any]:
    """What a run came to, but for seconds."""
    files = ["metrics.json", "controller/rounds.jsonl", "source/history.jsonl", "final/history.jsonl"]
    files += [f"{name}/adapter_model.safetensors" for name in ("source", "merged", "final", "adapter")]
    return {file: Path(folder, file).read_bytes() for file in files}


def assert_alike(split: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Adapters to the last bit, numbers within rounding, all else equal."""
    number = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    for file, expected in whole.items():
        if file.endswith("safetensors"):
            assert split[file] == expected, file
            continue
        found, wanted = (text[file].decode() for text in (split, whole))
        assert number.sub("#", found) == number.sub("#", wanted), file
        found_numbers, wanted_numbers = ([float(one) for one in number.findall(text)] for text in (found, wanted))
        assert found_numbers == pytest.approx(wanted_numbers, abs=1e-5), file


def test_a_split_backbone_changes_nothing_beyond_rounding(tiny_workspace: Path) -> None:
    changes = ["data.target.test=1", "target.on=source"]  # one process has nothing to answer
    for folder, shard in (("whole", "false"), ("split", "true")):
        status, output = launch_forked(*CHANGES, *changes, f"backbone.shard={shard}", folder=folder)
        assert status == 0, output
    assert_alike(results("split"), results("whole"))
    # It is the same run: without the split one goes on with it.
    forget("split", "final-*")
    status, output = launch_forked(*CHANGES, *changes, folder="split")
    assert status == 0, output
    assert_alike(results("split"), results("whole"))


@pytest.mark.slow
def test_labels_are_scored_on_a_split_backbone_too(tiny_workspace: Path) -> None:
    rows = [{"text": f"row {number}", "label": "ab"[number % 2] * (1 + number % 2)} for number in range(40)]
    for name in ("source", "target"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = [*CHANGES, "data.task=classification", "data.target.test=3"]
    for folder, shard in (("whole", "false"), ("split", "true")):
        status, output = launch_forked(*changes, f"backbone.shard={shard}", folder=folder)
        assert status == 0, output
    assert_alike(results("split"), results("whole"))


def test_each_process_holds_half_of_the_weights(tiny_workspace: Path) -> None:
    done = forked.python(["-c", HELD], count=2, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2
    for one in found:
        assert one["loaded"] <= 0.55
        assert one["answered"] <= 0.55
        assert one["alike"]
        assert one["same"]


def test_what_cannot_be_split_is_refused_before_anything(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("tiny-llama", "packed")
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    Path("packed/config.json").write_text(json.dumps(read("packed/config.json") | {"quantization_config": packed}))
    for processes, change, message in (
        (1, "seed=42", "backbone.shard is true, but there is one process: start it with torchrun"),
        (2, "backbone.quantise=nf4", "is quantised, and only full weights can be split"),
        (2, "backbone.name=packed", "is quantised, and only full weights can be split"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(backbones, "world_size", lambda processes=processes: processes)
            with pytest.raises(GraspError, match=message):
                run_tiny("backbone.shard=true", change)
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP by accelerate"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            with pytest.raises(
                GraspError, match=rf"the environment asks for {what} \({name} is true\).*backbone.shard"
            ):
                run_tiny(folder=tiny_workspace / "run")
    assert not (tiny_workspace / "run").exists()


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_each_process_that_srun_starts_works_by_itself(
    name: str, tiny_workspace: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "4")  # for which accelerate would look for the others, at an address that nobody has told
    result = cli("run", "tiny.yaml", "-o", "run")
    assert result.status == 0, result.err
