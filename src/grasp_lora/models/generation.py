"""Batched greedy decoding: token ids of prompts in, answers as text out."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from grasp_lora.errors import DataError
from grasp_lora.models.backbone import find_stop_ids, without_peft
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
    """
    inner = without_peft(model)
    stop_ids = {*find_stop_ids(inner, tokenizer), *ends}
    check_lengths(inner, prompts, settings)
    if getattr(inner.config, "model_type", None) in _ONE_BY_ONE:
        settings = replace(settings, batch_size=1)
    answers = [""] * len(prompts)
    finished = 0
    with (
        _greedy_mode(inner, settings.max_new_tokens),
        contiguous_head_input(inner),
        enough_memory("answering", less_memory(settings)),
    ):
        for batch in _batches([len(prompt) for prompt in prompts], settings):
            rows = _Answers(tokenizer, len(batch), stop_ids, settings)
            _decode(inner, [prompts[index] for index in batch], rows, settings.max_new_tokens)
            for index, text in zip(batch, rows.texts, strict=True):
                answers[index] = text.strip()
            finished += len(batch)
            if progress is not None:
                progress(finished, len(prompts))
    return answers


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
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"Prompt {index} has no tokens: give each prompt at least a BOS token")
        if context is not None and len(prompt) + settings.max_new_tokens > context:
            raise DataError(
                f"Prompt {index} has {len(prompt)} tokens and up to {settings.max_new_tokens} are generated, but the "
                f"model's context holds {context}: shorten the prompt or lower max_new_tokens"
            )


def _batches(lengths: Sequence[int], settings: GenerationSettings) -> Iterator[list[int]]:
    """Group prompts of similar length, the longest first: what does not fit in memory fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch:
            tokens = (lengths[batch[0]] + settings.max_new_tokens) * (len(batch) + 1)
            if len(batch) == settings.batch_size or tokens > settings.batch_tokens:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def _decode(model: Any, prompts: Sequence[Sequence[int]], answers: "_Answers", longest: int) -> None:
    """Generate until every row of `answers` has ended or has `longest` tokens; the model is in greedy mode.

    Every few tokens the rows that have ended leave the batch, with their part of the cache.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.long)  # padding is masked: any token will do
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    answers.prompt_width = width
    inputs = {"inputs": ids.to(model.device), "attention_mask": mask.to(model.device)}
    tokens = _TOKENS_BETWEEN
    while answers.rows and longest > 0:
        tokens = min(tokens, longest)
        longest -= tokens
        generated = model.generate(
            **inputs,
            max_new_tokens=tokens,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([answers]),
            logits_processor=LogitsProcessorList([answers.hold_off_the_end]),
        )
        staying = answers.drop_ended().to(model.device)
        sequences, mask = generated.sequences[staying], inputs["attention_mask"][staying]
        new = mask.new_ones((len(staying), sequences.shape[1] - mask.shape[1]))
        inputs = {"inputs": sequences, "attention_mask": torch.cat([mask, new], dim=1)}
        if can_share_rows(generated.cache):
            generated.cache.batch_select_indices(staying)
            inputs["cache"] = generated.cache
        else:  # the next call reads the prompts anew, and so it is the last one
            tokens = longest


def can_share_rows(cache: Any) -> bool:
    """Whether a model's cache has rows to take out or to repeat: that of a layer with a state of its own keeps them all."""
    from transformers import cache_utils

    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer, cache_utils.DummyLayer)
    # A model's own kind of cache, MiniMax's for one, holds more than its layers.
    return type(cache) is cache_utils.DynamicCache and all(type(layer) in plain for layer in cache.layers)


class _Answers:
    """Stopping criterion that keeps the text of each row up to its end: what a batch generates later changes nothing."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", rows: int, stop_ids: Collection[int], settings: GenerationSettings
    ) -> None:
        self.texts = [""] * rows
        self.rows = list(range(rows))  # those that are still generated, in the order of the batch
        self.prompt_width = 0  # tokens of the padded prompts, before the answers
        self._ended: set[int] = set()
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._settings = settings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Take in the newest token of each row [rows]; give True for the rows that have ended."""
        for row, tokens in zip(self.rows, input_ids[:, self.prompt_width :].tolist(), strict=True):
            if row in self._ended:
                continue
            if tokens[-1] in self._stop_ids:
                self._ended.add(row)
                continue
            text = str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            if not self._settings.allow_empty:
                text = text.lstrip()
            ends = [end for end in (text.find(stop) for stop in self._settings.stop) if end >= 0]
            if ends:
                self._ended.add(row)
            self.texts[row] = text[: min(ends)] if ends else text
        return torch.tensor([row in self._ended for row in self.rows], device=input_ids.device)

    def hold_off_the_end(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take the end tokens from the scores [rows, vocabulary] of rows that have no text yet, unless they may be empty."""
        blank = [place for place, row in enumerate(self.rows) if row not in self._ended and not self.texts[row].strip()]
        if blank and not self._settings.allow_empty:
            ends = [token for token in sorted(self._stop_ids) if token < scores.shape[-1]]
            scores[torch.tensor(blank)[:, None], torch.tensor(ends, dtype=torch.long)] = -torch.inf
        return scores

    def drop_ended(self) -> torch.Tensor:
        """Leave out the rows that have ended, and give the places in the batch of the others."""
        places = [place for place, row in enumerate(self.rows) if row not in self._ended]
        self.rows = [self.rows[place] for place in places]
        return torch.tensor(places, dtype=torch.long)


@contextmanager
def _greedy_mode(model: Any, max_new_tokens: int) -> Iterator[None]:
    """Put the model in eval mode, with a greedy generation config in place of its own.

    Passing ours to `generate` would not do: its gaps are filled from the model's own (temperature, penalties). It has
    no EOS and no padding: `_Answers` ends a row, and what follows in an ended row is never read.
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
