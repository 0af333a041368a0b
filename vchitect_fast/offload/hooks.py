"""Applies a Policy to a block: what is kept, what is moved by the engine, what is recomputed; counts every byte of it.

    saving = Saving(Engine(budget_bytes))          or Saving() when nothing is offloaded
    saved_pass = saving.new_pass()                 one forward of a model; several may come before a backward
    x, c = saving.run_block(run, policy, index, saved_pass, x, c, temb)
    x, c = saving.run_grouped(run, ...)            the same for a block that names and rebuilds its groups itself
    with saving.step(): ...                        around forwards and backwards, so that a failed one leaves nothing
    with saving.anonymous("encoder", min_bytes):   every tensor that a module which is not ours saves is moved

Recomputation is torch's non-reentrant checkpoint; nothing in our blocks draws random numbers. Not supported, and refused or
said: torch.compile around these calls, CUDA graphs, DTensor and other subclasses (keep their groups), saved tensors that are
changed in place. Parameters are never moved. What to do with a block is the Plan's, not decided here.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from vchitect_fast.errors import UserError
from vchitect_fast.offload.engine import Engine, Handle
from vchitect_fast.offload.groups import GROUPS, Frame
from vchitect_fast.offload.order import Orders, Pass
from vchitect_fast.offload.policy import KEEP_LAST, WHOLE, check_policy, offloads
from vchitect_fast.plan import KEEP, OFFLOAD, RECOMPUTE, Policy

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
GroupedRun = Callable[..., tuple[Tensor, Tensor | None]]
DEPTH = 1  # bundles fetched ahead of use


class Saving:
    """How the blocks of one model save for backward.

    engine     moves what is offloaded; None refuses a Policy that offloads
    depth      bundles (blocks, or tensors of anonymous hooks) that are fetched ahead of use in backward
    keep_last  blocks at the end whose offloaded groups are kept, since backward needs them at once
    count      also count what a block saves that keeps everything: a look at each saved tensor, for `memory explain`
    """

    def __init__(
        self, engine: Engine | None = None, *, depth: int = DEPTH, keep_last: int = KEEP_LAST, count: bool = False
    ) -> None:
        self.engine, self.depth, self.keep_last, self.count = engine, depth, keep_last, count
        self.orders = Orders()
        self._passes: weakref.WeakSet[Pass] = weakref.WeakSet()
        self._frames: weakref.WeakSet[Frame] = weakref.WeakSet()
        self.bytes: Counter[tuple[int, str, str]] = Counter()  # (block, group, action) -> bytes saved since `forget`

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around forwards and their backwards: when one fails, everything they saved is given back.

        Needed, because torch keeps the graph of a backward that raised: its queue still holds nodes of it.
        """
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Give back all that is saved now; a backward through it is an error from here on."""
        for frame in list(self._frames):
            frame.clear()
        for saved_pass in list(self._passes):
            for bundle in saved_pass.bundles:
                for reference in bundle.entries:
                    if (entry := reference()) is not None:
                        entry.engine.abandon(entry)

    def forget(self) -> None:
        """Set the counted bytes to nothing."""
        self.bytes.clear()

    def new_pass(self) -> Pass | None:
        """For one forward of a model; None when nothing can be moved."""
        return self._pass_of(self.engine) if self.engine and torch.is_grad_enabled() else None

    def _pass_of(self, engine: Engine) -> Pass:
        saved_pass = Pass(self.orders, engine.fetch, self.depth)
        self._passes.add(saved_pass)
        return saved_pass

    def before_backward(self, saved_pass: Pass | None, x: Tensor) -> None:
        """After the last block, whose output is `x`: what backward needs first is on its way before a block asks for it."""
        if saved_pass is not None and saved_pass.bundles and x.requires_grad:
            x.register_hook(lambda _: saved_pass.begin())

    def run_block(
        self, run: Run, policy: Policy, index: int, saved_pass: Pass | None, x: Tensor, c: Tensor, temb: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """run(x, c, temb), saving for backward what `policy` says."""
        if not torch.is_grad_enabled():
            return run(x, c, temb)
        if policy == Policy.keep():
            with self._counting(index) if self.count else nullcontext():
                return run(x, c, temb)
        check_policy(policy, index)
        if torch.compiler.is_compiling():
            raise UserError(
                "expected a forward outside torch.compile for a Policy that recomputes or offloads, got one that is being "
                "compiled; compile the blocks' insides, or keep everything."
            )
        if offloads(policy) and saved_pass is None:
            raise UserError(f"block {index} is to be offloaded and there is no engine; give Saving an Engine.")
        block = _Block(self, policy, index, saved_pass)
        with saved_tensors_hooks(block.pack_input, block.unpack_input):
            out = checkpoint(
                run, x, c, temb, use_reentrant=False, preserve_rng_state=False, context_fn=block.contexts,
            )  # fmt: skip
        if x.numel():  # a rank whose share is empty has nothing to hand over
            block.check_complete()
        return out

    def run_grouped(
        self, run: GroupedRun, policy: Policy, index: int, saved_pass: Pass | None, x: Tensor, c: Tensor, temb: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As run_block, for a block whose own backward rebuilds what it did not save: no checkpoint, no second forward.

        run(x, c, temb, policy=, hand_over=) leaves out the groups to recompute, and saves the others inside
        hand_over(names), which tells what becomes of them; without it they stay with autograd.
        """
        if not torch.is_grad_enabled() or (policy == Policy.keep() and not self.count):
            return run(x, c, temb)
        check_policy(policy, index)
        if offloads(policy) and saved_pass is None:
            raise UserError(f"block {index} is to be offloaded and there is no engine; give Saving an Engine.")
        if offloads(policy) and torch.compiler.is_compiling():
            raise UserError(f"block {index} is to be offloaded inside torch.compile; offload outside of it.")
        hand_over = _Block(self, policy, index, saved_pass).hand_over if offloads(policy) or self.count else None
        return run(x, c, temb, policy=policy, hand_over=hand_over)

    @contextmanager
    def anonymous(self, label: str, min_bytes: int = 2**20) -> Iterator[None]:
        """Move every saved tensor of at least `min_bytes` that is not a parameter's; views and aliases of one storage once."""
        engine = self.engine
        if engine is None:
            raise UserError(f"{label} is to be offloaded and there is no engine; give Saving an Engine.")
        if torch.compiler.is_compiling():
            raise UserError(f"{label}: saved-tensor hooks do not survive torch.compile; offload outside of it.")
        saved_pass = self._pass_of(engine)
        bundles: dict[int, int] = {}  # id of a living entry -> its bundle

        def pack(tensor: Tensor) -> Any:
            if tensor.nbytes < min_bytes or _is_parameters(tensor):
                return tensor
            name = f"{label}, saved tensor {len(saved_pass.bundles)} {tuple(tensor.shape)}"
            entry = engine.offload(tensor, name)
            position = bundles.get(id(entry))
            if position is None or saved_pass.bundles[position].entries[0]() is not entry:
                position = bundles[id(entry)] = saved_pass.add(len(saved_pass.bundles), entry)
            return entry.handle(tensor), position

        def unpack(held: Any) -> Tensor:
            if isinstance(held, Tensor):
                return held
            saved_pass.use(held[1])
            return engine.restore(held[0])

        with saved_tensors_hooks(pack, unpack):
            yield

    def _counting(self, index: int) -> saved_tensors_hooks:
        """Hooks that count each storage once and change nothing."""
        seen: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen and not _is_parameters(tensor):
                seen.add(storage._cdata)
                self.bytes[index, WHOLE, KEEP] += storage.nbytes()
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)


