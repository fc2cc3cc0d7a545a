"""A section of the recipe is a settings class of which some fields are keys, and the rest have one right answer.

The settings live beside the code that they steer, and a script may set all of them. A recipe shows those that a user changes:

    training: Annotated[TrainingSettings, Section(hidden=("lr_decay",))]

takes `{epochs: 3}` for `TrainingSettings(epochs=3)`, refuses `lr_decay`, and leaves it out where the recipe is written or
described.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, NamedTuple, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from grasp_lora.text.docstrings import arguments, summary

CONFIG = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Based(NamedTuple):
    """What a recipe says in a section, on top of settings that are not the defaults of their class, such as a preset's."""

    settings: Any
    keys: Any


class Section:
    """Says of an annotated settings class which of its fields are no keys.

    Args:
        hidden: those fields.
        written: types of keys that are sections themselves.
    """

    def __init__(self, hidden: tuple[str, ...] = (), written: Mapping[str, Any] | None = None) -> None:
        self.hidden, self.written = hidden, dict(written or {})
        self._models: dict[type[Any], type[BaseModel]] = {}

    def keys(self, settings: type[Any]) -> type[BaseModel]:
        """The keys as a pydantic model, each with its meaning from the docstring of the settings."""
        if settings not in self._models:
            self._models[settings] = self.model_of(settings)
        return self._models[settings]

    def model_of(self, settings: type[Any]) -> type[BaseModel]:
        docstring = settings.__doc__ or ""
        meanings = arguments(docstring)
        annotations = get_type_hints(settings, include_extras=True) | self.written
        keys: dict[str, Any] = {}
        for entry in fields(settings):
            if entry.name in self.hidden:
                continue
            default: dict[str, Any] = {"default": ... if entry.default is MISSING else entry.default}
            default = default if entry.default_factory is MISSING else {"default_factory": entry.default_factory}
            text = meanings.get(entry.name, "").replace("None", "null")
            keys[entry.name] = (annotations[entry.name], Field(description=text, **default))
        return create_model(settings.__name__, __config__=CONFIG, __doc__=summary(docstring), **keys)

    def read(self, settings: type[Any], base: Any, keys: Any) -> Any:
        """Check the keys and build the settings, on top of others where there are any."""
        if base is not None and isinstance(keys, Mapping):
            keys = self.write(base) | dict(keys)
        values = values_of(self.keys(settings).model_validate(keys))
        return settings(**values) if base is None else replace(base, **values)

    def write(self, settings: Any) -> dict[str, Any]:
        """The values of the keys."""
        return {name: getattr(settings, name) for name in self.keys(type(settings)).model_fields}

    def __get_pydantic_core_schema__(self, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        """How pydantic reads and writes the section."""

        def read(value: Any) -> Any:
            if isinstance(value, source):
                return value
            base, keys = value if isinstance(value, Based) else (None, value)
            return self.read(source, base, keys)

        def write(value: Any, info: SerializationInfo) -> dict[str, Any]:
            section = self.keys(type(value) if isinstance(value, source) else source)
            return section.model_construct(**self.write(value)).model_dump(mode=info.mode)

        written = core_schema.plain_serializer_function_ser_schema(
            write, info_arg=True, return_schema=core_schema.dict_schema()
        )
        return core_schema.no_info_plain_validator_function(read, metadata={"settings": source}, serialization=written)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """How pydantic describes the section: as it does the model of the keys."""
        return handler(self.keys(schema["metadata"]["settings"]).__pydantic_core_schema__)


def values_of(keys: BaseModel) -> dict[str, Any]:
    """The values of checked keys, as they were built."""
    return {name: getattr(keys, name) for name in type(keys).model_fields}
