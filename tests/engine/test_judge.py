"""Which of several adapters: scores as a run has them, strangers' folders, what is refused, what a person reads."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from recorder import read, rows_of, session_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import grasp_lora as gl
from grasp_lora.engine.judge import Judgement
from grasp_lora.errors import AdapterError, DataError
from grasp_lora.evaluation.statistics import compare_all_pairs
from grasp_lora.report.judged import sentence

ROWS = "fresh.jsonl"


@pytest.fixture
def judged(finished_run: Path) -> Callable[..., Judgement]:
    """Judge adapters of the run on its own test rows, which none of them knows."""
    write_rows([{"prompt": row.prompt, "completion": row.completion} for row in session_of().splits.test])

    def call(*adapters: str, rows: str = ROWS, **settings: Any) -> Judgement:
        return gl.judge(adapters, rows, "de", device="cpu", **settings)

    return call


def saying(name: str, **answers: Any) -> str:
    """A copy of the run's source adapter that says something else of how it is asked; the rest is as of one that says nothing."""
    shutil.copytree("run/source", name)
    said = read(f"{name}/grasp_lora.json") | {"answers": answers, "rows": []}
    Path(name, "grasp_lora.json").write_text(json.dumps(said), encoding="utf-8")
    return name


def write_rows(rows: list[dict[str, Any]], file: str = ROWS) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_scores_and_answers_are_those_of_the_run(judged: Callable[..., Judgement]) -> None:
    trial = judged("run/source", "run/target", "run/final", "backbone")
    systems = read("run/metrics.json")["systems"]
    for name, of_run in (("source", "source"), ("target", "target"), ("final", "grasp"), ("backbone", "zero_shot")):
        scores = dict(trial.scores[name])
        assert scores.pop("test_loss") == pytest.approx(systems[of_run]["test_loss"], rel=1e-6)
        assert scores == pytest.approx(systems[of_run]["metrics"])
        answers = {row["references"][0]: row["prediction"] for row in rows_of(f"run/evaluation/{of_run}.jsonl")}
        assert {row.references[0]: row.prediction for row in trial.answers[name]} == answers
    assert len(trial.pairs) == 6 * 3  # of four, by the loss and two scores
    assert {pair.comparison.comparisons for pair in trial.pairs} == {6}
    assert trial.ranking[0] == max(trial.scores, key=lambda name: trial.scores[name]["exact_match"] or 0.0)
    turned, straight = trial.against("target", "source", "test_loss"), trial.against("source", "target", "test_loss")
    assert turned is not None
    assert straight is not None
    assert (turned.difference, turned.low, turned.high) == (-straight.difference, -straight.high, -straight.low)


def test_one_adapter_is_judged_against_the_backbone(judged: Callable[..., Judgement]) -> None:
    assert list(judged("run/source").scores) == ["source", "backbone"]


def test_rows_that_an_adapter_knows_are_refused(judged: Callable[..., Judgement]) -> None:
    known = session_of().splits.train[0]
    write_rows([*rows_of(ROWS), {"prompt": known.prompt, "completion": known.completion}])
    judged("run/source")
    with pytest.raises(AdapterError, match=r"adapter 'target' was trained on 1 of the 9 rows of fresh\.jsonl"):
        judged("run/source", "run/target")


def test_what_cannot_be_judged_is_refused(judged: Callable[..., Judgement]) -> None:
    for other in ("run/source", "./run/source", str(Path("run/source").absolute())):
        with pytest.raises(AdapterError, match="source' is named twice"):
            judged("run/source", "run/target", other)
    with pytest.raises(AdapterError, match="there is no adapter to judge"):
        judged("backbone")
    shutil.copytree("run/source", "backbone")
    for adapter in ("backbone", "./backbone"):
        with pytest.raises(AdapterError, match="an adapter is called 'backbone', which means the model alone here"):
            judged(adapter)
    shutil.copytree("run/source", "many")
    said = read("many/grasp_lora.json")
    said["answers"]["labels"] = [str(number) for number in range(100_000)]  # a stranger's, which would take hours
    Path("many/grasp_lora.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(DataError, match="adapter many: "):
        judged("many")
    write_rows([{"text": "red", "label": "a"}, {"text": "blue", "label": "b"}], "labels.jsonl")
    with pytest.raises(DataError, match=r"labels\.jsonl is data for the task classification"):
        judged("run/source", rows="labels.jsonl")
    write_rows(rows_of(ROWS)[:1])
    with pytest.raises(DataError, match="has 1 rows to judge by; at least 2 are needed"):
        judged("run/source")
    shutil.copytree("run/source", "silent")  # which does not say how it is asked
    Path("silent/grasp_lora.json").unlink()
    questions = [{"id": str(i), "question": f"{i}?", "answers": [], "is_impossible": True} for i in range(3)]
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "a text", "qas": questions}]}]}
    Path("impossible.json").write_text(json.dumps(squad), encoding="utf-8")
    with pytest.raises(DataError, match=r"impossible\.json has 0 rows to judge by"):
        judged("silent", rows="impossible.json")


