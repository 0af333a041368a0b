"""Text encoders: HashEncoder is a pure function of the words, SD3TextEncoder is StableDiffusion3Pipeline.encode_prompt.

Run: pytest tests/model/test_text.py
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from vchitect_fast.errors import UserError
from vchitect_fast.model.text import HashEncoder, load_text_encoder

WIDTH, POOLED = 32, 20  # T5's d_model; 8 + 12 CLIP projections
CAPTIONS = [
    "A man rides a red bike downhill.",
    "",
    "Big Buck Bunny wakes up, stretches and looks at a butterfly, it's 9:30 in the morning " * 12,  # over 256 tokens
]
WORDS = "a man rides red bike downhill big buck bunny wakes up stretches and looks at butterfly it s in the morning"


# --- hash


def hash_encoder(**widths: int) -> HashEncoder:
    return HashEncoder(**{"width": 64, "pooled_width": 48, **widths})


def test_hash_shapes_and_statistics() -> None:
    encoder = load_text_encoder("hash", width=4096, pooled_width=2048)
    embeds, pooled = encoder.encode(CAPTIONS)
    assert embeds.shape == (3, encoder.num_tokens, 4096)
    assert pooled.shape == (3, 2048)
    assert embeds.dtype == pooled.dtype == torch.float32
    # 4096 numbers of mean 0 and variance 1: five standard errors.
    for token in embeds[:2].flatten(0, 1):
        assert token.mean().abs() < 5 / 64
        assert abs(token.var() - 1) < 5 * 2**0.5 / 64
    assert (pooled.square().mean(-1) - 1).abs().max() < 1e-6
    kurtosis = embeds[:2].double().pow(4).mean()
    assert 2.7 < kurtosis < 3.1  # a Gaussian has 3, a sum of eight uniforms 2.85


def test_hash_is_the_same_in_another_process() -> None:
    """No Python hash(), which changes with PYTHONHASHSEED; the bytes are also fixed for ever by the last line."""
    script = (
        "import hashlib; from vchitect_fast.model.text import HashEncoder\n"
        "e, p = HashEncoder(width=64, pooled_width=48).encode(['A red bike', ''])\n"
        "print(hashlib.sha256(e.numpy().tobytes() + p.numpy().tobytes()).hexdigest()[:16])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    embeds, pooled = hash_encoder().encode(["A red bike", ""])
    here = hashlib.sha256(embeds.numpy().tobytes() + pooled.numpy().tobytes()).hexdigest()[:16]
    assert run.stdout.strip() == here == "fa335612c6336827"


def test_hash_tells_captions_apart() -> None:
    captions = [
        "a red bike",
        "a blue bike",
        "red a bike",  # order
        "a red bike bike",  # repetition
        "a red",
        "",
        "word",
        "pad",
    ]
    embeds, pooled = hash_encoder().encode(captions)
    for i in range(len(captions)):
        for j in range(i):
            assert (embeds[i] - embeds[j]).square().sum(-1).max() > 1, (captions[i], captions[j])
    assert torch.equal(pooled[0], pooled[2])  # pooled knows no order
    assert (pooled[0] - pooled[1]).square().mean() > 0.1


def test_hash_case_punctuation_and_batch_do_not_matter() -> None:
    encoder = hash_encoder()
    embeds, pooled = encoder.encode(["A man, riding: a Bike!", "a man riding a bike", "other"])
    assert torch.equal(embeds[0], embeds[1])
    assert torch.equal(pooled[0], pooled[1])
    alone = encoder.encode(["other"])
    assert torch.equal(alone[0][0], embeds[2])
    assert torch.equal(alone[1][0], pooled[2])


def test_hash_same_word_is_near_itself_elsewhere_and_pads_are_near_each_other() -> None:
    embeds, _ = hash_encoder(width=4096).encode(["bike red", "red bike"])
    correlation = (embeds[0, 0] * embeds[1, 1]).mean()  # the word's half of the variance
    assert abs(correlation - 0.5) < 5 / 64
    assert abs((embeds[0, 0] * embeds[1, 0]).mean() - 0.5) < 5 / 64  # the position's half
    assert torch.equal(embeds[0, 2:], embeds[1, 2:])


def test_hash_long_captions_still_differ() -> None:
    words = [f"w{i}" for i in range(40)]
    encoder = hash_encoder()
    base, late, swapped, longer = (
        " ".join(words),
        " ".join([*words[:-1], "other"]),
        " ".join([*words[:-2], words[-1], words[-2]]),
        " ".join([*words, words[-1]]),
    )
    embeds, _ = encoder.encode([base, late, swapped, longer])
    assert torch.equal(embeds[0, :15], embeds[1, :15])
    assert (embeds[0, 15] - embeds[1, 15]).square().sum() > 0.5
    assert torch.equal(embeds[0], embeds[2])  # the order past the 15th word is lost, as documented
    assert not torch.equal(embeds[0], embeds[3])


def test_hash_exactly_16_words_are_kept_apart() -> None:
    words = [f"w{i}" for i in range(16)]
    embeds, _ = hash_encoder().encode([" ".join(words), " ".join([*words[:14], words[15], words[14]])])
    assert (embeds[0, 14:] - embeds[1, 14:]).square().sum(-1).min() > 1


def test_hash_fingerprint_follows_widths() -> None:
    fingerprints = {hash_encoder(**w).fingerprint for w in ({}, {"width": 65}, {"pooled_width": 49})}
    assert len(fingerprints) == 3
    assert hash_encoder().fingerprint in fingerprints


# --- sd3, with random weights in the released layout


def save_clip(folder: Path, number: str, hidden: int, projection: int, act: str, pad: str) -> None:
    tokenizer_folder = folder / f"tokenizer{number}"
    tokenizer_folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), "bi", "ke</w>", "bike</w>", "th", "the</w>"]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (tokenizer_folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (tokenizer_folder / "merges.txt").write_text("#version: 0.2\nb i\nk e</w>\nbi ke</w>\nt h\nth e</w>\n")
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **names}
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer_folder / "special_tokens_map.json").write_text(json.dumps(names))
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=3, hidden_act=act,
        num_attention_heads=2, projection_dim=projection, max_position_embeddings=77,
        bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=1,
    )  # fmt: skip
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{number}")


def save_t5(folder: Path, spiece: bool = False) -> None:
    tokenizer_folder = folder / "tokenizer_3"
    tokenizer_folder.mkdir(parents=True)
    if spiece:
        import sentencepiece

        text = tokenizer_folder.parent / "words.txt"
        text.write_text("\n".join([WORDS] * 3))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tokenizer_folder / "spiece"), vocab_size=40, model_type="unigram",
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
        (tokenizer_folder / "spiece.vocab").unlink()
        settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0}
        (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
        vocab += [(chr(c), -6.0) for c in range(ord("!"), ord("~") + 1)]
        vocab += [("\u2581" + word, -4.0) for word in WORDS.split()]
        tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)
        tokenizer.save_pretrained(tokenizer_folder)
    config = transformers.T5Config(
        vocab_size=160, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    transformers.T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")


def save_sd3(folder: Path, spiece: bool = False) -> Path:
    torch.manual_seed(0)
    save_clip(folder, "", hidden=8, projection=8, act="quick_gelu", pad="<|endoftext|>")
    save_clip(folder, "_2", hidden=16, projection=12, act="gelu", pad="!")
    save_t5(folder, spiece)
    return folder


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


def pipeline_encode(
    folder: Path, prompts: list[str], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' own pipeline makes of the prompts; loaded by transformers alone."""
    parts: dict[str, Any] = {"transformer": None, "vae": None, "scheduler": None}
    for number in ("", "_2"):
        encoder = transformers.CLIPTextModelWithProjection.from_pretrained(
            folder / f"text_encoder{number}", dtype=dtype
        )
        parts[f"text_encoder{number}"] = encoder.eval().requires_grad_(False)
        parts[f"tokenizer{number}"] = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}")
    t5 = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_3", dtype=dtype)
    parts["text_encoder_3"] = t5.eval().requires_grad_(False)
    parts["tokenizer_3"] = transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_3")
    pipeline = StableDiffusion3Pipeline(**parts)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=torch.device("cpu"), do_classifier_free_guidance=False
        )
    return embeds.float(), pooled.float()


