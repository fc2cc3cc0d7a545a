"""What `export` writes: ordinary PEFT adapters and model folders, right within the error that it states, or nothing at all."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from grasp_lora.errors import AdapterError, GraspError, RecipeError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.masks import MaskSet, MaskSettings
from grasp_lora.models.adapters import save_adapter
from grasp_lora.models.backbone import fingerprint
from grasp_lora.models.export import ExportSettings, accepted_by, export_folder
from grasp_lora.models.live import lora_layers
from grasp_lora.models.reading import OUR_FILE, WEIGHTS_FILE, read_adapter

IDS = torch.arange(4, 24)[None]
TARGETS = {"llama": ("q_proj", "down_proj"), "gemma3": ("q_proj", "down_proj"), "gpt2": ("c_attn",)}


@pytest.fixture
def llama(save_backbone: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return save_backbone("llama")


def write_adapter(
    model: PreTrainedModel,
    targets: tuple[str, ...],
    *,
    name: str = "adapter",
    prune: float = 0.5,
    mask: MaskSettings | None = None,
    seed: int = 3,
    scaling: float = 1.0,
) -> AdapterWeights:
    """Write a random adapter of two segments of rank 4 each, pruned by whole components."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for module, layer in model.named_modules():
        if module.endswith(targets):
            d_out, d_in = layer.weight.shape if model.config.model_type != "gpt2" else layer.weight.shape[::-1]
            A, B = torch.randn(8, d_in, generator=generator), torch.randn(d_out, 8, generator=generator)
            pairs[module] = LoraPair(0.1 * A, 0.1 * B, scaling, (Segment("source", 4), Segment("target", 4)))
    masks = MaskSet(pairs, mask or MaskSettings(granularity="component"))
    masks.commit(prune)
    weights = AdapterWeights(masks.pairs)
    save_adapter(Path(name), weights, model, backbone_name="backbone", fingerprint=fingerprint(model), dropout=0.05)
    return weights


def export(output: str, *, place: str = "adapter", **settings: Any) -> list[str]:
    return export_folder(place, Path(output), ExportSettings(**settings))


def facts_of(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / OUR_FILE).read_text(encoding="utf-8"))["export"]


def plain_peft(folder: str) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("backbone"), folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def dense_deltas(folder: str) -> dict[str, torch.Tensor]:
    """The deltas of an adapter folder in float64, as plain PEFT reads factors and scaling."""
    return {
        name: layer.scaling["default"]
        * (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()).detach()
        for name, layer in lora_layers(plain_peft(folder)).items()
    }


