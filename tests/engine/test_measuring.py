"""What decides the answers to the test prompts, and who writes them."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from grasp_lora.engine.outcomes import Adapter
from recorder import session_of

from grasp_lora.engine.steps import Bench
from grasp_lora.engine.store import Store

EOS = 2


@pytest.mark.parametrize(("ends", "extra"), [(EOS, None), ([EOS], None), ([EOS, 5, 9], [5, 9])])
def test_a_further_end_of_the_backbone_is_part_of_the_key(
    tiny_workspace: Path, ends: int | list[int], extra: list[int] | None
) -> None:
    own = Path("own")
    own.mkdir()
    for file in Path("tiny-llama").iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    config = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    usual, other = (session_of(f"backbone.name={name}") for name in ("tiny-llama", "own"))
    keys = [Bench(one, one, Store(Path("store")))._asked(Adapter("adapter", lambda: None)) for one in (usual, other)]
    assert keys[1]["generation"].pop("ends", None) == extra
    assert keys[0] == keys[1]
    assert "ends" not in keys[0]["generation"]


def test_two_who_write_the_same_answers_take_turns(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two comparisons of other metrics do, which share no step that scores."""
    session = session_of()
    count = len(session.splits.test)
    monkeypatch.setattr(session, "examine", lambda _: ([1.0] * count, ["answer"] * count))
    bench, adapter = Bench(session, session, Store(Path("store"))), Adapter("adapter", lambda: None)
    sync, together, failed = os.fsync, threading.Barrier(2), []

    def slow(descriptor: int) -> None:
        time.sleep(0.2)  # between the draft and its rename
        sync(descriptor)

    def write() -> None:
        together.wait()
        try:
            bench._examine(adapter)
        except OSError as error:
            failed.append(error)

    monkeypatch.setattr(os, "fsync", slow)
    writers = [threading.Thread(target=write) for _ in range(2)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert not failed
    [file] = Path("store/answers").iterdir()
    assert len(file.read_text(encoding="utf-8").splitlines()) == count


@pytest.mark.parametrize(
    ("code", "text", "metrics", "expected"),
    [
        ("sw", "habari ya leo", ["f1", "rougeL", "bleu"], {}),
        ("am", "ሰላም፡ለዓለም", ["f1"], {"words": "at their marks, too"}),
        ("am", "ሰላም፡ለዓለም", ["rougeL"], {}),
        ("tr", "ışık", ["exact_match", "rouge1"], {"letters": ["tokens in one writing", "words in one writing"]}),
        ("tr", "ışık", ["accuracy"], {}),
    ],
)
def test_scores_made_by_an_older_rule_for_such_text_are_not_taken(
    tiny_workspace: Path, code: str, text: str, metrics: list[str], expected: dict[str, object]
) -> None:
    session = session_of()
    session.metrics = metrics
    assert Bench(session, session, Store(Path("store")))._text_rules(code, [text]) == expected
