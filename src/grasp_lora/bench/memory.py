"""What each stage of a run needs of memory, and which setting fits which card. All of it are estimates.

What the backward pass keeps is counted in a forward pass on the device `meta`, where tensors have shapes and no numbers.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from grasp_lora.data.encode import Example
from grasp_lora.data.splits import Splits
from grasp_lora.models.adapters import fresh_adapter
from grasp_lora.models.backbone import supports_logits_to_keep
from grasp_lora.models.checked_config import fact_of
from grasp_lora.models.settings import LoraSettings
from grasp_lora.recipes.recipe import Recipe

CARDS = (8, 16, 24, 40, 80)  # GB
GIGABYTE = 1e9
PROCESS = 1.0 * GIGABYTE  # Python, torch, what CUDA keeps for itself
ADAPTER_BYTES = 21  # of each weight: itself, gradient, two moments of AdamW, stash, mask
LOGIT_BYTES = 12  # of each logit in float32: itself, its gradient, the softmax
QUANTISED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # bytes of a weight; nf4 has a float32 scale for 64 of them
# Bytes of a token, layer and unit of width where a model cannot be counted.
KEPT_BY_WIDTH = {4: 75, 2: 48}


@dataclass(frozen=True)
class Stage:
    """One training, or the answers.

    Args:
        name: as in a run.
        tokens: in one forward pass.
        labels: of them, those with logits.
        rank: of the adapter; of copies that train side by side all ranks together.
        checkpointing: whether activations are computed again; None where that cannot be.
        learns: whether there is a backward pass; else keys and values of all tokens are kept.
    """

    name: str
    tokens: int
    labels: int
    rank: int
    checkpointing: bool | None = False
    learns: bool = True


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs."""

    weights: float
    activations: float
    logits: float
    adapter: float

    @property
    def total(self) -> float:
        """All of it, with the process itself."""
        return self.weights + self.activations + self.logits + self.adapter + PROCESS


@dataclass
class Shape:
    """The sizes of a backbone that memory depends on.

    Args:
        linear: weights that a quantiser takes.
        others: all other weights.
        largest: weights of the largest linear layer, which is unpacked to be computed with.
        layers, width, vocabulary: as the config has them.
        cached: numbers of keys and values of one token.
        adapter: weights of an adapter of rank 1.
        kept: bytes of a number -> bytes that the backward pass keeps of one token.
        inputs: bytes of a number -> bytes of what goes into the linear layers, of one token, and is not kept otherwise.
    """

    linear: int
    others: int
    largest: int
    layers: int
    width: int
    vocabulary: int
    cached: int
    adapter: int = 0
    kept: dict[int, float] = field(default_factory=dict)
    inputs: dict[int, float] = field(default_factory=dict)

    def weights(self, number: int, quantise: str | None) -> float:
        """Bytes of the weights in numbers of so many bytes, the linear layers quantised or not."""
        each = number if quantise is None else QUANTISED[quantise.removesuffix("_torchao")]
        return self.linear * each + self.others * number

    def need(self, stage: Stage, number: int, quantise: str | None = None, weights: float | None = None) -> Need:
        """What a stage needs.

        Args:
            stage: which.
            number: bytes of a number that is computed with: 2 or 4.
            quantise: how the linear layers are stored.
            weights: bytes of all weights where they are known.
        """
        if not stage.learns:
            activations = float(stage.tokens * self.cached * number)
        else:
            kept = self.kept[number] + (self.inputs[number] if quantise == "int8" else 0.0)
            activations = stage.tokens * kept
            if stage.checkpointing:
                activations = stage.tokens * self.layers * self.width * number + activations / self.layers
        if quantise is not None:
            activations += self.largest * number
        stored = self.weights(number, quantise) if weights is None else weights
        logits = stage.labels * self.vocabulary * (number + LOGIT_BYTES)
        return Need(stored, activations, logits, self.adapter * stage.rank * ADAPTER_BYTES if stage.learns else 0.0)


