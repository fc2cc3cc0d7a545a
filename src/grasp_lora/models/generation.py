"""Answers and losses: token ids of prompts in; greedy texts, likeliest labels and the NLL of given tokens out.

Prompts with a long common beginning, such as the questions on one context, are a group: what they share is read once, and its
row in transformers' cache is repeated for each of them (`Cache.batch_select_indices`). Then the rest of each prompt is read, the
given tokens are scored on a copy of the cache, and `generate` goes on from it. Nothing is ever moved in a cache: padding is
masked and stays. A model whose cache cannot do this reads each row whole.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grasp_lora.errors import DataError, ProbeError
from grasp_lora.models.backbone import calls_behind, find_stop_ids, is_split, supports_logits_to_keep, without_peft
from grasp_lora.models.live import evaluating
from grasp_lora.models.loss import IGNORED, collate_pairs, summed_losses, target_scores
from grasp_lora.models.model_settings import GenerationSettings
from grasp_lora.storage.memory import enough_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Sequence[int]]
Group = tuple[list[int], int]  # places of prompts, and how many tokens they share; 0 for one prompt alone

BATCH_SIZE = 64  # most rows of a batch: a step of few takes nearly as long as one of many
BATCH_TOKENS = 8192  # most tokens that a batch of answers holds, padding and room for the answers included
READ_TOKENS = 2048  # most tokens of a batch that is only scored: on two CPU cores 4096 took 1.1 to 1.2 times as long
SCORED_TOKENS = 512  # most that are scored at once: 512 positions x 262k vocabulary in float32 are 0.5 GB
_ON_ACCELERATOR = 4  # as many times the tokens that are read and scored; not measured, `make gpu` does
PART = 4  # tokens of answers, after which the rows that have ended leave
_SPLIT_ROWS = 16  # of a batch of a split backbone
LESS_MEMORY = (
    "shorten the prompts, lower data.max_tokens or generation.max_new_tokens, or set backbone.dtype to bfloat16 if it is "
    "float32"
)


def answer(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Rows,
    settings: GenerationSettings,
    progress: Callable[[int, int], None] | None = None,
    ends: Iterable[int] = (),
    labels: Mapping[str, Sequence[int]] | None = None,
    right: Rows | None = None,
) -> list[tuple[str, float]]:
    """Answer each prompt, greedily or by the likeliest label; take the loss of its right answer, too, if that is given.

    A greedy answer ends at an EOS token, one of `ends`, a stop text or `max_new_tokens`, not before there is text. Batching does
    not change the answers beyond rounding (in bfloat16, near-ties between two tokens can fall either way); the losses are those
    of `models.loss`, beyond rounding. The model may be wrapped by PEFT; it is left as it was, each module in its mode.

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
        ending = _Ending(tokenizer, settings, {*find_stop_ids(model, tokenizer), *ends})
        losses, texts = _ask(model, prompts, right, progress, ending)
        lengths = [len(tokens) for tokens in right or [[0]] * len(prompts)]
        rows = [(text, loss / length) for text, loss, length in zip(texts, losses.tolist(), lengths, strict=True)]
    for number, (_, loss) in enumerate(rows, start=1):
        if math.isnan(loss):
            raise _no_numbers(model)
        if math.isinf(loss):
            raise ProbeError(
                f"the loss of the right answer to prompt {number} is {loss}, no finite number; check it and the adapter"
            )
    return rows


def label_scores(
    model: torch.nn.Module, prompts: Rows, labels: Rows, progress: Callable[[int, int], None] | None = None
) -> list[list[float]]:
    """Return the log-probability of each label after each prompt: the sum over its tokens, the end token, its last, among them.

    It is not divided by the length. The end token makes labels comparable of which one begins another: the shorter one gets what
    the model gives to the end there, the longer one a part of the rest. Raises as `answer` does.
    """
    asked, following = [prompt for prompt in prompts for _ in labels], [label for _ in prompts for label in labels]
    losses, _ = _ask(model, asked, following, progress, None, len(labels))
    if losses.isnan().any():
        raise _no_numbers(model)
    return (-losses).view(len(prompts), len(labels)).tolist()


