"""Answers: token ids of prompts in, greedy texts or the likeliest labels out, with the losses of the right answers if asked for.

Texts come from transformers' `generate`. Added here: how an answer ends (at a stop text, never before there is a text), batches
of similar lengths whose rows leave and join, a beginning from what the loss of the right answer tells, and equally many calls in
each process where the backbone is split over several.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from grasp_lora.errors import DataError, ProbeError
from grasp_lora.models.backbone import calls_behind, find_stop_ids, is_split, supports_logits_to_keep, without_peft
from grasp_lora.models.caches import cut, joined, padded, positions, read, repeated, shift, stacked
from grasp_lora.models.live import evaluating
from grasp_lora.models.loss import collate_pairs, summed_losses, target_scores
from grasp_lora.models.model_settings import GenerationSettings
from grasp_lora.storage.memory import enough_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 16  # most rows of a batch
BATCH_TOKENS = 8192  # most tokens, padding and room for the answers included; a longer prompt makes a batch of its own
LABEL_TOKENS = 512  # most tokens of labels or right answers in a batch: each has scores of a whole vocabulary
_ON_ACCELERATOR = 4  # as many times the right answers' tokens
PART = 4  # tokens of answers, after which the rows that have ended leave
WAITING = 8  # most rows that wait for those of the next batch: a step of few rows takes nearly as long as one of many
NO_ROW = -1  # the place of an answer that nobody asked for, so that all processes make the same calls
LESS_MEMORY = "shorten the prompts, lower generation.max_new_tokens, or set backbone.dtype to bfloat16 if it is float32"
_ONE_BY_ONE = ("minimax", "recurrent_gemma", "rwkv")  # model types that answer otherwise in a batch


def answer(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    progress: Callable[[int, int], None] | None = None,
    ends: Iterable[int] = (),
    labels: Mapping[str, Sequence[int]] | None = None,
    right: Sequence[Sequence[int]] | None = None,
) -> list[tuple[str, float]]:
    """Answer each prompt, greedily or by the likeliest label; take the loss of its right answer, too, if that is given.

    A greedy answer ends at an EOS token, one of `ends`, a stop text or `max_new_tokens`, not before there is text. Batching does
    not change the answers beyond rounding (in bfloat16, near-ties between two tokens can fall either way). A prompt is read once
    for both where the model's cache allows it; the losses are those of `models.loss`, beyond rounding. The model may be wrapped
    by PEFT; it is left as it was, each module in its train or eval mode.

    Args:
        prompts: token ids of each prompt, BOS included where the model wants one.
        settings: lengths and stop texts.
        progress: called after each batch with the prompts answered so far and their total.
        ends: further tokens that end an answer, such as the end of a turn.
        labels: label -> token ids; the first of equally likely ones is the answer. Without labels answers are texts.
        right: token ids of each prompt's right answer, its end token last.

    Returns:
        For each prompt, in their order, the answer, stripped of surrounding white space, and the mean NLL of the right
        answer's tokens in nats; 0 where none are given.

    Raises:
        DataError: a prompt is empty, or too long for the model's context with `max_new_tokens` or a label after it.
        ProbeError: a score is no number, or a loss is not finite.
    """
    if labels:
        scored = list(dict.fromkeys(map(tuple, (*labels.values(), *(right or ())))))
        rows = []
        for place, of_prompt in enumerate(label_scores(model, prompts, scored, progress)):
            found = dict(zip(scored, of_prompt, strict=True))
            likeliest = max(labels, key=lambda label: found[tuple(labels[label])])
            rows.append((likeliest, abs(found[tuple(right[place])]) / len(right[place]) if right else 0.0))
    else:
        rows = _greedy_answers(model, tokenizer, prompts, right, settings, progress, ends)
    for number, (_, loss) in enumerate(rows, start=1):
        if not math.isfinite(loss):
            raise ProbeError(
                f"the loss of the right answer to prompt {number} is {loss}, no finite number; check it and the adapter"
            )
    return rows


@torch.no_grad()
def _greedy_answers(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    right: Sequence[Sequence[int]] | None,
    settings: GenerationSettings,
    progress: Callable[[int, int], None] | None,
    ends: Iterable[int],
) -> list[tuple[str, float]]:
    inner = without_peft(model)
    lengths, scored = [len(prompt) for prompt in prompts], [len(ids) for ids in right or ()]
    _check_lengths(inner, prompts, [max(settings.max_new_tokens, length) for length in scored or [0] * len(prompts)])
    stops = {text for stop in settings.stop for text in (stop, stop.strip())}
    # Special tokens never stand in a decoded text.
    special = {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special and added.content in stops
    }
    ending = _Ending(tokenizer, settings, {*find_stop_ids(inner, tokenizer), *special, *ends})
    most_rows = 1 if inner.config.model_type in _ONE_BY_ONE else BATCH_SIZE
    most_scored = LABEL_TOKENS * (1 if inner.device.type == "cpu" else _ON_ACCELERATOR)
    batches = list(_batches(lengths, settings.max_new_tokens, most_rows, scored, most_scored, context_of(inner)))
    batches += [[]] * calls_behind(inner, len(batches))
    losses, answers, answered = [0.0] * len(prompts), _Answers(inner, ending), 0
    with (
        _greedy(inner, sorted(ending.stop_ids)),
        contiguous_head_input(inner),
        enough_memory("answering", LESS_MEMORY),
    ):
        shares = read(inner, [[0]]) is not None
        for number, batch in enumerate(batches, start=1):
            rows = [prompts[index] for index in batch] or [[0, 0]]
            # All processes of a split backbone make the same calls, be a cache of use or not.
            cache: Any = read(inner, [row[:-1] or row for row in rows]) if shares else None
            cache = None if min(map(len, rows)) == 1 else cache
            begun = [list[int]() for _ in rows]
            if right is not None:
                of_rows = [right[index] for index in batch] or [[0]]
                goes_on = cache is not None and not is_split(inner)
                if goes_on:
                    cache.activate_past_recording()  # a sliding window keeps what `shift` brings back into it
                scores, said = _score(inner, rows, cache if goes_on else repeated(cache, 1), of_rows)
                for index, score in zip(batch, scores, strict=False):  # no row of a call that only keeps step
                    losses[index] = abs(score) / len(right[index])
                if goes_on:
                    begun = [ending.beginning(*pair) for pair in zip(of_rows, said, strict=True)]
                    shift(cache, [max(map(len, of_rows)) - len(known) for known in begun])
            answers.add(batch or [NO_ROW], rows, begun, cache)
            cache = None  # its rows are those of `answers` now, or none
            answers.go_on(until=WAITING if number < len(batches) else 0)
            if progress is not None and (ended := len(answers.texts.keys() - {NO_ROW})) > answered:
                progress(answered := ended, len(prompts))
    return [(answers.texts[place].strip(), loss) for place, loss in enumerate(losses)]


class _Answers:
    """Answers that are being written, of one batch or several: rows leave as they end, and those of the next batch join them.

    `texts` are those that have ended, by their place among all. Rows are padded on the left, and the cache holds all but the
    last token of each. Without a cache, or with a backbone that is split, a batch is answered alone in one call of `generate`.
    """

    def __init__(self, model: Any, ending: "_Ending") -> None:
        self.texts: dict[int, str] = {}
        self._model, self._ending = model, ending
        self._places: list[int] = []
        self._written: list[int] = []  # tokens of each answer, at the end of its row
        self._ids = self._mask = torch.zeros(0, 0, dtype=torch.long)
        self._cache: Any = None

    def add(
        self, places: Sequence[int], prompts: Sequence[Sequence[int]], begun: Sequence[Sequence[int]], cache: Any
    ) -> None:
        """Add a batch: prompts, the tokens with which their answers begin, and a cache of both."""
        rows = [[*prompt, *known] for prompt, known in zip(prompts, begun, strict=True)]
        width = max(map(len, rows)) if cache is None else cache.get_seq_length() + 1
        tokens = (len(self._places) + len(rows)) * (max(width, self._ids.shape[1]) + self._ending.max_new_tokens)
        if cache is None or tokens > BATCH_TOKENS:
            self.go_on()
        ids, mask = (tensor.to(self._model.device) for tensor in padded(rows, width))
        if self._places:
            ids, mask = stacked(self._ids, ids), stacked(self._mask, mask)
            cache = joined(self._cache, cache)
        self._places, self._written = [*self._places, *places], [*self._written, *map(len, begun)]
        self._ids, self._mask, self._cache = ids, mask, cache
        self._let_go()

    def go_on(self, until: int = 0) -> None:
        """Write until at most so many answers are left."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        alone = self._cache is None or is_split(self._model)
        while len(self._places) > (0 if alone else until):
            most = self._ending.max_new_tokens - max(self._written)
            ids = self._model.generate(
                self._ids,
                attention_mask=self._mask,
                max_new_tokens=most if alone else min(PART, most),
                stopping_criteria=StoppingCriteriaList([self._are_ended]),
                logits_processor=LogitsProcessorList([self._wait_for_text]),
                synced_gpus=is_split(self._model),
                **({} if self._cache is None else {"cache": self._cache}),
            )
            new = ids.shape[1] - self._ids.shape[1]
            self._written = [length + new for length in self._written]
            self._ids, self._mask = ids, torch.nn.functional.pad(self._mask, (0, new), value=1)
            self._let_go()

    def _let_go(self) -> None:
        """Take out the rows that have ended, and padding."""
        found = self._found(self._ids)
        self.texts |= {place: text for place, (text, ended) in zip(self._places, found, strict=True) if ended}
        left = [row for row, (_, ended) in enumerate(found) if not ended]
        self._places, self._written = ([of_rows[row] for row in left] for of_rows in (self._places, self._written))
        self._ids, self._mask = self._ids[left], self._mask[left]
        if not left:
            self._cache = None  # its memory is free for the next batch
        if self._cache is not None:
            # What is padding for all rows goes; else they would get longer with each batch, and than the model's context.
            spare = int(self._mask.any(dim=0).int().argmax())
            self._ids, self._mask = self._ids[:, spare:], self._mask[:, spare:]
            if len(left) < len(found):
                self._cache.batch_select_indices(torch.tensor(left, device=self._ids.device))
            if spare:
                cut(self._cache, spare)

    def _found(self, ids: torch.Tensor) -> list[tuple[str, bool]]:
        """The text of each row of `ids`, which are those of now or longer, and whether it has ended."""
        width = self._ids.shape[1]
        return [
            self._ending.text(row[width - length :]) for row, length in zip(ids.tolist(), self._written, strict=True)
        ]

    def _are_ended(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([ended for _, ended in self._found(ids)], device=ids.device)

    def _wait_for_text(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take the end tokens from the scores [rows, vocabulary] of rows that have no text yet.

        Raises:
            ProbeError: a score is no number.
        """
        if scores.amax(dim=-1).isnan().any():
            raise _no_numbers(self._model)
        waiting = [row for row, (text, _) in enumerate(self._found(ids)) if not text]
        ends = [token for token in sorted(self._ending.stop_ids) if token < scores.shape[-1]]
        scores[torch.tensor(waiting, dtype=torch.long)[:, None], torch.tensor(ends, dtype=torch.long)] = -torch.inf
        return scores


class _Ending:
    """How answers end.

    Example: with the stop text "\\n" the tokens of "\\n Paris\\nQuestion" give "Paris"; "\\n" alone is no answer yet.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: GenerationSettings, stop_ids: set[int]) -> None:
        self.stop_ids, self.max_new_tokens = stop_ids, settings.max_new_tokens
        self._tokenizer, self._stops = tokenizer, settings.stop

    def text(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Return the text of an answer's tokens, and whether it has ended."""
        tokens = list(tokens[: self.max_new_tokens])
        length = next((place for place, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = str(self._tokenizer.decode(tokens[:length], **options)).lstrip()
        cuts = [place for place in map(text.find, self._stops) if place >= 0]
        ended = bool(cuts) or length < len(tokens) or length == self.max_new_tokens
        return text[: min(cuts)] if cuts else text, ended

    def beginning(self, right: Sequence[int], said: Sequence[int]) -> list[int]:
        """Return what a greedy answer begins with, given what the model says after each beginning of the right answer.

        It is the right answer as far as the model says the same, and the first token that differs. No end token stands before
        there is a text.
        """
        same = next(
            (place for place, pair in enumerate(zip(right, said, strict=True)) if pair[0] != pair[1]), len(right)
        )
        for length in range(1, same + 2):
            text, ended = self.text(said[:length])
            if ended:  # as it would have been, token by token
                return list(said[: length - 1 if not text and said[length - 1] in self.stop_ids else length])
        return list(said[: same + 1])


@torch.no_grad()
def label_scores(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Return the log-probability of each label after each prompt: the sum over its tokens, the end token among them.

    It is that of the whole answer, and not divided by its length. The end token makes labels comparable of which one begins
    another: the shorter one gets what the model gives to the end there, the longer one a part of the rest. A prompt is read once
    for all labels where the model's cache allows it. The model may be wrapped by PEFT; it is left as it was.

    Args:
        labels: token ids of each label, the end token last.
        progress: called after each batch with the prompts done so far and their total.

    Returns:
        For each prompt one number <= 0 a label.

    Raises:
        DataError: a prompt is empty, or too long for the model's context with a label after it.
        ProbeError: a score is no number.
    """
    inner = without_peft(model)
    longest, lengths = max(map(len, labels)), [len(prompt) for prompt in prompts]
    _check_lengths(inner, prompts, [longest] * len(prompts))
    scores: list[list[float]] = [[] for _ in prompts]
    answered = 0
    with evaluating(inner), contiguous_head_input(inner), enough_memory("scoring labels", LESS_MEMORY):
        shares = read(inner, [[0]]) is not None
        longer = [index for index, length in enumerate(lengths) if shares and length > 1]
        batches = [
            [longer[place] for place in batch]
            for batch in _batches([lengths[index] for index in longer], longest, BATCH_SIZE)
        ]
        batches += [[index] for index, length in enumerate(lengths) if not shares or length == 1]
        parts = [_label_batches(labels, lengths[batch[0]] + longest, len(batch)) for batch in batches]
        cached = [shares and lengths[batch[0]] > 1 for batch in batches]
        behind = calls_behind(inner, sum(map(len, parts)) + sum(cached))
        for batch, of_labels, once in zip(batches, parts, cached, strict=True):
            rows = [prompts[index] for index in batch]
            cache = read(inner, [row[:-1] for row in rows]) if once else None
            for part in of_labels:
                pairs = [row for row in rows for _ in part]
                found, _ = _score(inner, pairs, repeated(cache, len(part)), [*part] * len(rows))
                for place, index in enumerate(batch):
                    scores[index] += found[place * len(part) : (place + 1) * len(part)]
            if any(math.isnan(score) for index in batch for score in scores[index]):
                raise _no_numbers(inner)
            answered += len(batch)
            if progress is not None:
                progress(answered, len(prompts))
        for _ in range(behind):
            read(inner, [[0]])
    return scores


def context_of(model: Any) -> int | None:
    """Return how many tokens the model can read, where its config says so."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def _check_lengths(model: Any, prompts: Sequence[Sequence[int]], rooms: Sequence[int]) -> None:
    context = context_of(model)
    for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True), start=1):
        if not prompt or (context is not None and len(prompt) + room > context):
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens and up to {room} follow, but the model's context holds "
                f"{context}: give each prompt one token at least, shorten it, or lower max_new_tokens"
            )


def _no_numbers(model: Any) -> ProbeError:
    ways = "check the weights of the adapter and the backbone"
    if model.dtype == torch.float16:
        ways = "float16 may overflow: set backbone.dtype to float32, or let predict answer with --device cpu"
    return ProbeError(f"the model's scores are no numbers; {ways}")


def _batches(
    lengths: Sequence[int],
    new_tokens: int,
    most_rows: int,
    scored: Sequence[int] = (),
    most_scored: int = 0,
    context: int | None = None,
) -> Iterator[list[int]]:
    """Group prompts of similar length, the longest first: what does not fit in memory fails at once.

    Args:
        scored: tokens of the right answer to each, if those are scored, too, and the most of them in a batch.
        context: that the longest prompt and the longest right answer of a batch fit in.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rows = len(batch) + 1
        right = [scored[place] for place in (*batch, index)] if scored else [0]
        full = rows > most_rows or sum(right) > most_scored
        full = full or (context is not None and lengths[(*batch, index)[0]] + max(right) > context)
        if batch and (full or (lengths[batch[0]] + new_tokens) * rows > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@contextmanager
def _greedy(model: Any, stop_ids: list[int]) -> Iterator[None]:
    """Put the model in eval mode, with a greedy generation config in place of its own.

    Passing ours to `generate` would not do: its gaps are filled from the model's own (temperature, penalties).
    """
    from transformers import GenerationConfig

    config_type: Any = GenerationConfig  # its constructor has no type hints
    usual_config = model.generation_config
    model.generation_config = config_type(do_sample=False, use_cache=True, eos_token_id=stop_ids, pad_token_id=0)
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = usual_config


@contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:
    """Hand the language model head a contiguous input.

    Generation slices the last position out of the hidden states of a prompt. On a CPU torch multiplies such a
    slice sequence by sequence and copies the head, 262k rows in Gemma 3, for each one: several times the work of
    the rest of the model.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _label_batches(labels: Sequence[Sequence[int]], width: int, prompts: int) -> list[Sequence[Sequence[int]]]:
    most = min(BATCH_TOKENS // width, LABEL_TOKENS // max(map(len, labels))) // prompts
    rows = max(1, min(BATCH_SIZE, most))
    return [labels[start : start + rows] for start in range(0, len(labels), rows)]


def _score(
    model: Any, prompts: Sequence[Sequence[int]], cache: Any, answers: Sequence[Sequence[int]]
) -> tuple[list[float], list[list[int]]]:
    """The log-probability of each answer after its prompt, and the likeliest token in each of its places.

    A cache holds all but the prompts' last tokens, and is added to.
    """
    rest = [prompt if cache is None else prompt[-1:] for prompt in prompts]
    # The last column is only predicted. Padding stands on the right, where nothing that counts sees it.
    batch = collate_pairs(list(zip(rest, answers, strict=True)), pad_id=0)
    ids, mask, targets = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1], batch["labels"][:, 1:]
    inputs: dict[str, Any] = {"input_ids": ids}
    if cache is not None:
        _, before = padded([prompt[:-1] for prompt in prompts])
        inputs |= positions(model, before.sum(1, keepdim=True) + torch.arange(ids.shape[1]))
        mask = torch.cat([before, mask], dim=1)
    inputs = {name: tensor.to(model.device) for name, tensor in {**inputs, "attention_mask": mask}.items()}
    inputs |= {"use_cache": cache is not None} | ({} if cache is None else {"cache": cache})
    keeps = supports_logits_to_keep(model)
    scores = target_scores(model, inputs, targets.to(model.device), label_positions=keeps)
    losses: list[float] = summed_losses(scores, targets).tolist()
    said = iter(scores.argmax(-1).tolist())
    return [-loss for loss in losses], [list(islice(said, len(ids))) for ids in answers]
