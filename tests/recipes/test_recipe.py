"""The recipe: YAML in, resolved copy out, overrides, and one line for what does not fit."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grasp_lora.engine.steps import plain
from grasp_lora.errors import RecipeError
from grasp_lora.method.search import PRESETS, Controller, Gaussian, Rounds, Spread
from grasp_lora.recipes.builtin import recipe_keys
from grasp_lora.recipes.explain import SYNONYMS
from grasp_lora.recipes.load import builtin_recipes, load_recipe, validate
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import ControllerStage

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


def test_the_resolved_copy_has_the_same_keys_in_the_store(load: Load) -> None:
    """A whole number of a default must not be an int where the copy has a float: JSON tells them apart."""
    recipe = load(SMALL)
    again = load(recipe.to_yaml())
    keys = [json.dumps(plain(one.model_dump()), sort_keys=True) for one in (recipe, again)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("text", ["{on: source}", "{'on': source}"])
def test_the_key_on_is_a_text_though_yaml_takes_it_for_true(text: str, load: Load) -> None:
    assert load(f"{SMALL}target: {text}").target.on == "source"
    assert load(SMALL, f"target={text}").target.on == "source"


def test_absolute_paths_are_written_as_they_are_seen_from_the_folder_and_texts_are_not(load: Load) -> None:
    recipe = load(
        SMALL, "backbone.name=/srv/models/llama", "target.adapter=/elsewhere/german", "data.prompt='/srv/{prompt} '"
    )
    content = yaml.safe_load(recipe.to_yaml(Path("/srv/runs/small")))
    assert content["backbone"]["name"] == "../../models/llama"
    assert content["target"]["adapter"] == "german"  # no folder in common but the root
    assert content["data"]["prompt"] == "/srv/{prompt} "
    assert yaml.safe_load(recipe.to_yaml())["backbone"]["name"] == "/srv/models/llama"


def test_behind_a_link_paths_are_seen_from_where_it_leads(tmp_path: Path, load: Load) -> None:
    recipe = load(SMALL, f"backbone.name={tmp_path}/models/llama")
    for leads_to, seen in (
        (tmp_path / "a/b/c", "../../../../models/llama"),
        (Path("/elsewhere"), "../../models/llama"),
    ):
        (tmp_path / "runs").symlink_to(leads_to)
        assert yaml.safe_load(recipe.to_yaml(tmp_path / "runs/small"))["backbone"]["name"] == seen
        (tmp_path / "runs").unlink()


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
        "lora.rank=4", "source.training.epochs=1", "target.adapter=x", "merge.rule=svd", "merge.dropout=0.1",
        "mask.score=input_aware",
        "controller.policy.candidates=4", "controller.rounds.every=3", "controller.rule=smooth_fit",
        "final.prune_ratio=0.5", "final.mode=reselect",
        "generation.max_new_tokens=3", "metrics=[f1]", "name=b", "data.skip_unanswered=true", "data.target.sheet=a",
    ],
)  # fmt: skip
def test_the_fingerprint_depends_on_what_decides_the_result(change: str, load: Load) -> None:
    assert load(SMALL, change).fingerprint() != load().fingerprint()


@pytest.mark.parametrize(
    "change", ["data.root=/x", "backbone.device=cpu", "backbone.offline=true", "report_to=[tensorboard]"]
)
def test_the_fingerprint_does_not_depend_on_the_machine(change: str, load: Load) -> None:
    assert load(SMALL, change).fingerprint() == load().fingerprint()


def test_labels_decide_the_result() -> None:
    assert len({load_recipe("nusax-jv", change)[0].fingerprint() for change in ([], ["data.labels=[a, b]"])}) == 2


class TestController:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ((), PRESETS["spread"]),
            (("data.target.dev=0",), PRESETS["late"]),
            (("controller.preset=paper",), PRESETS["paper"]),
            (("controller.preset=late",), PRESETS["late"]),
            (("controller.preset=spread", "data.target.dev=0"), PRESETS["spread"]),
            (("controller.preset=spread", "controller.preset=paper"), PRESETS["paper"]),
            (("controller.rule=smooth_fit",), replace(PRESETS["spread"], rule="smooth_fit")),
            (
                ("controller.rounds.patience=null", "controller.rounds.every=5"),
                replace(PRESETS["spread"], rounds=replace(PRESETS["spread"].rounds, patience=None, every=5)),
            ),
            (("controller.policy.candidates=5",), replace(PRESETS["spread"], policy=Spread(candidates=5))),
            (
                ("controller={preset: paper, policy: {max_step: 0.2}, rounds: {pool: both}}",),
                replace(PRESETS["paper"], policy=Gaussian(max_step=0.2), rounds=Rounds(pool="both")),
            ),
            (("controller.policy={kind: spread}",), PRESETS["spread"]),
        ],
    )
    def test_what_is_left_out_is_the_presets(self, changes: tuple[str, ...], expected: Controller, load: Load) -> None:
        stage = load(SMALL, *changes).controller
        assert (stage.policy, stage.rounds, stage.rule) == (expected.policy, expected.rounds, expected.rule)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("policy=spread", r"controller\.policy is 'spread', but a policy is a section; set controller\.preset"),
            ("preset=[paper]", r"controller\.preset is a list; allowed: spread, late, paper"),
            ("policy.kind=3", r"controller\.policy: kind is 3; allowed: gaussian, spread, or the import path"),
            ("policy=0", r"controller\.policy is 0, but a policy is a section"),
            ("policy=3", r"controller\.policy is 3, but a policy is a section"),
            ("policy.ratio_min=low", r"controller\.policy\.ratio_min is 'low'; it must be a number$"),
            ("policy.max_step=0.1", r"unknown key 'controller\.policy\.max_step'"),
            ("rounds.evry=3", r"unknown key 'controller\.rounds\.evry'; did you mean 'every'\?"),
            ("rounds.every=week", r"controller\.rounds: every is 'week'; it must be at least 1 optimizer step"),
            ("rounds.start=0.5", r"controller\.rounds: before_training is true, but start is 0\.5"),
        ],
    )
    def test_wrong_keys_are_named(self, change: str, message: str, load: Load) -> None:
        with pytest.raises(RecipeError, match=message) as caught:
            load(SMALL, f"controller.{change}")
        assert "\n" not in str(caught.value)

    def test_an_instance_is_taken_as_it_is(self, load: Load) -> None:
        stage = load().controller
        assert ControllerStage(policy=Gaussian(seed=3)).policy == Gaussian(seed=3)
        assert load().model_copy(update={"controller": stage}) == load()


class TestCode:
    """A recipe that names code runs it only where that is allowed, also from beside it, and from nowhere else by itself."""

    POLICY = """