def test_intervals_are_of_whole_groups(judged: Callable[..., Judgement]) -> None:
    rows = rows_of(ROWS)
    write_rows([row | {"group": f"text {number // 4}"} for number, row in enumerate(rows)])
    trial = judged("run/source", "run/target")
    assert trial.groups == 2
    losses = {name: [row.loss for row in rows] for name, rows in trial.answers.items()}
    shown = trial.against("source", "target", "test_loss")
    for groups, same in (([number // 4 for number in range(8)], True), (None, False)):
        [expected] = compare_all_pairs(losses, groups=groups, higher_is_better=False).values()
        assert shown is not None
        assert ((shown.low, shown.high) == pytest.approx((expected.low, expected.high))) == same


def test_rows_that_are_related_to_what_an_adapter_knows_are_said(
    judged: Callable[..., Judgement], caplog: pytest.LogCaptureFixture
) -> None:
    judged("run/target")
    assert not caplog.messages
    known = read("run/target/grasp_lora.json")
    shared = hashlib.sha256(b"grouprivers").hexdigest()[:16]
    Path("run/target/grasp_lora.json").write_text(json.dumps(known | {"rows": [*known["rows"], shared]}))
    first, *rest = rows_of(ROWS)
    write_rows([first | {"group": "rivers"}, *rest])
    judged("run/target")
    assert "'target' was trained on rows that share an id, a text or an article with 1 of the 8 rows" in caplog.text


def test_an_adapter_chooses_from_its_own_labels(judged: Callable[..., Judgement]) -> None:
    write_rows([{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(6)], "labels.jsonl")
    own = {name: saying(name, task="classification", labels=[*name]) for name in ("xy", "ab")}
    trial = judged(*own, "backbone", rows="labels.jsonl")
    for name, labels in (("xy", "xy"), ("ab", "ab"), ("backbone", "xy")):  # which is asked as the first is
        assert {row.prediction for row in trial.answers[name]} <= {*labels}
    assert trial.scores["xy"]["accuracy"] == 0.0


def test_labels_that_differ_in_case_alone_are_refused(judged: Callable[..., Judgement]) -> None:
    write_rows([{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(6)], "labels.jsonl")
    with pytest.raises(DataError, match=r"labels\.jsonl and the adapters: the labels 'A' and 'a' differ in case"):
        judged(saying("capitals", task="classification", labels=["A", "b"]), rows="labels.jsonl")


def test_rows_without_an_answer_are_told_of(judged: Callable[..., Judgement], caplog: pytest.LogCaptureFixture) -> None:
    qas = [{"id": f"q{i}", "question": f"{i}?", "answers": [{"text": "a", "answer_start": 0}]} for i in range(2)]
    qas.append({"id": "q2", "question": "what?", "answers": [], "is_impossible": True})
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "a text", "qas": qas}]}]}
    Path("squad.json").write_text(json.dumps(squad), encoding="utf-8")
    assert judged(saying("questions", task="qa"), rows="squad.json").examples == 2
    assert "1 rows of squad.json have no answer and are left out" in caplog.text


def test_an_adapter_is_asked_in_the_chat_template_that_it_brings_along(judged: Callable[..., Judgement]) -> None:
    folder = saying("talks", task="completion", chat_template=True, prompt="{prompt}")
    template = "{% for turn in messages %}<{{ turn['content'] }}>{% endfor %}"
    Path(folder, "chat_template.jinja").write_text(template, encoding="utf-8")
    trial = judged(folder, "run/source")
    assert trial.prompts == tuple(f"<{row['prompt']}>" for row in rows_of(ROWS))


def test_texts_are_cut_as_the_adapter_was_trained_on_them(judged: Callable[..., Judgement]) -> None:
    folder = saying("cuts", task="qa", max_document_tokens=30)
    rows = [{"context": f"{number} one {'word ' * 30}six", "question": "?", "answer": "one"} for number in (1, 2)]
    write_rows(rows, "questions.jsonl")
    assert not any("six" in prompt for prompt in judged(folder, rows="questions.jsonl").prompts)
    write_rows([rows[0], rows[1] | {"answer": "six"}], "questions.jsonl")
    with pytest.raises(
        DataError, match=r"1 rows of questions\.jsonl lose their answer where 'cuts' cuts texts to 30 tokens"
    ):
        judged(folder, rows="questions.jsonl")