def relative(new: list[torch.Tensor], old: list[torch.Tensor]) -> float:
    joined = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (new, old)]
    return float((joined[0] - joined[1]).norm() / joined[1].norm())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestAdapter:
    @pytest.mark.parametrize("architecture", TARGETS)
    def test_pruned_ranks_make_the_file_smaller_and_change_nothing(
        self, architecture: str, save_backbone: Callable[[str], PreTrainedModel]
    ) -> None:
        weights = write_adapter(save_backbone(architecture), TARGETS[architecture])
        lines = export("out", prune_rank=True)
        components = 8 * len(weights)
        assert f"removed {components // 2} of {components} components, 4 left in each module" in lines
        assert "delta: unchanged" in lines
        assert facts_of("out")["relative_error"] < 1e-12
        before, after = (sum(t.numel() for t in load_file(f"{f}/{WEIGHTS_FILE}").values()) for f in ("adapter", "out"))
        assert after == before / 2
        assert {pair.segments for pair in read_adapter("out").weights.values()} == {
            (Segment("source", 2), Segment("target", 2))
        }
        expected = logits(plain_peft("adapter"))
        assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained("backbone")), atol=1e-2)
        exported = plain_peft("out")
        torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(exported.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("rank", [None, 2])
    def test_the_stated_error_is_that_of_the_written_deltas(
        self, rank: int | None, dtype: str, llama: PreTrainedModel
    ) -> None:
        write_adapter(llama, TARGETS["llama"], scaling=2.0)
        lines = export("out", rank=rank, dtype=dtype)
        assert {str(tensor.dtype) for tensor in load_file(f"out/{WEIGHTS_FILE}").values()} == {f"torch.{dtype}"}
        old, new = dense_deltas("adapter"), dense_deltas("out")
        errors = {module: relative([new[module]], [old[module]]) for module in old}
        stated = facts_of("out")
        assert stated["relative_error"] == pytest.approx(
            relative(list(new.values()), list(old.values())), rel=1e-6, abs=1e-12
        )
        assert stated["worst_error"] == pytest.approx(max(errors.values()), rel=1e-6, abs=1e-12)
        if rank is None and dtype == "float32":
            assert "delta: unchanged" in lines
            assert contents(Path("out"))[WEIGHTS_FILE] == contents(Path("adapter"))[WEIGHTS_FILE]
        else:
            assert stated["worst_module"] == max(errors, key=lambda module: errors[module])
            found = re.search(r"relative error (\S+) over all modules, at worst (\S+) \((\S+)\)", "\n".join(lines))
            assert found
            assert float(found[1]) == pytest.approx(stated["relative_error"], rel=1e-2)
            assert float(found[2]) == pytest.approx(stated["worst_error"], rel=1e-2)
            assert stated["relative_error"] > 0.05 if rank else 1e-4 < stated["relative_error"] < 1e-2

    def test_unequal_ranks_are_read_right_and_an_empty_module_is_left_out(self, llama: PreTrainedModel) -> None:
        weights = write_adapter(llama, TARGETS["llama"], prune=0.0)
        empty = "model.layers.1.self_attn.q_proj"
        for removed, (module, pair) in enumerate(weights.items()):
            pair.B[:, : 8 if module == empty else removed] = 0
        save_adapter(
            Path("holes"), weights, llama, backbone_name="backbone", fingerprint=fingerprint(llama), dropout=0.0
        )
        lines = export("out", place="holes", prune_rank=True)
        ranks = {module: pair.rank for module, pair in read_adapter("out").weights.items()}
        assert empty not in ranks
        assert ranks == {
            "model.layers.0.self_attn.q_proj": 8,
            "model.layers.0.mlp.down_proj": 7,
            "model.layers.1.mlp.down_proj": 5,
        }
        assert "removed 12 of 32 components, 0 to 8 left in a module" in lines
        assert "delta: unchanged" in lines
        expected = logits(plain_peft("holes"))
        exported = plain_peft("out")
        assert empty not in lora_layers(exported)
        torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(exported.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
        assert any("add --uniform-rank" in line for line in lines)

        lines = export("even", place="holes", prune_rank=True, uniform_rank=True)
        config = json.loads(Path("even/adapter_config.json").read_text())
        assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
        assert config["r"] == max(ranks.values())
        assert not any("--uniform-rank" in line for line in lines)
        torch.testing.assert_close(logits(plain_peft("even")), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"prune_rank": True}])
    def test_one_scaling_serves_programs_that_know_only_one(self, settings: dict, llama: PreTrainedModel) -> None:
        weights = write_adapter(llama, TARGETS["llama"])
        mixed = AdapterWeights(
            {
                module: LoraPair(pair.A, pair.B / (1 + i), 1.0 + i, pair.segments)
                for i, (module, pair) in enumerate(weights.items())
            }
        )
        save_adapter(Path("mixed"), mixed, llama, backbone_name="backbone", fingerprint=fingerprint(llama), dropout=0.0)
        export("out", place="mixed", **settings)
        config = json.loads(Path("out/adapter_config.json").read_text())
        assert config["alpha_pattern"] == {}
        # As vLLM and llama.cpp compute it, with no look at any pattern.
        scaling = config["lora_alpha"] / config["r"]
        tensors = load_file(f"out/{WEIGHTS_FILE}")
        for module, delta in dense_deltas("out").items():
            A, B = (tensors[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "AB")
            torch.testing.assert_close(scaling * B @ A, delta)

    def test_it_swaps_with_other_adapters(self, llama: PreTrainedModel) -> None:
        write_adapter(llama, TARGETS["llama"])
        write_adapter(llama, TARGETS["llama"], name="second", seed=4)
        export("one", prune_rank=True)
        export("two", place="second", rank=2)
        one, two = logits(plain_peft("one")), logits(plain_peft("two"))
        model = plain_peft("one")
        model.load_adapter("two", "other")
        model.set_adapter("other")
        torch.testing.assert_close(logits(model), two)
        model.set_adapter("default")
        torch.testing.assert_close(logits(model), one)
        for folder, expected in (("two", two), ("one", one)):
            hotswap_adapter(model, folder, "default")
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)

    def test_facts_and_card_name_the_adapter_and_no_place(self, llama: PreTrainedModel, tmp_path: Path) -> None:
        write_adapter(llama, TARGETS["llama"])
        config = json.loads(Path("adapter/adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "backbone")
        Path("adapter/adapter_config.json").write_text(json.dumps(config))
        Path("adapter/README.md").write_text("---\nlibrary_name: peft\n---\n\n# Mine\n\nScores.\n")
        export(str(tmp_path / "one"), place=str(tmp_path / "adapter"), prune_rank=True)
        export("two", place="one", rank=2, dtype="bfloat16")
        export("model", place="one", fold=True, dtype="bfloat16")
        assert facts_of("one")["adapter"] == "adapter"
        assert facts_of("one")["sha256"] == read_adapter("adapter").sha256
        assert facts_of("two")["adapter"] == "one"
        assert facts_of("two") | {"rank": 2, "dtype": "bfloat16"} == facts_of("two")
        card = Path("two/README.md").read_text()
        assert card.startswith("---\nlibrary_name: peft\n---\n\n# Mine\n\nScores.\n")
        assert card.count("## Export") == 1
        assert "removed" not in card
        for folder in ("one", "two", "model"):
            for name, content in contents(Path(folder)).items():
                assert str(tmp_path).encode() not in content, name
        assert read_adapter("two").base_model == "backbone"

    def test_a_process_of_its_own_needs_peft_alone(self, llama: PreTrainedModel) -> None:
        write_adapter(llama, TARGETS["llama"], mask=MaskSettings(scope="global", granularity="component"))
        expected = logits(plain_peft("adapter"))
        export("out", prune_rank=True, dtype="bfloat16")
        code = (
            "import sys, torch\nfrom peft import AutoPeftModelForCausalLM\nfrom safetensors.torch import save_file\n"
            "model = AutoPeftModelForCausalLM.from_pretrained('out').merge_and_unload().eval()\n"
            "with torch.no_grad():\n    logits = model(torch.arange(4, 24)[None]).logits\n"
            "assert not any(name.startswith('grasp_lora') for name in sys.modules)\n"
            "save_file({'logits': logits}, 'logits.safetensors')\n"
        )
        forked.python(["-c", code]).check_returncode()
        torch.testing.assert_close(load_file("logits.safetensors")["logits"], expected, rtol=0.05, atol=0.15)
        torch.testing.assert_close(
            load_file("logits.safetensors")["logits"], logits(plain_peft("out")), rtol=1e-4, atol=1e-4
        )


class TestFold:
    @pytest.mark.parametrize("architecture", TARGETS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_model_folder_answers_as_the_adapter_does(
        self, architecture: str, dtype: str, save_backbone: Callable[[str], PreTrainedModel]
    ) -> None:
        weights = write_adapter(save_backbone(architecture), TARGETS[architecture])
        lines = export("out", fold=True, dtype=dtype)
        model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert str(model.dtype) == f"torch.{dtype}"
        before = AutoModelForCausalLM.from_pretrained("backbone")
        assert model.config.tie_word_embeddings == before.config.tie_word_embeddings
        assert set(load_file("out/model.safetensors")) == set(load_file("backbone/model.safetensors"))
        assert model.generation_config.eos_token_id == before.generation_config.eos_token_id
        assert AutoTokenizer.from_pretrained("out")("où?") == AutoTokenizer.from_pretrained("backbone")("où?")
        adapted = plain_peft("adapter")
        expected = logits(adapted)
        merged = adapted.merge_and_unload()
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.1, "atol": 0.4}
        torch.testing.assert_close(logits(model), expected, **close)
        torch.testing.assert_close(logits(model), logits(merged.to(model.dtype)), **close)

        written, exact = load_file("out/model.safetensors"), []
        for module, pair in weights.items():
            delta = pair.B.double() @ pair.A.double()
            original = before.get_submodule(module).weight.detach().double()
            exact.append(original + (delta.T if architecture == "gpt2" else delta))
        # GPT-2's file leaves out the prefix of its modules.
        found = [
            written[f"{module}.weight".removeprefix("" if f"{module}.weight" in written else "transformer.")]
            for module in weights
        ]
        measured = relative([weight.double() for weight in found], exact)
        assert facts_of("out")["rounding"]["of_weights"] == pytest.approx(measured, rel=1e-6)
        stated = next(
            re.match(r"rounding: relative error (\S+) of the folded weights, \S+ of the delta$", line)
            for line in lines
            if line.startswith("rounding")
        )
        assert stated
        assert float(stated[1]) == pytest.approx(measured, rel=1e-2)

    @pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")  # PEFT, on what this test is about
    def test_a_tied_output_layer_gets_a_weight_of_its_own(
        self, save_backbone: Callable[[str], PreTrainedModel]
    ) -> None:
        before = save_backbone("gemma3")
        write_adapter(before, ("lm_head",), prune=0.0)
        expected = logits(plain_peft("adapter"))
        lines = export("out", fold=True, dtype="float32")
        assert "delta: unchanged" in lines
        model = AutoModelForCausalLM.from_pretrained("out")
        assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.filterwarnings(
        "ignore:.*(ensure_weight_tying|tie_word_embeddings|save_embedding_layers).*:UserWarning"
    )
    @pytest.mark.parametrize("architecture", ["llama", "gemma3"])
    def test_a_base_weight_that_peft_stores_beside_is_left_out_where_it_is_the_backbones(
        self, architecture: str, save_backbone: Callable[[str], PreTrainedModel]
    ) -> None:
        save_backbone(architecture)
        config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained("backbone"), config).eval()
        model.save_pretrained("adapter")
        assert "base_model.model.lm_head.base_layer.weight" in load_file(Path("adapter") / WEIGHTS_FILE)
        export("out", fold=True, dtype="float32")
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained("out")), logits(model), rtol=1e-4, atol=1e-4
        )
        export("plain")
        torch.testing.assert_close(logits(plain_peft("plain")), logits(model), rtol=1e-4, atol=1e-4)
        model.get_base_model().lm_head.base_layer.weight.data[0, 0] += 1
        model.save_pretrained("adapter")
        with pytest.raises(
            AdapterError, match=r"base weight of lm_head that is not the one of .*save_embedding_layers=False"
        ):
            export("other")

    def test_it_combines_with_a_lower_rank(self, llama: PreTrainedModel) -> None:
        write_adapter(llama, TARGETS["llama"])
        export("small", prune_rank=True, rank=2)
        lines = export("out", prune_rank=True, rank=2, fold=True, dtype="float32")
        assert "removed 16 of 32 components, 4 left in each module" in lines
        assert facts_of("out")["relative_error"] == pytest.approx(facts_of("small")["relative_error"], rel=1e-6)
        folded = AutoModelForCausalLM.from_pretrained("out")
        torch.testing.assert_close(logits(folded), logits(plain_peft("small")), rtol=1e-4, atol=1e-4)


