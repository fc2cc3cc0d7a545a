"""How a bench measures a system: losses of a split, answers to the test prompts and their scores, the outcome of a method."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grasp_lora.bench.keyed import REVISIONS, Keyed
from grasp_lora.bench.keys import plain, public_bertscore
from grasp_lora.bench.outcomes import Adapter, Measured, Outcome, unique
from grasp_lora.bench.run_folder import TargetOn
from grasp_lora.bench.store import Record, key_of
from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.answers import MLQA_LANGUAGES
from grasp_lora.evaluation.overlap import bleu_tokenizer
from grasp_lora.storage.claims import claim, make_folder
from grasp_lora.storage.files import write_jsonl
from grasp_lora.storage.processes import on_first_process
from grasp_lora.text.characters import DOTTED, has_old_letters, has_two_writings, space_words
from grasp_lora.text.languages import language_code

logger = logging.getLogger(__name__)

CHOOSING = ("dev", "micro_dev")  # the splits whose rows may decide
FEWEST = 2  # rows that a choice by losses needs


def choosing_splits(sizes: Mapping[str, int]) -> list[str]:
    """The splits with rows that may decide, given the size of each split; none where all of them are too few."""
    there = [name for name in CHOOSING if sizes[name]]
    return there if sum(sizes[name] for name in there) >= FEWEST else []


def _warn_of_others(file: Path, scored: Mapping[str, Any], now: Mapping[str, float | None]) -> None:
    """Say that answers which were written again, as on another processor, are not those whose scores are on record."""
    # A metric that was not available may be now, and the last bits of a similarity differ between processors.
    both = {name: (entry["value"], now[name]) for name, entry in scored.items()}
    known = {name: (one, other) for name, (one, other) in both.items() if one is not None and other is not None}
    if changed := [name for name, (one, other) in known.items() if not math.isclose(one, other, rel_tol=1e-6)]:
        logger.warning(
            "the answers in %s were written again and are not those that were scored: %s, and %s now",
            file,
            ", ".join(f"{name} {known[name][0]} on record" for name in changed),
            ", ".join(f"{name} {known[name][1]}" for name in changed),
        )


class Measuring(Keyed):
    """The steps that measure an adapter; no seed has a part in them."""

    target_on: TargetOn | None = None  # with `target.on: auto`: why the target adapter is where it is
    discarded: frozenset[str] = frozenset()  # keys of the steps that trained it the other way

    def losses(self, adapter: Adapter, split: str = "test", *, answered: bool = False) -> Record:
        """The losses of the examples of a split: `dev`, `micro_dev` or `test`.

        Where the test prompts are to be `answered`, too, that is done in the same go, for `scores`.
        """

        def work(key: str, folder: Path) -> dict[str, Any]:
            if answered and not on_first_process(self._answers_file(adapter).is_file):
                return {"losses": self._examine(adapter)}
            return {"losses": self.session.losses(adapter.load(), split)}

        settings = self._measured(adapter, data=self._data(split), revision=REVISIONS["losses"], split=split)
        return self.store.get(f"{split} losses", settings, work)

    def errors(self, adapter: Adapter, split: str) -> Record:
        """Which examples of a split of a classification get a wrong label: 1, the right one: 0; as its `losses`."""
        settings = self._measured(
            adapter,
            data=self._data(split),
            revision=REVISIONS["scores"],
            split=split,
            labels=self.session.splits.labels,
        )
        return self.store.get(
            f"{split} errors", settings, lambda key, folder: {"losses": self.session.errors(adapter.load(), split)}
        )

    @property
    def choosing_splits(self) -> list[str]:
        """The splits whose rows decide."""
        return choosing_splits({name: len(getattr(self.session.splits, name)) for name in CHOOSING})

    @property
    def choosing_split(self) -> str | None:
        """The split whose losses decide: `dev`, or `micro_dev` where that is too small; None where both are."""
        splits = self.session.splits
        return next((name for name in CHOOSING if len(getattr(splits, name)) >= FEWEST), None)

    def scores(self, adapter: Adapter) -> Record:
        """The scores of the answers to the test prompts; the answers themselves are written beside the records."""
        return self._scored(adapter)[0]

    def measured(self, adapter: Adapter) -> Measured:
        """All that one system is worth: losses on dev and test, answers and their scores."""
        splits = self.session.splits
        dev = self.losses(adapter, "dev") if splits.dev else None
        if not splits.test:
            return Measured(dev, None, None, ())
        losses = self.losses(adapter, answered=True)
        scores, answers = self._scored(adapter)
        return Measured(dev, losses, scores, answers())

    def _asked(self, adapter: Adapter) -> dict[str, Any]:
        """What decides the answers to the test prompts."""
        answers_by = self.recipe.generation
        generation = {"max_new_tokens": answers_by.max_new_tokens, "stop": answers_by.stop}
        if not answers_by.allow_empty:  # as the records say that were made when every answer could be empty
            generation["allow_empty"] = False
        if ends := self._other_ends():  # earlier records do not have it: base models name no other
            generation["ends"] = ends
        asked = self._measured(adapter, data=self._data("test"), revision=REVISIONS["scores"], generation=generation)
        if self.session.splits.labels:
            del asked["generation"]  # nothing is written
            asked |= plain({"labels": self.session.splits.labels})
        return asked

    def _other_ends(self) -> list[int]:
        """Tokens that end an answer by the backbone's config alone, neither the tokenizer's end nor the end of a gold answer."""
        backbone = self.session.backbone
        known = {one.completion_ids[-1] for one in self.session.splits.test} | {backbone.tokenizer.eos_token_id}
        return [token for token in backbone.stop_ids if token not in known]

    def _answers_file(self, adapter: Adapter) -> Path:
        """Where the answers are: under a key of their own, so that another metric does not need new ones."""
        return self.store.answers_file(key_of("answers", self._asked(adapter)))

    def _examine(self, adapter: Adapter) -> list[float]:
        """Measure the losses of the test examples and write the answers to their prompts."""
        losses, answers = self.session.examine(adapter.load())
        test = self.session.splits.test
        rows = [{"id": one.public_id, "prediction": text} for one, text in zip(test, answers, strict=True)]
        file = self._answers_file(adapter)

        def write() -> None:
            make_folder(file.parent)
            with claim(file, wait=True):  # scores of other metrics may need the same answers in another process
                write_jsonl(file, rows)

        on_first_process(write)
        return losses

    def _scored(self, adapter: Adapter) -> tuple[Record, Callable[[], tuple[str, ...]]]:
        recipe, session = self.recipe, self.session
        references = [example.references for example in session.splits.test]
        code = language_code(session.language)
        settings = self._asked(adapter) | {
            "metrics": list(session.metrics),
            "bertscore": public_bertscore(recipe.bertscore) if "bertscore" in session.metrics else None,
            "language": session.language,
            "references": hashlib.sha256(repr(references).encode()).hexdigest(),
        }
        if code != session.language:  # else it says nothing more, and earlier records do not have it
            settings["code"] = code
        if session.splits.labels.keys() - {one for texts in references for one in texts}:
            settings["statistics"] = "of all labels"  # once they were of those in the references alone
        settings |= self._text_rules(code, [text for texts in references for text in texts])
        file = self._answers_file(adapter)

        def read() -> tuple[str, ...]:
            lines = on_first_process(lambda: file.read_text(encoding="utf-8")).split("\n")
            try:
                found = tuple(json.loads(line)["prediction"] for line in lines if line)
            except (ValueError, KeyError, TypeError):
                found = ()
            if len(found) != len(references):
                raise RecipeError(f"the answers {file} are damaged; remove the file, and they are written again")
            return found

        def answers() -> tuple[str, ...]:
            if on_first_process(file.is_file):
                return read()
            self._examine(adapter)
            made, record = read(), self.store.on_record("scores", plain(settings))
            if record is not None:  # of a store that was copied without its answers
                _warn_of_others(file, record.result, {name: entry.value for name, entry in session.score(made).items()})
            return made

        def work(key: str, folder: Path) -> dict[str, Any]:
            return {name: asdict(entry) for name, entry in session.score(answers()).items()}

        return self.store.get("scores", plain(settings), work), answers

    def _text_rules(self, code: str, references: Sequence[str]) -> dict[str, Any]:
        """What metrics make of words and letters that they took otherwise once, where the test set has such text."""
        metrics = set(self.session.metrics)
        rules: dict[str, Any] = {}
        letters: list[str] = []
        dotted = code in DOTTED
        by_words = code not in MLQA_LANGUAGES and {"exact_match", "f1"} & metrics
        if by_words and any(space_words(text) != text for text in references):
            rules["words"] = "at their marks, too"  # once such a mark joined two words or was one
        if by_words and (dotted or any(has_two_writings(text) for text in references)):
            letters.append("tokens in one writing")
        if {"rouge1", "rouge2", "rougeL"} & metrics and (dotted or any(has_old_letters(text) for text in references)):
            letters.append("words in one writing")
        if "bleu" in metrics and bleu_tokenizer(code, references) != bleu_tokenizer(code, ()):
            letters.append("BLEU of characters")
        return rules | ({"letters": letters} if letters else {})

    def outcome(
        self,
        adapter: Adapter,
        prune_ratio: float | None = None,
        chosen_on: str | None = None,
        curve: Mapping[float, Mapping[str, float]] | None = None,
        chosen_among: Iterable[Adapter] = (),
        chosen_by: Iterable[Record] = (),
        left_out: Sequence[str] = (),
        taken: str | None = None,
    ) -> Outcome:
        """Measure what a method came to.

        Args:
            adapter: the result; what is not named here is as in `Outcome`.
            chosen_among: the adapters that a choice was made among, the result included: all of them were needed.
            chosen_by: measurements that the choice took beyond those of the trainings.
        """
        needed = unique([*(record for one in (*chosen_among, adapter) for record in one.records), *chosen_by])
        losses, scores = self.losses(adapter, answered=True), self.scores(adapter)
        found = Outcome(losses, scores, needed, prune_ratio, chosen_on, curve, tuple(left_out), taken)
        if self.target_on is None:
            return found
        why = [f"takes {self.target_on.merge}: {self.target_on.left_out}"] if self.target_on.left_out else []
        return replace(found, merge=self.target_on.merge, discarded=self.discarded, left_out=(*found.left_out, *why))
