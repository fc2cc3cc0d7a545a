"""A recipe: keys, presets, overrides, code of one's own, fingerprint, and a line for each mistake."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grasp_lora.errors import RecipeError
from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.search import GrpoPolicy, PaperPolicy, preset
from grasp_lora.recipes.load import load_recipe, validate
from grasp_lora.recipes.recipe import Recipe, recipe_keys, schema_text
from grasp_lora.recipes.text import SCHEMA_LINE, builtin_recipes, builtin_text, parse
from grasp_lora.training.training_settings import TrainingSettings

SMALL = "name: a\ndata: {task: completion, target: {language: de, files: [x.csv]}}\n"
Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Give `load(text, *overrides)`: the recipe of a file that holds the text."""

    def loaded(text: str = SMALL, *overrides: str, **options: Any) -> Recipe:
        file = tmp_path / "r.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_recipe(file, overrides, **options)[0]

    return loaded


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_built_in_recipe_is_whole_and_says_what_it_is_for(name: str) -> None:
    text = builtin_text(name)
    assert text.startswith(SCHEMA_LINE + "\n# ")
    recipe, _ = load_recipe(name)
    again = validate(yaml.safe_load(recipe.to_yaml()), name)
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def test_the_resolved_copy_says_every_key_but_the_place_of_the_data(load: Load) -> None:
    recipe = load(SMALL, "data.root=/somewhere")
    content = yaml.safe_load(recipe.to_yaml())
    assert "root" not in content["data"]

    def dotted(section: dict[str, Any], path: str = "") -> list[str]:
        inner = [dotted(part, f"{path}{name}.") if isinstance(part, dict) else [] for name, part in section.items()]
        return [*(path + name for name in section), *(key for keys in inner for key in keys)]

    leaves = [key for key in recipe_keys() if not key.startswith("data.source.")]
    assert set(leaves) - set(dotted(content)) == {"data.root"}


def test_paths_are_written_as_they_are_seen_from_the_folder(load: Load, tmp_path: Path) -> None:
    files = {"train": [str(tmp_path / "x.csv")], "test": ["/elsewhere/y.csv"]}
    text = load(SMALL, f"data.target.files={json.dumps(files)}").to_yaml(tmp_path / "runs" / "a")
    written = yaml.safe_load(text)["data"]["target"]["files"]
    assert written["train"] == ["../../x.csv"]
    assert "elsewhere" not in written["test"][0] or written["test"][0].startswith("..")


@pytest.mark.parametrize(
    "change",
    [
        "seed=7", "backbone.name=other", "backbone.dtype=float32", "data.max_tokens=100", "data.target.train=9", "lora.rank=4",
        "source.training.epochs=1", "target.adapter=x", "merge.rule=svd", "mask.score=input_aware", "controller.preset=paper",
        "controller.rounds.every=3", "controller.rule=best_reward", "final.mode=reselect",
        "final.training.batch_size=2", "generation.max_new_tokens=5", "metrics=[bleu]",
    ],
)  # fmt: skip
def test_the_fingerprint_depends_on_what_decides_the_result(load: Load, change: str) -> None:
    assert load(SMALL, change).fingerprint() != load().fingerprint()


@pytest.mark.parametrize(
    "change", ["data.root=/x", "report_to=tensorboard", "backbone.shard=true", "backbone.gradient_checkpointing=true"]
)
def test_the_fingerprint_does_not_depend_on_the_machine(load: Load, change: str) -> None:
    assert load(SMALL, change).fingerprint() == load().fingerprint()


def test_parts_of_an_experiment_have_seeds_of_their_own(load: Load) -> None:
    recipe = load()
    seeds = [recipe.seed_of(part) for part in ("source", "target", "merge", "final")]
    assert len(set(seeds)) == 4
    assert load(SMALL, "seed=1").seed_of("source") not in seeds


