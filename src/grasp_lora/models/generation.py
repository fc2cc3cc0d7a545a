"""Answers: token ids of prompts in, greedy texts or the likeliest labels out.

Texts come from transformers' `generate`. Added here: how an answer ends (at a stop text, never before there is a text), batches
of similar lengths, and equally many calls in each process where the backbone is split over several.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

from grasp_lora.errors import DataError, ProbeError
from grasp_lora.models.backbone import calls_behind, find_stop_ids, is_split, supports_logits_to_keep, without_peft
from grasp_lora.models.live import evaluating
from grasp_lora.models.model_settings import GenerationSettings
from grasp_lora.storage.memory import enough_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 16  # most rows of a batch
BATCH_TOKENS = 8192  # most tokens, padding and room for the answers included; a longer prompt makes a batch of its own
LABEL_TOKENS = 512  # most tokens of labels in a batch: each has scores of a whole vocabulary
LESS_MEMORY = "shorten the prompts, lower generation.max_new_tokens, or set backbone.dtype to bfloat16 if it is float32"
_ONE_BY_ONE = ("minimax", "recurrent_gemma", "rwkv")  # model types that answer otherwise in a batch
_PADDING = -100


def generate(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    progress: Callable[[int, int], None] | None = None,
    ends: Iterable[int] = (),
) -> list[str]:
    """Answer each prompt greedily.

    An answer ends at an EOS token, one of `ends`, a stop text or `max_new_tokens`; unless it may be empty, not before there
    is text.
    Batching does not change the answers beyond rounding (in bfloat16, near-ties between two tokens can fall either
    way). The model may be wrapped by PEFT; it is left as it was, each module in its train or eval mode.

    Args:
        model: causal language model, on its device.
        tokenizer: of the model.
        prompts: token ids of each prompt, BOS included where the model wants one.
        settings: lengths and stop texts.
        progress: called after each batch with the prompts answered so far and their total.
        ends: further tokens that end an answer, such as the end of a turn.

    Returns:
        One answer a prompt, in the order of the prompts, stripped of surrounding white space.

    Raises:
        DataError: a prompt is empty, or too long for the model's context with `max_new_tokens` after it.
        ProbeError: a score is no number.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    inner = without_peft(model)
    _check_lengths(inner, prompts, settings.max_new_tokens)
    stops = {text for stop in settings.stop for text in (stop, stop.strip())}
    # Special tokens never stand in a decoded text.
    special = {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special and added.content in stops
    }
    ending = _Ending(inner, tokenizer, settings, {*find_stop_ids(inner, tokenizer), *special, *ends})
    most_rows = 1 if inner.config.model_type in _ONE_BY_ONE else BATCH_SIZE
    batches = list(_batches([len(prompt) for prompt in prompts], settings.max_new_tokens, most_rows))
    batches += [[]] * calls_behind(inner, len(batches))
    texts, answered = [""] * len(prompts), 0
    with (
        _greedy(inner, settings.max_new_tokens, sorted(ending.stop_ids)),
        contiguous_head_input(inner),
        enough_memory("answering", LESS_MEMORY),
    ):
        for batch in batches:
            rows = [torch.tensor(prompts[index]) for index in batch] or [torch.zeros(1, dtype=torch.long)]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
            lengths = torch.tensor([[len(row)] for row in rows])
            mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths).long()  # 0 where there is padding
            ending.start = ids.shape[1]
            generated = inner.generate(
                ids.to(inner.device),
                attention_mask=mask.to(inner.device),
                stopping_criteria=StoppingCriteriaList([ending.is_reached]),
                logits_processor=LogitsProcessorList([ending.wait_for_text]),
                synced_gpus=is_split(inner),
            )
            if not batch:
                continue
            for index, (text, _) in zip(batch, ending.texts(generated), strict=True):
                texts[index] = text.strip()
            answered += len(batch)
            if progress is not None:
                progress(answered, len(prompts))
    return texts