def sizes_of(skeleton: Any) -> Shape:
    """Take the sizes of a backbone that has no weights yet, see `models.backbone.skeleton`."""
    config, head = skeleton.config.get_text_config(decoder=True), skeleton.get_output_embeddings()
    linear = [
        module.weight.numel()
        for module in skeleton.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    return Shape(
        linear=sum(linear),
        others=sum(parameter.numel() for parameter in skeleton.parameters()) - sum(linear),
        largest=max(linear, default=0),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        cached=_cached(config),
    )


def _cached(config: Any) -> int:
    """Numbers of keys and values of one token, the layers added up, which may differ; 0 for a model without attention."""
    names, layers = ("num_attention_heads", "num_key_value_heads", "head_dim"), config.num_hidden_layers
    facts = [found if isinstance(found := fact_of(config, name), list) else [found] * layers for name in names]
    of_layers = (
        (of_keys or heads) * (size or config.hidden_size // heads)
        for heads, of_keys, size in zip(*facts, strict=True)
        if heads
    )
    return 2 * int(sum(of_layers))


def shape_of(skeleton: Any, lora: LoraSettings, tokens: int) -> Shape:
    """Take the sizes, and count what a backward pass keeps.

    Args:
        skeleton: as of `sizes_of`.
        lora: whose target modules have adapters.
        tokens: of the longest example; what is kept is counted with so many.
    """
    shape = sizes_of(skeleton)
    for number, dtype in ((4, torch.float32), (2, torch.bfloat16)):
        model = copy.deepcopy(skeleton).to(dtype)
        with fresh_adapter(model, replace(lora, rank=1), 0) as adapted:
            shape.adapter = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
            try:
                kept, inputs = _counted(adapted.train(), tokens)
            except (RuntimeError, TypeError, ValueError, AttributeError):  # such as experts, chosen by numbers
                kept, inputs = float(KEPT_BY_WIDTH[number] * shape.layers * shape.width), 0.0
        shape.kept[number], shape.inputs[number] = kept, inputs
    return shape


def stages_of(recipe: Recipe, splits: Splits, ranks: Sequence[int]) -> list[Stage]:
    """The stages of a run that train or answer, each with its longest batch.

    Args:
        recipe, splits: of the run.
        ranks: of the adapters that are merged.
    """
    merged, copies = recipe.merge.result_rank(ranks), recipe.controller.policy.copies
    trained = (
        ("source", splits.source_train, recipe.source.training, recipe.lora.rank, 1, not recipe.source.adapters),
        ("target", splits.train, recipe.target.training, recipe.lora.rank, 1, not recipe.target.adapter),
        ("controller", splits.train, recipe.controller.training, merged, copies, recipe.final.prune_ratio is None),
        ("final", splits.train, recipe.final.training, merged, 1, True),
    )
    stages = [
        Stage(
            name,
            copies * training.batch_size * max(map(_length, examples)),
            copies * training.batch_size * max(len(one.completion_ids) for one in examples),
            copies * rank,
            training.gradient_checkpointing if copies == 1 else None,
        )
        for name, examples, training, rank, copies, there in trained
        if there and examples
    ]
    if splits.test and not splits.labels:
        new, most = recipe.generation.max_new_tokens, recipe.generation.batch_size
        longest = max(len(one.prompt_ids) for one in splits.test) + new
        rows = min(len(splits.test), most, max(1, recipe.generation.batch_tokens // longest))
        stages.append(Stage("answers", rows * longest, rows, merged, learns=False))
    return stages


def smallest_card(needed: float) -> int | None:
    """The smallest card that holds so many bytes, in GB; None where none does."""
    return next((card for card in CARDS if needed <= card * GIGABYTE), None)


def by_setting(shape: Shape, stages: Sequence[Stage]) -> dict[str, float]:
    """Bytes of the stage that needs most, for each setting that a card can have."""
    needs: dict[str, float] = {}
    settings: Mapping[str, tuple[int, str | None]] = {
        "float32": (4, None), "bfloat16": (2, None), "int8": (2, "int8"), "nf4": (2, "nf4")
    }  # fmt: skip
    for name, (number, quantise) in settings.items():
        for words, one_by_one in (("", stages), (" with gradient_checkpointing", _checkpointed(stages))):
            needs[name + words] = max(shape.need(stage, number, quantise).total for stage in one_by_one)
    return needs


def _checkpointed(stages: Sequence[Stage]) -> list[Stage]:
    return [stage if stage.checkpointing is None else replace(stage, checkpointing=True) for stage in stages]


def _length(example: Example) -> int:
    return len(example.prompt_ids) + len(example.completion_ids)


def _counted(model: Any, tokens: int) -> tuple[float, float]:
    """Bytes of one token that the backward pass keeps, and bytes of other inputs of frozen linear layers."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}
    inputs: dict[int, int] = {}
    # The other kinds do not keep every token's attention to every other.
    whole = model.config._attn_implementation == "eager"

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        attention = tensor.dim() > 2 and tensor.shape[-1] == tensor.shape[-2] == tokens
        if storage._cdata not in own and (whole or not attention):
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def note(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        storage = arguments[0].untyped_storage()
        inputs[storage._cdata] = storage.nbytes()
        alive.append(arguments[0])

    alive: list[torch.Tensor] = []  # so that no address is used twice
    hooks = [
        module.register_forward_pre_hook(note)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and module is not model.get_output_embeddings()
    ]
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="meta")  # four dimensions: nothing looks into it
    positions = {"logits_to_keep": 1} if supports_logits_to_keep(model) else {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
            output.logits.float().logsumexp(-1).sum()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(kept.values()) / tokens, sum(size for key, size in inputs.items() if key not in kept) / tokens
