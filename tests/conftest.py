"""Offline fixtures shared by all tests: a byte-level tokenizer and random two-layer models.

The libraries are imported where they are used: the process that only hands out tests to others has no use for them.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads these once
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# How quickly inputs come says how busy the machine is, and nothing about the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3
TINY_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
TINY_CONTEXT = 512


MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
MEMORY_NEEDED = 4_000_000_000  # bytes free


def pytest_configure(config: pytest.Config) -> None:
    # What is written is forced to the disk each time: a sixth of the tests' time where that is a real disk.
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_NEEDED:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    # peft 0.21 itself reads this attribute in every get_peft_model; transformers 5.24 warns about it.
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def pytest_collection_modifyitems() -> None:
    import torch
    from accelerate import optimizer
    from accelerate.utils import memory

    torch.set_num_threads(1)
    # Every fine-tune ends in a full garbage collection, which takes longer than a tiny training; Python's own go on.
    memory.gc = SimpleNamespace(collect=lambda: 0)
    # Every step looks anew whether a package is there.
    optimizer.is_lomo_available = cache(optimizer.is_lomo_available)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws does not depend on the tests before it in its process."""
    import torch

    torch.manual_seed(0)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per UTF-8 byte, so that any language round-trips; it adds BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=TINY_CONTEXT,
    )


def build_tiny_model(
    architecture: str, seed: int = 0, vocab_size: int = TINY_VOCAB_SIZE, layers: int = 2
) -> PreTrainedModel:
    """Build a random float32 model in eval mode; equal seeds give equal weights, and the global random state stays.

    With `tiny_tokenizer` it needs a vocabulary of 260. "gemma3" has two layers.
    """
    import torch
    import transformers

    torch.set_num_threads(1)  # the benchmarks call this without pytest
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": vocab_size}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": TINY_CONTEXT,
        # Large weights: with the usual 0.02 a random model answers nearly the same whatever it reads.
        "initializer_range": 0.2,
    }
    sliding = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    gpt2 = {"n_embd": 32, "n_inner": 64, "n_layer": layers, "n_head": 4, "n_positions": TINY_CONTEXT}
    kind, config, settings = {
        "llama": ("LlamaForCausalLM", "LlamaConfig", shape),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", shape | sliding),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", shape),
        "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", shape | experts),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", gpt2 | {"initializer_range": 0.2}),
    }[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, kind)(getattr(transformers, config)(**settings, **tokens))
    return model.float().eval()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with pad 0, bos 1, eos 2, unk 3; `save_pretrained` works."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., PreTrainedModel]:
    """Give the factory `make_tiny_model(architecture, seed=0, vocab_size=260)`."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_backbone_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder with a saved tiny Llama (seed 0, float32) and its tokenizer; treat it as read-only."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny-llama"
    build_tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sources without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", *build, str(Path(__file__).parents[1])], check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture
def save_backbone(
    tmp_path: Path,
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], PreTrainedModel]:
    """Save a tiny model as `backbone` in the working folder."""
    monkeypatch.chdir(tmp_path)

    def save(architecture: str) -> PreTrainedModel:
        model = make_tiny_model(architecture)
        model.save_pretrained("backbone")
        tiny_tokenizer.save_pretrained("backbone")
        return model

    return save


def run_ranks(
    count: int,
    arguments: Sequence[str],
    cwd: Path | None = None,
    during: Callable[[subprocess.Popen[str]], None] | None = None,
    **env: str,
) -> tuple[int, str]:
    """Start so many processes as torchrun does, and call `during` with the launcher; return exit status and output of all.

    A hang ends after ten minutes.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    process = subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if during is not None:
        during(process)
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the launcher and its processes: a session of their own
        output, _ = process.communicate()
        pytest.fail(f"the processes hang: {output[-3000:]}")
    return process.returncode, output


@dataclass(frozen=True)
class CliResult:
    """What a command left: exit status and output."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., CliResult]]:
    """Give `cli("check", "recipe.yaml", ...)`, which calls the real entry point in this process."""
    from grasp_lora.cli import main

    logger = logging.getLogger("grasp_lora")
    before = logger.handlers[:], logger.level, logger.propagate

    def call(*arguments: object) -> CliResult:
        monkeypatch.setattr("sys.argv", ["grasp-lora", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        output = capsys.readouterr()
        return CliResult(status, output.out, output.err)

    yield call
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


TINY_RECIPE = """\
name: tiny
backbone: {name: tiny-llama, dtype: float32}
data:
  task: completion
  source: {language: en, files: [source.jsonl], train: 12, dev: 4}
  target: {language: de, files: [target.jsonl], train: 10, dev: 6, micro_dev: 4, test: 8}
lora: {rank: 2, alpha: 4}
source: {training: {epochs: 1, batch_size: 2, learning_rate: 1.0e-2}}
target: {training: {epochs: 1, learning_rate: 1.0e-2}}
controller: {preset: paper, rule: surrogate_at_end, rounds: {every: 3}, training: {epochs: 1, learning_rate: 1.0e-2}}
final: {deliver: grasp, training: {epochs: 1, learning_rate: 1.0e-2}}
generation: {max_new_tokens: 4}
"""


def write_tiny_workspace(folder: Path, backbone: Path) -> Path:
    """Write data, a link to the backbone and a recipe that uses them by relative paths; return the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny-llama").symlink_to(backbone, target_is_directory=True)
    for name, rows in (("source", 20), ("target", 40)):
        lines = [{"prompt": f"{name} {i}: what?", "completion": f" {i % 7}{i % 3}"} for i in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY_RECIPE, encoding="utf-8")
    return recipe


@pytest.fixture
def tiny_workspace(tmp_path: Path, tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, made the current one, with `tiny.yaml`, its data and its backbone `tiny-llama`."""
    folder = tmp_path / "work"
    write_tiny_workspace(folder, tiny_backbone_folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GRASP_LORA_DATA", raising=False)
    return folder


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Path:
    """The folder of a whole, uninterrupted run of `tiny.yaml`; treat it as read-only."""
    from grasp_lora import api

    recipe = write_tiny_workspace(tmp_path_factory.mktemp("reference") / "work", tiny_backbone_folder)
    api.run(recipe, folder=recipe.parent / "run")
    return recipe.parent / "run"


@pytest.fixture
def finished_run(tiny_workspace: Path, reference_run: Path) -> Path:
    """The folder `run` in the working folder: a copy of the reference run."""
    return Path(shutil.copytree(reference_run, tiny_workspace / "run"))
