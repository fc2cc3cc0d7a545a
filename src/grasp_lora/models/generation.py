"""Answers: token ids of prompts in; greedy texts or the likeliest labels out, and the losses of the right answers.

Prompts with a long common beginning, such as the questions on one context, are a group: what they share is read once, into
transformers' cache; its row is repeated for each prompt, and the rest of each with its right answer or label is added on the
right. Nothing is ever moved in a cache: padding, and what the model would not have said, is masked and stays. A greedy answer
begins with what the loss of the right one has told, and `generate` writes on. A model whose cache cannot do this reads each row
whole.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise, takewhile
from operator import eq
from typing import TYPE_CHECKING, Any

import torch

from grasp_lora.errors import DataError, ProbeError
from grasp_lora.models.backbone import calls_behind, find_stop_ids, is_split, supports_logits_to_keep, without_peft
from grasp_lora.models.live import evaluating
from grasp_lora.models.loss import IGNORED, collate_pairs, target_scores
from grasp_lora.models.model_settings import GenerationSettings
from grasp_lora.storage.memory import enough_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Sequence[int]]
Group = tuple[
    list[int], int
]  # places of prompts, and how many tokens they share; of one prompt alone, all but its last

BATCH_SIZE = 64  # most rows of a batch: a step of few takes nearly as long as one of many
BATCH_TOKENS = 8192  # most tokens of a batch, padding and room for the answers included
READ_TOKENS, SCORED_TOKENS = (
    1024,
    512,
)  # of one call on a processor: what outgrows its caches takes longer; scores are large
_ON_ACCELERATOR = 4  # as many times the scored tokens
_SPLIT_ROWS = 16  # of a batch of a split backbone
PART = 4  # tokens of answers, after which the rows that have ended leave
LESS_MEMORY = "shorten the prompts, lower generation.max_new_tokens, or set backbone.dtype to bfloat16 if it is float32"


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
        rows = [
            (text, loss / len(right[place]) if right else 0.0)
            for place, (text, loss) in enumerate(zip(texts, losses, strict=True))
        ]
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
    if any(map(math.isnan, losses)):
        raise _no_numbers(model)
    return [[-loss for loss in losses[at : at + len(labels)]] for at in range(0, len(losses), len(labels))]


def losses_after(model: torch.nn.Module, prompts: Rows, right: Rows) -> list[float]:
    """Return the loss of each prompt's right answer, the mean NLL of its tokens in nats, which may be no finite number."""
    losses, _ = _ask(model, prompts, right, None, None)
    return [loss / len(tokens) for loss, tokens in zip(losses, right, strict=True)]


def share_contexts(model: torch.nn.Module, prompts: Rows) -> bool:
    """Whether `losses_after` reads a quarter of the tokens less than row by row, since prompts share their beginnings."""
    if is_split(model) or _empty_cache(without_peft(model)) is None:
        return False
    twice = sum((len(group) - 1) * shared for group, shared in _groups(prompts, BATCH_SIZE, BATCH_TOKENS))
    return 4 * twice >= sum(map(len, prompts))


