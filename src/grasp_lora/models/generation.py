"""Batched greedy decoding: token ids of prompts in, answers as text out; also out of a pass that measures losses."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from grasp_lora.errors import DataError, ProbeError
from grasp_lora.models.backbone import find_stop_ids, without_peft
from grasp_lora.models.caches import can_cut, can_share_rows, joined
from grasp_lora.models.company import Company
from grasp_lora.models.live import evaluating
from grasp_lora.models.settings import GenerationSettings
from grasp_lora.storage.memory import enough_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ONE_BY_ONE = ("minimax", "recurrent_gemma", "rwkv")  # model types that answer otherwise in a batch
_TOKENS_BETWEEN = 4  # generated before rows that have ended leave the batch


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
        tokenizer: the tokenizer of the model.
        prompts: token ids of each prompt, BOS included where the model wants one.
        settings: lengths, batches and stop texts.
        progress: called after each batch with the prompts answered so far and their total.
        ends: further tokens that end an answer, such as the end of a turn.

    Returns:
        One answer a prompt, in the order of the prompts, stripped of surrounding white space.

    Raises:
        DataError: a prompt is empty, or too long for the model's context with `max_new_tokens` after it.
        ProbeError: a score is no number.
    """
    answering = _Answering(model, tokenizer, prompts, settings, progress, ends)
    for batch in _batches([len(prompt) for prompt in prompts], answering.settings):
        answering.decode([_Row(index, prompts[index]) for index in batch])
    with _greedy_mode(answering.model, 1):
        answering.company.keep()
    return answering.texts


class Reader:
    """Greedy answers out of the forward pass that measures the losses of gold answers.

    Until a gold answer and the likeliest tokens part, that pass has computed what decoding would: the likeliest token after each
    token of the answer. A row that ends by then needs nothing more; the others go on from there, with the keys and values of
    the pass. The answers are those of `generate` up to rounding: where two tokens are equally likely but for the last bits, as
    happens in bfloat16, either may be taken, as with another size of batches. Which one does not depend on the gold answer.

    Args:
        model, tokenizer, prompts, settings, progress, ends: as of `generate`.
        gold: token ids of the gold answer of each prompt, its end included.

    Raises:
        DataError, ProbeError: as of `generate`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence[Sequence[int]],
        gold: Sequence[Sequence[int]],
        settings: GenerationSettings,
        progress: Callable[[int, int], None] | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        self._answering = _Answering(model, tokenizer, prompts, settings, progress, ends)
        self._prompts, self._gold = prompts, gold
        self._waiting: list[_Row] = []
        self.keeps_cache = not self._answering.one_by_one

    def take(self, batch: Sequence[int], likeliest: torch.Tensor, cache: Any) -> None:
        """Take in the pass over some prompts with their gold answers, padded on the right.

        Args:
            batch: places of the prompts.
            likeliest: token id after each token that is followed by one of a gold answer, row by row [tokens of the answers].
            cache: of the pass, or None.
        """
        answering, tokens = self._answering, iter(likeliest.tolist())
        for place, index in enumerate(batch):
            row, gold = _Row(index, self._prompts[index]), self._gold[index]
            best = [next(tokens) for _ in gold]
            for likely, token in zip(best, gold, strict=True):
                if answering.must_wait(row) and likely in answering.stop_ids:
                    break  # decoding takes the likeliest other token, which the pass did not look for
                answering.add(row, likely)
                if row.ended or likely != token:
                    break
            if row.ended:
                answering.end([row])
                continue
            known = len(row.prompt) + len(row.tokens) - 1
            row.cache = [
                (layer.keys[place, :, :known].clone(), layer.values[place, :, :known].clone())
                for layer in (cache.layers if can_cut(cache, known) else ())
            ]
            if self._waiting and not _fits([*self._waiting, row], answering.settings):
                self._decode()
            self._waiting.append(row)

    def answers(self) -> list[str]:
        """Decode what is left; return the answers in the order of the prompts."""
        self._decode()
        return self._answering.texts

    def _decode(self) -> None:
        self._answering.decode(self._waiting)
        self._waiting = []


def no_numbers(model: Any) -> ProbeError:
    """The error to raise where a model's scores are no numbers."""
    ways = "check the weights of the adapter and the backbone"
    if model.dtype == torch.float16:
        ways = "float16 may overflow: set backbone.dtype to float32, or let predict answer with --device cpu"
    return ProbeError(f"the model's scores are no numbers; {ways}")


