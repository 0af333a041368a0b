"""The model against an independent fp64 implementation, against SD3, and against finite differences.

Run: pytest tests/model/test_transformer.py
"""

from __future__ import annotations

from dataclasses import replace

import close
import independent
import pytest
import torch

from vchitect_fast.errors import UserError
from vchitect_fast.model import Branches, VchitectTransformer, preset
from vchitect_fast.plan import Policy

NANO = replace(preset("vchitect-nano"), rope_scaling_factor=1.5)

# B, T, h, w: batch of one and two, an image, three frames, wide and tall, the whole grid
SHAPES = [(1, 1, 4, 6), (2, 1, 6, 4), (1, 3, 4, 8), (2, 3, 6, 4), (1, 2, 24, 24)]


def make(config=NANO, dtype=torch.float64, **kwargs) -> VchitectTransformer:
    """Random weights everywhere: zero-initialised outputs would hide most of the model."""
    torch.manual_seed(0)
    model = VchitectTransformer(config, **kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def inputs(B: int, T: int, h: int, w: int, config=NANO, dtype=torch.float64, N: int = 5):
    g = torch.Generator().manual_seed(B * 1000 + T * 100 + h * 10 + w)
    shapes = [(B, T, config.in_channels, h, w), (B, N, config.joint_attention_dim), (B, config.pooled_projection_dim)]
    drawn = [torch.randn(shape, generator=g, dtype=torch.float32).to(dtype) for shape in shapes]
    return (*drawn, 1000 * torch.rand(B, generator=g))


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_independent_implementation(shape: tuple[int, ...]) -> None:
    """Relative error below 1e-5 in fp32, and by the rule of close.py against the math backend."""
    low = make(dtype=torch.float32)
    z, text, pooled, t = inputs(*shape, dtype=torch.float32)
    state = {name: tensor.double().numpy() for name, tensor in low.state_dict().items()}
    exact = torch.from_numpy(
        independent.forward(NANO, state, z.double().numpy(), text.double().numpy(), pooled.double().numpy(), t.numpy())
    )
    actual = low(z, text, pooled, t)
    assert close.relative_error(actual, exact) < 1e-5
    low.attention_backend = dict.fromkeys(low.attention_backend, "math")
    close.assert_close_to_exact(actual, exact, low(z, text, pooled, t), reduced=NANO.hidden_dim * 4)


def test_a_batch_is_as_many_single_runs() -> None:
    model = make()
    z, text, pooled, t = inputs(2, 3, 4, 6)
    both = model(z, text, pooled, t)
    for b in range(2):
        alone = model(z[b : b + 1], text[b : b + 1], pooled[b : b + 1], t[b : b + 1])
        assert close.relative_error(both[b : b + 1], alone) < 1e-13
    swapped = model(z.flip(0), text.flip(0), pooled.flip(0), t.flip(0))
    assert close.relative_error(swapped.flip(0), both) < 1e-13


@pytest.mark.parametrize("frames", [1, 3])
def test_gradients_of_every_parameter_match_finite_differences(frames: int) -> None:
    """fp64 central differences along a random direction of each parameter, and of the latents."""
    model = make()
    z, text, pooled, t = inputs(2, frames, 4, 6)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    z.requires_grad_()
    (model(z, text, pooled, t) * weight).sum().backward()
    unused = {
        f"transformer_blocks.{NANO.num_layers - 1}.attn.to_add_out_temporal.{kind}" for kind in ("weight", "bias")
    }
    step = 1e-5
    checked = [*model.named_parameters(), ("latents", z)]
    for name, parameter in checked:
        if name in unused:  # the last block's text output is dropped
            assert parameter.grad is None
            continue
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=parameter.dtype)
        direction /= direction.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * step * direction
                values.append((model(z, text, pooled, t) * weight).sum())
            parameter += step * direction
        numeric = (values[0] - values[1]) / (2 * step)
        analytic = (parameter.grad * direction).sum()
        scale = parameter.grad.norm() + 1e-3  # a direction may be nearly orthogonal to the gradient
        assert abs(numeric - analytic) < 1e-6 * scale, f"{name}: {analytic} against {numeric}"
        if frames == 1 and "temporal" in name:
            assert parameter.grad.abs().max() == 0, f"{name}: an image must leave zero gradients, not missing ones"


