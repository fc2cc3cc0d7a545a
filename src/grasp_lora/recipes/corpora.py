"""The keys of `data`: where the rows of both languages lie, how many go where, and what the model sees of them.

target: {language: sw, files: rows.csv, dev: 50}                     # a pool, which is split here
target: {language: sw, files: {train: a.csv, dev: b.csv, test: c.csv}}  # splits that exist
target: {language: ar, hub: [facebook/mlqa, mlqa.ar.ar, test]}         # name, configuration and split on the hub
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from grasp_lora.data.data_settings import CorpusSettings, DataSettings
from grasp_lora.models.model_settings import Texts
from grasp_lora.recipes.section import Section, values_of
from grasp_lora.text.display import listed

POOL = "pool"
PARTS = {POOL: "files", "train": "train_files", "dev": "dev_files", "test": "test_files"}
Files = Annotated[
    dict[Literal["pool", "train", "dev", "test"], Texts],
    BeforeValidator(lambda files: files if isinstance(files, Mapping) else {POOL: files}, json_schema_input_type=Any),
]
Template = str | dict[str, str] | None
FILES = (
    "data files: a list is a pool, which is split by the counts; {train: ..., dev: ..., test: ...} are splits that exist; "
    "{pool: ..., test: ...} a pool with a test set beside it, which leaves out of the pool what shares a text with it."
)
HUB = "a data set on the hub: its name, or [name, configuration, split]; the split is `train` if it is left out."
TEMPLATE = 'with the fields of the task in braces; or one for each language, such as {sw: "..."}.'
SOURCE = (
    "data of the rich language; null where adapters are given, or for a single step that trains on the target alone."
)
HUB_PARTS = ("hub", "hub_config", "hub_split")
TEMPLATES = ("prompt", "completion")
NO_KEYS = ("hub_config", "hub_split", "train_files", "dev_files", "test_files", "prompt", "completion")


class CorpusSection(Section):
    """The keys of one language: files by split under `files`, name and parts of a data set on the hub under `hub`.

    Args:
        hidden: more fields that are no keys.
    """

    def __init__(self, hidden: tuple[str, ...] = ()) -> None:
        files: Any = (Files, Field(default={}, description=FILES))
        super().__init__(
            (*NO_KEYS, *hidden),
            {"files": files, "hub": (Texts, Field(default=(), max_length=len(HUB_PARTS), description=HUB))},
        )

    def read(self, settings: type[Any], base: Any, keys: Any) -> CorpusSettings:
        """Check the keys and build the settings."""
        values = values_of(self.keys(settings).model_validate(keys))
        hub = values.pop("hub")
        files = {PARTS[part]: places for part, places in values.pop("files").items()}
        return CorpusSettings(**values, **files, **dict(zip(HUB_PARTS, hub, strict=False)))

    def write(self, settings: CorpusSettings) -> dict[str, Any]:
        """The values of the keys."""
        files = {part: getattr(settings, field) for part, field in PARTS.items() if getattr(settings, field)}
        hub = tuple(part for part in (settings.hub, settings.hub_config, settings.hub_split) if part)
        return super().write(settings) | {"files": files, "hub": hub}


class DataSection(Section):
    """The keys of the data: a template of prompt or completion is one text, or one for each language."""

    def __init__(self) -> None:
        templates = {
            name: (Template, Field(default=None, description=f"template in place of the built-in one, {TEMPLATE}"))
            for name in TEMPLATES
        }
        source = (
            Annotated[CorpusSettings, CorpusSection(("micro_dev", "test"))] | None,
            Field(default=None, description=SOURCE),
        )
        target = (Annotated[CorpusSettings, CorpusSection()], Field(description="data of the language to adapt to."))
        super().__init__((), {"source": source, "target": target, **templates})

    def read(self, settings: type[Any], base: Any, keys: Any) -> DataSettings:
        """Check the keys and build the settings."""
        values = values_of(self.keys(settings).model_validate(keys))
        corpora = {side: values[side] for side in ("source", "target") if values[side] is not None}
        for name in TEMPLATES:
            if isinstance(values[name], Mapping):
                by_language, values[name] = values[name], None
                languages = [corpus.language for corpus in corpora.values()]
                if strange := sorted(by_language.keys() - set(languages)):
                    raise ValueError(
                        f"{name} has a template for {listed(strange)}, but the data are of {listed(languages)}"
                    )
                for side, corpus in corpora.items():
                    corpora[side] = replace(corpus, **{name: by_language.get(corpus.language)})
        return DataSettings(**{**values, **corpora})

    def write(self, settings: DataSettings) -> dict[str, Any]:
        """The values of the keys."""
        values = super().write(settings)
        corpora = [corpus for corpus in (settings.source, settings.target) if corpus is not None]
        for name in TEMPLATES:
            by_language = {corpus.language: getattr(corpus, name) or values[name] for corpus in corpora}
            if any(getattr(corpus, name) for corpus in corpora):
                values[name] = {language: text for language, text in by_language.items() if text}
        return values