class TestPresets:
    @pytest.mark.parametrize(
        ("changes", "name", "dev"),
        [
            ((), "grasp", True),
            (("data.target.dev=0",), "grasp", False),
            (("data.target.files={train: a.csv, test: b.csv}",), "grasp", False),
            (("data.target.files={train: a.csv, dev: b.csv}",), "grasp", True),
            (("data.target.dev=0", "controller.preset=paper"), "paper", False),
            (("controller={policy: null, rounds: null}",), "grasp", True),
        ],
    )
    def test_what_is_left_out_is_the_presets(self, load: Load, changes: tuple[str, ...], name: str, dev: bool) -> None:
        stage, chosen = load(SMALL, *changes).controller, preset(name, dev)
        assert (stage.policy, stage.rounds, stage.rule) == (chosen.policy, chosen.rounds, chosen.rule)
        assert stage.preset == name
        assert stage.training.patience is None

    def test_keys_are_put_on_top_of_the_preset(self, load: Load) -> None:
        stage = load(SMALL, "controller={preset: grasp, policy: {ratio_min: 0.5}, rounds: {every: 3}}").controller
        assert stage.policy == GrpoPolicy(ratio_min=0.5, ratio_init=0.5)
        assert (stage.rounds.every, stage.rounds.at_ends) == (3, True)
        papers = load(SMALL, "controller.policy={kind: paper, ratio_max: 0.3}").controller
        assert papers.policy == PaperPolicy(ratio_max=0.3, ratio_init=0.3)
        assert papers.rounds == preset("grasp").rounds

    def test_the_papers_preset_sets_its_own(self, load: Load) -> None:
        paper, usual = load(SMALL, "controller.preset=paper", "source.training.epochs=3", "final.mode=reselect"), load()
        for recipe, clipped, dropout in ((paper, 0.0, 0.0), (usual, 1.0, 0.05)):
            trainings = [getattr(recipe, name).training for name in ("source", "target", "controller", "final")]
            assert {training.max_grad_norm for training in trainings} == {clipped}
            assert {training.lr_decay for training in trainings} == {0.85}
            assert recipe.dropout == dropout
        assert paper.final.mask_of(paper.mask) == MaskSettings("gradient_of_delta")
        assert usual.final.mask_of(usual.mask) == usual.mask

    def test_a_training_that_says_something_begins_with_the_usual_settings(self, load: Load) -> None:
        assert load().source.training == TrainingSettings(epochs=2.0, learning_rate=3e-4)
        assert load(SMALL, "source.training.epochs=1").source.training == TrainingSettings(epochs=1.0)
        saved = load(SMALL, "backbone.gradient_checkpointing=true")
        assert saved.controller.training.gradient_checkpointing
        assert saved.final.training.gradient_checkpointing


class TestData:
    def test_files_hub_and_templates_become_settings(self, load: Load) -> None:
        recipe = load(
            "name: a\ndata:\n  task: qa\n  prompt: {sw: 'Swali {question} {context}'}\n"
            "  source: {language: en, hub: [a/b, c]}\n  target: {language: sw, files: {pool: x.csv, test: [y.csv]}}\n"
        )
        target, source = recipe.data.target, recipe.data.source
        assert (target.files, target.explicit) == ({"pool": ("x.csv",), "test": ("y.csv",)}, False)
        assert source is not None
        assert source.hub == ("a/b", "c")
        assert recipe.data.templates(target)[0] == "Swali {question} {context}"
        assert recipe.data.templates(source)[0] is None
        assert validate(recipe.model_dump(mode="json"), "again") == recipe

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("{language: de}", "data of de is given by nothing"),
            ("{language: de, files: {tran: x}}", "'pool', 'train', 'dev' or 'test'"),
            (
                "{language: de, files: [x], prompt: y}",
                r"unknown key 'data\.target\.prompt'; did you mean 'data\.prompt'",
            ),
            ("{language: de, hub: [a, b, c, d]}", r"target\.hub: .* should have at most 3 items"),
            ("{language: no, files: [x]}", r"language: must be a text \(it is False\); put it in quotes"),
        ],
    )
    def test_what_does_not_fit_is_named(self, load: Load, target: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            load(f"name: a\ndata: {{task: completion, target: {target}}}\n")


class TestCode:
    @pytest.mark.parametrize(
        "change",
        [
            "controller.policy.kind=mine:X", "controller.rule=mine:X", "merge.rule=mine:X", "mask.score=mine:X",
            "metrics=[f1, mine:x]",
        ],
    )  # fmt: skip
    def test_without_the_flag_nothing_is_imported(self, load: Load, tmp_path: Path, change: str) -> None:
        (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
        with pytest.raises(RecipeError, match=r"names code, 'mine:\w'; read it, then allow it with --allow-code"):
            load(SMALL, change)

    def test_a_file_beside_the_recipe_is_found(
        self, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(sys.modules, "own_of_recipes", raising=False)
        (tmp_path / "own_of_recipes.py").write_text(
            "from dataclasses import dataclass\nfrom grasp_lora.method.search import GrpoPolicy\n"
            "from grasp_lora.method.merging import MERGE_RULES\nrule = MERGE_RULES['exact']\n"
            "@dataclass(frozen=True)\nclass Mine(GrpoPolicy):\n    step: float = 0.1\n"
        )
        importlib.invalidate_caches()
        path = list(sys.path)
        recipe = load(
            SMALL,
            "controller.policy={kind: 'own_of_recipes:Mine', step: 0.2, candidates: 4}",
            "merge.rule=own_of_recipes:rule",
            allow_code=True,
        )
        assert vars(recipe.controller.policy)["step"] == 0.2
        assert recipe.controller.policy.candidates == 4
        assert sys.path == path
        assert validate(yaml.safe_load(recipe.to_yaml()), "again") == recipe
        with pytest.raises(RecipeError, match=r"unknown key 'controller\.policy\.stop'"):
            load(SMALL, "controller.policy={kind: 'own_of_recipes:Mine', stop: 0.2}", allow_code=True)
        with pytest.raises(RecipeError, match="has no attribute 'gone'"):
            load(SMALL, "merge.rule=own_of_recipes:gone", allow_code=True)


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("data.target.train = 9", 9),
            ("name='123'", "123"),
            ("final.prune_ratio=null", None),
            ("generation.stop=[\"\\n\"]", ("\n",)),
            ("metrics=[f1, bleu]", ("f1", "bleu")),
            ("lora.target_modules=all-linear", ("all-linear",)),
        ],
    )  # fmt: skip
    def test_a_value_is_read_as_yaml(self, load: Load, override: str, value: Any) -> None:
        place: Any = load(SMALL, override)
        for key in override.partition("=")[0].strip().split("."):
            place = getattr(place, key)
        assert place == value

    def test_a_mapping_gives_values_of_python(self, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text(SMALL)
        changes = {"seed": np.int64(7), "metrics": ("f1",), "data.root": tmp_path}
        recipe, base = load_recipe(tmp_path / "r.yaml", changes)
        assert (recipe.seed, recipe.metrics, recipe.data.root, base) == (7, ("f1",), str(tmp_path), tmp_path)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("seed", r"must look like a\.b=value"),
            ("seed=", r"a\.b=null unsets a key"),
            ("=1", r"must look like a\.b=value"),
            ("name.x=1", "name: must be a text"),
            ("seed=[1", "is no valid YAML"),
            ("backbone.name=org/llama #2", 'has a comment, as YAML reads it; write backbone.name="org/llama #2"'),
        ],
    )
    def test_what_does_not_fit_is_named(self, load: Load, override: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message) as caught:
            load(SMALL, override)
        assert "\n" not in str(caught.value)