def test_adapters_of_two_tasks_are_not_compared(judged: Callable[..., Judgement]) -> None:
    with pytest.raises(AdapterError, match="trained for the task qa, and the rows are of the task completion"):
        judged("run/source", saying("questions", task="qa"))


def test_of_equals_none_is_called_the_best(judged: Callable[..., Judgement]) -> None:
    shutil.copytree("run/source", "twin")
    assert sentence(judged("run/source", "twin")).startswith("source, twin have the highest ")


def test_table_and_files(judged: Callable[..., Judgement], cli: Callable[..., Any]) -> None:
    asked = ("judge", "run/source", "run/final", "--rows", ROWS, "--language", "de")
    result = cli(*asked, "--save", "verdict")
    assert result.status == 0, result.err
    trial = judged("run/source", "run/final")
    assert sentence(trial) in result.out
    facts = read("verdict/judge.json")
    assert facts["ranking"] == trial.ranking
    assert facts["scores"]["final"]["test_loss"] == pytest.approx(trial.scores["final"]["test_loss"])
    assert [set(row["answers"]) for row in rows_of("verdict/answers.jsonl")] == [{"source", "final"}] * trial.examples
    again = cli(*asked, "--save", "verdict")
    assert (again.status, "verdict" in again.err) == (2, True)


# Folders as other programs leave them: TRL writes its own; for others PEFT writes the weights, and files like theirs are added.
STRANGERS = {
    "trl": ({"target_modules": ["q_proj", "v_proj"]}, ()),
    "axolotl": (
        {"target_modules": "all-linear"},
        ("config.json", "debug.log", "checkpoint-2/adapter_model.safetensors"),
    ),
    "llama-factory": (
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        ("all_results.json", "trainer_log.jsonl", "trainer_state.json", "train_results.json", "training_args.bin"),
    ),
    "unsloth": ({"target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|v_proj|up_proj).*?)"}, ()),
}


def strangers_folder(program: str) -> str:
    """An adapter that TRL trained, or one of random weights with its tokenizer, and what the program writes beside it."""
    more, files = STRANGERS[program]
    backbone = AutoModelForCausalLM.from_pretrained("tiny-llama")
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **more)
    if program == "trl":
        return train_with_trl(backbone, config)
    model = get_peft_model(backbone, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(program)
    AutoTokenizer.from_pretrained("tiny-llama").save_pretrained(program)
    for file in files:
        place = Path(program, file)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"{}")
    if program == "unsloth":
        stated = read(f"{program}/adapter_config.json")
        mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
        stated |= {"auto_mapping": mapping, "base_model_name_or_path": "unsloth/tiny-llama-bnb-4bit"}
        Path(program, "adapter_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return program


def train_with_trl(backbone: PreTrainedModel, config: LoraConfig) -> str:
    """One step of TRL's trainer, saved by it, its checkpoint within."""
    from trl import SFTConfig, SFTTrainer

    settings = {"max_steps": 1, "save_steps": 1, "learning_rate": 0.1, "bf16": False, "activation_checkpointing": False}
    trainer = SFTTrainer(
        backbone,
        SFTConfig("trl", report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **settings),
        train_dataset=Dataset.from_list(rows_of("source.jsonl")),
        processing_class=AutoTokenizer.from_pretrained("tiny-llama"),
        peft_config=config,
    )
    trainer.train()
    trainer.save_model()
    return "trl"


@pytest.mark.parametrize("program", STRANGERS)
def test_folders_of_other_programs_load_as_they_are(program: str, judged: Callable[..., Judgement]) -> None:
    folder = strangers_folder(program)
    trial = judged("run/source", folder)  # the first says in which number format it was trained
    if program == "unsloth":  # PEFT would import what the mapping names
        stated = read(f"{program}/adapter_config.json") | {"auto_mapping": None}
        Path(program, "adapter_config.json").write_text(json.dumps(stated), encoding="utf-8")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny-llama"), folder).eval()
    losses = []
    for row in session_of().splits.test:
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        labels = torch.where(torch.arange(ids.shape[1]) < len(row.prompt_ids), -100, ids)
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    assert [row.loss for row in trial.answers[folder]] == pytest.approx(losses, rel=1e-5)
    with model.disable_adapter(), torch.no_grad():
        assert abs(float(model(input_ids=ids, labels=labels).loss) - losses[-1]) > 1e-3  # so that the adapter counts


def test_a_folder_of_a_checkpoint_is_an_adapter_too(judged: Callable[..., Judgement]) -> None:
    strangers_folder("trl")
    assert list(judged("trl/checkpoint-1", "run/source").scores) == ["checkpoint-1", "source"]