class _Ending:
    """How answers end, as `generate` of transformers asks for it.

    Example: with the stop text "\\n" the tokens of "\\n Paris\\nQuestion" give "Paris"; "\\n" alone is no answer yet.

    `start` is the width of the prompts of the batch.
    """

    def __init__(
        self, model: Any, tokenizer: "PreTrainedTokenizerBase", settings: GenerationSettings, stop_ids: set[int]
    ) -> None:
        self.stop_ids, self.start = stop_ids, 0
        self._model, self._tokenizer, self._settings = model, tokenizer, settings

    def texts(self, ids: torch.Tensor) -> list[tuple[str, bool]]:
        """Return the text of each row of prompts and answers [rows, tokens], and whether a stop text cut it."""
        answers = []
        for row in ids[:, self.start :].tolist():
            length = next((place for place, token in enumerate(row) if token in self.stop_ids), len(row))
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            text = str(self._tokenizer.decode(row[:length], **options))
            text = text if self._settings.allow_empty else text.lstrip()
            cuts = [place for place in map(text.find, self._settings.stop) if place >= 0]
            answers.append((text[: min(cuts)] if cuts else text, bool(cuts)))
        return answers

    def is_reached(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Tell of each row whether a stop text has ended it; end tokens are seen by transformers."""
        return torch.tensor([cut for _, cut in self.texts(ids)], device=ids.device)

    def wait_for_text(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take the end tokens from the scores [rows, vocabulary] of rows that have no text yet, unless they may be empty.

        Raises:
            ProbeError: a score is no number.
        """
        if scores.amax(dim=-1).isnan().any():
            raise _no_numbers(self._model)
        if not self._settings.allow_empty:
            waiting = [row for row, (text, _) in enumerate(self.texts(ids)) if not text]
            ends = [token for token in sorted(self.stop_ids) if token < scores.shape[-1]]
            scores[torch.tensor(waiting, dtype=torch.long)[:, None], torch.tensor(ends, dtype=torch.long)] = -torch.inf
        return scores


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
        model: causal language model, on its device.
        prompts: token ids of each prompt.
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
    _check_lengths(inner, prompts, longest)
    scores: list[list[float]] = [[] for _ in prompts]
    answered = 0
    with evaluating(inner), contiguous_head_input(inner), enough_memory("scoring labels", LESS_MEMORY):
        shares = _read(inner, [[0]]) is not None
        read = [index for index, length in enumerate(lengths) if shares and length > 1]
        batches = [
            [read[place] for place in batch]
            for batch in _batches([lengths[index] for index in read], longest, BATCH_SIZE)
        ]
        batches += [[index] for index, length in enumerate(lengths) if not shares or length == 1]
        parts = [_label_batches(labels, lengths[batch[0]] + longest, len(batch)) for batch in batches]
        cached = [shares and lengths[batch[0]] > 1 for batch in batches]
        behind = calls_behind(inner, sum(map(len, parts)) + sum(cached))
        for batch, of_labels, once in zip(batches, parts, cached, strict=True):
            rows = [prompts[index] for index in batch]
            cache = _read(inner, [row[:-1] for row in rows]) if once else None
            for part in of_labels:
                for index, found in zip(batch, _score(inner, rows, cache, part), strict=True):
                    scores[index] += found
            if any(math.isnan(score) for index in batch for score in scores[index]):
                raise _no_numbers(inner)
            answered += len(batch)
            if progress is not None:
                progress(answered, len(prompts))
        for _ in range(behind):
            _read(inner, [[0]])
    return scores


def likeliest_labels(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    labels: Mapping[str, Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Return the likeliest label after each prompt, the first of equal ones.

    Args:
        labels: label -> token ids.
        model, prompts, progress: as of `label_scores`.

    Raises:
        DataError, ProbeError: as of `label_scores`.
    """
    scores = label_scores(model, prompts, list(labels.values()), progress)
    return [max(zip(of_prompt, labels, strict=True), key=itemgetter(0))[1] for of_prompt in scores]


def context_of(model: Any) -> int | None:
    """Return how many tokens the model can read, where its config says so."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def _check_lengths(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    context = context_of(model)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt or (context is not None and len(prompt) + new_tokens > context):
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens and up to {new_tokens} are generated, but the model's context holds "
                f"{context}: give each prompt one token at least, shorten it, or lower max_new_tokens"
            )


def _no_numbers(model: Any) -> ProbeError:
    ways = "check the weights of the adapter and the backbone"
    if model.dtype == torch.float16:
        ways = "float16 may overflow: set backbone.dtype to float32, or let predict answer with --device cpu"
    return ProbeError(f"the model's scores are no numbers; {ways}")


def _batches(lengths: Sequence[int], new_tokens: int, most_rows: int) -> Iterator[list[int]]:
    """Group prompts of similar length, the longest first: what does not fit in memory fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rows = len(batch) + 1
        if batch and (rows > most_rows or (lengths[batch[0]] + new_tokens) * rows > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@contextmanager
def _greedy(model: Any, max_new_tokens: int, stop_ids: list[int]) -> Iterator[None]:
    """Put the model in eval mode, with a greedy generation config in place of its own.

    Passing ours to `generate` would not do: its gaps are filled from the model's own (temperature, penalties).
    """
    from transformers import GenerationConfig

    config_type: Any = GenerationConfig  # its constructor has no type hints
    usual_config = model.generation_config
    model.generation_config = config_type(
        do_sample=False, use_cache=True, max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=0
    )
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


def _read(model: Any, prompts: Sequence[Sequence[int]]) -> Any:
    """The cache of a model that has read these prompts, padded on the left; None where it cannot serve several rows."""
    from transformers import cache_utils

    mask = _mask_of(prompts)
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for prompt in prompts for token in prompt])
    inputs = {"input_ids": ids, "attention_mask": mask, **_positions(model, (mask.cumsum(1) - 1).clamp_min(0))}
    if supports_logits_to_keep(model):
        inputs["logits_to_keep"] = torch.zeros_like(ids, dtype=torch.bool)
    called = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=True)
    cache = getattr(called, "cache", None)
    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer, cache_utils.DummyLayer)
    # A layer with a state of its own, or a model's own kind of cache (MiniMax), has no rows to repeat.
    if type(cache) is not cache_utils.DynamicCache or not all(type(layer) in plain for layer in cache.layers):
        return None
    # A model that keeps nothing, as OpenAI's first GPT, leaves the one it was given empty.
    return cache if any(getattr(layer, "keys", None) is not None for layer in cache.layers) else None


def _mask_of(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """1 where a prompt stands, 0 for the padding on its left."""
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])
    width = int(lengths.max())
    return (torch.arange(width) >= width - lengths).long()


def _positions(model: Any, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that says at which positions tokens stand; a model without it reads that off the mask."""
    return {"position_ids": places} if "position_ids" in inspect.signature(model.forward).parameters else {}


def _score(
    model: Any, prompts: Sequence[Sequence[int]], cache: Any, labels: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Score some labels after each prompt; a cache holds all but the last tokens, without one there is a single prompt."""
    width, own = max(map(len, labels)), len(prompts[0]) if cache is None else 1  # tokens of a prompt that are read here
    pairs = [(prompt, label) for prompt in prompts for label in labels]
    # The last token of each row is only predicted. Padding stands behind it, where nothing that counts sees it.
    ids = torch.zeros((len(pairs), own + width - 1), dtype=torch.long)
    mask = torch.zeros_like(ids)
    targets = torch.full((len(pairs), width), _PADDING)
    for row, (prompt, label) in enumerate(pairs):
        tokens = [*prompt[-own:], *label[:-1]]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        targets[row, : len(label)] = torch.tensor(label)
    inputs: dict[str, Any] = {"input_ids": ids}
    if cache is not None:
        before = _mask_of([prompt[:-1] for prompt in prompts]).repeat_interleave(len(labels), 0)
        inputs |= _positions(model, before.sum(1, keepdim=True) + torch.arange(ids.shape[1]))
        mask = torch.cat([before, mask], dim=1)
    inputs["attention_mask"] = mask
    if supports_logits_to_keep(model):
        # A mask, not a number: in bfloat16 a processor copies the whole output layer for a slice of several rows.
        kept = torch.zeros_like(ids, dtype=torch.bool)
        kept[:, -width:] = True
        inputs["logits_to_keep"] = kept
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()} | {"use_cache": cache is not None}
    if cache is not None:
        repeated = copy.deepcopy(cache)  # a call adds to it
        repeated.batch_repeat_interleave(len(labels))
        inputs["cache"] = repeated
    logits = model(**inputs).logits
    logits = logits.view(len(pairs), -1, logits.shape[-1])[:, -width:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(
        logits, targets.to(logits.device), reduction="none", ignore_index=_PADDING
    )
    scores: list[list[float]] = (-losses.sum(dim=1)).view(len(prompts), len(labels)).tolist()
    return scores
