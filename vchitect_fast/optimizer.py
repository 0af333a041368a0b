"""AdamW over fp32 master weights, whatever dtype the model computes in.

With a bf16 model each parameter has an fp32 master and an fp32 gradient: microbatch gradients are added in fp32 as
backward produces them and the bf16 ones are freed at once. With an fp32 model (or fp64, in tests) the parameters are their
own masters. So are sharded ones (DTensor): FSDP2 gathers them in lower precision, and each rank updates its shards only.
Weight decay applies to matrices only. Source: Micikevicius et al. 2018 (master weights); Loshchilov & Hutter 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from vchitect_fast.errors import UserError
from vchitect_fast.offload.policy import turns
from vchitect_fast.parallel.shard import global_norm, local_shard

if TYPE_CHECKING:
    from vchitect_fast.offload.states import InTurn

WIDE = (torch.float32, torch.float64)
EPS = 1e-8  # added to the root of the second moment
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("step", *MOMENTS)


class MasterAdamW:
    """One optimizer step from accumulated gradients.

    dtype    what the model is cast to once its masters are taken, so that they keep the bits that the cast drops; a sharded
             model is not cast, its parameters are gathered in that dtype
    masters  fp32 tensor a parameter name, the truth that is checkpointed

    Raises UserError for sharded parameters in low precision.
    """

    def __init__(
        self, model: nn.Module, *, weight_decay: float, betas: tuple[float, float], dtype: torch.dtype | None = None
    ) -> None:
        self.weight_decay, self.betas = weight_decay, betas
        self._parameters = dict(model.named_parameters())
        self.masters: dict[str, Tensor] = {}
        self._state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            sharded = isinstance(parameter, DTensor)
            if sharded and parameter.dtype not in WIDE:
                raise UserError(
                    f"sharded parameters are their own masters and must be fp32, {name} is {parameter.dtype}; shard the fp32 "
                    "model and give shard() the compute dtype."
                )
            if sharded or parameter.dtype == (dtype or parameter.dtype) in WIDE:
                master: Tensor = parameter
            else:
                master = parameter.detach().float()
                parameter.data = parameter.data.to(dtype or parameter.dtype)
                parameter.register_post_accumulate_grad_hook(_gradient_to(master))
            self.masters[name] = master
            self._state[name] = {  # made now, so that a checkpoint has the same names at every step
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    @torch.no_grad()
    def step(self, learning_rate: float, clip_norm: float, in_turn: InTurn | None = None) -> Tensor:
        """Clip to the global norm, update masters, copy them into the model, drop gradients. Returns the norm before clipping.

        A norm that is not finite changes nothing: one such step would ruin every master. Without any gradient nothing changes
        either. With shards every rank calls it. `in_turn` (offload/states.py): the moments are elsewhere, a few come at a time.
        """
        gradients = {name: master.grad for name, master in self.masters.items() if master.grad is not None}
        norm = global_norm(list(gradients.values()))
        if not torch.isfinite(norm) or not gradients:
            return norm
        # Elementwise from here on, so the shards are taken out of their DTensors: dispatching on 1200 of them costs more.
        local = {name: local_shard(gradient) for name, gradient in gradients.items()}
        torch._foreach_mul_(list(local.values()), torch.clamp(clip_norm / (norm + 1e-6), max=1.0))
        sizes = {name: 2 * local_shard(master).nbytes for name, master in self.masters.items()}
        groups = turns(sizes) if in_turn else [list(self.masters)]

        def update(place: int) -> None:
            for is_matrix, decay in ((True, self.weight_decay), (False, 0.0)):
                names = [n for n in groups[place] if n in local and (self.masters[n].ndim > 1) == is_matrix]
                steps, first, second = ([local_shard(self._state[name][kind]) for name in names] for kind in KINDS)
                adamw(
                    [local_shard(self.masters[name]) for name in names], [local[name] for name in names], first, second, [],
                    steps, fused=True, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=learning_rate,
                    weight_decay=decay, eps=EPS, maximize=False,
                )  # fmt: skip

        if in_turn:
            in_turn([[f"{kind}.{name}" for name in names for kind in MOMENTS] for names in groups], update)
        else:
            update(0)
        for master in self.masters.values():
            master.grad = None
        self.copy_masters()
        return norm

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Round the masters into a model of lower precision."""
        pairs = [(p, m) for p, m in zip(self._parameters.values(), self.masters.values(), strict=True) if p is not m]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def state(self) -> dict[str, Tensor]:
        """The AdamW state as flat names "<kind>.<parameter>", sharing storage: loading writes into these tensors."""
        return {f"{kind}.{name}": self._state[name][kind] for name in self.masters for kind in KINDS}


def _gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        if parameter.grad is None:  # a hand-written backward that has no gradient for it runs the hook all the same
            return
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return add
