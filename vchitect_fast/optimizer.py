"""AdamW over fp32 master weights, whatever dtype the model computes in.

With a bf16 model each parameter has an fp32 master and an fp32 gradient: microbatch gradients are added in fp32 as
backward produces them and the bf16 ones are freed at once. With an fp32 model the parameters are their own masters.
Weight decay applies to matrices only. Source: Micikevicius et al. 2018 (master weights); Loshchilov & Hutter 2019.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MasterAdamW:
    """One optimizer step from accumulated gradients.

    dtype    what the model is cast to once its masters are taken, so that they keep the bits that the cast drops
    masters  fp32 tensor a parameter name, the truth that is checkpointed
    """

    def __init__(
        self, model: nn.Module, *, weight_decay: float, betas: tuple[float, float], dtype: torch.dtype | None = None
    ) -> None:
        self._parameters = dict(model.named_parameters())
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.dtype == torch.float32 == (dtype or parameter.dtype):
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().float()
                parameter.data = parameter.data.to(dtype or parameter.dtype)
                parameter.register_post_accumulate_grad_hook(_gradient_to(self.masters[name]))
        matrices = [tensor for tensor in self.masters.values() if tensor.ndim > 1]
        vectors = [tensor for tensor in self.masters.values() if tensor.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        for tensor in self.masters.values():  # made now, so that a checkpoint has the same names at every step
            self._adamw.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                "exp_avg": torch.zeros_like(tensor, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
            }

    def step(self, learning_rate: float, clip_norm: float) -> Tensor:
        """Clip to the global norm, update masters, copy them into the model, drop gradients. Returns the norm before clipping.

        A norm that is not finite changes nothing: one such step would ruin every master.
        """
        masters = list(self.masters.values())
        norm = torch.nn.utils.clip_grad_norm_(masters, clip_norm)
        if not torch.isfinite(norm):
            return norm
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
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
        return {
            f"{kind}.{name}": value
            for name, master in self.masters.items()
            for kind, value in self._adamw.state[master].items()
        }


def _gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None  # the hook runs after it was accumulated
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return add
