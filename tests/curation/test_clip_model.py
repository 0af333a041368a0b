"""CLIP and ViCLIP: checkpoints in the originals' layouts load strictly and give what the originals' formulas give.

The checkpoints are random and small, their names and layouts are the published ones; the frames are real.
pytest tests/curation/test_clip_model.py
"""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_exact
from real_video import bikes
from torch import Tensor, nn

from vchitect_fast.curation import clip_model
from vchitect_fast.curation.clip_model import Clip, clip_pixels, in_chunks, load_clip, load_viclip, viclip_pixels
from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.stage import ClipSpan, Want
from vchitect_fast.errors import UserError

WIDTH, DIM, DEPTH, PATCH = 128, 48, 2, 32  # of the small towers


def real_frames(name: str, num: int) -> list[np.ndarray]:
    span = ClipSpan("", str(bikes().with_name(name)), 0, 99, 0.0, 3.2, 0, 0, 0.0)
    return clip_frames(span, [Want(time) for time in span.spread(num)])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP as transformers writes it: both towers, one safetensors file."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    vision = {"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**vision, "patch_size": PATCH, "projection_dim": DIM},
        projection_dim=DIM,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


def viclip_state(width: int = WIDTH) -> dict[str, Tensor]:
    """Random tensors under the names that InternVid's viclip_vision.py gives them, with parts of the text tower."""
    make = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make) / shape[-1] ** 0.5

    vision = {
        "class_embedding": random(width),
        "positional_embedding": random((224 // PATCH) ** 2 + 1, width),
        "temporal_positional_embedding": random(1, 8, width),
        "proj": random(width, DIM),
        "conv1.weight": random(width, 3, 1, PATCH, PATCH),
    }
    norms = ["ln_pre", "ln_post"]
    for block in (f"transformer.resblocks.{k}" for k in range(DEPTH)):
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        for name, rows, columns in [
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ]:
            vision[f"{block}.{name}weight"] = random(rows, columns)
            vision[f"{block}.{name}bias"] = random(rows)
    for name in norms:
        vision[f"{name}.weight"], vision[f"{name}.bias"] = 1 + random(width), random(width)
    text = {"temp": torch.ones([]), "text_encoder.transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    return {f"vision_encoder.{name}": tensor for name, tensor in vision.items()} | text


@pytest.fixture
def viclip_file(tmp_path: Path) -> Path:
    torch.save({"model": viclip_state()}, tmp_path / "ViClip-InternVid-10M-FLT.pth")
    return tmp_path / "ViClip-InternVid-10M-FLT.pth"


def openai_transform(size: int) -> Any:
    from torchvision import transforms as T

    return T.Compose(
        [
            T.ToPILImage(),
            T.Resize(size, interpolation=T.InterpolationMode.BICUBIC),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )


PICTURES = {
    "bikes.mp4": lambda frame: frame,  # 640x272: an odd number of columns is cut off
    "bigbuckbunny.mp4": lambda frame: frame,
    "carphone_pristine.mp4": lambda frame: frame,  # 176x144: enlarged
    "upright": lambda frame: np.ascontiguousarray(np.rot90(frame)[:-3]),
    "square": lambda frame: np.ascontiguousarray(frame[:224, :224]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_clip_pixels_are_those_of_openai(name: str) -> None:
    [frame] = real_frames(name if "." in name else "bikes.mp4", 1)
    frame = PICTURES[name](frame)
    assert torch.equal(clip_pixels([frame], 224), openai_transform(224)(frame)[None])


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "carphone_pristine.mp4"])
def test_clip_pixels_are_those_of_transformers_where_the_middle_is_whole(name: str) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    [frame] = real_frames(name, 1)
    theirs = torch.as_tensor(np.asarray(CLIPImageProcessorPil()(frame)["pixel_values"]))

    def bytes_of(pixels: Tensor) -> Tensor:  # theirs multiplies by 1/255, which rounds otherwise
        std, mean = np.array([0.26862954, 0.26130258, 0.27577711]), np.array([0.48145466, 0.4578275, 0.40821073])
        return ((pixels[0].permute(1, 2, 0).double() * torch.tensor(std) + torch.tensor(mean)) * 255).round()

    assert torch.equal(bytes_of(clip_pixels([frame], 224)), bytes_of(theirs))


def test_clip_embeddings_are_those_of_transformers(clip_folder: Path) -> None:
    from transformers import CLIPModel

    frames = real_frames("bikes.mp4", 2) + real_frames("bigbuckbunny.mp4", 1)
    actual = load_clip(str(clip_folder)).image_embeddings(frames)
    assert actual.shape == (3, DIM) and actual.dtype == np.float32
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = torch.stack([openai_transform(224)(frame) for frame in frames])

    def embedded(dtype: torch.dtype) -> Tensor:
        whole = model.to(dtype)
        pooled = whole.vision_model(pixel_values=pixels.to(dtype)).pooler_output
        return F.normalize(whole.visual_projection(pooled), dim=-1).detach()

    reference, exact = embedded(torch.float32), embedded(torch.float64)
    assert_close_to_exact(torch.from_numpy(actual), exact, reference, reduced=3 * PATCH**2)


def test_a_clip_of_2021_loads(clip_folder: Path, tmp_path: Path) -> None:
    """pytorch_model.bin in half precision, with the counted position_ids and the keys that old configs are full of."""
    from safetensors.torch import load_file

    tensors = {name: tensor.half() for name, tensor in load_file(clip_folder / "model.safetensors").items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = json.loads((clip_folder / "config.json").read_text())
    config["vision_config"] |= {
        "_name_or_path": "",
        "num_beams": 1,
        "torchscript": False,
        "label2id": {"A": 0},
        "dropout": 0.0,
    }
    del config["vision_config"]["projection_dim"]  # then transformers would take 512
    (tmp_path / "config.json").write_text(json.dumps(config))
    old, new = load_clip(str(tmp_path)), load_clip(str(clip_folder))
    assert old.dim == DIM
    [frame] = real_frames("bikes.mp4", 1)
    half_eps = torch.finfo(torch.float16).eps
    assert old.image_embeddings([frame])[0] @ new.image_embeddings([frame])[0] > 1 - half_eps


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"])
def test_viclip_pixels_are_those_of_internvid(name: str) -> None:
    import cv2

    frames = real_frames(name, 8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    theirs = []
    for frame in frames:
        bgr = frame[:, :, ::-1].copy()  # the original reads by OpenCV and turns it around
        theirs.append((cv2.resize(bgr[:, :, ::-1], (224, 224)) / 255.0 - mean) / std)
    expected = torch.from_numpy(np.stack(theirs).transpose(0, 3, 1, 2)).float()
    assert torch.equal(viclip_pixels(frames, 224), expected)


def published_viclip(state: dict[str, Tensor], pixels_TCHW: Tensor) -> Tensor:
    """The published forward, module by module, of one video: Conv3d, MultiheadAttention, tokens before batch."""
    t = {name.removeprefix("vision_encoder."): value.to(pixels_TCHW.dtype) for name, value in state.items()}
    x = F.conv3d(pixels_TCHW.transpose(0, 1)[None], t["conv1.weight"], stride=(1, PATCH, PATCH))
    x = x[0].permute(1, 2, 3, 0).reshape(8, -1, WIDTH)  # T, places, D
    place, time = t["positional_embedding"], t["temporal_positional_embedding"][0]
    tokens = [t["class_embedding"] + place[0]]
    tokens += [x[frame, k] + place[1 + k] + time[frame] for k in range(x.shape[1]) for frame in range(8)]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"])

    x = norm(torch.stack(tokens)[:, None], "ln_pre")  # N, 1, D
    for k in range(DEPTH):
        block = f"transformer.resblocks.{k}"
        attention = nn.MultiheadAttention(WIDTH, WIDTH // 64, dtype=x.dtype)
        attention.load_state_dict(
            {n.removeprefix(f"{block}.attn."): v for n, v in t.items() if n.startswith(f"{block}.attn.")}
        )
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y)[0]
        y = norm(x, f"{block}.ln_2") @ t[f"{block}.mlp.c_fc.weight"].T + t[f"{block}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ t[f"{block}.mlp.c_proj.weight"].T + t[f"{block}.mlp.c_proj.bias"]
    return F.normalize(norm(x, "ln_post")[0, 0] @ t["proj"], dim=-1).detach()


def test_viclip_embeds_as_published(viclip_file: Path) -> None:
    frames = real_frames("bikes.mp4", 8)
    actual = load_viclip(str(viclip_file.parent)).video_embedding(frames)
    assert actual.shape == (DIM,) and actual.dtype == np.float32
    state, pixels = viclip_state(), viclip_pixels(frames, 224)
    exact, reference = published_viclip(state, pixels.double()), published_viclip(state, pixels)
    assert_close_to_exact(torch.from_numpy(actual), exact, reference, reduced=3 * PATCH**2)
    backwards = load_viclip(str(viclip_file.parent)).video_embedding(frames[::-1])
    assert not np.allclose(actual, backwards), "the order of frames must matter"


CHANGES = {
    "missing": lambda t, name: {other: t[other] for other in t if other != name},
    "unknown": lambda t, name: t | {f"{name}_2": t[name].clone()},
    "misshapen": lambda t, name: t | {name: t[name][..., :-1].clone()},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["vision_model.encoder.layers.1.mlp.fc2.weight", "visual_projection.weight"])
def test_a_clip_with_other_tensors_is_refused(clip_folder: Path, tmp_path: Path, change: str, name: str) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    save_file(CHANGES[change](load_file(clip_folder / "model.safetensors"), name), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"must hold exactly the 40 tensors .* got {change} {name}"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change, name)
        for name in [
            "transformer.resblocks.1.attn.in_proj_bias",
            "temporal_positional_embedding",
            "conv1.weight",
            "proj",
        ]
        for change in CHANGES
        if (change, name)
        != ("misshapen", "proj")  # fewer columns are a shorter embedding, which the layout leaves open
    ],
)
def test_a_viclip_with_other_tensors_is_refused(tmp_path: Path, change: str, name: str) -> None:
    name = f"vision_encoder.{name}"
    state = CHANGES[change](viclip_state(), name)
    torch.save({"model": state}, tmp_path / "v.pth")
    with pytest.raises(UserError, match=rf"must hold exactly the .* {change} .*{name}"):
        load_viclip(str(tmp_path))


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
def test_a_clip_folder_that_lacks_a_file_is_refused(clip_folder: Path, tmp_path: Path, lacking: str) -> None:
    for name in {"config.json", "model.safetensors"} - {lacking}:
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(UserError, match=f"got none named {lacking}"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"), [('{"model_type": "bert"}', "got 'bert'"), ("{", "must be a JSON object"), ("[]", "must be a JSON")]
)  # fmt: skip
def test_a_folder_of_another_model_is_refused(clip_folder: Path, tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        load_clip(str(tmp_path))


def test_one_file_of_weights_must_be_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got no such file or folder"):
        clip_model.weight_file(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="got none"):
        clip_model.weight_file(str(tmp_path))
    (tmp_path / "b.pth").touch()
    (tmp_path / "notes.txt").touch()
    assert (
        clip_model.weight_file(str(tmp_path)) == clip_model.weight_file(str(tmp_path / "b.pth")) == tmp_path / "b.pth"
    )
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(UserError, match=r"got a.safetensors, b.pth; name the file"):
        clip_model.weight_file(str(tmp_path))


class _Touch:
    """What a hostile checkpoint holds: unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_pickle_runs(tmp_path: Path) -> None:
    torch.save({"model": viclip_state(), "more": _Touch(tmp_path / "ran")}, tmp_path / "v.pth")
    with pytest.raises(UserError, match="must hold tensors only"):
        load_viclip(str(tmp_path / "v.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not weights", None])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_weights_are_named(tmp_path: Path, viclip_file: Path, content: bytes | None, suffix: str) -> None:
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(viclip_file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match=f"damaged{suffix}"):
        load_viclip(str(file))


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "v.pth")
    with pytest.raises(UserError, match="must hold a state dict"):
        load_viclip(str(tmp_path))


def test_passes_have_one_size_and_the_last_is_filled() -> None:
    inputs, sizes = torch.arange(5.0)[:, None], []

    def forward(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part * 2

    assert torch.equal(in_chunks(forward, inputs, "cpu"), inputs * 2) and sizes == [1] * 5
    sizes.clear()
    assert torch.equal(in_chunks(forward, inputs, "cpu", size=3), inputs * 2) and sizes == [3, 3]


def test_a_frame_is_embedded_alike_in_any_company(clip_folder: Path) -> None:
    frames, tower = real_frames("bikes.mp4", 5), load_clip(str(clip_folder))
    together = tower.image_embeddings(frames)
    assert all(
        np.array_equal(tower.image_embeddings([frame])[0], row) for frame, row in zip(frames, together, strict=True)
    )


def test_a_model_is_loaded_once_a_process(clip_folder: Path, viclip_file: Path) -> None:
    assert isinstance(load_clip(str(clip_folder)), Clip)
    assert load_clip(str(clip_folder)) is load_clip(str(clip_folder))
    assert load_viclip(str(viclip_file)) is load_viclip(str(viclip_file))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [clip_model.pick_device(name) for name in ("auto", "cpu", "cuda", "cuda:0")] == [
        "cuda",
        "cpu",
        "cuda",
        "cuda:0",
    ]
    with pytest.raises(UserError, match="'cuda:1' is not here: torch sees 1"):
        clip_model.pick_device("cuda:1")
    with pytest.raises(UserError, match="got 'gpu'"):
        clip_model.pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert clip_model.pick_device("auto") == "cpu"


@pytest.mark.parametrize(("library", "extra"), [("transformers", "models"), ("cv2", "curation")])
def test_a_missing_library_names_its_extra(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch, library: str, extra: str
) -> None:
    genuine = builtins.__import__

    def without_it(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return genuine(name, *rest)

    frame = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(builtins, "__import__", without_it)
    with pytest.raises(UserError, match=rf"vchitect-fast\[{extra}\]"):
        load_clip.__wrapped__(str(clip_folder)) if library == "transformers" else viclip_pixels([frame], 224)
