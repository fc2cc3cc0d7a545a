"""Do the tests see it? Small faults made by hand, each in a copy of the tree, and the tests that ought to catch it.

    python lab/mutations.py
    python lab/mutations.py --only turns

A fault is found by its text, which has to stand exactly once in `src/`: whoever changes that line adapts the fault. The tests of
all faults are run without any first. Exit status 1 where one is not caught, 2 where a fault does not fit any more.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 1200  # seconds of a run of tests; a fault may make a loop endless
FAILED = 1  # pytest's exit status where tests ran and some failed


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Args:
        name: for people.
        old: text that stands once in `src/`.
        new: what it becomes.
        tests: files below `tests/` that ought to fail.
        harm: what a user would get.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]
    harm: str


MASKS, POLICY, ESTIMATE = "method/test_masks.py", "method/test_policy.py", "method/test_estimate.py"
CONTROLLER, PROBES, CHECKPOINTS = (
    "training/test_controller.py",
    "training/test_probes.py",
    "training/test_checkpoints.py",
)
RUN, COMPARE, SPLITS = "engine/test_run.py", "engine/test_compare.py", "data/test_splits.py"
JUDGE, INIT = "engine/test_judge.py", "recipes/test_init.py"
FOLDER, INTERRUPTION, ORDER = "storage/test_claims.py", "storage/test_interruption.py", "storage/test_order.py"

MUTATIONS = (
    Mutation(
        "deliver: a training that was discarded is averaged",
        "if continued.made and continued.made.result.best_step:",
        "if continued.made:",
        ("engine/test_deliver.py",),
        "half of what is handed over is the source adapter",
    ),
    Mutation(
        "compare: joint trains on the source alone",
        '("source_train", *["train"] * epochs)',
        '("source_train",)',
        (COMPARE,),
        "GRASP is compared with a joint training that never saw the target language",
    ),
    Mutation(
        "masks: count rounded down whatever floats do",
        "return nearest if math.isclose(product, nearest, rel_tol=1e-12) else math.floor(product)",
        "return math.floor(product)",
        (MASKS,),
        "29 % of 100 weights are 28",
    ),
    Mutation(
        "masks: one weight more in each group",
        "group >= prune_count(prune_ratio, group.numel())",
        "group > prune_count(prune_ratio, group.numel())",
        (MASKS,),
        "more is pruned than the ratio says",
    ),
    Mutation(
        "masks: a revived weight is zero",
        "for key, dense in self.dense().items():\n            self.weights[key].copy_(dense).masked_fill_(~keep[key], 0.0)\n"
        "            self.stash",
        "for key, dense in self.weights.items():\n            self.weights[key].copy_(dense).masked_fill_(~keep[key], 0.0)\n"
        "            self.stash",
        (MASKS,),
        "a lower ratio loses what a higher one had masked",
    ),
    Mutation(
        "masks: all masked weights count as newly masked",
        "self.newly_masked[key] = self.keep[key] & ~keep[key]",
        "self.newly_masked[key] = ~keep[key]",
        (MASKS,),
        "moments are zeroed where nothing has changed",
    ),
    Mutation(
        "masks: norms forgotten by restore",
        "for module, _ in norms}",
        "for module, _ in ()}",
        (MASKS,),
        "a resumed run ranks without norms",
    ),
    Mutation(
        "policy: no commit without a gain",
        "if rewards[best] < 0.0:",
        "if rewards[best] <= 0.0:",
        (POLICY,),
        "the paper's rule commits at a reward of 0",
    ),
    Mutation(
        "policy: clipped steps go up",
        "math.copysign(max_step, distance)",
        "max_step",
        (POLICY,),
        "a far candidate below moves the ratio up",
    ),
    Mutation(
        "estimate: an interval that need not hold its ratio",
        "RatioEstimate(ratio, min(low, ratio), max(high, ratio), rule, rounds, curve=curve)",
        "RatioEstimate(ratio, low, high, rule, rounds, curve=curve)",
        (ESTIMATE,),
        "ratio 0.80 (0.40 to 0.75)",
    ),
    Mutation(
        "estimate: the end of the run is read as its best moment",
        "losses[-1] if at_end else losses.amin(0)",
        "losses.amin(0)",
        (ESTIMATE,),
        "without a dev set the ratio is one that overfitting has spoiled",
    ),
    Mutation(
        "estimate: the examples in turn are taken for the first ones",
        "weights[:, list(measured.places)]",
        "weights[:, : len(measured.places)]",
        (ESTIMATE,),
        "the interval draws other examples than were probed",
    ),
    Mutation(
        "policy: candidates are no pairs around the mean",
        "for sign in (1, -1)",
        "for sign in (1, 1)",
        (POLICY,),
        "half of the probes of a round are wasted",
    ),
    Mutation(
        "controller: a reward counts as a loss",
        "return [-float(value) for value in values]",
        "return [float(value) for value in values]",
        (CONTROLLER,),
        "the worst ratio is learned",
    ),
    Mutation(
        "controller: the baseline of other examples for a candidate at the ratio in force",
        "of_turn = baseline if whole is few or places is None else [baseline[place] for place in places]",
        "of_turn = baseline if whole is few or places is None else baseline[: len(places)]",
        (CONTROLLER,),
        "a reward of nothing but other examples",
    ),
    Mutation(
        "controller: moments of newly masked weights stay",
        "reset_moments(optimizer, masks.weights, masks.newly_masked)",
        "pass",
        (CONTROLLER,),
        "a revived weight is moved by an old average",
    ),
    Mutation(
        "controller: masks are not put back on after a step",
        "self.masks.enforce()",
        "pass",
        (CONTROLLER,),
        "pruned weights drift away from zero",
    ),
    Mutation(
        "controller: the baseline under the mask of the last step",
        "self.masks.commit(self.search.current_ratio, self._order)",
        "pass",
        (CONTROLLER,),
        "rewards against a ratio that is not in force",
    ),
    Mutation(
        "probes: examples in turn shifted by one",
        "(number * self.count + place) % len(self._examples)",
        "(number * self.count + place + 1) % len(self._examples)",
        (PROBES,),
        "the first example comes last",
    ),
    Mutation(
        "probes: the seed of the turns is ignored",
        'random.Random(f"{seed}/turns")',
        'random.Random("turns")',
        (PROBES,),
        "all seeds probe alike, so their spread says nothing",
    ),
    Mutation(
        "probes: padding counts in the norms",
        "values = values * mask.reshape(*values.shape[:-1], 1)",
        "pass",
        (PROBES,),
        "scores depend on what an example is batched with",
    ),
    Mutation(
        "checkpoints: a manifest not removed first",
        "    (checkpoint / MANIFEST).unlink(missing_ok=True)\n",
        "",
        (CHECKPOINTS,),
        "a kill while one is removed leaves what looks damaged",
    ),
    Mutation(
        "checkpoints: files that have changed count",
        "if not file.is_file() or sha256_of(file) != digest]",
        "if not file.is_file()]",
        (CHECKPOINTS,),
        "training goes on from spoiled weights",
    ),
    Mutation(
        "records: settings need not give the key",
        "if done is None or key_of(name, done.inputs) != key:",
        "if done is None:",
        ("engine/test_store.py",),
        "a record that was edited counts",
    ),
    Mutation(
        "drafts: links are followed",
        '        draft.unlink(missing_ok=True)  # of a process that was killed\n        with draft.open("xb")',
        '        with draft.open("wb")',
        (FOLDER,),
        "a stranger's folder overwrites a file of the user",
    ),
    Mutation(
        "new folder: what came while the lock was awaited is not looked for",
        "        refuse_existing(output)  # again: another process may have written it\n",
        "",
        (FOLDER,),
        "a second writer in a finished folder",
    ),
    Mutation(
        "new folder: its name comes before its data",
        "            sync_all(draft)\n            if place",
        "            if place",
        (ORDER,),
        "a power cut leaves a result of empty files",
    ),
    Mutation(
        "signals: a second one not raised",
        "signal.raise_signal(number)",
        "pass",
        (INTERRUPTION,),
        "a second Ctrl-C does not end the run",
    ),
    Mutation(
        "splits: groups of held-out examples stay in the source",
        "order = [group for group in members if group not in barred]",
        "order = list(members)",
        (SPLITS, "data/test_splits.py"),
        "test articles are trained on in English",
    ),
    Mutation(
        "splits: the proof looks at test alone",
        'for source in ("source_train", "source_dev") for name in HELD_OUT]',
        'for source in ("source_train", "source_dev") for name in HELD_OUT[:1]]',
        (SPLITS,),
        "dev examples in the source's training data go unseen",
    ),
    Mutation(
        "run: source and target swapped when the merge is written",
        "merge([parent.weights for parent in parents], replace(settings, seed=seed), names)",
        "merge([parent.weights for parent in parents], replace(settings, seed=seed), names[::-1])",
        (RUN,),
        "weights and segments of the merge are those of the other adapter",
    ),
    Mutation(
        "keys: the dropout of a final run counts for nothing",
        """            mask=asdict(mask),
            dropout=self.recipe.dropout,
