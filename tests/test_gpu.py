"""What wants a GPU; `make gpu` runs these."""

import pytest
import torch
from random_examples import make_examples

from grasp_lora import api
from grasp_lora.method.lora import LoraPair, Segment
from grasp_lora.method.masks import MaskSet, MaskSettings
from grasp_lora.models.backbone import supports_logits_to_keep
from grasp_lora.models.loss import collate, example_losses
from grasp_lora.training.probes import ProbeSet

EXAMPLES = make_examples(12)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
    return torch.device("cuda")


def pairs_on(device: torch.device) -> dict[str, LoraPair]:
    generator, segments = torch.Generator().manual_seed(0), (Segment("source", 2), Segment("target", 4))
    return {
        f"layer{number}": LoraPair(
            torch.nn.Parameter(torch.randn(6, 40, generator=generator).to(device)),
            torch.nn.Parameter(torch.randn(24, 6, generator=generator).to(device)),
            segments=segments,
        )
        for number in range(20)
    }


@pytest.mark.gpu
def test_masks_are_those_of_the_cpu_and_a_step_does_not_make_the_host_wait(cuda):
    sets = [MaskSet(pairs_on(device), MaskSettings()) for device in (torch.device("cpu"), cuda)]
    rankings = [masks.rank() for masks in sets]
    for ratio in (0.35, 0.7, 0.1):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for masks, ranking in zip(sets, rankings, strict=True):
                masks.commit(ratio, ranking)
                for weight in masks.weights.values():
                    weight.grad = torch.ones_like(weight)
                masks.mask_gradients()
                masks.enforce()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for key, keep in sets[0].keep.items():
            assert torch.equal(sets[1].keep[key].cpu(), keep)
            assert torch.equal(sets[1].weights[key].detach().cpu(), sets[0].weights[key].detach())
            assert torch.equal(sets[1].stash[key].cpu(), sets[0].stash[key])


@pytest.mark.gpu
def test_losses_are_those_of_the_cpu_whatever_the_batches(cuda, make_tiny_model):
    backbone = make_tiny_model("llama").double()
    expected = ProbeSet(EXAMPLES).losses(backbone)
    assert ProbeSet(EXAMPLES).losses(backbone.to(cuda)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.gpu
def test_a_batch_of_the_accelerators_size_fits(cuda, make_tiny_model):
    backbone = make_tiny_model("llama").to(cuda)
    batch = {name: part.to(cuda) for name, part in collate(EXAMPLES, 0).items()}
    assert example_losses(backbone, batch, label_positions=supports_logits_to_keep(backbone)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["grasp", "paper"])
def test_a_run_on_a_gpu(cuda, tiny_workspace, preset):
    overrides = [f"controller={{preset: {preset}, training: {{epochs: 1, learning_rate: 1.0e-2}}}}"]
    result = api.run("tiny.yaml", overrides=overrides, folder="runs/tiny")
    assert 0.1 <= result.ratio.ratio <= 0.8