def test_recomputation_changes_no_bit() -> None:
    model = make(dtype=torch.float32)
    batch = inputs(1, 2, 4, 4, dtype=torch.float32)
    grads = []
    for policy in (Policy.keep(), Policy.recompute()):
        model.set_policy((policy,) * NANO.num_layers)
        model.zero_grad()
        model(*batch).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("off", ["spatial", "temporal", "cross"])
def test_a_branch_switched_off_equals_its_output_weights_at_zero(off: str) -> None:
    batch = inputs(1, 3, 4, 4)
    full, ablated = make(), make(branches=Branches(**{off: False}))
    with torch.no_grad():
        for block in full.transformer_blocks:
            attn = block.attn
            if off == "spatial":  # spatial shares to_out with cross: silence its values instead
                for name in ("to_v", "add_v_proj"):
                    getattr(attn, name).weight.zero_(), getattr(attn, name).bias.zero_()
            names = {"temporal": ("to_out_temporal", "to_add_out_temporal"), "cross": ("to_out_context",)}.get(off, ())
            for name in names:
                getattr(attn, name).weight.zero_(), getattr(attn, name).bias.zero_()
    if off == "spatial":
        # add_v also feeds the other branches, so only the switched model's own silence is comparable
        with torch.no_grad():
            for block in ablated.transformer_blocks:
                block.attn.add_v_proj.weight.zero_(), block.attn.add_v_proj.bias.zero_()
    assert close.relative_error(ablated(*batch), full(*batch)) < 1e-13


def test_2b_has_the_released_number_of_parameters() -> None:
    with torch.device("meta"):
        model = VchitectTransformer(preset("vchitect-2b"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 2_424_947_776 == preset("vchitect-2b").num_parameters()
    assert (
        len(model.state_dict()) == 24 * 42 - 6 + 17
    )  # 21 linears a block; no text output in the last; the rest with its buffer


@pytest.mark.parametrize("name", ["vchitect-tiny", "vchitect-nano"])
def test_parameter_formula(name: str) -> None:
    with torch.device("meta"):
        model = VchitectTransformer(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == preset(name).num_parameters()


def test_position_grid_is_diffusers() -> None:
    """sin-cos grid of SD3's PatchEmbed, same crop."""
    from diffusers.models.embeddings import PatchEmbed

    theirs = PatchEmbed(
        height=NANO.sample_size, width=NANO.sample_size, patch_size=NANO.patch_size, in_channels=16,
        embed_dim=NANO.hidden_dim, pos_embed_max_size=NANO.pos_embed_max_size,
    )  # fmt: skip
    ours = VchitectTransformer(NANO).pos_embed
    # theirs rounds the angle to fp32 before the sine; angles stay below grid_size, so that is all it can differ by
    rounding = torch.finfo(torch.float32).eps * NANO.pos_embed_max_size
    assert (ours.pos_embed - theirs.pos_embed).abs().max() <= rounding


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"z": (1, 2, 16, 5, 4)}, "divisible by the patch size 2, got 5 x 4"),
        ({"z": (1, 2, 16, 26, 4)}, "exceed the position grid of 12 x 12"),
        ({"z": (1, 2, 8, 4, 4)}, "hidden_states must be [B, T, 16, h, w], got (1, 2, 8, 4, 4)"),
        ({"z": (2, 16, 4, 4)}, "hidden_states must be"),
        ({"text": (2, 5, 12)}, "encoder_hidden_states must be [1, N, 12], got (2, 5, 12)"),
        ({"pooled": (1, 7)}, "pooled_projections must be [1, 20], got (1, 7)"),
        ({"t": (3,)}, "timestep must be [1], got (3,)"),
    ],
)
def test_rejects(change: dict[str, tuple[int, ...]], fragment: str) -> None:
    shapes = {"z": (1, 2, 16, 4, 4), "text": (1, 5, 12), "pooled": (1, 20), "t": (1,)} | change
    with pytest.raises(UserError) as error:
        make()(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes.values()))
    assert fragment in str(error.value)


def test_offload_is_refused_until_there_is_an_engine() -> None:
    model = make()
    with pytest.raises(UserError, match="block 0 is to be offloaded and this model has no engine"):
        model.set_policy((Policy(qkv="offload"),) * NANO.num_layers)
    with pytest.raises(UserError, match="branch_out and stats come from the same op"):
        model.set_policy((Policy(stats="recompute"),) * NANO.num_layers)
    with pytest.raises(UserError, match="each of 2 blocks, got 1"):
        model.set_policy((Policy.keep(),))