""",
        """            mask=asdict(mask),
""",
        ("engine/test_keys.py",),
        "another dropout, and the old training counts as done",
    ),
    Mutation(
        "keys: the mask of a final run counts for nothing",
        """            mode=stage.mode,
            mask=asdict(mask),
""",
        """            mode=stage.mode,
""",
        ("engine/test_keys.py",),
        "another score, and the old training counts as done",
    ),
    Mutation(
        "keys: the stop texts of answers count for nothing",
        """            "stop": generation.stop,
""",
        "",
        ("engine/test_keys.py",),
        "another stop text, and the old answers count as done",
    ),
    Mutation(
        "data: the hash of examples leaves their answers out",
        "example.prompt_ids, example.completion_ids)).encode()",
        "example.prompt_ids)).encode()",
        ("engine/test_keys.py",),
        "corrected answers, and the old training counts as done",
    ),
    Mutation(
        "judge: intervals without groups",
        "compare_all_pairs(runs, groups=groups, corpus_score",
        "compare_all_pairs(runs, groups=None, corpus_score",
        (JUDGE,),
        "rows of one text count as independent, and a difference is shown where there is none",
    ),
    Mutation(
        "judge: no warning of related rows",
        "if related := sum(not contestant.rows.isdisjoint(example.marks) for example in examples):",
        "if related := 0:",
        (JUDGE,),
        "an adapter that knows the texts of the rows wins, and nobody is told why",
    ),
    Mutation(
        "judge: an adapter chooses from the labels of the rows",
        "encode_labels(form.labels or corpus.labels, encoder)",
        "encode_labels(corpus.labels, encoder)",
        (JUDGE,),
        "an adapter is judged by a choice that it never has",
    ),
    Mutation(
        "judge: the chat template that an adapter brings along unused",
        "        tokenizer.chat_template = contestant.chat_template\n",
        "",
        (JUDGE,),
        "an adapter is asked in a form that it was not trained with",
    ),
    Mutation(
        "judge: documents uncut",
        "sys.maxsize, form.max_document_tokens, in_chat",
        "sys.maxsize, None, in_chat",
        (JUDGE,),
        "an adapter is asked with longer texts than it was trained on",
    ),
    Mutation(
        "judge: an adapter of another task is judged, too",
        "if form.task not in (None, corpus.task):",
        "if False:",
        (JUDGE,),
        "prompts of one task are compared with those of another",
    ),
    Mutation(
        "steps: a final run forgets which rows it was trained on",
        "rows = _seen_by([start], self.splits.train)",
        "rows = _seen_by([start])",
        ("engine/test_single.py",),
        "an adapter is judged on its own training rows",
    ),
    Mutation(
        "merge: the marks of the first parent alone",
        "rows={row for adapter in adapters for row in adapter.info.rows}",
        "rows=set(adapters[0].info.rows)",
        ("engine/test_single.py",),
        "a merge is judged on training rows of its second parent",
    ),
    Mutation(
        "init: a source has one group where all orders leave one",
        "any(len(counts) < 2 for counts in left)",
        "all(len(counts) < 2 for counts in left)",
        (INIT,),
        "a recipe whose source cannot be split with some seeds",
    ),
    Mutation(
        "init: as many source rows as the best order leaves",
        "fewest = min(map(sum, left))",
        "fewest = max(map(sum, left))",
        (INIT,),
        "a recipe that asks for more source rows than there are",
    ),
    Mutation(
        "check: the mean of both is no system",
        'rivals = 2 * (recipe.final.deliver == "best")',
        'rivals = 1 * (recipe.final.deliver == "best")',
        ("engine/test_preflight.py",),
        "check promises fewer minutes and narrower intervals than the run has",
    ),
    Mutation(
        "compare: what a run hands over does not pay for its rivals",
        "systems[name].after(*trained),",
        "systems[name],",
        (COMPARE,),
        "the row seems to cost less than what it was chosen from",
    ),
    Mutation(
        "predict: prompts among conversations without a line break",
        'ends_turns = talks and template.prompt.endswith("\\n")',
        "ends_turns = False",
        ("cli/test_predict.py",),
        "prompts of another form than the adapter was trained on",
    ),
    Mutation(
        "records: full-width copies are other texts",
        'unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())',
        'unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())',
        ("data/test_records.py",),
        "copies of one text stand in training and test",
    ),
    Mutation(
        "answers: the last of equally likely labels",
        "likeliest = max(labels, key",
        "likeliest = max(reversed(list(labels)), key",
        ("models/test_answering.py",),
        "other answers than documented, and than those on record",
    ),
    Mutation(
        "encode: labels have to be as short as examples",
        "replace(encoder, max_tokens=sys.maxsize, max_document_tokens=None).encode(",
        "encoder.encode(",
        ("data/test_labels.py",),
        "labels that are never an answer",
    ),
    Mutation(
        "check: the unpruned twin of a run costs nothing",
        '_TO_PRUNE | {"continued", "unpruned"}',
        '_TO_PRUNE | {"continued"}',
        ("engine/test_preflight.py",),
        "check promises fewer trained examples than there are",
    ),
    Mutation(
        "given adapters: one given twice weighs twice",
        "if len({adapter.sha256 for adapter in found.values()}) < len(places):",
        "if False:",
        ("engine/test_single.py",),
        "a merge of other weights than the recipe seems to say",
    ),
    Mutation(
        "training: a trainer of one's own clips before the mask",
        'if self.mode == "hold" and self in trainer.callback_handler.callbacks:',
        "if False:",
        (CONTROLLER,),
        "gradients of pruned weights shrink each clipped step",
    ),
    Mutation(
        "data: an absolute path gives other ids",
        "return place.relative_to(folder).as_posix() if place.is_relative_to(folder) else name",
        "return name",
        (SPLITS,),
        "the same files split otherwise, and rows of two files with one id",
    ),
)


class MisfitError(Exception):
    """A fault whose text is not there exactly once, or tests that fail without one."""


def file_of(mutation: Mutation, tree: Path) -> Path:
    """The file below `src/` in which a fault's text stands.

    Raises:
        MisfitError: it stands nowhere, or more than once.
    """
    files = sorted((tree / "src").rglob("*.py"))
    places = [file for file in files for _ in range(file.read_text(encoding="utf-8").count(mutation.old))]
    if len(places) != 1:
        found = ", ".join(str(place.relative_to(tree)) for place in places) or "nowhere"
        raise MisfitError(f"{mutation.name}: its text must stand once in src/, but stands {found}; adapt the fault")
    return places[0]


def fails(tests: Sequence[str], tree: Path) -> bool:
    """Whether tests fail in a copy of the tree; one that never ends counts as failed.

    Raises:
        MisfitError: they could not be run.
    """
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *(f"tests/{test}" for test in tests),
    ]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, timeout=TIMEOUT, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return True
    if done.returncode not in (0, FAILED):
        raise MisfitError(f"{', '.join(tests)} cannot be run: {done.stdout[-800:]}{done.stderr[-200:]}")
    return done.returncode == FAILED


def caught(mutation: Mutation, tree: Path) -> bool:
    """Whether the tests of a fault fail with it; the copy of the tree is as before afterwards."""
    file = file_of(mutation, tree)
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return fails(mutation.tests, tree)
    finally:
        file.write_text(before, encoding="utf-8")


def main() -> int:
    """Try all faults; print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--fit", action="store_true", help="only look whether each fault still fits")
    options = parser.parse_args()
    chosen = [one for one in MUTATIONS if options.only in one.name]
    survivors = 0
    try:
        for one in chosen:
            file_of(one, ROOT)
        if options.fit:
            return 0
        with tempfile.TemporaryDirectory() as scratch:
            tree = Path(scratch) / "tree"
            kept = shutil.ignore_patterns(".*", "__pycache__", "results")
            shutil.copytree(ROOT, tree, ignore=kept)
            if fails(sorted({test for one in chosen for test in one.tests}), tree):
                raise MisfitError("the tests fail without a fault; mend them first")
            for one in chosen:
                started = time.perf_counter()
                seen = caught(one, tree)
                survivors += not seen
                told = "caught  " if seen else f"SURVIVED ({one.harm})"
                sys.stdout.write(f"{time.perf_counter() - started:6.0f} s  {told} {one.name}\n")
                sys.stdout.flush()
    except MisfitError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{len(chosen) - survivors} of {len(chosen)} caught\n")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