@pytest.mark.parametrize("spiece", [False, True], ids=["tokenizer.json", "spiece.model"])
def test_sd3_is_the_pipelines_encode_prompt(tmp_path: Path, spiece: bool) -> None:
    """Bitwise, on prompts of a few words, of none, and longer than both encoders take."""
    save_sd3(tmp_path, spiece)
    encoder = load_text_encoder(str(tmp_path), width=WIDTH, pooled_width=POOLED)
    embeds, pooled = encoder.encode(CAPTIONS)
    assert embeds.shape == (3, 333, WIDTH)
    assert encoder.num_tokens == 333
    assert pooled.shape == (3, POOLED)
    expected_embeds, expected_pooled = pipeline_encode(tmp_path, CAPTIONS)
    assert torch.equal(embeds, expected_embeds)
    assert torch.equal(pooled, expected_pooled)
    # The pieces lie where they should: both CLIPs, zeros, T5.
    assert embeds[:, :77, :24].abs().sum(-1).min() > 0
    assert not embeds[:, :77, 24:].any()
    assert embeds[:, 77:].abs().sum(-1).min() > 0
    assert len({bytes(row.numpy().tobytes()) for row in embeds}) == 3


def test_sd3_runs_in_the_weights_own_dtype(sd3_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd3_folder, tmp_path, dirs_exist_ok=True)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        weights = tmp_path / name / "model.safetensors"
        save_file({key: t.to(torch.bfloat16) for key, t in load_file(weights).items()}, weights, {"format": "pt"})
    embeds, pooled = load_text_encoder(str(tmp_path), width=WIDTH, pooled_width=POOLED).encode(CAPTIONS[:1])
    assert embeds.dtype == torch.float32
    assert torch.equal(embeds, embeds.bfloat16().float())
    expected_embeds, expected_pooled = pipeline_encode(tmp_path, CAPTIONS[:1], torch.bfloat16)
    assert torch.equal(embeds, expected_embeds)
    assert torch.equal(pooled, expected_pooled)


