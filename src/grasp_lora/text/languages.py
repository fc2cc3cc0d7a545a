"""Language codes: one rule for recipes, prompts and metrics."""

import re

from grasp_lora.errors import DataError

_CODE = re.compile(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]+)*")
# ISO 639-2 and 639-3 codes of the languages that prompts or metrics have rules for.
_SHORT = {
    "ara": "ar", "arb": "ar", "bur": "my", "chi": "zh", "cmn": "zh", "deu": "de", "eng": "en", "ger": "de", "hin": "hi",
    "jpn": "ja", "khm": "km", "lao": "lo", "mya": "my", "spa": "es", "tha": "th", "vie": "vi", "zho": "zh",
}  # fmt: skip


def language_code(language: str) -> str:
    """Return a language without region and script, in lower case, and in two letters where rules depend on it.

    Args:
        language: ISO 639 code of two or three letters, alone or followed by parts such as `-Hans` or `_CN`.

    Raises:
        DataError: it is no code.

    >>> language_code("zh-CN"), language_code("zho"), language_code("fil")
    ('zh', 'zh', 'fil')
    """
    if not _CODE.fullmatch(language):
        raise DataError(
            f"{language!r} is no language code; give one of two or three letters (ISO 639), such as ar, sw or zh-Hans"
        )
    code = re.split("[-_]", language.lower())[0]
    return _SHORT.get(code, code)