class _Block:
    """One block in one forward: the hooks around its checkpoint and the Frame inside."""

    def __init__(self, saving: Saving, policy: Policy, index: int, saved_pass: Pass | None) -> None:
        self.saving, self.policy, self.index, self.saved_pass = saving, policy, index, saved_pass
        self.seen: set[str] = set()
        self.position: int | None = None
        self.num_inputs = 0

    def contexts(self) -> tuple[Any, Any]:
        """What torch's checkpoint puts around the forward and around the recomputation."""
        policy = self.policy
        if policy.qkv == policy.branch_out == policy.mlp_pre == RECOMPUTE:
            return nullcontext(), nullcontext()
        frame = Frame(self.save, self.restore)  # not an attribute: a cycle would keep everything until a collection
        self.saving._frames.add(frame)
        return frame.recording(), frame.replaying()

    def pack_input(self, tensor: Tensor) -> Any:
        """The checkpoint saves its arguments in order: x and c are the block's input, temb is the model's."""
        if tensor.shape == (0,):  # some versions of torch save an empty one to hang the others on
            return tensor
        self.num_inputs += 1
        return self.save("block_input", tensor) if self.num_inputs <= 2 else tensor

    def unpack_input(self, held: Any) -> Tensor:
        """What pack_input was given."""
        return held if isinstance(held, Tensor) else self.restore(held)

    def hand_over(self, names: Sequence[str]) -> saved_tensors_hooks:
        """Hooks for a block that saves tensors of these groups in this order, and then what is not to be moved."""
        left = list(reversed(names))

        def pack(tensor: Tensor) -> Any:
            return self.save(left.pop(), tensor) if left else tensor

        return saved_tensors_hooks(pack, self.unpack_input)

    def save(self, name: str, tensor: Tensor) -> Any:
        """The tensor with its version, a Handle of the engine, or None to compute it again."""
        action = getattr(self.policy, name)
        self.seen.add(name)
        storage_bytes = tensor.untyped_storage().nbytes()
        self.saving.bytes[self.index, name, action] += storage_bytes
        if action == RECOMPUTE:
            return None
        label = f"{name} of block {self.index}"
        if action == OFFLOAD and tensor.numel():  # an empty one, of a rank without a share, has no bytes to move
            engine, saved_pass = self.saving.engine, self.saved_pass
            assert engine is not None and saved_pass is not None
            entry = engine.offload(tensor, label)
            self.position = saved_pass.add(self.index, entry)
            return entry.handle(tensor)
        return (tensor, tensor._version, label)

    def restore(self, held: Any) -> Tensor:
        """What `save` was given. The first Handle asked for starts the fetch of the whole block."""
        if isinstance(held, Handle):
            assert self.saving.engine is not None and self.saved_pass is not None and self.position is not None
            self.saved_pass.use(self.position)
            return self.saving.engine.restore(held)
        tensor, version, label = held
        if tensor._version != version:
            raise UserError(
                f"{label} was changed in place after it was saved for backward (version {version}, now {tensor._version}); "
                "change a clone of it."
            )
        return tensor

    def check_complete(self) -> None:
        """A group that is to be kept or moved must have come by; a block that does not name it would recompute it silently."""
        wanted = {name for name in GROUPS if getattr(self.policy, name) != RECOMPUTE}
        if missing := sorted(wanted - self.seen):
            raise UserError(
                f"block {self.index} hands over no tensor of {', '.join(missing)} to keep or offload; recompute it (an attention "
                'backend that writes its softmax out, "math", has no branch_out and no stats).'
            )


def _is_parameters(tensor: Tensor) -> bool:
    """A parameter, trained or frozen, another leaf that collects gradients, or a view of one: backward finds it on the device."""
    base = tensor._base if tensor._base is not None else tensor
    return isinstance(base, torch.nn.Parameter) or (base.is_leaf and base.requires_grad)
