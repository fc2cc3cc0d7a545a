"""Presets: a policy with the rounds and the rule that go with it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from grasp_lora.method.policy import Gaussian, Spread
from grasp_lora.method.rules import RULES, Rule
from grasp_lora.method.schedule import Rounds
from grasp_lora.method.search import RatioPolicy
from grasp_lora.text.display import quoted
from grasp_lora.text.names import find

if TYPE_CHECKING:
    RuleOrName = str | Rule
else:
    RuleOrName = str  # what a recipe can hold, which is checked by this; a script may pass the object


def ratio_rule(rule: RuleOrName) -> Rule:
    """The rule of a name: a key of `RULES`, or an import path.

    Raises:
        ValueError: there is none, or the object is no `Rule`.
    """
    return find("rule", rule, Rule, RULES)


@dataclass(frozen=True)
class Controller:
    """How the ratio is learned: the settings of `GraspController`; left as it is, preset `spread`.

    Args:
        policy: who chooses candidates and when the current ratio moves.
        rounds: when rounds come and what they measure.
        rule: how the ratio is read off them: `surrogate`, `smooth_fit` or `best_reward` (the paper's); or a `Rule` of one's
            own, in a recipe by its import path `package.module:name`.

    Raises:
        ValueError: there is no such rule, or the policy is none.
    """

    policy: RatioPolicy = field(default_factory=lambda: Spread(candidates=2))
    rounds: Rounds = field(
        default_factory=lambda: Rounds(every="epoch", before_training=True, pool="dev", in_turn=12, patience=1)
    )
    rule: RuleOrName = "surrogate"

    def __post_init__(self) -> None:
        if not isinstance(self.policy, RatioPolicy):
            raise ValueError(
                f"policy is {quoted(self.policy)}; it must be an object, such as Gaussian(); preset('paper') gives a preset"
            )
        ratio_rule(self.rule)

    @property
    def compares_rounds(self) -> bool:
        """Whether losses of one round are compared with those of another, so that its baseline needs all examples."""
        return self.rounds.patience is not None or ratio_rule(self.rule).compares_rounds

    def probed_examples(self, pool: int) -> int:
        """Examples measured in a round on a pool of so many, with each ratio counted anew, at most."""
        few = self.rounds.turn(pool) or pool
        return (pool if self.compares_rounds else few) + self.policy.candidates * few


PRESETS: dict[str, Controller] = {
    "spread": Controller(),
    "late": Controller(Spread(bounds_first=True), Rounds(start=0.5), "smooth_fit"),
    "paper": Controller(Gaussian(), Rounds(), "best_reward"),
}
WITH_DEV, WITHOUT_DEV = "spread", "late"  # the default where the target has a dev set, and where it has none


def preset(name: str) -> Controller:
    """Return a preset: `spread` (all ratios train together, few probes of dev; the default), `late` (for targets without a dev
    set), or `paper`.

    Raises:
        ValueError: there is none of that name.
    """
    return find("preset", name, Controller, PRESETS)


def controller_settings(settings: Controller | str | None) -> Controller:
    """Settings by themselves, by the name of a preset, or those of preset `spread`.

    Raises:
        ValueError: there is no preset of that name, or it is something else.
    """
    found = Controller() if settings is None else preset(settings) if isinstance(settings, str) else settings
    if not isinstance(found, Controller):
        raise ValueError(
            f"settings is {quoted(found)}; give a Controller, or the name of a preset: {', '.join(PRESETS)}"
        )
    return found
