"""What a fine-tune step and a probe cost beside the bare computation, as ratios within one run.

    python benchmarks/overhead.py mlqa-ar --set data.root=FOLDER

Step: one epoch of our fine-tune over the same batches as a bare PyTorch + PEFT loop (logits at label positions in both).
Probe: masks, micro-dev losses and restoring against the forward passes of the same batches up to the last hidden state.
Both sides alternate, and each figure is the median of the pairs' ratios, since machines are shared and noisy.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from grasp_lora.experiments.recipe import load_recipe
from grasp_lora.experiments.session import Session
from grasp_lora.method.masking import MaskSet
from grasp_lora.training.adapters import fresh_adapter, live_pairs
from grasp_lora.training.finetune import finetune
from grasp_lora.training.probing import ProbeSet, collate, example_losses
from grasp_lora.training.settings import TrainingSettings


def main() -> None:
    """Measure and write one JSON object to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--examples", type=int, default=24, help="training examples in an epoch")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of measurements")
    arguments = parser.parse_args()
    recipe, base = load_recipe(arguments.recipe, arguments.overrides)
    session = Session(recipe, base)
    session.prepare()
    print(json.dumps(measure(session, arguments.examples, arguments.pairs), indent=1))  # noqa: T201


def measure(session: Session, examples: int, pairs: int) -> dict[str, object]:
    """Return the ratios, each with the spread of its pairs."""
    train = session.splits.train[:examples]
    settings = TrainingSettings(epochs=1, batch_size=1, patience=None, keep="last")
    pad_id = session.pad_id
    with (
        fresh_adapter(session.backbone.model, session.recipe.lora, seed=0) as model,
        tempfile.TemporaryDirectory() as folder,
    ):

        def ours() -> None:
            finetune(model, train, (), settings, pad_id=pad_id, seed=0, folder=Path(folder))

        def bare() -> None:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
            model.train()
            for example in train:
                batch = collate([example], pad_id)
                loss = example_losses(model, batch, label_positions=True).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()

        step = compare(ours, bare, pairs)
        masks = MaskSet(live_pairs(model), session.recipe.mask)
        micro_dev = session.splits.micro_dev
        probes = ProbeSet(micro_dev, pad_id)
        decoder = model.get_base_model().model
        ranking = masks.rank()

        def probe() -> None:
            with masks.probe(0.4, ranking):
                probes.losses(model)

        @torch.no_grad()
        def forward() -> None:
            model.eval()
            for _, batch in probes.batches:
                decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

        return {
            "backbone": session.backbone.name,
            "threads": torch.get_num_threads(),
            "training_examples": len(train),
            "micro_dev_examples": len(micro_dev),
            "step_over_bare_loop": step,
            "probe_over_forward": compare(probe, forward, pairs),
        }


def compare(ours: Callable[[], None], reference: Callable[[], None], pairs: int) -> dict[str, float]:
    """Time both in turn and return the median ratio, its range and the seconds of the reference."""
    ours()
    reference()
    ratios, seconds = [], []
    for _ in range(pairs):
        numerator, denominator = _seconds(ours), _seconds(reference)
        ratios.append(numerator / denominator)
        seconds.append(denominator)
    return {
        "median_ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "reference_seconds": round(statistics.median(seconds), 3),
    }


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
