"""VchitectTransformer: latents, text, timestep -> velocity. The released architecture and parameter names.

Every batch equals as many runs of one sample; an image is T = 1. What is saved for backward follows the Plan's Policy
(`set_policy`); loading and saving by name live in weights.py, the diffusion in flow.py.
Source: model_spec.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, D hidden, c latent channels, h w latent rows and
columns, p patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.model import weights
from vchitect_fast.model.blocks import AdaLN, Block, Branches, modulate
from vchitect_fast.model.chunks import chunked_block
from vchitect_fast.model.embed import PatchEmbed, TimeTextEmbed
from vchitect_fast.model.exchange import WHOLE, Sharding
from vchitect_fast.model.handwritten import handwritten_block
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.offload.policy import check_policy, effective, offloads
from vchitect_fast.plan import BRANCHES, RECOMPUTE, Policy, ShardSpec
from vchitect_fast.profiling.span import span

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALL_BRANCHES = Branches()
# Who computes the blocks on a type of device unless set_kernels says otherwise; {"cuda": "triton"} once it is measured.
DEFAULT_KERNELS: dict[str, str] = {}


@dataclass(frozen=True)
class _Shard:
    """What set_shard was told."""

    spec: ShardSpec
    group: ProcessGroup
    num_frames: int


class VchitectTransformer(nn.Module):
    """The video diffusion transformer.

    config    sizes, by the release's field names
    branches  attention branches that contribute, for ablations; all by default
    """

    def __init__(self, config: TransformerConfig, branches: Branches = ALL_BRANCHES) -> None:
        super().__init__()
        self.config = config
        D, L = config.hidden_dim, config.num_layers
        self.pos_embed = PatchEmbed(
            config.patch_size, config.in_channels, D, config.pos_embed_max_size, config.sample_size
        )
        self.time_text_embed = TimeTextEmbed(config.pooled_projection_dim, D)
        self.context_embedder = nn.Linear(config.joint_attention_dim, D)
        self.transformer_blocks = nn.ModuleList(Block(config, last=i == L - 1, branches=branches) for i in range(L))
        self.norm_out = AdaLN(D, 2)
        self.proj_out = nn.Linear(D, config.patch_size**2 * config.out_channels)
        self.policy: tuple[Policy, ...] = (Policy.keep(),) * L
        self.saving = Saving()
        self.attention_backend = dict.fromkeys(BRANCHES, "auto")
        self.kernels: str | None = None
        self.fp8 = False
        self.num_chunks = 1
        self._chose_kernels = False
        self._shard: _Shard | None = None
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for the linears; modulation and the outputs that must not disturb at first start at zero (AdaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(self.config.hidden_dim, -1))
        nn.init.zeros_(self.pos_embed.proj.get_parameter("bias"))
        zero = [self.proj_out] + [module.linear for module in self.modules() if isinstance(module, AdaLN)]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def set_policy(self, policy: Sequence[Policy]) -> None:
        """What each block keeps, offloads or recomputes; offloading needs `saving` with an engine. UserError as check_policy."""
        if len(policy) != self.config.num_layers:
            raise UserError(
                f"expected a Policy for each of {self.config.num_layers} blocks, got {len(policy)}; plan this model again."
            )
        for index, item in enumerate(policy):
            check_policy(item, index)
            if offloads(item) and self.saving.engine is None:
                raise UserError(
                    f"block {index} is to be offloaded and this model has no engine; set model.saving = Saving(Engine(budget_bytes)) first."
                )
        self.policy = tuple(policy)

    def set_shard(self, spec: ShardSpec, group: ProcessGroup | None, num_frames: int) -> None:
        """Cut the sequence over the ranks of `group` as the Plan's ShardSpec says; None = this process has all of it.

        Each rank then calls `forward` with its frames out of `num_frames`, parallel.collectives.share(num_frames, P, rank),
        and the whole text; its gradients are its part of a sum over the group. UserError as parallel.sequence.check, and
        for chunks or kernels, which work in one process only.
        """
        if group is None:
            self._shard = None
            return
        # Here, not above: sequence.py knows the blocks, and one process needs no torch.distributed.
        from vchitect_fast.parallel.sequence import check

        if num_frames < 1:
            raise UserError(
                f"expected a video of at least 1 frame, got {num_frames}; give the frames of all ranks together."
            )
        check(spec, group, self.config.num_attention_heads)
        self._refuse_sharded(self.num_chunks, self.kernels)
        self._shard = _Shard(spec, group, num_frames)

    def _refuse_sharded(self, num_chunks: int, kernels: str | None) -> None:
        if num_chunks > 1 or kernels:
            raise UserError(
                f"a sequence that is cut over ranks runs in whole blocks of plain torch, got {num_chunks} chunks and kernels "
                f"{kernels!r}; set_chunks(1) and set_kernels(None), or set_shard with the group None."
            )

    def set_chunks(self, num_chunks: int) -> None:
        """Compute each block in so many chunks of frames or positions (chunks.py); 1 = whole. After set_policy."""
        if num_chunks > 1 and self.kernels:
            raise UserError(
                f"a block in {num_chunks} chunks is plain torch, got kernels {self.kernels!r}; choose one of the two."
            )
        for index, policy in enumerate(self.policy):
            groups = {policy.qkv, policy.branch_out, policy.mlp_pre, policy.stats}
            if num_chunks > 1 and policy != Policy.keep() and groups != {RECOMPUTE}:
                raise UserError(
                    f"block {index}: in {num_chunks} chunks all groups but block_input are recomputed, the Policy keeps or "
                    "offloads some; recompute them, or use one chunk."
                )
        if self._shard:
            self._refuse_sharded(num_chunks, self.kernels)
        self.num_chunks = num_chunks

    def set_kernels(self, impl: str | None, *, fp8: bool = False) -> None:
        """Who computes a block: None = the modules of blocks.py, "triton" or "reference" = handwritten.py on those steps.

        fp8  the linears of every block in fp8, forward and backward (fp8_steps.py); of handwritten.py only
        """
        if impl not in (None, "triton", "reference"):
            raise unknown_name("kernels", str(impl), ("triton", "reference"))
        if fp8 and not impl:
            raise UserError(
                'fp8 linears are those of the hand-written block, got kernels None; set_kernels("triton", fp8=True) on a GPU, '
                '"reference" elsewhere.'
            )
        if impl and self.num_chunks > 1:
            raise UserError(
                f"kernels {impl!r} compute whole blocks, this model has {self.num_chunks} chunks; set_chunks(1) first."
            )
        if self._shard:
            self._refuse_sharded(self.num_chunks, impl)
        self.kernels, self.fp8, self._chose_kernels = impl, fp8, True

    def _sharding(self, num_visual: int, num_text: int) -> Sharding:
        """What this rank has of a forward over S visual and N text tokens a frame."""
        if self._shard is None:
            return WHOLE
        from vchitect_fast.parallel.sequence import sharding  # as in set_shard

        shard = self._shard
        return sharding(
            shard.spec, shard.group, shard.num_frames, num_visual, num_text, self.config.num_attention_heads
        )

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        """Velocity of the rectified flow.

        hidden_states          [B, T, c, h, w] latents (of this rank's frames, see set_shard); h and w divisible by the patch
        encoder_hidden_states  [B, N, joint_attention_dim] text embeddings
        pooled_projections     [B, pooled_projection_dim]
        timestep               [B] in [0, 1000]

        Returns [B, T, c, h, w] in the dtype of the parameters. Raises UserError on any other shape.
        """
        self._check(hidden_states, encoder_hidden_states, pooled_projections, timestep)
        h, w = hidden_states.shape[-2:]
        sharding = self._sharding(self.pos_embed.num_tokens(h, w), encoder_hidden_states.shape[1])
        dtype = self.proj_out.weight.dtype
        x = sharding.enter(self.pos_embed, hidden_states.to(dtype))  # [B, T, S, D]
        temb = self.time_text_embed(timestep, pooled_projections.to(dtype))
        text = self.context_embedder(sharding.own_text(encoder_hidden_states.to(dtype)))
        c = text[:, None].expand(-1, x.shape[1], -1, -1)  # the text stream is per frame from here on
        saving, saved_pass = self.saving, self.saving.new_pass()
        kernels = self.kernels if self._chose_kernels or self._shard else DEFAULT_KERNELS.get(x.device.type)
        for index, policy in enumerate(effective(self.policy, saving.keep_last)):
            block = cast(Block, self.transformer_blocks[index])
            if kernels and self.num_chunks == 1:

                def by_hand(x: Tensor, c: Tensor, temb: Tensor, block: Block = block, **how: Any) -> Any:
                    instead = partial(handwritten_block, impl=kernels, fp8=self.fp8, **how)
                    return block(x, c, temb, self.attention_backend, instead=instead)

                with span("forward/block"):
                    x, c = saving.run_grouped(by_hand, policy, index, saved_pass, x, c, temb)
                continue
            run = partial(block, backend=self.attention_backend, sharding=sharding)
            if self.num_chunks > 1:
                instead = partial(chunked_block, backend=self.attention_backend, num_chunks=self.num_chunks)
                run = partial(block, backend=self.attention_backend, instead=instead)
            with span("forward/block"):
                x, c = saving.run_block(run, policy, index, saved_pass, x, c, temb)
        saving.before_backward(saved_pass, x)
        scale, shift = self.norm_out(temb)
        return self._unpatchify(sharding.leave(self.proj_out(modulate(x, shift, scale))), h, w)

    def _unpatchify(self, x_BTSp: Tensor, h: int, w: int) -> Tensor:
        B, T, p, c = *x_BTSp.shape[:2], self.config.patch_size, self.config.out_channels
        x = x_BTSp.view(B, T, h // p, w // p, p, p, c)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, T, c, h, w)

    def _check(self, latents: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> None:
        config = self.config
        if latents.ndim != 5 or latents.shape[2] != config.in_channels:
            raise UserError(
                f"hidden_states must be [B, T, {config.in_channels}, h, w], got {tuple(latents.shape)}; see VideoShape for the sizes."
            )
        B = latents.shape[0]
        wanted = {
            "encoder_hidden_states": (text, (B, "N", config.joint_attention_dim)),
            "pooled_projections": (pooled, (B, config.pooled_projection_dim)),
            "timestep": (timestep, (B,)),
        }
        for name, (tensor, shape) in wanted.items():
            fits = tensor.ndim == len(shape) and all(w in ("N", g) for w, g in zip(shape, tensor.shape, strict=True))
            if not fits:
                asked = ", ".join(map(str, shape))
                raise UserError(
                    f"{name} must be [{asked}], got {tuple(tensor.shape)}; check the text encoder and the batch."
                )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> VchitectTransformer:
        """Load config.json and safetensors by the released names, strictly (weights.load_pretrained)."""
        return weights.load_pretrained(cls, Path(folder), dtype)

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write config.json and safetensors (sharded with an index above `max_shard_bytes`) under the released names."""
        weights.save_pretrained(self.config, self.state_dict(), Path(folder), max_shard_bytes)

    @classmethod
    def init_from_sd3(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> VchitectTransformer:
        """Start from a diffusers SD3-medium transformer (weights.init_from_sd3)."""
        return weights.init_from_sd3(cls, Path(folder), dtype)
