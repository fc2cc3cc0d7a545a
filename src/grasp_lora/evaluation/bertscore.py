"""BERTScore, which needs the extra `eval`.

What a language lacks for it, such as "no model for sw", is said in the tables, and never a 0.
"""

import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.short_answers import MetricScore, Outputs, sign
from grasp_lora.storage.reading import expanded, is_folder, reading
from grasp_lora.text.languages import language_code
from grasp_lora.text.names import needs, without_place

_DECIMALS = 4  # of a percentage: what float32 leaves over batches of different shapes


@dataclass(frozen=True)
class BertScoreSettings:
    """Which model BERTScore compares texts with.

    Args:
        models: for each language code, such as `zh`, an encoder: a folder, relative to the recipe's, or a hub id with
            safetensors weights. A language without one has no BERTScore. The layer whose states are compared is the one that
            bert-score found best for a model of this name, else three quarters of the layers, rounded up.
    """

    models: dict[str, str] = field(default_factory=dict)

    @property
    def by_code(self) -> dict[str, str]:
        """The models by `language_code`, since `zho` names the language of `zh`; a code that stands there itself comes first."""
        return {language_code(language): place for language, place in self.models.items()} | self.models


@dataclass(frozen=True)
class _Encoder:
    """A loaded model, cut off above the layer that counts."""

    model: Any
    tokenizer: Any
    layer: str  # such as 9/12
    device: str

    def compare(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """F of each pair of a prediction and a reference, a fraction."""
        from bert_score.utils import bert_cos_score_idf

        weights: dict[int, float] = defaultdict(lambda: 1.0)
        weights[self.tokenizer.sep_token_id] = weights[self.tokenizer.cls_token_id] = 0.0
        predictions, references = map(list, zip(*pairs, strict=True))
        scores = bert_cos_score_idf(self.model, references, predictions, self.tokenizer, weights, device=self.device)
        return dict(zip(pairs, scores[:, 2].tolist(), strict=True))


def bertscore(outputs: Outputs, settings: BertScoreSettings | None = None, *, base: Path = Path()) -> MetricScore:
    """Score the BERTScore-F1 of each prediction against its best reference, without idf weights.

    A blank text scores 0, where bert-score fails. Texts longer than the model's context are cut off. The language has a model;
    the folder of one may be relative to `base`.

    Source: Zhang et al. 2020; bert-score.
    """
    place = (settings or BertScoreSettings()).by_code[outputs.language_code]
    encoder = _load(place, base)
    answers = list(zip(outputs.predictions, outputs.references, strict=True))
    pairs = [(text, good) for text, texts in answers for good in texts if not _is_blank(text) and not _is_blank(good)]
    values = encoder.compare(pairs) if pairs else {}
    best = [max(values.get((text, good), 0.0) for good in texts) for text, texts in answers]
    per_example = tuple(round(min(100.0, 100.0 * value), _DECIMALS) for value in best)
    signature = sign(
        nrefs=outputs.reference_count,
        refs="best",
        measure="f",
        model=without_place(place),
        layer=encoder.layer,
        idf="no",
        rescaled="no",
        blank="0",
        bert_score=version("bert-score"),
        transformers=version("transformers"),
    )
    return MetricScore("bertscore", sum(per_example) / len(per_example), signature, per_example)


def _is_blank(text: str) -> bool:
    return all(unicodedata.category(character)[0] in "CZ" for character in text)


def lack_of_bertscore(language: str, settings: BertScoreSettings | None = None, *, base: Path = Path()) -> str | None:
    """Say what a `language_code` lacks, or load its model, so that what does not fit shows before hours of training."""
    if settings is None or language not in settings.by_code:
        return f"no model for {language}"
    _load(settings.by_code[language], base)
    return None


@lru_cache(maxsize=1)  # a comparison scores dozens of systems with the same model
def _load(place: str, base: Path) -> _Encoder:
    needs("BERTScore", "bert_score", "bert-score", extra="eval")
    import torch
    from bert_score.utils import get_model, model2layers
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoTokenizer

    with reading(f"BERTScore model {place}", RecipeError):
        folder = next((str(path) for path in (base / place, expanded(place)) if is_folder(path)), None)
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        folder = folder or snapshot_download(place, allow_patterns=patterns)
        config = AutoConfig.from_pretrained(folder)
        layers = int(config.num_hidden_layers)
        tuned = model2layers.get(place, model2layers.get(Path(place).name))
        layer = tuned or -(-3 * layers // 4)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = get_model(folder, layer)
    # Some tokenizers know no limit, and say so with a number that overflows theirs. RoBERTa and its kin count positions from
    # behind the padding's.
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    context = positions - 2 if positions % 64 == 2 else positions
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _Encoder(model.float().eval().to(device), tokenizer, f"{layer}/{layers}", device)
