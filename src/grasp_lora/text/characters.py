"""What characters are: invisible marks, and scripts without spaces between words, in which metrics take characters for words."""

import re
import unicodedata

# Direction marks, soft hyphens and the like; joiners and the zero-width space tell words apart.
INVISIBLE = re.compile("[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
JOINERS = "\u200c\u200d"
# With 々, 〇, Yi's syllables and planes 2 and 3.
IDEOGRAPH_OR_KANA = re.compile(
    "[\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48c\uf900-\ufaff\uff66-\uff9f"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
# Letters of Thai, Lao, Myanmar, Khmer, Tai Tham, Balinese and Javanese, each with the vowel signs and tone marks that follow it.
_WITH_MARKS = re.compile(
    "[\u0e01-\u0e30\u0e32-\u0e33\u0e40-\u0e46][\u0e31\u0e34-\u0e3a\u0e47-\u0e4e]*"
    "|[\u0e81-\u0eb0\u0eb2-\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf][\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece]*"
    "|[\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065-\u1066\u106e-\u1070\u1075-\u1081\u108e]"
    "[\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d\u108f\u109a-\u109d]*"
    "|[\u1780-\u17b3\u17d7\u17dc][\u17b4-\u17d3\u17dd]*"
    "|[\u1a20-\u1a54][\u1a55-\u1a7f]*|[\u1b05-\u1b33\u1b45-\u1b4c][\u1b00-\u1b04\u1b34-\u1b44]*"
    "|[\ua984-\ua9b2][\ua980-\ua983\ua9b3-\ua9c0]*"
)
ENDS_OF_SENTENCES = ".?!\u2026\u061f\u06d4\u0964\u3002\uff1f\uff01"  # also those of Arabic, Urdu, Hindi and Chinese
_BETWEEN_WORDS = re.compile(
    "[\u200b\u0f0b-\u0f0d\u1361]"
)  # zero-width space, Tibetan tsheg and shad, Ethiopic word space
# Letters that texts before Unicode 5.1 write as a letter, a virama and a joiner: Malayalam's chillus and Bengali's khanda ta.
_ONE_LETTER = {
    letter + virama + "\u200d": whole
    for virama, letters in (
        ("\u0d4d", {"ണ": "ൺ", "ന": "ൻ", "ര": "ർ", "ല": "ൽ", "ള": "ൾ", "ക": "ൿ"}),
        ("\u09cd", {"ত": "ৎ"}),
    )
    for letter, whole in letters.items()
}
_OLD_LETTERS = re.compile("|".join(_ONE_LETTER))
DOTTED = frozenset({"tr", "az"})  # languages whose i keeps its dot as a capital, and whose I has none


def split_unspaced(text: str) -> str:
    """Put white space around each ideograph, kana, syllable of Yi, and letter of Thai and the other scripts above.

    A letter keeps its vowel signs and tone marks. Words would need a dictionary of each language.

    >>> split_unspaced("AI สวัสดี").split(), split_unspaced("第3章").split()
    (['AI', 'ส', 'วั', 'ส', 'ดี'], ['第', '3', '章'])
    """
    return _WITH_MARKS.sub(r" \g<0> ", IDEOGRAPH_OR_KANA.sub(r" \g<0> ", text))


def lowered(text: str, language: str = "") -> str:
    """Return a text in lower case, as its language has it, with each letter in one writing.

    >>> lowered("IŞIK", "tr"), lowered("I", "en"), lowered("അവന്\u200d") == "അവൻ"
    ('ışık', 'i', True)
    """
    text = _OLD_LETTERS.sub(lambda match: _ONE_LETTER[match.group()], unicodedata.normalize("NFC", text))
    if language in DOTTED:
        text = text.replace("İ", "i").replace("I", "ı").replace("i\u0307", "i")  # the last as other programs lower İ
    return text.lower()


def is_unspaced(text: str) -> bool:
    """Whether most letters of a text are of scripts that `split_unspaced` takes apart.

    >>> is_unspaced("台灣 Taiwan 的首都是臺北市"), is_unspaced("Taipei (台北)")
    (True, False)
    """
    alone = sum(len(script.findall(text)) for script in (IDEOGRAPH_OR_KANA, _WITH_MARKS))
    return 2 * alone > sum(character.isalpha() for character in text)


def space_words(text: str) -> str:
    """Put a space in place of each zero-width space, Tibetan tsheg or shad and Ethiopic word space, which end a word.

    >>> space_words("ទីក្រុង\u200bភ្នំពេញ").split() == ["ទីក្រុង", "ភ្នំពេញ"], space_words("བོད་ཀྱི་སྐད").split()
    (True, ['བོད', 'ཀྱི', 'སྐད'])
    """
    return _BETWEEN_WORDS.sub(" ", text)


def are_glued(before: str, after: str) -> bool:
    """Whether the last word or sentence of a text goes on as the first word of the next.

    >>> are_glued("why?", "because"), are_glued("why?\\n", "because"), are_glued("why:", "because"), are_glued("问", "答")
    (True, False, False, False)
    """
    border = before[-1:] + after[:1]
    ends = border[:1].isalnum() or border[:1] in ENDS_OF_SENTENCES
    return len(border) == 2 and ends and border[1].isalnum() and split_unspaced(border).strip() == border
