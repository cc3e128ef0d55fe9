"""AdamW in fp32 over a model that may be in bf16.

A bf16 weight has 8 significant bits: an update of less than 1/512 of the weight is rounded away, and at the learning
rates of policy gradients nearly all updates are. So every 16-bit parameter has an fp32 **master** here: moments, weight
decay and update work on the master, and the parameter is its rounding. Gradients are added up over micro-batches in
fp32 as well, since a 16-bit sum loses small terms the same way. A parameter in fp32 or fp64 is its own master and costs
nothing more.

Bytes per trainable parameter, gradients included: 16 in fp32, 18 in bf16 (2 the weight, 4 the master, 4 the gradient,
8 the moments) and 2 more for the gradients of the layers that ``collect`` has not emptied yet.

State is kept by parameter name, so that it can be checked against the model, stored in shards and put together again
for another number of processes. Parameters may be ``DTensor`` (FSDP2): then masters, gradients and moments are shards
too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from agentrl.errors import ConfigError, RunFolderError
from agentrl.learner.distributed import laid_out_as, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) by groups, each with its own learning rate.

    One update is: for each micro-batch ``backward`` and ``collect``, then ``clip``, then ``step``.

    Args:
        groups: named parameters by group, as ``{"policy": model.named_parameters()}``. Frozen ones are left out. Make
            it after the model has been sharded and moved to its device.
        betas: decay of the first and the second moment.
        weight_decay: decoupled, times the learning rate.
        eps: added to the root of the second moment.

    Raises:
        ConfigError: a group has nothing to train, or a parameter stands in two places.
    """

    def __init__(
        self,
        groups: Mapping[str, Iterable[tuple[str, Parameter]]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        self._parameters: dict[str, Parameter] = {}
        self._masters: dict[str, Tensor] = {}
        self._groups: dict[str, list[str]] = {}
        for group, named in groups.items():
            trained = {f"{group}.{name}": parameter for name, parameter in named if parameter.requires_grad}
            if not trained:
                raise ConfigError(f"parameter group {group!r}: expected parameters that require gradients, got none.")
            self._groups[group] = list(trained)
            self._parameters |= trained
        if len({id(parameter) for parameter in self._parameters.values()}) < len(self._parameters):
            raise ConfigError("a parameter was given twice: expected every parameter in one group, under one name.")
        self._masters = {name: _master(parameter) for name, parameter in self._parameters.items()}
        self._adam = torch.optim.AdamW(
            [{"params": [self._masters[name] for name in names]} for names in self._groups.values()],
            lr=0.0,
            betas=betas,
            weight_decay=weight_decay,
            eps=eps,
        )
        for master in self._masters.values():  # what AdamW would make at the first step; here, so that it can be loaded
            self._adam.state[master] = {"step": torch.tensor(0.0)} | {key: torch.zeros_like(master) for key in MOMENTS}

    def collect(self) -> None:
        """Add the gradients of 16-bit parameters to those of their masters and free them; after each backward."""
        for parameter, master in self._rounded():
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(master.dtype)
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def clip(self, max_norm: float) -> float:
        """Scale all gradients together so that their L2 norm is at most ``max_norm``; returns the norm before.

        A norm that is not finite is returned as it is, and makes the gradients unusable: do not ``step`` then.
        """
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        kinds = ([g for g in gradients if isinstance(g, DTensor)], [g for g in gradients if not isinstance(g, DTensor)])
        norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]
        if not norms:
            return 0.0
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        torch.nn.utils.clip_grads_with_norm_(self._masters.values(), max_norm, norm)
        return float(norm)

    def step(self, lr: float | Mapping[str, float]) -> None:
        """Move the masters by their gradients, round them into the parameters and free the gradients.

        Args:
            lr: the learning rate of all groups, or of each by its name.
        """
        for group, settings in zip(self._groups, self._adam.param_groups, strict=True):
            settings["lr"] = lr[group] if isinstance(lr, Mapping) else lr
        self._adam.step()
        self._round()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Free all gradients, as before an update and after one that was given up."""
        for name, parameter in self._parameters.items():
            parameter.grad = self._masters[name].grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors by name: ``GROUP.PARAMETER/exp_avg``, ``/exp_avg_sq``, ``/step`` and ``/master``.

        ``/master`` is there only where the parameter has one of its own; otherwise the weights belong to the model's
        checkpoint alone.
        """
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            state |= {f"{name}/{key}": value for key, value in self._adam.state[master].items()}
            if master is not self._parameters[name]:
                state[f"{name}/master"] = master.detach()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what ``state_dict`` gave, whole or in this process's shards, and round the masters into the parameters.

        Raises:
            RunFolderError: names or shapes are not those of this model; nothing was changed.
        """
        own = self.state_dict()
        check_fits({name: t.shape for name, t in own.items()}, {name: t.shape for name, t in state.items()})
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(laid_out_as(tensor, state[name]))
        self._round()

    def _rounded(self) -> Iterable[tuple[Parameter, Tensor]]:
        """Parameters with a master of their own, each with it."""
        pairs = ((parameter, self._masters[name]) for name, parameter in self._parameters.items())
        return ((parameter, master) for parameter, master in pairs if master is not parameter)

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in self._rounded():
            parameter.copy_(master)


def check_fits(own: Mapping[str, torch.Size], saved: Mapping[str, torch.Size]) -> None:
    """Refuse saved tensors of another model, by their names and shapes.

    Raises:
        RunFolderError: a name is missing or unknown, or a shape is another.
    """
    if own.keys() != saved.keys():
        missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        raise RunFolderError(
            f"the learner's state does not fit the policy: missing {missing[:3]}, unknown {unknown[:3]}. Expected the "
            "policy, the adapters, the critic and the dtype that it was saved with."
        )
    for name, shape in own.items():
        if shape != saved[name]:
            raise RunFolderError(
                f"the learner's state does not fit the policy: {name} has shape {tuple(saved[name])}, expected "
                f"{tuple(shape)}."
            )


def _master(parameter: Parameter) -> Tensor:
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return parameter
    return parameter.detach().float()