def test_sd3_ignores_autocast_and_leaves_no_gradient(sd3_folder: Path) -> None:
    encoder = load_text_encoder(str(sd3_folder), width=WIDTH, pooled_width=POOLED)
    plain = encoder.encode(CAPTIONS[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = encoder.encode(CAPTIONS[:1])
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
        assert not a.is_inference()


def test_sd3_fingerprint_follows_weights_configs_and_tokenizers(sd3_folder: Path, tmp_path: Path) -> None:
    def fingerprint_after(change: str) -> str:
        folder = tmp_path / change.replace(" ", "_")
        shutil.copytree(sd3_folder, folder)
        if change == "a weight":
            weights = folder / "text_encoder_3" / "model.safetensors"
            state = load_file(weights)
            state["encoder.block.1.layer.1.DenseReluDense.wo.weight"][0, 0] += 1e-3
            save_file(state, weights, {"format": "pt"})
        if change == "a config":
            path = folder / "text_encoder_2" / "config.json"
            path.write_text(path.read_text().replace('"gelu"', '"quick_gelu"'))
        if change == "a tokenizer":
            path = folder / "tokenizer" / "tokenizer_config.json"
            path.write_text(path.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
        encoder = load_text_encoder(str(folder), width=WIDTH, pooled_width=POOLED)
        before = encoder.fingerprint
        encoder.encode(["a bike"])  # tokenizers remember their last padding; that must not count
        assert load_text_encoder(str(folder), width=WIDTH, pooled_width=POOLED).fingerprint == before
        return before

    changes = ("nothing", "nothing again", "a weight", "a config", "a tokenizer")
    prints = {change: fingerprint_after(change) for change in changes}
    assert prints["nothing"] == prints["nothing again"]
    assert len(set(prints.values())) == 4


# --- refusals


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (["text_encoder_3", "tokenizer_3"], "lacks text_encoder_3, tokenizer_3"),
        (["text_encoder", "tokenizer_2"], "lacks text_encoder, tokenizer_2"),
        (["text_encoder/config.json"], "text_encoder needs a config.json, found none"),
        (["text_encoder_2/model.safetensors"], "text_encoder_2 needs weights in model.safetensors, found none"),
        (["tokenizer/vocab.json"], "tokenizer needs tokenizer.json, spiece.model, or vocab.json with merges.txt"),
        (["tokenizer_3/tokenizer.json"], "tokenizer_3 needs tokenizer.json, spiece.model"),
    ],
)
def test_rejects_incomplete_folder(sd3_folder: Path, tmp_path: Path, remove: list[str], message: str) -> None:
    shutil.copytree(sd3_folder, tmp_path, dirs_exist_ok=True)
    for name in remove:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=message) as caught:
        load_text_encoder(str(tmp_path), width=WIDTH, pooled_width=POOLED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("pickle", r"only pickled pytorch_model.bin \(never loaded\)"),
        ("truncated", "not a whole safetensors file"),
        ("lacks a tensor", "missing or misshaped are .*final_layer_norm.weight"),
        ("misshaped", "text_encoder_3 does not load as T5EncoderModel"),
    ],
)
def test_rejects_spoiled_weights(sd3_folder: Path, tmp_path: Path, spoil: str, message: str) -> None:
    shutil.copytree(sd3_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "text_encoder_3" / "model.safetensors"
    state = load_file(weights)
    if spoil == "pickle":
        torch.save(state, weights.with_name("pytorch_model.bin"))
        weights.unlink()
    elif spoil == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif spoil == "lacks a tensor":
        del state["encoder.final_layer_norm.weight"]
        save_file(state, weights, {"format": "pt"})
    else:
        state["encoder.final_layer_norm.weight"] = torch.zeros(5)
        save_file(state, weights, {"format": "pt"})
    with pytest.raises(UserError, match=message) as caught:
        load_text_encoder(str(tmp_path), width=WIDTH, pooled_width=POOLED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("width", "pooled_width", "message"),
    [
        (4096, POOLED, "joint_attention_dim 4096, .* has 32"),
        (WIDTH, 2048, "add up to the transformer's pooled_projection_dim 2048, .* has 20"),
    ],
)
def test_rejects_widths(sd3_folder: Path, width: int, pooled_width: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_text_encoder(str(sd3_folder), width=width, pooled_width=pooled_width)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 64, "two CLIPs side by side must fit in joint_attention_dim 32, .* has 72"),
        ("max_position_embeddings", 40, "must take 77 tokens, .* has one of 40"),
    ],
)
def test_rejects_clip_config(sd3_folder: Path, tmp_path: Path, field: str, value: int, message: str) -> None:
    shutil.copytree(sd3_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "text_encoder_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match=message):
        load_text_encoder(str(tmp_path), width=WIDTH, pooled_width=POOLED)


def test_rejects_absent_folder_and_never_falls_back(tmp_path: Path) -> None:
    for spec in (str(tmp_path / "absent"), "HASH", "stabilityai/some-model"):
        with pytest.raises(UserError, match="which is no folder"):
            load_text_encoder(spec, width=WIDTH, pooled_width=POOLED)


def test_rejects_missing_transformers_by_the_extra(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'vchitect-fast\[sd3\]'"):
        load_text_encoder(str(sd3_folder), width=WIDTH, pooled_width=POOLED)
    assert load_text_encoder("hash", width=4, pooled_width=4).name == "hash"


@pytest.mark.parametrize("prompts", ["a bike", [], [None], ("a bike",), None])
def test_rejects_prompts(sd3_folder: Path, prompts: Any) -> None:
    for spec in ("hash", str(sd3_folder)):
        encoder = load_text_encoder(spec, width=WIDTH, pooled_width=POOLED)
        with pytest.raises(UserError, match="list of at least one string"):
            encoder.encode(prompts)


def test_rejects_hash_widths() -> None:
    with pytest.raises(UserError, match="must be positive, got width 0"):
        HashEncoder(width=0, pooled_width=4)
