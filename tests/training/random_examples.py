"""Examples of random tokens, which the tests of training share."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


def make_examples(count: int, seed: int = 0, name: str = "e", prompt: tuple[int, int] = (2, 12)) -> list[Example]:
    """Examples of uneven lengths: prompts of as many tokens as `prompt` allows, completions of 1 to 5."""
    generator = random.Random(seed)
    return [
        Example(
            f"{name}{index}",
            tuple(generator.randrange(4, 260) for _ in range(generator.randint(*prompt))),
            (*(generator.randrange(4, 260) for _ in range(generator.randint(0, 4))), 2),
        )
        for index in range(count)
    ]
