"""Settings that are checked when they are made: one line with the name, the value and the rule."""

from numbers import Integral

from grasp_lora.text.display import quoted


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def require(settings: object, **rules: tuple[bool, str]) -> None:
    """Refuse the first setting that breaks its rule.

    Args:
        settings: an object with these fields.
        rules: of each field whether its value fits, and what it must do, such as "lie in (0, 1]".

    Raises:
        ValueError: as in "start is 1.5; it must be a share of the run, in [0, 1]".
    """
    for name, (fits, rule) in rules.items():
        if not fits:
            value = getattr(settings, name)
            raise ValueError(f"{name} is {list(value) if isinstance(value, tuple) else quoted(value)}; it must {rule}")
