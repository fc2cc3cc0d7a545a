"""Text of models, files and strangers in one line that a terminal, a log and a report can show as it is.

A control character can move the cursor or recolour what follows, a bidirectional override can make one text look like another.
"""

import re
from collections.abc import Iterable, Sequence

# C0 and C1 controls, line and paragraph separator, what embeds, overrides or isolates a direction, halves of surrogate pairs.
# The marks U+200E, U+200F and U+061C move nothing beside them: Arabic needs them.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SURROGATES = re.compile("[\ud800-\udfff]")
_MOST_SHOWN = 80
_MOST_LISTED = 20
_MOST_PLACES = 4


def one_line(text: str) -> str:
    r"""Return a text on one line: white space becomes one space, other control characters their escapes.

    >>> one_line("no\nsuch \x1b[31mfile\u202e")
    'no such \\x1b[31mfile\\u202e'
    """
    return escaped(" ".join(text.split()))


def first_line(error: BaseException) -> str:
    r"""Return the first line that an error says, with the next where it ends in a colon; else its kind. No full stop ends it.

    >>> first_line(ValueError("no such file.\nSee the manual.")), first_line(KeyError()), first_line(ValueError("size:\n 7"))
    ('no such file', 'KeyError', 'size: 7')
    """
    lines = [*map(one_line, str(error).splitlines()), type(error).__name__]
    first, *more = filter(None, lines)
    return (f"{first} {more[0]}" if first.endswith(":") else first).rstrip(".")


def escaped(text: str) -> str:
    r"""Return a text whose control characters are escapes, white space among them.

    >>> escaped("a\tb\x1b")
    'a\\tb\\x1b'
    """
    return CONTROLS.sub(lambda match: ascii(match.group())[1:-1], text)


def quoted(value: object) -> str:
    r"""Return a short form of any value for a message: text in quotes, cut after 80 characters; of lists only the kind.

    >>> quoted("a\x1b"), quoted(7), quoted([1, [2]]), quoted({})
    ("'a\\x1b'", '7', 'a list', 'an object')
    """
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return repr(value) if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]!r}..."
    if isinstance(value, int) and value.bit_length() > 4 * _MOST_SHOWN:
        return "a huge number"  # Python refuses to print some of them
    text = escaped(repr(value))
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def listed(names: Iterable[object]) -> str:
    """Return names for a message, comma between them; of many the first 20 and how many more there are.

    >>> listed(["a", "b"])
    'a, b'
    """
    all_names = [str(name) for name in names]
    shown = [escaped(name if len(name) <= _MOST_SHOWN else name[:_MOST_SHOWN] + "...") for name in all_names]
    more = len(shown) - _MOST_LISTED
    return ", ".join(shown[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def places(rows: Sequence[str]) -> str:
    """Return places of rows for a message: the first whole, of others what differs, of many how many more there are.

    >>> places(["a.csv, line 2"]), places(["a.csv, line 2", "a.csv, line 9", "b.csv, line 3"])
    ('a.csv, line 2', 'a.csv, line 2, line 9 and b.csv, line 3')
    """
    first, *others = rows
    file, more = f"{first.rpartition(', ')[0]}, ", len(rows) - _MOST_PLACES
    shown = [first, *(row.removeprefix(file) for row in others[: _MOST_PLACES - 1])]
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