def losses_after(
    model: torch.nn.Module, prompts: Rows, right: Rows, watch: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Return the mean NLL of each prompt's right answer in nats, which may be no finite number; [prompts], on the CPU.

    With `watch` each row is read whole, and it is told before each pass which tokens of it count: a mask, [rows, tokens].
    """
    losses, _ = _ask(model, prompts, right, watch=watch)
    return losses / torch.tensor([len(tokens) for tokens in right])


@torch.no_grad()
def _ask(
    model: torch.nn.Module,
    prompts: Rows,
    following: Rows | None,
    progress: Callable[[int, int], None] | None = None,
    ending: "_Ending | None" = None,
    each: int = 1,
    watch: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, list[str]]:
    """The summed NLL of the tokens that follow each prompt, and, with an ending, its greedy answer; `each` rows are a prompt."""
    inner, count, done, told = without_peft(model), len(prompts), 0, 0
    scores, new = following is not None, ending.max_new_tokens if ending else 0
    following = [[]] * count if following is None else following
    lengths = [max(new, len(tokens)) for tokens in following]
    _check_lengths(inner, prompts, lengths, each)
    # The last row is one that nobody asked for: a process of a split backbone may have nothing to answer.
    prompts, following, texts = [*prompts, [0, 0]], [*following, [0] * scores], [""] * (count + 1)
    losses = torch.zeros(count + 1, dtype=torch.promote_types(inner.dtype, torch.float32))
    doing = "answering" if ending or each > 1 else "measuring losses"
    with _prepared(inner, ending), enough_memory(doing, LESS_MEMORY):
        batches = _batches(inner, prompts[:-1], lengths, bool(ending), apart=watch is not None)
        # All processes of a split backbone make the same calls.
        for groups in [*batches, *[[([count], 0)]] * calls_behind(inner, len(batches))]:
            batch = _Batch(inner, prompts, groups, answers=bool(ending), scores=scores)
            if scores:
                losses[batch.places] = batch.losses([following[place] for place in batch.places], bool(ending), watch)
            for place, text in zip(batch.places, batch.answers(ending) if ending else (), strict=False):
                texts[place] = text.strip()
            done = min(count, done + len(batch.places))
            if progress is not None and done // each > told:
                progress(told := done // each, count // each)
    return losses[:count], texts[:count]


class _Batch:
    """Rows that are read together: a cache with their beginnings, or none, its mask [rows, held], and the rest of each row."""

    def __init__(self, model: Any, prompts: Rows, groups: Sequence[Group], *, answers: bool, scores: bool) -> None:
        self.model, self.places = model, [place for group, _ in groups for place in group]
        shared = [shared for group, shared in groups for _ in group]
        self.rest = [list(prompts[place][held:]) for place, held in zip(self.places, shared, strict=True)]
        self.held = torch.zeros(len(self.rest), 0, dtype=torch.long)
        self.said: dict[int, Sequence[int]] = {}  # rows whose given tokens are what the model says itself
        self.cache = None if is_split(model) or not (any(shared) or answers) else _empty_cache(model)
        if self.cache is None:
            return
        if any(shared):
            ids, self.held = padded([prompts[group[0]][:shared] for group, shared in groups])
            self._read(ids, torch.full_like(ids, IGNORED))
            owners = torch.tensor([number for number, (group, _) in enumerate(groups) for _ in group])
            self.cache.batch_select_indices(owners)  # which repeats rows, too
            self.held = self.held[owners]
        if answers and scores and max(map(len, self.rest)) > 1:  # both to score and to answer go on from the last token
            ids, mask = padded([rest[:-1] for rest in self.rest])
            self.held, self.rest = torch.cat([self.held, mask], 1), [rest[-1:] for rest in self.rest]
            self._read(ids, torch.full_like(ids, IGNORED))

    def losses(self, following: Rows, again: bool, watch: Callable[[Tensor], None] | None) -> Tensor:
        """The summed NLL of what follows each row, [rows]; `again`: the cache is needed once more."""
        batch = collate_pairs(list(zip(self.rest, following, strict=True)), pad_id=0)
        # The last token is only predicted. Padding stands on the right, where nothing that counts sees it.
        last = -1 if watch is None else None
        ids, mask = batch["input_ids"][:, :last], batch["attention_mask"][:, :last]
        targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)[:, :last]
        size = max(1, SCORED_TOKENS * _share(self.model) // max(map(len, following)))
        size = len(ids) if is_split(self.model) else size  # all processes make as many calls
        whole, held, found = self.cache, torch.cat([self.held, mask], 1), []
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            if whole is not None and (again or size < len(ids)):
                self.cache = copy.deepcopy(whole)
                self.cache.batch_select_indices(torch.arange(len(ids))[rows])
            if watch is not None:
                watch(held[rows])
            self.held = held[rows]
            scores, wanted = self._read(ids[rows], targets[rows]), targets[rows]
            found.append(summed_losses(scores, wanted).cpu())
            if is_split(self.model):  # whose processes all have to answer, since all call the model equally often
                continue
            others = scores.argmax(-1).cpu() != wanted[wanted != IGNORED]
            differ = (wanted != IGNORED).nonzero()[:, 0][others].tolist()
            self.said |= {start + row: following[start + row] for row in range(len(wanted)) if row not in differ}
        self.cache, self.held = whole, held[:, : held.shape[1] - ids.shape[1]]
        return torch.cat(found)

    def answers(self, ending: "_Ending") -> list[str]:
        """The greedy answers."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        ids, mask = padded(self.rest)
        mask = torch.cat([self.held, mask], 1)
        ids = torch.nn.functional.pad(ids, (self.held.shape[1], 0))  # what the cache holds is not read again
        prompt = ids.shape[1]

        def are_ended(ids: Tensor, _: Any, **more: Any) -> Tensor:
            return torch.tensor([ending.text(row)[1] for row in ids[:, prompt:].tolist()], device=ids.device)

        def wait_for_text(ids: Tensor, scores: Tensor) -> Tensor:
            if scores.amax(dim=-1).isnan().any():
                raise _no_numbers(self.model)
            waiting = [row for row, tokens in enumerate(ids[:, prompt:].tolist()) if not ending.text(tokens)[0]]
            stops = [token for token in sorted(ending.stop_ids) if token < scores.shape[-1]]
            scores[torch.tensor(waiting, dtype=torch.long)[:, None], torch.tensor(stops, dtype=torch.long)] = -torch.inf
            return scores

        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        texts = {row: ending.text(tokens) for row, tokens in self.said.items() if len(tokens) <= ending.max_new_tokens}
        texts = {row: (text, ended) for row, (text, ended) in texts.items() if text and ended}
        left = list(range(len(ids)))
        while True:
            rows = [row for row, place in enumerate(left) if not texts.get(place, ("", False))[1]]
            left, ids, mask = [left[row] for row in rows], ids[rows], mask[rows]
            if not left:
                return [texts[row][0] for row in range(len(self.rest))]
            if self.cache is not None:
                self.cache.batch_select_indices(torch.tensor(rows))
            most = ending.max_new_tokens - ids.shape[1] + prompt
            ids = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=most if self.cache is None else min(PART, most),
                stopping_criteria=StoppingCriteriaList([are_ended]),
                logits_processor=LogitsProcessorList([wait_for_text]),
                synced_gpus=is_split(self.model),
                **({} if self.cache is None else {"cache": self.cache}),
            )
            texts |= {place: ending.text(row) for place, row in zip(left, ids[:, prompt:].tolist(), strict=True)}
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)

    def _read(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Read tokens, the last ones of those that `held` is the mask of; the scores where a target counts."""
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": self.held}
        if self.cache is not None:
            given["position_ids"] = (self.held.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        given = {name: tensor.to(self.model.device) for name, tensor in given.items()}
        given |= {"use_cache": False} if self.cache is None else {"use_cache": True, "cache": self.cache}
        keeps = supports_logits_to_keep(self.model)
        return target_scores(self.model, given, targets.to(self.model.device), label_positions=keeps)


class _Ending:
    """How answers end.

    Example: with the stop text "\\n" the tokens of "\\n Paris\\nQuestion" give "Paris"; "\\n" alone is no answer yet.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: GenerationSettings, stop_ids: set[int]) -> None:
        stops = {text for stop in settings.stop for text in (stop, stop.strip())}
        # Special tokens never stand in a decoded text.
        added = tokenizer.added_tokens_decoder.items()
        self.stop_ids = stop_ids | {token for token, one in added if one.special and one.content in stops}
        self.max_new_tokens, self._tokenizer, self._stops = settings.max_new_tokens, tokenizer, settings.stop

    def text(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Return the text of an answer's tokens, and whether it has ended."""
        length = next((place for place, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = str(self._tokenizer.decode(list(tokens[:length]), **options)).lstrip()
        cuts = [place for place in map(text.find, self._stops) if place >= 0]
        return text[: min(cuts)] if cuts else text, bool(cuts) or length < len(tokens) or length == self.max_new_tokens


def _empty_cache(model: Any) -> Any:
    """A cache whose rows can be repeated and taken out; None where the model has none such."""
    from transformers import cache_utils

    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer, cache_utils.DummyLayer)
    config, takes = model.config.get_text_config(decoder=True), inspect.signature(model.forward).parameters
    if not {"cache", "position_ids"} <= takes.keys() or not model._supports_default_dynamic_cache():
        return None
    # Long RoPE turns all tokens by the length of a call; positions that know a padding do not count from 0.
    positions = (part for name, part in model.named_modules() if name.endswith("position_embeddings"))
    if "longrope" in str(getattr(config, "rope_parameters", "")) or any(
        getattr(part, "padding_idx", None) is not None for part in positions
    ):
        return None
    cache = cache_utils.DynamicCache(config=config)
    return cache if all(type(layer) in plain for layer in cache.layers) else None


def context_of(model: Any) -> int | None:
    """Return how many tokens the model can read, where its config says so."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def _check_lengths(model: Any, prompts: Rows, rooms: Sequence[int], each: int) -> None:
    context = context_of(model)
    for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True), start=each):
        if not prompt or (context is not None and len(prompt) + room > context):
            raise DataError(
                f"prompt {number // each} has {len(prompt)} tokens and up to {room} follow, but the model's context holds "
                f"{context}: give each prompt one token at least, shorten it, or lower max_new_tokens"
            )


def _no_numbers(model: Any) -> ProbeError:
    ways = "check the weights of the adapter and the backbone"
    if model.dtype == torch.float16:
        ways = "float16 may overflow: set backbone.dtype to float32, or let predict answer with --device cpu"
    return ProbeError(f"the model's scores are no numbers; {ways}")


def _share(model: Any) -> int:
    return 1 if model.device.type == "cpu" else _ON_ACCELERATOR


def _groups(prompts: Rows, following: Sequence[int]) -> list[Group]:
    """Group prompts by a common beginning, wherever it saves more tokens than it leaves to be read once more for each."""
    found: list[Group] = []
    for place in sorted(range(len(prompts)), key=lambda place: tuple(prompts[place])):
        prompt, (places, shared) = prompts[place], found[-1] if found else ([], 0)
        if 0 < len(places) < BATCH_SIZE:
            first = prompts[places[0]]
            own = shared or len(first) - 1
            common = min(own, len(prompt) - 1, sum(takewhile(bool, map(eq, first, prompt))))
            fits = (len(places) + 1) * (len(prompt) + following[place]) <= BATCH_TOKENS
            if fits and 2 * common >= len(prompt) and common > len(places) * (own - common):
                found[-1] = ([*places, place], common)
                continue
        found.append(([place], 0))
    return found


def _batches(model: Any, prompts: Rows, following: Sequence[int], answers: bool, *, apart: bool) -> list[list[Group]]:
    """Groups and single rows, packed into batches by like length."""
    alone: list[Group] = [([place], 0) for place in range(len(prompts))]
    cache, split = _empty_cache(model), is_split(model)
    if answers and cache is None:  # padding on the left would change what a state holds
        return [[group] for group in alone]
    tokens, most = BATCH_TOKENS if answers else READ_TOKENS * _share(model), _SPLIT_ROWS if split else BATCH_SIZE
    # How many tokens may stand in a row with gaps among them: a window counts gaps. GPT-Neo's cache does not know its window.
    context = context_of(model) or math.inf
    windows = [
        getattr(model.config, "window_size", None),
        *(one.get_max_length() for one in (cache.layers if cache else ())),
    ]
    room = min([context, *(size for size in windows if answers and isinstance(size, int) and size > 0)])

    def shape(groups: Sequence[Group]) -> tuple[int, int, int]:
        rows = [(len(prompts[place]) - shared, following[place]) for places, shared in groups for place in places]
        rest = sum(map(max, zip(*rows, strict=True))) if answers else max(map(sum, rows))
        return max(shared for _, shared in groups), rest, len(rows)

    def fits(groups: Sequence[Group], room: float) -> bool:
        shared, rest, rows = shape(groups)
        held = shared * (rows if answers else len(groups))  # of contexts a copy for each row, or one in all
        return rows <= most and held + rest * rows <= tokens and shared + rest <= room

    def packed(groups: Iterable[Group], room: float) -> list[list[Group]]:
        batches: list[list[Group]] = [[]]
        # What needs most memory first, so that it fails at once.
        for group in sorted(groups, key=lambda group: shape([group]), reverse=answers):
            if batches[-1] and not fits([*batches[-1], group], room):
                batches.append([])
            batches[-1].append(group)
        return [batch for batch in batches if batch]

    groups = alone if apart or split or cache is None else _groups(prompts, following)
    shared = [group for group in groups if group[1] and sum(shape([group])[:2]) <= room]
    together = {place for places, _ in shared for place in places}
    return packed(shared, room) + packed((group for group in alone if group[0][0] not in together), context)


@contextmanager
def _prepared(model: Any, ending: "_Ending | None") -> Iterator[None]:
    """Put the model in eval mode, with a greedy generation config in place of its own, and hand its head contiguous inputs.

    Passing our config to `generate` would not do: its gaps are filled from the model's own (temperature, penalties). It slices
    the last position out of a prompt; of such a slice torch copies the head, 262k rows in Gemma 3, for each sequence on a CPU.
    """
    from transformers import GenerationConfig

    stop_ids = sorted(ending.stop_ids) if ending else []
    config_type: Any = GenerationConfig  # its constructor has no type hints
    usual, head = model.generation_config, model.get_output_embeddings()
    hooks = (
        [] if head is None else [head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))]
    )
    model.generation_config = config_type(do_sample=False, use_cache=True, eos_token_id=stop_ids, pad_token_id=0)
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = usual
        for hook in hooks:
            hook.remove()


def padded(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens padded on the left, and the mask: 1 where a row stands, 0 for its padding; each [rows, longest]."""
    lengths = torch.tensor([[len(row)] for row in rows])
    width = int(lengths.max())
    mask = (torch.arange(width) >= width - lengths).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return ids, mask