MISTAKES = {
    "a key of another place": ("epochs: 3", r"did you mean 'source\.training\.epochs' or "),
    "a slip": ("lora: {rnak: 3}", "unknown key 'lora.rnak'; did you mean 'rank'"),
    "a word": ("seed: one", r"seed: input should be a valid integer, .* \(it is 'one'\)"),
    "a share": ("final: {prune_ratio: 50%}", r"prune_ratio: .*valid number.* \(it is '50%'\)"),
    "a text for a list": ("metrics: bleu", r"metrics: must be a list, such as \[first, second\] \(it is 'bleu'\)"),
    "a text for a section": ("lora: 3", r"lora: must be a section of keys and values \(it is 3\)"),
    "a preset": ("controller: {preset: papr}", r"controller\.preset is 'papr'; allowed: grasp, paper"),
    "a policy": ("controller: {policy: grpo}", r"controller\.policy: must be a section .*\(it is 'grpo'\)"),
    "a kind": ("controller: {policy: {kind: grbo}}", "policy kind is 'grbo'; allowed: grpo, paper"),
    "patience of a run at many ratios": ("controller: {training: {patience: 1}}", r"training\.patience is 1, but this policy"),
    "a merge on the source": ("target: {on: source}\nmerge: {rule: svd}", r"target\.on is 'source', .* remove merge\.rule"),
    "a choice": ("final: {deliver: both}", r"final\.deliver: input should be 'best', 'grasp' or 'continued' \(it is 'both'\)"),
    "a ratio of no merge": ("final: {deliver: continued}", r"which merges nothing; .* \(they are None and None\)"),
    "an adapter of no merge": ("final: {deliver: continued, prune_ratio: 0}\ntarget: {adapter: a}", r"\(they are 0\.0 and a\)"),
    "code in a preset": ("controller: {preset: 'json:loads'}", r"controller\.preset is 'json:loads'; allowed: grasp"),
    "endless": ("final: {training: {epochs: 1.0e+9}}", r"epochs is 1000000000\.0; it must be above 0 and at most 10000"),
    "out of range": ("final: {training: {epochs: -1}}", r"final\.training: epochs is -1\.0; it must be above 0"),
    "no number": ("lora: {alpha: .nan}", r"lora\.alpha.*finite number"),
    "a key twice": ("seed: 1\nseed: 1", "the key 'seed' stands twice; remove one"),
    "a tag": ("seed: !!python/object:os.system x", "no valid YAML in line 3"),
    "no YAML": ("a: [1, 2", "no valid YAML in line 4"),
    "depth": ("a: " + "[" * 2000, "no valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(load: Load, name: str) -> None:
    text, message = MISTAKES[name]
    with pytest.raises(RecipeError, match=message) as caught:
        load(f"{SMALL}{text}\n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a", "just text", b"\xff\xfe\x00"])
def test_a_file_that_is_no_recipe_is_one_line(load: Load, content: Any) -> None:
    with pytest.raises(RecipeError, match=r"must hold keys and values|no valid YAML: .utf-8. codec"):
        load(content)


def test_what_is_no_recipe_leads_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(SMALL)
    Path("runs").mkdir()
    Path("runs/run.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"did you mean 'mine\.yaml'"):
        load_recipe("mien.yaml")
    with pytest.raises(RecipeError, match="is the folder of a run"):
        load_recipe("runs")
    with pytest.raises(RecipeError, match=r"neither a file, as seen from .*, nor a built-in name"):
        load_recipe("nowhere")


def test_the_schema_describes_every_key_and_fits_the_built_in_recipes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(schema_text())
    for name in builtin_recipes():
        jsonschema.validate(parse(builtin_text(name), name), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parse(SMALL, "a") | {"sede": 1}, schema)