class TestNothingIsWritten:
    @pytest.fixture(autouse=True)
    def adapter(self, llama: PreTrainedModel) -> None:
        write_adapter(llama, TARGETS["llama"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rank", "0"], r"--rank is 0; it must be at least 1"),
            (["--rank", "8"], r"adapter adapter has rank 8, so --rank 8 has nothing to gain; give one below 8"),
            (["--rank", "9"], r"--rank 9 has nothing to gain"),
            (["--dtype", "int8"], r"--dtype is 'int8'; allowed: float32, float16, bfloat16"),
            (["--fold"], r"--fold writes a whole model; say in which --dtype: float32, float16, bfloat16"),
            (["--fold", "--dtype", "fp16"], r"--dtype is 'fp16'; allowed"),
            (["--fold", "--uniform-rank", "--dtype", "float16"], r"--uniform-rank pads an adapter, but --fold writes none"),
            (["--backbone", "./nowhere"], r"Backbone folder '\./nowhere' does not exist"),
            (["--backbone", "other"], r"use an adapter of this backbone"),
            (["--fold", "--dtype", "float16", "--backbone", "huge"], r"model\.norm\.weight .*float16 ends at.*use bfloat16"),
            (["-o", "adapter"], r"adapter exists and is not an empty folder; choose another with --output"),
            (["-o", "backbone/config.json"], r"config\.json exists and is not an empty folder"),
            (["-o", "adapter/adapter_config.json/x"], r"x cannot be made \(adapter_config\.json is a file\); choose"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_one_line(
        self,
        arguments: list[str],
        message: str,
        cli: Callable[..., Any],
        tmp_path: Path,
        llama: PreTrainedModel,
        make_tiny_model: Callable[..., PreTrainedModel],
        tiny_tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        if "other" in arguments:
            make_tiny_model("gpt2").save_pretrained("other")
            tiny_tokenizer.save_pretrained("other")
        if "huge" in arguments:
            shutil.copytree("backbone", "huge")
            llama.model.norm.weight.data[0] = 1e6
            llama.save_pretrained("huge")
            (tmp_path / "adapter" / OUR_FILE).unlink()
        before = contents(tmp_path)
        result = cli("export", "adapter", *([] if "-o" in arguments else ["-o", "deep/out"]), *arguments)
        assert result.status == 2
        assert result.out == ""
        assert re.fullmatch(r"(WARNING: [^\n]+\n)*error: [^\n]+\n", result.err), result.err
        assert re.search(message, result.err), result.err
        assert contents(tmp_path) == before
        assert not (tmp_path / "deep").exists()

    def test_a_card_without_end(self) -> None:
        with (Path("adapter") / "README.md").open("wb") as card:
            card.truncate(2**40)
        with pytest.raises(AdapterError, match=r"adapter adapter: README\.md: it has 1099511627776 bytes; .*remove it"):
            export("out")
        assert not Path("out").exists()

    def test_values_that_float16_does_not_hold(self, llama: PreTrainedModel, tmp_path: Path) -> None:
        weights = write_adapter(llama, TARGETS["llama"], name="large", prune=0.0)
        weights["model.layers.0.self_attn.q_proj"].A[0, 0] = 1e6
        save_adapter(
            Path("large"), weights, llama, backbone_name="backbone", fingerprint=fingerprint(llama), dropout=0.0
        )
        before = contents(tmp_path)
        with pytest.raises(
            AdapterError, match=r"factor A of model\.layers\.0\.self_attn\.q_proj .*float16 ends at 6\.55e\+04"
        ):
            export("out", place="large", dtype="float16")
        assert contents(tmp_path) == before
        export("out", place="large", dtype="bfloat16")

    def test_an_adapter_that_changes_nothing(self, llama: PreTrainedModel) -> None:
        write_adapter(llama, TARGETS["llama"], name="empty", prune=1.0)
        with pytest.raises(
            AdapterError, match="adapter empty changes nothing: all its components are zero; use the backbone"
        ):
            export("out", place="empty", prune_rank=True)
        assert "delta: unchanged" in export("out", place="empty")

    @pytest.mark.parametrize("settings", [{}, {"fold": True, "dtype": "bfloat16"}])
    def test_a_disk_that_fails_half_way(self, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import grasp_lora.models.export as module

        def fail(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "_describe", fail)
        before = contents(tmp_path)
        with pytest.raises(GraspError, match=r"out cannot be written \(.*No space left on device\); nothing was"):
            export("out", **settings)
        assert contents(tmp_path) == before
        assert not list(tmp_path.glob(".out*"))

    def test_an_adapter_of_other_weights(self, llama: PreTrainedModel) -> None:
        info = json.loads(Path("adapter", OUR_FILE).read_text())
        Path("adapter", OUR_FILE).write_text(json.dumps(info | {"backbone_fingerprint": "0123456789abcdef"}))
        with pytest.raises(AdapterError, match=r"fingerprint 0123456789abcdef.*use the backbone it was trained on"):
            export("out", fold=True, dtype="float32")

    def test_an_adapter_of_a_quantised_backbone_is_folded_into_the_full_one(
        self, llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
    ) -> None:
        weights = read_adapter("adapter").weights
        llama.config.quantization_config = {"quant_method": "bitsandbytes"}
        save_adapter(
            Path("small"), weights, llama, backbone_name="backbone", fingerprint="0123456789abcdef", dropout=0.0
        )
        assert read_adapter("small").info.backbone_quantised
        export("out", place="small", fold=True, dtype="float32")
        assert "could not be checked by its weights" in caplog.text
        export("other", fold=True, dtype="float32")
        same = load_file("other/model.safetensors")
        for name, tensor in load_file("out/model.safetensors").items():
            assert torch.equal(tensor, same[name])
        with pytest.raises(AdapterError, match="use the backbone it was trained on"):
            export("third", place="small")


def test_an_empty_folder_is_filled_by_the_command(llama: PreTrainedModel, cli: Callable[..., Any]) -> None:
    write_adapter(llama, TARGETS["llama"])
    Path("out").mkdir()
    result = cli("export", "adapter", "-o", "out", "--prune-rank", "--dtype", "bfloat16")
    assert result.status == 0, result.err
    assert result.err == ""
    assert result.out.splitlines()[0].startswith("adapter: 4 modules, rank 4, bfloat16, 0.0")
    assert result.out.endswith("-> out\n")
    assert "vLLM: --enable-lora --max-lora-rank 8; modules down_proj, q_proj" in result.out
    assert "llama.cpp: convert_lora_to_gguf.py takes it as it is" in result.out


def test_a_mask_of_single_weights_says_why_nothing_was_removed(llama: PreTrainedModel) -> None:
    write_adapter(llama, TARGETS["llama"], mask=MaskSettings())
    assert (
        "removed 0 of 32 components, 8 left in each module; only a mask of granularity component empties whole ones"
        in export("out", prune_rank=True)
    )


@pytest.mark.parametrize(
    ("ranks", "conv1d", "expected"),
    [
        ({"a.q_proj": 8}, False, ["vLLM: --enable-lora --max-lora-rank 8; modules q_proj", "llama.cpp: .* takes it as it is"]),
        ({"a.q_proj": 9, "b.q_proj": 9}, False, ["vLLM: .* --max-lora-rank 16; modules q_proj", "llama.cpp: .* as it is"]),
        ({"a.q_proj": 2, "a.v_proj": 65}, False, ["vLLM: .* 128; modules q_proj, v_proj", ".*wrongly; add --uniform-rank.*"]),
        ({"a.q_proj": 600}, False, ["vLLM: rank 600 is above its limit of 512; use --rank or --fold", "llama.cpp: .*"]),
        ({"a.c_attn": 8}, True, ["vLLM, llama.cpp: .*Conv1D.*use --fold"]),
        ({"lm_head": 8}, False, ["vLLM, llama.cpp: .*lm_head.*--fold works for all"]),
    ],
)  # fmt: skip
def test_what_other_programs_need(ranks: dict[str, int], conv1d: bool, expected: list[str]) -> None:
    weights = AdapterWeights({name: LoraPair(torch.ones(rank, 2), torch.ones(3, rank)) for name, rank in ranks.items()})
    lines = accepted_by(weights, conv1d=conv1d)
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines


@pytest.mark.parametrize("settings", [{"rank": -1}, {"dtype": ""}, {"fold": True}])
def test_settings_are_checked_at_once(settings: dict) -> None:
    with pytest.raises(RecipeError):
        ExportSettings(**settings)
