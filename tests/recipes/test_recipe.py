"""The recipe: YAML in, resolved copy out, overrides, and one line for what does not fit."""

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from grasp_lora.errors import RecipeError
from grasp_lora.method.policy import PRESETS, preset
from grasp_lora.recipes.load import builtin_recipes, load_recipe, validate
from grasp_lora.recipes.recipe import Recipe

SMALL = "name: a\ndata: {task: completion, target: {language: de, files: [x.csv]}}\n"

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Give `load(text, *overrides)`."""
    file = tmp_path / "r.yaml"

    def call(text: str = SMALL, *overrides: str) -> Recipe:
        file.write_text(text, encoding="utf-8")
        return load_recipe(file, overrides)[0]

    return call


def test_relative_paths_start_from_the_folder_of_the_file(tmp_path: Path, load: Load) -> None:
    load()
    assert load_recipe(tmp_path / "r.yaml")[1] == tmp_path
    assert load_recipe("demo-ar")[1] == Path()


def test_a_file_may_begin_with_a_byte_order_mark(load: Load) -> None:
    assert load("\ufeff" + SMALL).name == "a"


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_resolved_copy_is_the_same_recipe(name: str, load: Load) -> None:
    recipe, _ = load_recipe(name)
    again = load(recipe.to_yaml())
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    assert again.to_yaml() == recipe.to_yaml()


def test_the_resolved_copy_says_every_default_but_no_place_of_the_data(load: Load) -> None:
    content = yaml.safe_load(load(SMALL, "data.root=/somewhere").to_yaml())
    assert set(content) == set(Recipe.model_fields)
    assert content["lora"]["rank"] == 8
    assert content["controller"]["policy"]["ratio_min"] == 0.1
    assert "root" not in content["data"]


@pytest.mark.parametrize(
    "change",
    [
        "seed=7", "backbone.name=other", "backbone.dtype=float32", "data.max_tokens=100", "data.target.train=9",
        "lora.rank=4", "source.training.epochs=1", "target.adapter=x", "merge.rule=svd", "mask.scope=global",
        "controller.policy.max_step=0.2", "controller.probe_every=3", "final.prune_ratio=0.5", "final.mode=reselect",
        "final.start=controller",
        "generation.max_new_tokens=3", "metrics=[f1]", "name=b",
    ],
)  # fmt: skip
def test_the_fingerprint_depends_on_what_decides_the_result(change: str, load: Load) -> None:
    assert load(SMALL, change).fingerprint() != load().fingerprint()


@pytest.mark.parametrize(
    "change", ["data.root=/x", "backbone.device=cpu", "backbone.offline=true", "report_to=[tensorboard]"]
)
def test_the_fingerprint_does_not_depend_on_the_machine(change: str, load: Load) -> None:
    assert load(SMALL, change).fingerprint() == load().fingerprint()


class TestPolicy:
    def test_a_preset_by_name(self, load: Load) -> None:
        assert load(SMALL + "controller: {policy: paper}").controller.policy == preset("paper")

    def test_a_preset_with_changes(self, load: Load) -> None:
        text = SMALL + "controller: {policy: {preset: random, candidates: 5}}"
        assert load(text).controller.policy == preset("random", candidates=5)

    def test_an_override_changes_a_preset_that_is_named(self, load: Load) -> None:
        text = SMALL + "controller: {policy: paper}"
        assert load(text, "controller.policy.candidates=5").controller.policy == preset("paper", candidates=5)

    def test_plain_settings(self, load: Load) -> None:
        assert load(SMALL + "controller: {policy: {ratio_init: 0.2}}").controller.policy == preset(
            "shared", ratio_init=0.2
        )


class TestOverrides:
    @pytest.mark.parametrize(
        ("changes", "policy", "rounds"),
        [
            ((), "shared", (None, "dev", 1)),
            (("data.target.dev=0",), "late", (10, "micro_dev", None)),
            (("controller.policy=shared", "data.target.dev=0"), "shared", (None, "micro_dev", 1)),
            (("controller.policy=paper",), "paper", (10, "micro_dev", None)),
            (("controller.policy=late", "controller.probe_every=7"), "late", (7, "micro_dev", None)),
            (("controller.policy=surrogate", "controller.probe_on=dev"), "surrogate", (None, "dev", 1)),
            (("controller.policy=shared", "controller.policy=paper"), "paper", (10, "micro_dev", None)),
            (("controller.patience=null", "controller.probe_every=5"), "shared", (5, "dev", None)),
        ],
    )
    def test_how_rounds_are_run_follows_from_the_policy(
        self, changes: tuple[str, ...], policy: str, rounds: tuple[int | None, str, int | None], load: Load
    ) -> None:
        stage = load(SMALL, *changes).controller
        assert stage.policy == PRESETS[policy]
        assert (stage.probe_every, stage.probe_on, stage.patience) == rounds
        assert stage.probe_examples == (12 if stage.probe_on == "dev" else None)

    def test_a_policy_by_its_settings_alone_is_known_for_what_it_is(self, load: Load) -> None:
        held = load(SMALL, "controller.policy.candidates=5").controller
        assert (held.policy.kind, held.policy.candidates, held.probe_every, held.patience) == ("shared", 5, None, 1)
        turn = load(SMALL, "controller.policy={kind: shared}", "controller.probe_examples=4").controller
        assert (turn.policy.estimate, turn.probe_every, turn.probe_on, turn.patience) == (
            "smooth_fit",
            None,
            "dev",
            1,
        )
        assert turn.probe_examples == 4
        assert load(SMALL, "controller.policy.estimate=lowest_loss").controller.probe_examples is None

    def test_a_round_measures_all_at_the_baseline_where_rounds_are_compared(self, load: Load) -> None:
        turn = load(SMALL).controller
        assert [turn.in_turn(pool) for pool in (50, 13, 12, 6)] == [12, 12, None, None]
        assert [turn.probed_examples(pool) for pool in (50, 6)] == [50 + 2 * 12, 3 * 6]
        late = load(SMALL, "controller.policy=late", "controller.probe_examples=4").controller
        assert late.probed_examples(50) == 4 * 4

    @pytest.mark.parametrize(
        ("override", "path", "value"),
        [
            ("seed=7", "seed", 7),
            ("final.prune_ratio=0.5", "final.prune_ratio", 0.5),
            ("target.training.learning_rate=1e-5", "target.training.learning_rate", 1e-5),
            ("merge.weights=[1, 1e-1]", "merge.weights", (1.0, 0.1)),
            ("metrics=[f1, bleu]", "metrics", ("f1", "bleu")),
            ("final.training.patience=null", "final.training.patience", None),
            ("final.training.patience=", "final.training.patience", None),
            ("controller.training.epochs=2", "controller.training.patience", None),
            ("controller.training.epochs=2", "controller.training.keep", "last"),
            ("data.prompt='{prompt} = '", "data.prompt", "{prompt} = "),
            ("backbone.revision='1e5'", "backbone.revision", "1e5"),
            ("final.mask.scope=global", "final.mask.scope", "global"),
        ],
    )
    def test_a_value_is_read_as_yaml(self, override: str, path: str, value: object, load: Load) -> None:
        found: object = load(SMALL + "backbone: {name: org/model}\n", override)
        for key in path.split("."):
            found = getattr(found, key)
        assert found == value
        assert type(found) is type(value)

    def test_the_last_one_counts(self, load: Load) -> None:
        assert load(SMALL, "seed=1", "seed=2").seed == 2

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("seed", r"override 'seed' must look like a\.b=value, for example"),
            ("=1", r"must look like a\.b=value"),
            ("a..b=1", r"must look like a\.b=value"),
            ("name.first=1", r"override 'name\.first=1': name is no section of the recipe"),
            ("data.target.files.0=x", r"files is no section of the recipe"),
            ("seed=[1", r"the value is no valid YAML; put text in quotes"),
            ("data.target.fils=[x]", r"unknown key 'data\.target\.fils'; did you mean 'files'\?"),
            ("target.train=4", r"unknown key 'target\.train'; did you mean 'data\.target\.train'\?"),
            ("rank=4", r"unknown key 'rank'; did you mean 'lora\.rank' or 'merge\.rank'\?"),
            ("controler.probe_every=1", r"unknown key 'controler'; did you mean 'controller'\?"),
        ],
    )
    def test_what_does_not_fit_is_named(self, override: str, message: str, load: Load) -> None:
        with pytest.raises(RecipeError, match=message):
            load(SMALL, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys and values"),
        ("- a\n- b", "must hold keys and values"),
        ("name: a", "'data' is missing"),
        ("data: {task: qa, target: {language: ar, files: [x]}}", "'name' is missing"),
        (SMALL + "nam: b", r"unknown key 'nam'; did you mean 'name'\?"),
        (SMALL + "zzz: b", r"unknown key 'zzz'; known here: name, seed, backbone, data"),
        (SMALL + "lora: {rnk: 4, alpa: 2}", r"unknown key 'lora\.rnk'; did you mean 'rank'\? \(and 1 more\)"),
        (SMALL + "source: {training: {epoch: 4}}", r"unknown key 'source\.training\.epoch'; did you mean 'epochs'\?"),
        (SMALL + "seed: -1", r"seed: .*greater than or equal to 0 \(it is -1\)"),
        (SMALL + "seed: one", r"seed: .*valid integer.*\(it is 'one'\)"),
        (SMALL + "metrics: bleu", r"metrics: must be a list, such as \[first, second\] \(it is 'bleu'\)"),
        (SMALL + "final: {start: fresh}", r"final: start is 'fresh'; allowed: merged, controller"),
        (
            SMALL + "final: {start: controller, prune_ratio: 0.4}",
            r"final\.start is 'controller', but final\.prune_ratio 0\.4 leaves out the controller run; remove one of them",
        ),
        (
            SMALL + "final: {start: controller, mode: reselect}",
            r"final\.start is 'controller', which holds the controller's mask; remove final\.mode, or start from 'merged'",
        ),
        (
            SMALL + "final: {start: controller, mask: {score: input_aware}}",
            r"the controller's mask; remove final\.mask, or",
        ),
        (
            SMALL + "final: {start: controller}\ncontroller: {policy: late}",
            r"the policy's probe_from 0\.5 leaves rounds to the end of the run",
        ),
        (SMALL + "controller: {probe_on: test}", r"controller: probe_on is 'test'; allowed: micro_dev, dev, both"),
        (SMALL + "controller: {probe_examples: 0}", r"controller: probe_examples is 0; it must be at least 1"),
        (
            SMALL + "controller: {probe_examples: 4, policy: {preset: shared, estimate: lowest_loss}}",
            r"controller: the estimate 'lowest_loss' needs all examples in each round, but probe_examples is 4; set",
        ),
        (
            SMALL + "controller: {training: {patience: 1}}",
            r"controller: training\.patience is 1 and training\.keep 'last', but the controller run measures no dev loss",
        ),
        (SMALL + "controller: {training: {keep: best}}", r"training\.patience is None and training\.keep 'best', but"),
        (SMALL + "controller: {patience: 0}", r"controller: patience is 0; it must be at least 1 round"),
        (SMALL + "merge: svd", r"merge: must be a section of keys and values \(it is 'svd'\)"),
        (SMALL.replace("de,", "no,"), r"data\.target\.language: must be a text \(it is False\); put it in quotes"),
        (SMALL + "seed: 1\nseed: 1", r"line 4: the key 'seed' stands twice; remove one"),
        (SMALL + "seed: 2024-99-99", r"no valid YAML: month must be in 1\.\.12"),
        (SMALL + "a: &x 1\nb: *x", r"recipe \S+ uses a YAML alias \(\*name\) in line 4"),
        (SMALL + "a: [1, 2\n", r"no valid YAML in line 4: .*from line 3 on"),
        (SMALL + "a: b: c\n", r"no valid YAML in line 3: mapping values are not allowed here"),
        (SMALL + "a: \x07\n", r"no valid YAML: unacceptable character #x0007"),
        (SMALL + "a: !!python/object:os.system x\n", r"uses a YAML tag \(!name\) in line 3"),
        (SMALL + "? [a, b]\n: 1\n", r"no valid YAML in line 3: the key a list or an object is no text"),
        ("[" * 500, r"nested too deeply"),
    ],
)
def test_a_mistake_is_one_line(text: str, message: str, load: Load) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("lora: {alpha: 1e1}", "lora.alpha", 10.0),  # to YAML 1.1 that is a text
        ("seed: 1_000", "seed", 1000),
        ("seed: 0x10", "seed", 16),
        ("seed: 0", "seed", 0),
        ("lora: {dropout: 0.05}", "lora.dropout", 0.05),
        ("lora: {dropout: 00.5}", "lora.dropout", 0.5),
        ("lora: {rslora: off}", "lora.rslora", False),
        ("backbone: {name: a, revision: '010'}", "backbone.revision", "010"),
        ("backbone: {name: a, revision: 09a}", "backbone.revision", "09a"),
        ('generation: {stop: ["\\x1b", "\\n"]}', "generation.stop", ("\x1b", "\n")),
    ],
)
def test_what_yaml_reads_as_a_person_would_is_taken(text: str, path: str, value: object, load: Load) -> None:
    found: object = load(SMALL + text + "\n")
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_every_number_must_be_finite_and_within_reason(load: Load) -> None:
    """Each number of each section, set to what no setting means; none is taken as it is."""

    def numbers(value: object, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
        if isinstance(value, dict):
            return [found for key, part in value.items() for found in numbers(part, (*path, key))]
        return [(path, value)] if isinstance(value, int | float) else []

    content = yaml.safe_load(load(SMALL + "final: {prune_ratio: 0.5}\nmerge: {rule: svd, rank: 3}").to_yaml())
    found = numbers(content)
    assert len(found) > 40
    for path, value in found:
        wrong: list[object] = [float("nan"), float("inf"), "nan", 10**40]
        if not isinstance(value, bool):
            wrong.append(True)
        else:
            wrong += [1, "yes"]
        for bad in wrong:
            changed = copy.deepcopy(content)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = bad
            if isinstance(value, float) and bad == 10**40:
                continue  # a float may be as large as it likes where its section allows that
            with pytest.raises(RecipeError):
                validate(changed, "r")


def test_a_name_fit_for_a_folder(load: Load) -> None:
    for name in ("a b", "../up", "-x", "سؤال"):
        with pytest.raises(RecipeError, match=r"name: use Latin letters, digits, '\.', '_' and '-' only"):
            load(SMALL, f"name={name}")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load_recipe(file)


def test_a_file_far_too_large(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("# " + "x" * 1_000_000)
    with pytest.raises(RecipeError, match="has 1000002 bytes; at most 1000000 are allowed"):
        load_recipe(file)


def test_a_recipe_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"neither a file nor a built-in name \(demo-ar, demo-zh, "):
        load_recipe("demo-xx")


def test_parts_have_seeds_of_their_own() -> None:
    recipe, _ = load_recipe("demo-ar")
    other, _ = load_recipe("demo-ar", ["seed=43"])
    parts = ("source", "target", "policy", "controller order")
    seeds = [chosen.seed_of(part) for chosen in (recipe, other) for part in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert recipe.seed_of("source") == load_recipe("demo-ar")[0].seed_of("source")


def test_every_section_refuses_unknown_keys() -> None:
    """A settings class without `extra: forbid` would take a misspelled key in silence."""

    def sections(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = [path] if path else []
        names = list(Recipe.model_fields) if isinstance(value, Recipe) else []
        names += [entry.name for entry in fields(value)] if hasattr(value, "__dataclass_fields__") else []
        for name in names:
            inner = getattr(value, name)
            if hasattr(inner, "__dataclass_fields__"):
                found += sections(inner, (*path, name))
        return found

    content = yaml.safe_load(SMALL) | {
        "data": {**yaml.safe_load(SMALL)["data"], "source": {"language": "en", "files": ["y"]}}
    }
    recipe = validate(content, "r")
    paths = [*sections(recipe), ("final", "mask")]
    assert ("data", "target") in paths
    assert ("controller", "policy") in paths
    for path in paths:
        changed = yaml.safe_load(recipe.to_yaml())
        place = changed
        for key in path:
            place[key] = place[key] or {}
            place = place[key]
        place["nonsense"] = 1
        with pytest.raises(RecipeError, match=rf"unknown key '{'.'.join(path)}\.nonsense'; (did you mean|known here)"):
            validate(changed, "r")
