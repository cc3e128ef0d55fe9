"""What the adapters of the reference cases share: a case, a pair of numbers, and verl's habits in denominators."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentrl.learner.loss import aggregate

RTOL = {torch.float64: 1e-10, torch.float32: 1e-6}
ATOL = {torch.float64: 1e-14, torch.float32: 1e-7}
VERL_EPS = 1e-8


@dataclass(frozen=True)
class Case:
    id: str
    fn: str
    source: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    grad: Any

    def tensor(self, name: str) -> Tensor:
        return as_tensor(self.inputs[name])

    def mask(self, name: str = "response_mask") -> Tensor:
        return self.tensor(name).bool()

    def only(self, *known: str) -> None:
        """Fails on a parameter that the adapter does not read, so that none is ignored."""
        assert not set(self.params) - set(known), (
            f"{self.fn} has parameters unknown here: {set(self.params) - set(known)}"
        )


@dataclass(frozen=True)
class Pair:
    """One number or tensor of ours and theirs; entries under ``differs`` must differ, for the reason given."""

    ours: Tensor
    theirs: Tensor
    differs: Tensor | None = None
    reason: str = ""


Result = dict[str, Pair]


def as_tensor(record: Any) -> Tensor:
    if isinstance(record, (int, float)):
        return torch.tensor(record, dtype=torch.float64)
    return torch.tensor(record["data"], dtype=getattr(torch, record["dtype"])).reshape(record["shape"])


def verl_aggregate(case: Case, values: Tensor, mask: Tensor, *, token_mean_eps: bool = False) -> Tensor:
    """verl's ``agg_loss``: adds 1e-8 to a trajectory's length, and its default constant is the padded length."""
    mode = case.params.get("loss_agg_mode", "token-mean")
    if mode == "seq-mean-token-mean":
        values = values * with_verl_eps(mask.sum(-1, keepdim=True))
    if mode == "token-mean" and token_mean_eps:
        values = values * with_verl_eps(mask.sum())
    constant = case.params.get("loss_scale_factor") or mask.shape[-1]
    return aggregate(values, mask, mode, denominator=constant if mode == "seq-mean-token-sum-norm" else None)


def with_verl_eps(count: Tensor) -> Tensor:
    """Turns a mean over ``count`` into verl's ``masked_mean``, which divides by ``count + 1e-8``."""
    return count.double() / (count.double() + VERL_EPS)


def gradient(case: Case, loss: Tensor, logprobs: Tensor) -> Result:
    if case.grad is None:
        return {}
    (ours,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    return {"gradient": Pair(ours, as_tensor(case.grad))}


Adapter = Callable[[Case], Result]


def load() -> list[Case]:
    bundled = Path(__file__).parents[1] / "data" / "reference_cases.json"
    path = Path(os.environ.get("AGENTRL_REFERENCE_CASES") or bundled)
    return [
        Case(
            id=c["id"],
            fn=c["fn"],
            source=c["source"],
            params=c["params"],
            inputs=c["inputs"],
            outputs=c["outputs"],
            grad=c.get("grad_wrt_log_prob"),
        )
        for c in json.loads(path.read_text())["cases"]
    ]
