"""What a docstring of ours says of each argument, so that the recipe's schema need not say it again."""

import inspect
import re

_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def summary(docstring: str) -> str:
    """Return what stands before the first section, one line a paragraph.

    >>> summary("One\\nline.\\n\\nArgs:\\n    a: b.")
    'One line.'
    """
    text = re.split(r"^(?:Args|Returns|Raises):$", inspect.cleandoc(docstring), maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def arguments(docstring: str) -> dict[str, str]:
    """Return the meaning of each argument in the section `Args:`; several that share an entry get the same one.

    >>> arguments("What.\\n\\nArgs:\\n    a, b: two\\n        numbers.\\n    c: one.\\n\\nRaises:\\n    E: never.")
    {'a': 'two numbers.', 'b': 'two numbers.', 'c': 'one.'}
    """
    section = re.search(r"^Args:\n((?: {4,}.*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE)
    entries = _ENTRY.findall(section[1]) if section else []
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