def less_memory(settings: GenerationSettings) -> str:
    return (
        f"lower generation.batch_size (now {settings.batch_size}) or generation.batch_tokens (now {settings.batch_tokens}), "
        "or set backbone.dtype to bfloat16 if it is float32"
    )


def context_of(model: Any) -> int | None:
    """Return how many tokens the model can read, where its config says so."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def check_lengths(model: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> None:
    context = context_of(model)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError(f"prompt {number} has no tokens: give each prompt at least a BOS token")
        if context is not None and len(prompt) + settings.max_new_tokens > context:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens and up to {settings.max_new_tokens} are generated, but the "
                f"model's context holds {context}: shorten the prompt or lower max_new_tokens"
            )


@dataclass
class _Row:
    """One answer, as far as it goes.

    Args:
        index: its place in the list of prompts.
        prompt: token ids.
        tokens: those of the answer.
        text: of the answer.
        ended: whether it is whole.
        cache: keys and values of all tokens but the last, [heads, tokens, size] of each layer; empty where they are not at hand.
    """

    index: int
    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    cache: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def _batches(lengths: Sequence[int], settings: GenerationSettings) -> Iterator[list[int]]:
    """Group prompts of similar length, the longest first: what does not fit in memory fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and not _fit(lengths[batch[0]], len(batch) + 1, settings):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _fit(longest: int, rows: int, settings: GenerationSettings) -> bool:
    """Whether so many prompts, the longest of so many tokens, make one batch."""
    return rows <= settings.batch_size and (longest + settings.max_new_tokens) * rows <= settings.batch_tokens


def _fits(rows: Sequence[_Row], settings: GenerationSettings) -> bool:
    """Whether these rows make one batch: all or none of them have their keys and values at hand."""
    alike = len({bool(row.cache) for row in rows}) == 1
    return alike and _fit(max(len(row.prompt) for row in rows), len(rows), settings)


class _Answering:
    """What one round of answering shares: the model, how an answer ends, and the answers so far."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        progress: Callable[[int, int], None] | None,
        ends: Iterable[int],
    ) -> None:
        self.model: Any = without_peft(model)
        stops = {text for stop in settings.stop for text in (stop, stop.strip())}
        # They never stand in a decoded text.
        special = {token for token, it in tokenizer.added_tokens_decoder.items() if it.special and it.content in stops}
        self.stop_ids = frozenset({*find_stop_ids(self.model, tokenizer), *special, *ends})
        self.one_by_one = getattr(self.model.config, "model_type", None) in _ONE_BY_ONE
        self.settings = replace(settings, batch_size=1) if self.one_by_one else settings
        self.texts = [""] * len(prompts)
        self._tokenizer, self._progress, self._finished = tokenizer, progress, 0
        check_lengths(self.model, prompts, settings)
        self.company = Company(self.model, lambda token: self.model.generate(token, max_new_tokens=1))

    def must_wait(self, row: _Row) -> bool:
        """Whether the end has to wait for a text."""
        return not (row.ended or row.text.strip() or self.settings.allow_empty)

    def add(self, row: _Row, token: int) -> None:
        """Add the next token of an answer."""
        if token in self.stop_ids:
            row.ended = True
            return
        row.tokens.append(token)
        text = self._tokenizer.decode(row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = str(text) if self.settings.allow_empty else str(text).lstrip()
        ends = [end for end in (text.find(stop) for stop in self.settings.stop) if end >= 0]
        row.text = text[: min(ends)] if ends else text
        row.ended = bool(ends) or len(row.tokens) == self.settings.max_new_tokens

    def end(self, rows: Sequence[_Row]) -> None:
        """Take the texts of rows that have ended."""
        for row in rows:
            self.texts[row.index] = row.text.strip()
        self._finished += len(rows)
        if self._progress is not None and rows:
            self._progress(self._finished, len(self.texts))

    def decode(self, rows: Sequence[_Row]) -> None:
        """Bring a batch of rows to their ends."""
        with (
            _greedy_mode(self.model, self.settings.max_new_tokens),
            contiguous_head_input(self.model),
            enough_memory("answering", less_memory(self.settings)),
        ):
            _decode(self.model, _Batch(self, list(rows)), self.company)
        self.end(rows)


def _decode(model: Any, batch: "_Batch", company: Company) -> None:
    """Generate until every row has ended; the model is in greedy mode.

    Every few tokens the rows that have ended leave the batch, with their part of the cache.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    rows = batch.rows
    width = max((len(row.prompt) + len(row.tokens) for row in rows), default=0)
    ids = torch.zeros((len(rows), width), dtype=torch.long)  # padding is masked: any token will do
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        known = torch.tensor([*row.prompt, *row.tokens], dtype=torch.long)
        ids[place, width - len(known) :] = known
        mask[place, width - len(known) :] = 1
    inputs = {"inputs": ids.to(model.device), "attention_mask": mask.to(model.device)}
    if rows and all(row.cache for row in rows):
        inputs["cache"] = joined(model, rows, width - 1)
    tokens = _TOKENS_BETWEEN
    while batch.rows:
        longest = batch.most_tokens_left()
        company.calls()
        generated = model.generate(
            **inputs,
            max_new_tokens=min(tokens, longest),
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([batch]),
            logits_processor=LogitsProcessorList([batch.hold_off_the_end]),
        )
        staying = batch.drop_ended().to(model.device)
        sequences, mask = generated.sequences[staying], inputs["attention_mask"][staying]
        new = mask.new_ones((len(staying), sequences.shape[1] - mask.shape[1]))
        inputs = {"inputs": sequences, "attention_mask": torch.cat([mask, new], dim=1)}
        if can_share_rows(generated.cache):
            generated.cache.batch_select_indices(staying)
            inputs["cache"] = generated.cache
        else:  # the next call reads the prompts anew, and so it is the last one
            tokens = longest