from dataclasses import dataclass
from grasp_lora import Gaussian

@dataclass(frozen=True)
class Mine(Gaussian):
    width: float = 0.5
"""

    @pytest.mark.parametrize(
        "change",
        [
            "controller.preset=mine_policies:X", "controller.policy.kind=mine_policies:Mine", "controller.rule=mine:rule",
            "merge.rule=mine:rule", "mask.score=mine:score", "final.mask.score=mine:score", "metrics=[f1, 'mine:metric']",
        ],
    )  # fmt: skip
    def test_without_the_flag_nothing_is_imported(self, change: str, load: Load) -> None:
        with pytest.raises(RecipeError, match=r"names code, '[\w:]+'; read it, then allow it with --allow-code"):
            load(SMALL, change)

    def test_a_policy_beside_the_recipe(self, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mine_beside.py").write_text(self.POLICY)
        monkeypatch.delitem(sys.modules, "mine_beside", raising=False)
        before = list(sys.path)
        load()
        change = ["controller.policy={kind: 'mine_beside:Mine', width: 1, candidates: 4}"]
        recipe, _ = load_recipe(tmp_path / "r.yaml", change, allow_code=True)
        policy = recipe.controller.policy
        assert (type(policy).__name__, policy.candidates, policy.width) == ("Mine", 4, 1.0)  # type: ignore[attr-defined]
        assert sys.path == before
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        again, _ = load_recipe(tmp_path / "again.yaml", allow_code=True)
        assert again == recipe
        assert again.fingerprint() == recipe.fingerprint()
        with pytest.raises(RecipeError, match=r"controller\.policy\.width is 'far'; it must be a number"):
            load_recipe(tmp_path / "r.yaml", [*change, "controller.policy.width=far"], allow_code=True)

    def test_what_is_not_there_is_named(self, tmp_path: Path, load: Load) -> None:
        load()
        with pytest.raises(
            RecipeError, match=r"merge\.rule is 'nowhere:rule', but module 'nowhere' cannot be imported"
        ):
            load_recipe(tmp_path / "r.yaml", ["merge.rule=nowhere:rule"], allow_code=True)

    def test_a_module_that_fails_when_it_is_imported_is_named(self, tmp_path: Path, load: Load) -> None:
        load()
        (tmp_path / "failing_ladder.py").write_text('raise RuntimeError("first\\nsecond")')
        with pytest.raises(RecipeError, match=r"module 'failing_ladder' fails .*RuntimeError: first.*second") as caught:
            load_recipe(tmp_path / "r.yaml", ["merge.rule=failing_ladder:rule"], allow_code=True)
        assert "\n" not in str(caught.value)


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "path", "value"),
        [
            ("seed=7", "seed", 7),
            ("final.prune_ratio=0.5", "final.prune_ratio", 0.5),
            ("target.training.learning_rate=1e-5", "target.training.learning_rate", 1e-5),
            ("merge.weights=[1, 1e-1]", "merge.weights", (1.0, 0.1)),
            ("metrics=[f1, bleu]", "metrics", ("f1", "bleu")),
            ("report_to=tensorboard", "report_to", ("tensorboard",)),
            ("final.training.patience=null", "final.training.patience", None),
            ("controller.training.epochs=2", "controller.training.patience", None),
            ("controller.training.epochs=2", "controller.training.keep", "last"),
            ("data.prompt='{prompt} = '", "data.prompt", "{prompt} = "),
            ("backbone.revision='1e5'", "backbone.revision", "1e5"),
            ("final.mask.score=input_aware", "final.mask.score", "input_aware"),
            ("final.mask.score = input_aware\n", "final.mask.score", "input_aware"),
            ('data.prompt="{prompt} #1"', "data.prompt", "{prompt} #1"),
            ("data.root=~", "data.root", None),
        ],
    )
    def test_a_value_is_read_as_yaml(self, override: str, path: str, value: object, load: Load) -> None:
        found: object = load(SMALL + "backbone: {name: org/model}\n", override)
        for key in path.split("."):
            found = getattr(found, key)
        assert found == value
        assert type(found) is type(value)

    def test_a_mapping_says_the_same(self) -> None:
        changes = {"data.root": Path("texts"), "final.prune_ratio": 0.5, "metrics": ["f1"]}
        recipe, _ = load_recipe("demo-ar", changes)
        assert (recipe.data.root, recipe.final.prune_ratio, recipe.metrics) == ("texts", 0.5, ("f1",))

    @pytest.mark.parametrize(
        "text",
        [
            "Read {prompt}\nAnswer",
            "{prompt}\n",
            "Text: {prompt}",
            "{prompt} #1",
            "'{prompt}'",
            "1 {prompt}",
            "😀 {prompt}",
            "{prompt}\x85Answer",
            "\u2029 {prompt}",
            "\x7f{prompt}",
        ],
    )
    def test_a_text_in_a_mapping_is_that_text(self, text: str) -> None:
        recipe, _ = load_recipe("demo-ar", {"data.prompt": text, "data.task": "completion", "metrics": ["f1"]})
        assert recipe.data.prompt == text

    def test_numbers_of_numpy_in_a_mapping_are_numbers(self) -> None:
        changes = {"data.target.dev": np.int64(0), "data.skip_unanswered": np.bool_(True), "lora.rank": np.int32(4)}
        recipe, _ = load_recipe("mlqa-ar", changes)
        assert (recipe.data.target.dev, recipe.data.skip_unanswered, recipe.lora.rank) == (0, True, 4)

    @pytest.mark.parametrize("zero", ["'0'", "0.0", "'00'"])
    def test_the_preset_goes_by_the_number_of_dev_rows_however_it_is_written(self, zero: str, load: Load) -> None:
        assert load(SMALL, f"data.target.dev={zero}").controller == load(SMALL, "data.target.dev=0").controller

    @pytest.mark.parametrize("changes", [None, 3])
    def test_what_is_no_list_of_changes_is_named(self, changes: Any) -> None:
        with pytest.raises(RecipeError, match=rf"^overrides is '?{changes}'?; give a list, or a mapping"):
            load_recipe("demo-ar", changes)

    def test_a_single_text_is_not_read_letter_by_letter(self) -> None:
        with pytest.raises(RecipeError, match=r"overrides is the text 'seed=1'; give a list, or a mapping"):
            load_recipe("demo-ar", "seed=1")

    def test_words_of_other_tools_lead_to_keys_that_exist(self) -> None:
        keys = recipe_keys()
        for word, meant in SYNONYMS.items():
            assert any(f".{key}".endswith(f".{meant}") for key in keys), (word, meant)
            assert word not in keys

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
            ("final.prune_ratio=", r"'final\.prune_ratio=' has no value; write final\.prune_ratio=null to unset it"),
            ("data.root= ", r"has no value; write data\.root=null"),
            (
                "data.root=/my #1 folder",
                r"reads this text as '/my'; .* within the shell's: data\.root=\"/my #1 folder\"$",
            ),
            ("data.root=#1", r"reads this text as nothing; put it in double quotes .*: data\.root=\"#1\"$"),
            ("data.completion= A{answer}", r"reads this text as 'A\{answer\}'; .*: data\.completion=\" A\{answer\}\"$"),
            ("data.prompt=a\nb", r"reads this text as 'a b'; .*: data\.prompt=\"a\\nb\"$"),
            ("data.target.fils=[x]", r"unknown key 'data\.target\.fils'; did you mean 'files'\?"),
            ("target.train=4", r"unknown key 'target\.train'; did you mean 'data\.target\.train'\?"),
            ("final.ratio=0.5", r"unknown key 'final\.ratio'; did you mean 'final\.prune_ratio'\?"),
            ("rank=4", r"unknown key 'rank'; did you mean 'lora\.rank' or 'merge\.rank'\?"),
            ("controler.rounds=1", r"unknown key 'controler'; did you mean 'controller'\?"),
            ("controller.pool=dev", r"did you mean 'controller\.rounds\.pool'\?"),
            ("controller.nonsense=1", r"known here: preset, policy, rounds, rule, training"),
            ("controller.policy.nonsense=1", r"known here: kind, .*bounds_first"),
            ("controller.policy.max_step=0.2", r"only a policy of kind gaussian has it; set kind"),
            ("final.start=controller", "final.start is gone: leave it out; the final run starts from the merge"),
            ("data.split_seed=7", "data.split_seed is gone: leave it out; the recipe's seed draws the splits"),
            ("source.adapter=x", r"unknown key 'source\.adapter'; did you mean 'adapters'\?"),
            ("model=org/llama", r"unknown key 'model'; did you mean 'backbone\.name'\?"),
            ("model_name_or_path=org/llama", r"did you mean 'backbone\.name'\?"),
            ("lora_r=8", r"did you mean 'lora\.rank'\?"),
            ("lora.r=8", r"did you mean 'rank'\?"),
            ("controller.training.lr=1", r"did you mean 'learning_rate'\?"),
            ("num_train_epochs=1", r"did you mean 'source\.training\.epochs' or 'target\.training\.epochs' or "),
            ("output_dir=out", r"unknown key 'output_dir'; give the folder on the command line: --output FOLDER"),
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
        (SMALL + "seed: one", r"seed is 'one'; it must be a whole number$"),
        (SMALL + "seed: 1.5", r"seed is 1\.5; it must be a whole number$"),
        (SMALL + "seed: 2024-01-02", r"seed is 2024-01-02; it must be a whole number$"),
        (SMALL + "merge: {weights: 1}", r"must be a list, .* \(it is 1\); write \[1\], as in --set"),
        (SMALL + "final: {all_rows: perhaps}", r"final\.all_rows is 'perhaps'; it must be true or false"),
        (
            SMALL + "metrics: bleu",
            r"metrics: must be a list, .* \(it is 'bleu'\); write \[bleu\], as in --set 'metrics=\[bleu\]'$",
        ),
        (SMALL + "metrics: f1,bleu", r"; write \[f1,bleu\], as in --set 'metrics=\[f1,bleu\]'$"),
        (
            SMALL + "final: {prune_ratio: 50%}",
            r"final\.prune_ratio is '50%'; it must be a number; for 50 % write 0\.5$",
        ),
        (
            SMALL + "final: {prune_ratio: 50}",
            r"prune_ratio is 50\.0; it must be a fraction in \[0, 1\]; for 50 % write 0\.5$",
        ),
        (
            SMALL + "controller: {rounds: {pool: test}}",
            r"controller\.rounds\.pool: .*'micro_dev', 'dev' or 'both'.*'test'",
        ),
        (SMALL + "controller: {rounds: {in_turn: 0}}", r"controller\.rounds: in_turn is 0; it must be at least 1"),
        (
            SMALL + "controller: {preset: paper, rounds: {start: 0.5}, training: {patience: 1}}",
            r"controller: training\.patience is 1, but controller\.rounds\.start 0\.5 leaves rounds to the end",
        ),
        (
            SMALL + "controller: {training: {patience: 1}}",
            r"controller: training\.patience is 1, but this policy trains at many ratios",
        ),
        (
            SMALL + "controller: {training: {keep: best}}",
            r"training\.keep is 'best', but the masks of a controller run are",
        ),
        (
            SMALL + "controller: {rounds: {patience: 0}}",
            r"controller\.rounds: patience is 0; it must be at least 1 round",
        ),
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


def test_a_slip_in_the_name_of_a_file_gives_the_nearest_and_a_run_is_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/sw"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"name": "sw", "recipe_folder": "../.."}')
    with pytest.raises(RecipeError, match=r"^runs/sw is the folder of a run; give the recipe that it was begun with$"):
        load_recipe("runs/sw")
    (tmp_path / "sw.yaml").write_text(SMALL)
    with pytest.raises(RecipeError, match=r"^there is no recipe './swx\.yaml'; did you mean 'sw\.yaml'\?$"):
        load_recipe("./swx.yaml")
    for name in ("runs/swx.yaml", "swx"):  # no recipe is near there, and no file is meant
        with pytest.raises(RecipeError, match="neither a file nor a built-in name"):
            load_recipe(name)


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
