"""BERTScore-F1, by bert-score, with a model of the language; where there is none it says so and never 0."""

import csv
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from grasp_lora.errors import DataError, RecipeError
from grasp_lora.evaluation.outputs import MetricScore, Outputs, score_of_similarities
from grasp_lora.storage.network import not_there
from grasp_lora.storage.reading import expanded, is_folder
from grasp_lora.text.display import first_line
from grasp_lora.text.languages import language_code
from grasp_lora.text.names import needs, without_place


@dataclass(frozen=True)
class BertScoreSettings:
    """Which model BERTScore compares texts with.

    Args:
        models: for each language code, such as `zh`, an encoder: a folder, relative to the recipe's, or a hub id with
            safetensors weights. A language without one has no BERTScore.
        num_layers: the layer whose states are compared, >= 1. None takes the one that bert-score found best for a model of this
            name, and three quarters of the layers, rounded up, for a model it does not know.
        rescale: map the score of unrelated texts to 0; then scores below 0 occur. bert-score has baselines for English and
            Chinese, and none for Arabic.

    Raises:
        ValueError: a language is no code, a model has no name, or `num_layers` is below 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    models: dict[str, str] = field(default_factory=dict)
    num_layers: int | None = None
    rescale: bool = False

    def __post_init__(self) -> None:
        for language, place in self.models.items():
            try:
                code = language_code(language)
            except DataError as error:
                raise ValueError(f"models has the key {language!r}: {error}") from None
            if code != language:
                raise ValueError(f"models has the key {language!r}; use the code {code}")
            if not place.strip():
                raise ValueError(f"models has no model for {language}; give a folder or a hub id, or remove the key")
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}; use a whole number of at least 1")


@dataclass(frozen=True)
class _Encoder:
    """A loaded model, cut off above the layer that counts."""

    model: Any
    tokenizer: Any
    layer: str  # such as 9/12
    baseline: float | None
    device: str

    def compare(self, predictions: list[str], references: list[str]) -> list[float]:
        """F of each pair, a fraction."""
        from bert_score.utils import bert_cos_score_idf

        weights: dict[int, float] = defaultdict(lambda: 1.0)
        weights[self.tokenizer.sep_token_id] = weights[self.tokenizer.cls_token_id] = 0.0
        scores = bert_cos_score_idf(self.model, references, predictions, self.tokenizer, weights, device=self.device)
        values: list[float] = scores[:, 2].tolist()
        return values if self.baseline is None else [(f - self.baseline) / (1.0 - self.baseline) for f in values]


def bertscore(
    outputs: Outputs, settings: BertScoreSettings | None = None, *, base: Path = Path(), offline: bool = False
) -> MetricScore:
    """Score the BERTScore-F1 of each prediction against its best reference, without idf weights.

    A blank text scores 0, where bert-score fails. Texts longer than the model's context are cut off.

    Args:
        outputs: what to score, in a language that has a model.
        settings: the models; None: there are none.
        base: folder that relative folders start from.
        offline: use only models that are on this machine.

    Raises:
        RecipeError: see `lack_of_bertscore`.

    Source: Zhang et al. 2020; bert-score.
    """
    settings = settings or BertScoreSettings()
    code = outputs.language_code
    encoder = _load(code, settings.models[code], settings.num_layers, settings.rescale, base, offline)
    return score_of_similarities(
        "bertscore",
        outputs,
        encoder.compare,
        measure="f",
        model=without_place(settings.models[code]),
        layer=encoder.layer,
        idf="no",
        rescaled="yes" if settings.rescale else "no",
        blank="0",
        bert_score=version("bert-score"),
        transformers=version("transformers"),
    )


def lack_of_bertscore(
    language: str, settings: BertScoreSettings | None = None, *, base: Path = Path(), offline: bool = False
) -> str | None:
    """Say what a language lacks, or load its model, so that what does not fit shows before hours of training.

    Args:
        language: its code, see `language_code`.
        settings, base, offline: see `bertscore`.

    Raises:
        RecipeError: bert-score is not installed, the model is missing or cannot be used, it has fewer layers than
            `num_layers`, or there is no baseline to rescale with.
    """
    if settings is None or language not in settings.models:
        return f"no model for {language}"
    _load(language, settings.models[language], settings.num_layers, settings.rescale, base, offline)
    return None


@lru_cache(maxsize=1)  # a comparison scores dozens of systems with the same model
def _load(language: str, place: str, num_layers: int | None, rescale: bool, base: Path, offline: bool) -> _Encoder:
    needs("BERTScore", "bert_score", "bert-score", extra="eval")
    import torch
    from bert_score.utils import get_model, model2layers
    from transformers import AutoConfig, AutoTokenizer

    folder = _find(place, base, offline)
    try:
        config = AutoConfig.from_pretrained(folder)
        layers = int(config.num_hidden_layers)
        tuned = model2layers.get(place, model2layers.get(Path(place).name))
        layer = num_layers or tuned or -(-3 * layers // 4)
        if layer > layers:
            raise RecipeError(f"bertscore.num_layers is {layer}, but {place} has {layers} layers")
        if "t5" in folder and "t5" not in config.model_type:
            raise RecipeError(f"bert-score takes any path with 't5' in it for a T5 model: rename or move {folder}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = get_model(folder, layer)
    except RecipeError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"BERTScore model {place} cannot be loaded: {first_line(error)}") from error
    # Some tokenizers know no limit, and say so with a number that overflows theirs.
    tokenizer.model_max_length = min(tokenizer.model_max_length, _context(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    baseline = _baseline(language, place, layer) if rescale else None
    return _Encoder(model.float().eval().to(device), tokenizer, f"{layer}/{layers}", baseline, device)


def _context(config: Any) -> int:
    """Longest input in tokens. RoBERTa and its kin count positions from behind the padding's."""
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    return positions - 2 if positions % 64 == 2 else positions


def _find(place: str, base: Path, offline: bool) -> str:
    """Find the folder of a model, from the hub where it is none here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    for folder in (base / place, expanded(place)):
        if is_folder(folder):
            return str(folder)
    try:
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        return str(snapshot_download(place, allow_patterns=patterns, local_files_only=offline))
    except (HFValidationError, OSError) as error:  # network, authorisation and missing repositories are OSErrors
        raise RecipeError(f"BERTScore model {place}: {not_there(error)}") from error


def _baseline(language: str, place: str, layer: int) -> float:
    """Read F of unrelated texts at a layer, as bert-score measured it."""
    folder = Path(str(resources.files("bert_score"))) / "rescale_baseline" / language
    for name in (place, Path(place).name):
        file = folder / f"{name}.tsv"
        if file.is_file():
            rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
            return float(rows[layer]["F"])
    raise RecipeError(
        f"bert-score has no baseline for {place} in {language!r}, so bertscore.rescale is not possible; set it to false"
    )
