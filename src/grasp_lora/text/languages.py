"""Language codes: one rule for recipes, prompts and metrics."""

import re

from babel import Locale
from babel.core import get_global

from grasp_lora.errors import DataError

_CODE = re.compile(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]+)*")
# ISO 639-2 and 639-3 codes of the languages that prompts or metrics have rules for, and the two written forms of Norwegian.
_SHORT = {
    "ara": "ar", "arb": "ar", "aze": "az", "ben": "bn", "bur": "my", "chi": "zh", "cmn": "zh", "dan": "da", "deu": "de",
    "dut": "nl", "eng": "en", "fin": "fi", "fra": "fr", "fre": "fr", "ger": "de", "hin": "hi", "hun": "hu", "ita": "it",
    "jpn": "ja", "khm": "km", "kor": "ko", "lao": "lo", "mya": "my", "nb": "no", "nld": "nl", "nno": "no", "nn": "no",
    "nob": "no", "nor": "no", "pol": "pl", "por": "pt", "ron": "ro", "rum": "ro", "rus": "ru", "spa": "es", "swe": "sv",
    "tha": "th", "tur": "tr", "vie": "vi", "zho": "zh",
}  # fmt: skip
KNOWN = frozenset(_SHORT.values())  # languages whose scripts are known, too
_NAMES = Locale("en").languages  # all codes of two letters are in Unicode's table, of three letters only some


def language_code(language: str) -> str:
    """Return a language without region and script, in lower case, and in two letters where rules depend on it.

    Args:
        language: ISO 639 code of two or three letters, alone or followed by parts such as `-Hans` or `_CN`.

    Raises:
        DataError: it is no code, or of two letters that stand for no language.

    >>> language_code("zh-CN"), language_code("zho"), language_code("fil")
    ('zh', 'zh', 'fil')
    >>> language_code("vn")
    Traceback (most recent call last):
    grasp_lora.errors.DataError: 'vn' is not a language code (ISO 639); vi is Vietnamese
    """
    if not _CODE.fullmatch(language):
        raise DataError(
            f"{language!r} is not a language code of two or three letters (ISO 639), such as ar, sw or zh-Hans"
        )
    code = re.split("[-_]", language.lower())[0]
    if len(code) == 2 and code not in _NAMES:
        # Often it is the code of a country, whose most common language the table knows.
        spoken = str(get_global("likely_subtags").get(f"und_{code.upper()}", "")).split("_")[0]
        advice = f"{spoken} is {_NAMES[spoken]}" if spoken in _NAMES else "such as ar, sw or zh-Hans"
        raise DataError(f"{language!r} is not a language code (ISO 639); {advice}")
    return _SHORT.get(code, code)


def language_name(language: str) -> str:
    """Return the English name of a language, and its code where Unicode's table (CLDR) has no name for it.

    >>> language_name("sq"), language_name("zh-Hans"), language_name("min"), language_name("xyz")
    ('Albanian', 'Chinese', 'Minangkabau', 'xyz')
    """
    code = language_code(language)
    return str(_NAMES.get(code, code))