class _Batch:
    """Stopping criterion that takes in the tokens of each row up to its end: what a batch generates later changes nothing."""

    def __init__(self, answering: _Answering, rows: list[_Row]) -> None:
        self.rows = rows  # those that are still generated, in the order of the batch
        self._answering = answering

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Take in the newest token of each row [rows]; give True for the rows that have ended."""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.ended:
                self._answering.add(row, token)
        return torch.tensor([row.ended for row in self.rows], device=input_ids.device)

    def hold_off_the_end(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take the end tokens from the scores [rows, vocabulary] of rows that have no text yet, unless they may be empty.

        Raises:
            ProbeError: a score is no number.
        """
        acting = [place for place, row in enumerate(self.rows) if not row.ended]
        if scores.amax(dim=-1)[acting].isnan().any():  # without a copy of the rows
            raise no_numbers(self._answering.model)
        if waiting := [place for place, row in enumerate(self.rows) if self._answering.must_wait(row)]:
            ends = [token for token in sorted(self._answering.stop_ids) if token < scores.shape[-1]]
            scores[torch.tensor(waiting)[:, None], torch.tensor(ends, dtype=torch.long)] = -torch.inf
        return scores

    def most_tokens_left(self) -> int:
        """How many tokens the row with the fewest may still take."""
        return self._answering.settings.max_new_tokens - min(len(row.tokens) for row in self.rows)

    def drop_ended(self) -> torch.Tensor:
        """Leave out the rows that have ended, and give the places in the batch of the others."""
        places = [place for place, row in enumerate(self.rows) if not row.ended]
        self.rows = [self.rows[place] for place in places]
        return torch.tensor(places, dtype=torch.long)


@contextmanager
def _greedy_mode(model: Any, max_new_tokens: int) -> Iterator[None]:
    """Put the model in eval mode, with a greedy generation config in place of its own.

    Passing ours to `generate` would not do: its gaps are filled from the model's own (temperature, penalties). It has
    no EOS and no padding: `_Batch` ends a row, and what follows in an ended row is never read.
    """
    from transformers import GenerationConfig

    config_type: Any = GenerationConfig  # its constructor has no type hints
    own_config = model.generation_config
    model.generation_config = config_type(do_sample=False, use_cache=True, max_new_tokens=max_new_tokens)
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = own_config


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