@torch.no_grad()
def _ask(
    model: torch.nn.Module,
    prompts: Rows,
    following: Rows | None,
    progress: Callable[[int, int], None] | None,
    ending: "_Ending | None",
    each: int = 1,
) -> tuple[list[float], list[str]]:
    """The summed NLL of the tokens that follow each prompt, and, with an ending, its greedy answer; `each` rows are a prompt."""
    inner, count, done, told = without_peft(model), len(prompts), 0, 0
    most, scores = ending.max_new_tokens if ending else 0, following is not None
    # Without a right answer the first token is predicted in any case. The last row is one that nobody asked for.
    prompts, following = [*prompts, [0, 0]], [*(following or [[0]] * count), [0]]
    losses, texts, lengths = [0.0] * len(prompts), [""] * len(prompts), [len(tokens) for tokens in following]
    _check_lengths(inner, prompts[:-1], [max(most, length) for length in lengths[:-1]], each)
    stop_ids = sorted(ending.stop_ids) if ending else []
    with _prepared(inner, stop_ids), enough_memory("answering", LESS_MEMORY):
        batches = _batches(inner, prompts[:-1], lengths, most, each)
        # All processes of a split backbone make the same calls.
        for groups in [*batches, *[[([count], 1)]] * calls_behind(inner, len(batches))]:
            batch = _Batch(inner, prompts, groups)
            if batch.cache is not None or scores:
                for place, loss in batch.losses(following, most).items():
                    losses[place] = loss if scores else 0.0
            for place, text in (batch.answers(ending) if ending else {}).items():
                texts[place] = text.strip()
            done = min(count, done + len(batch.places))
            if progress is not None and done // each > told:
                progress(told := done // each, count // each)
    return losses[:count], texts[:count]


class _Batch:
    """Rows that are read together, and then written on."""

    def __init__(self, model: Any, prompts: Rows, groups: Sequence[Group]) -> None:
        self.model, self.places = model, [place for group, _ in groups for place in group]
        self.cache: Any = None if is_split(model) else _empty_cache(model)
        held = [0 if self.cache is None else shared for group, shared in groups for _ in group]
        self.rest = [list(prompts[place][shared:]) for place, shared in zip(self.places, held, strict=True)]
        self.heard: list[tuple[Sequence[int], list[int]]] = []  # right answers, and what the model said in their places
        # Of each row the one in the cache that it goes on from, and masks of what the cache holds.
        self.owners = torch.tensor([number for number, (group, _) in enumerate(groups) for _ in group])
        self.before, self.after = (
            torch.zeros(len(groups), 0, dtype=torch.long),
            torch.zeros(len(held), 0, dtype=torch.long),
        )
        if self.cache is not None and any(held):
            ids, self.before = padded([prompts[group[0]][:shared] for group, shared in groups])
            self._read(ids, self.before, torch.full_like(ids, IGNORED))

    def losses(self, following: Rows, new: int = 0) -> dict[int, float]:
        """The summed NLL of what follows each prompt, by its place; `new` tokens of an answer are to be written after this."""
        pairs = [(rest, following[place]) for place, rest in zip(self.places, self.rest, strict=True)]
        batch = collate_pairs(pairs, pad_id=0)
        # The last column is only predicted. Padding stands on the right, where nothing that counts sees it.
        ids, mask, targets = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1], batch["labels"][:, 1:]
        width, read, found = self.before.shape[1] + ids.shape[1], self.cache, list[float]()
        self.before = self.before[self.owners]
        goes_on = read is not None and width + new < _room(self.model, read)
        # Many labels of a prompt are several parts of rows, each with a copy of what has been read.
        size = len(pairs) if new or read is None else max(1, min(BATCH_SIZE, BATCH_TOKENS // width))
        for start in range(0, len(pairs), size):
            part = slice(start, start + size)
            again = start + size < len(pairs) or (new and not goes_on)
            self.cache = copy.deepcopy(read) if again else read
            if (
                read is not None
                and read.get_seq_length()
                and (size < len(pairs) or len(set(self.owners.tolist())) < len(pairs))
            ):
                self.cache.batch_select_indices(self.owners[part])  # which repeats rows, too
            losses, said = self._read(ids[part], torch.cat([self.before, mask], dim=1)[part], targets[part])
            found += losses.sum(1).tolist()
        if new and goes_on:
            self.heard = [(right, row[row >= 0].tolist()) for (_, right), row in zip(pairs, said, strict=True)]
            self.after = mask
        else:
            self.cache = read
        return dict(zip(self.places, found, strict=True))

    def answers(self, ending: "_Ending") -> dict[int, str]:
        """The greedy answers, by their places."""
        begun = [ending.beginning(*pair) for pair in self.heard] or [[] for _ in self.places]
        ids, mask = padded(self.rest)
        if self.cache is not None:  # it holds all but the last token of each row, and more that does not count
            known = [[*rest, *begun] for rest, begun in zip(self.rest, begun, strict=True)]
            counts = torch.arange(self.after.shape[1]) < torch.tensor([[len(row) - 1] for row in known])
            last = torch.tensor([row[-1:] for row in known])
            mask = torch.cat([self.before, self.after * counts, torch.ones_like(last)], dim=1)
            ids = torch.nn.functional.pad(last, (mask.shape[1] - 1, 0))
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        places, prompt, texts = self.places, ids.shape[1], dict[int, str]()
        while True:
            found = ending.texts(begun, ids[:, prompt:])
            texts |= {place: text for place, (text, ended) in zip(places, found, strict=True) if ended}
            left = [row for row, (_, ended) in enumerate(found) if not ended]
            if not left:
                return texts
            if len(left) < len(found):
                places, begun = [places[row] for row in left], [begun[row] for row in left]
                ids, mask = ids[left], mask[left]
                if self.cache is not None:
                    self.cache.batch_select_indices(torch.tensor(left))
            ids = self._written(ids, mask, begun, prompt, ending)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)

    def _written(self, ids: torch.Tensor, mask: torch.Tensor, begun: Rows, prompt: int, ending: "_Ending") -> Any:
        """The rows with some more tokens; without a cache, which is `generate`'s own then, all of them."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        def are_ended(ids: torch.Tensor, _: Any, **more: Any) -> torch.Tensor:
            return torch.tensor([ended for _, ended in ending.texts(begun, ids[:, prompt:])], device=ids.device)

        def wait_for_text(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if scores.amax(dim=-1).isnan().any():
                raise _no_numbers(self.model)
            waiting = [row for row, (text, _) in enumerate(ending.texts(begun, ids[:, prompt:])) if not text]
            stops = [token for token in sorted(ending.stop_ids) if token < scores.shape[-1]]
            scores[torch.tensor(waiting, dtype=torch.long)[:, None], torch.tensor(stops, dtype=torch.long)] = -torch.inf
            return scores

        most = ending.max_new_tokens - max(map(len, begun)) - ids.shape[1] + prompt
        return self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=most if self.cache is None else min(PART, most),
            stopping_criteria=StoppingCriteriaList([are_ended]),
            logits_processor=LogitsProcessorList([wait_for_text]),
            synced_gpus=is_split(self.model),
            **({} if self.cache is None else {"cache": self.cache}),
        )

    def _read(self, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read tokens after those that the cache holds; the NLL of each target, 0 where none counts, and the likeliest tokens.

        Args:
            mask: of those that the cache holds, too.
        """
        model, cache, (rows, columns), held = self.model, self.cache, ids.shape, mask.shape[1] - ids.shape[1]
        places, keeps, counts = (mask.cumsum(1) - 1).clamp_min(0), supports_logits_to_keep(model), targets != IGNORED
        width, on_cpu = columns, model.device.type == "cpu"
        if cache is not None and counts.any():
            width = max(1, SCORED_TOKENS * (1 if on_cpu else _ON_ACCELERATOR) // rows)
        elif cache is not None and on_cpu and columns <= READ_TOKENS:  # parts cost the attention of longer ones more
            width = max(1, READ_TOKENS // rows)
        losses, said = torch.zeros(targets.shape), torch.full_like(targets, -1)
        for start in range(0, columns, width):
            part, seen = slice(start, start + width), slice(held + start, held + start + width)
            inputs = {"input_ids": ids[:, part], "attention_mask": mask[:, : seen.stop]}
            inputs |= {} if cache is None else {"position_ids": places[:, seen]}
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            given = {"use_cache": False} if cache is None else {"use_cache": True, "cache": cache}
            wanted = targets[:, part].to(model.device)
            scores = target_scores(model, inputs | given, wanted, label_positions=keeps)
            aims = wanted[wanted != IGNORED].to(scores.device)
            found = torch.nn.functional.cross_entropy(scores, aims, reduction="none")
            losses[:, part][counts[:, part]] = found.float().cpu()
            said[:, part][counts[:, part]] = scores.argmax(-1).cpu()
        return losses, said


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

    def texts(self, begun: Rows, ids: torch.Tensor) -> list[tuple[str, bool]]:
        """The text of each row, of the tokens that it has begun with and those after them, and whether it has ended."""
        return [self.text([*known, *new]) for known, new in zip(begun, ids.tolist(), strict=True)]

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
        for length in range(1, min(same + 1, len(said)) + 1):
            text, ended = self.text(said[:length])
            if ended:  # as it would have been, token by token
                return list(said[: length - 1 if not text and said[length - 1] in self.stop_ids else length])
        return list(said[: same + 1])


def _empty_cache(model: Any) -> Any:
    """A cache whose rows can be added to, repeated and taken out; None where the model has none such."""
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


def _room(model: Any, cache: Any) -> float:
    """How many tokens a cache may hold with gaps among them: as many as its windows and the context."""
    # GPT-Neo's cache does not know its window.
    rooms = [
        context_of(model),
        getattr(model.config, "window_size", None),
        *(one.get_max_length() for one in cache.layers),
    ]
    return min((room for room in rooms if isinstance(room, int) and room > 0), default=math.inf)


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


def _groups(prompts: Rows, most: int, tokens: float = math.inf) -> list[Group]:
    """Group prompts by a common beginning of at least half of each, so that the fewest tokens are read.

    Of a group there are at most so many rows, and tokens of whole rows.
    """
    order = sorted(range(len(prompts)), key=lambda place: tuple(prompts[place]))
    rows = [prompts[place] for place in order]
    common = [sum(takewhile(bool, map(eq, one, other))) for one, other in pairwise(rows)]
    fewest = [(0, 0, 0)]  # of the first rows: tokens that are read, where the last group begins, and what it shares
    for end in range(1, len(rows) + 1):
        whole = longest = len(rows[end - 1])
        shared, ways = whole - 1, [(fewest[end - 1][0] + whole, end - 1, whole - 1)]
        for start in range(end - 2, max(-1, end - 1 - most), -1):
            shared = min(shared, len(rows[start]) - 1, common[start])
            longest, whole = max(longest, len(rows[start])), whole + len(rows[start])
            if 2 * shared < longest or (end - start) * longest > tokens:
                break
            ways.append((fewest[start][0] + whole - (end - start - 1) * shared, start, shared))
        fewest.append(min(ways))
    found, end = [], len(rows)
    while end:
        _, start, shared = fewest[end]
        found.append((order[start:end], shared))
        end = start
    return found


def _batches(model: Any, prompts: Rows, following: Sequence[int], new: int, each: int) -> list[list[Group]]:
    """Batches of groups, those that share much first: what does not fit in memory fails at once."""
    alone: list[Group] = [([place], len(prompt) - 1) for place, prompt in enumerate(prompts)]
    cache, context = _empty_cache(model), context_of(model) or math.inf
    if cache is None or is_split(model):  # padding would change what a state holds
        rows = _SPLIT_ROWS if cache is not None else 1
        alone.sort(key=lambda group: -group[1])
        return [alone[start : start + rows] for start in range(0, len(alone), rows)]

    def width(groups: Sequence[Group]) -> int:
        longest = max(len(prompts[place]) - shared + following[place] for group, shared in groups for place in group)
        return max(shared for _, shared in groups) + longest

    def packed(groups: Iterable[Group]) -> list[list[Group]]:
        batches: list[list[Group]] = [[]]
        for group in sorted(groups, key=lambda group: (len(group[0]) == 1, -group[1])):
            more, rows = width([*batches[-1], group]), sum(len(places) for places, _ in (*batches[-1], group))
            if batches[-1] and (rows > BATCH_SIZE or (more + new) * rows > BATCH_TOKENS or more > context):
                batches.append([])
            batches[-1].append(group)
        return [batch for batch in batches if batch]

    found, room = [], _room(model, cache)
    for batch in packed(_groups(prompts, BATCH_SIZE, BATCH_TOKENS) if new else _groups(prompts, max(BATCH_SIZE, each))):
        # Where a window or the context leaves no room for gaps, answers begin after the prompts, each read alone.
        gaps = not new or width(batch) + new <= room
        found += [batch] if gaps else packed(alone[place] for group, _ in batch for place in group)
    return found


@contextmanager
def _prepared(model: Any, stop_ids: list[int]) -> Iterator[None]:
    """Put the model in eval mode, with a greedy generation config in place of its own, and hand its head contiguous inputs.

    Passing our config to `generate` would not do: its gaps are filled from the model's own (temperature, penalties). It slices
    the last position out of a prompt; of such a slice torch copies the head, 262k rows in Gemma 3, for each sequence on a CPU.
    """
    from transformers import GenerationConfig

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
