"""A backbone that is split over processes: each call gathers its weights from all of them, so all have to call equally often."""

from collections.abc import Callable
from typing import Any

import torch


def is_split(model: Any) -> bool:
    """Whether `backbone.shard` has split a model over several processes."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


class Company:
    """Has all processes call a split model equally often, however many calls the work of each takes; else does nothing.

    Args:
        model: of transformers, without a PEFT wrapper.
        call: calls it on one token, [1, 1], of which nothing is used.
    """

    def __init__(self, model: Any, call: Callable[[torch.Tensor], object]) -> None:
        self._model, self._call, self._needed = model, call, is_split(model)

    def calls(self) -> None:
        """Tell the others that this process calls the model now; before each call."""
        if self._needed:
            self._any_calls(True)

    @torch.no_grad()
    def keep(self) -> None:
        """Call the model as long as another process does; when the work is done, or where there was none."""
        while self._needed and self._any_calls(False):
            self._call(torch.zeros((1, 1), dtype=torch.long, device=self._model.device))

    def _any_calls(self, own: bool) -> bool:
        calling = torch.tensor(int(own), device=self._model.device)
        torch.distributed.all_reduce(calling, torch.distributed.ReduceOp.MAX)
        return bool(calling)
