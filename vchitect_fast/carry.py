"""A run that starts from another: the weights, their average and, where asked, AdamW's moments of its newest checkpoint.

That is how a recipe's stage follows the one before. Steps, schedule and random draws begin anew; the data, the shapes and
the Plan may be others. Refuses a run of another model size or another latent space. The other run is only read, and no
more needed once this one has a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from vchitect_fast import checkpoint
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.parallel.mesh import ALONE, Mesh, on_all, on_first

SAME = ("codec", "text_encoder")  # what the weights mean


def carry_over(config: TrainConfig, state: dict[str, Any], tensors: dict[str, Tensor], mesh: Mesh = ALONE) -> None:
    """Fill `tensors` in place from the newest checkpoint of `config.start_from`; nothing where that is None.

    state    as `resume.run_state` says of this run
    tensors  as `resume.run_tensors` names them; without `config.carry_optimizer` those of the optimizer stay as they are
    mesh     whose ranks hold them in shards, in whatever way; every rank calls it

    Raises UserError when there is no checkpoint, or it is of another model, codec or text encoder.
    """
    if config.start_from is None:
        return
    newest = on_first(mesh.host_group, lambda: checkpoint.latest(Path(str(config.start_from))))
    if newest is None:
        raise UserError(f"start_from names {config.start_from}, which holds no checkpoint; name the folder of a run.")
    stored = on_all(mesh.host_group, lambda: checkpoint.read_state(newest))
    if stored["model"] != state["model"]:
        raise UserError(f"start_from: {newest} holds a model of other sizes than {config.model!r}; use that model.")
    for name in SAME:
        if stored["decides"][name] != state["decides"][name]:
            raise UserError(
                f"start_from: {newest} was trained with {name} {stored['decides'][name]}, got {state['decides'][name]}; use the same."
            )
    wanted = {n: t for n, t in tensors.items() if config.carry_optimizer or not n.startswith("optimizer.")}
    checkpoint.load(newest, wanted, mesh.host_group)
