"""Text encoders: prompts -> embeddings [B,N,width] and a pooled vector [B,pooled_width], both fp32.

`SD3TextEncoder` runs CLIP-L, CLIP-G and T5-XXL from a folder as Stable Diffusion 3 does; `HashEncoder` needs no
weights: it gives every word a fixed random vector, which is enough to tell the captions of a quickstart apart and carries
no meaning. `load_text_encoder` gives the one that was asked for and never the other. All three encoders of SD3 are needed
(the released model was trained with them); nothing here is trained, nothing here is downloaded.

B prompts, N text tokens. The empty prompt is valid: it is the unconditional side of classifier-free guidance.
"""

from __future__ import annotations

import hashlib
import math
import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.model.frozen import fingerprint, load_frozen, require_config


class TextEncoder(Protocol):
    """What training, sampling and the embedding cache need of a text encoder."""

    @property
    def name(self) -> str:
        """ "hash" or "sd3"."""

    @property
    def fingerprint(self) -> str:
        """Changes when the same prompt would give other embeddings; the key of the embedding cache."""

    @property
    def num_tokens(self) -> int:
        """N, the same for every prompt."""

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B,N,width] and pooled [B,pooled_width], fp32, on the encoder's device, without gradient.

        Raises UserError unless `prompts` is a list of at least one string.
        """


def load_text_encoder(spec: str, *, width: int, pooled_width: int, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder that `spec` names.

    spec          "hash", or an SD3 folder in diffusers' layout (text_encoder, _2, _3 and tokenizer, _2, _3)
    width         joint_attention_dim of the transformer that reads the embeddings
    pooled_width  its pooled_projection_dim

    Raises UserError when the folder is absent, incomplete or of other widths, or when transformers is not installed.
    """
    if spec == "hash":
        return HashEncoder(width=width, pooled_width=pooled_width, device=device)
    return SD3TextEncoder(Path(spec).expanduser(), width=width, pooled_width=pooled_width, device=device)


HASH_TOKENS = 16
_SUMMED_BYTES = 8  # uniform bytes a number: their sum is close to a Gaussian
_BYTES_MEAN = _SUMMED_BYTES * 255 // 2
_BYTES_STD = math.sqrt(_SUMMED_BYTES * (256**2 - 1) / 12)


class HashEncoder:
    """Words -> fixed random vectors of unit variance, the same on every machine and in every process.

    A word is a run of letters, digits and underscores, lower-cased; punctuation is dropped. A word's vector comes from
    SHAKE-256 of its UTF-8 bytes: each number is the sum of eight of the hash's bytes, centred and scaled, exact
    in integers up to one rounding (a seeded Gaussian generator is not the same on every machine). Token i is
    (word_i + position_i) / sqrt(2); the rest of the 16 tokens hold a fixed pad vector in place of the word.
    The pooled vector is the mean of the words' own (other) vectors, scaled to unit mean square; it knows no order.

    A prompt of more than 16 words keeps its first 15; the last token holds the sum of all others over the root of their
    number, so long prompts that differ in a word still differ, but the order of the words from the 16th on is lost.
    """

    name = "hash"
    num_tokens = HASH_TOKENS

    def __init__(self, *, width: int, pooled_width: int, device: torch.device | str = "cpu") -> None:
        if width < 1 or pooled_width < 1:
            raise UserError(f"text widths must be positive, got width {width} and pooled_width {pooled_width}.")
        self._width, self._pooled_width, self._device = width, pooled_width, device
        self.fingerprint = f"hash-1-{HASH_TOKENS}x{width}-{pooled_width}"  # the first number counts changes of the rule

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See TextEncoder.encode."""
        _check_prompts(prompts)
        pairs = [self._encode_one(re.findall(r"\w+", prompt.lower())) for prompt in prompts]
        embeds = torch.from_numpy(np.stack([tokens for tokens, _ in pairs]))
        pooled = torch.from_numpy(np.stack([vector for _, vector in pairs]))
        return embeds.to(self._device), pooled.to(self._device)

    def _encode_one(self, words: list[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        tokens = np.empty((HASH_TOKENS, self._width), dtype=np.float32)
        for i in range(HASH_TOKENS):
            here = words[i:] if i == HASH_TOKENS - 1 else words[i : i + 1]
            vectors = [_hashed(f"word:{word}", self._width) for word in here] or [_hashed("pad:", self._width)]
            position = _hashed(f"position:{i}", self._width)
            # Integers until here; one division, one rounding to fp32.
            tokens[i] = (sum(vectors) / math.sqrt(len(vectors)) + position) / (_BYTES_STD * math.sqrt(2))
        vectors = [_hashed(f"pooled:{word}", self._pooled_width) for word in words]
        total = np.asarray(sum(vectors) if vectors else _hashed("pooled pad:", self._pooled_width))
        mean_square = int((total * total).sum()) / self._pooled_width
        # Numbers that sum to exactly zero everywhere are possible only for a width of a few; they stay zero.
        return tokens, (total / math.sqrt(mean_square or 1.0)).astype(np.float32)


@lru_cache(maxsize=1024)
def _hashed(label: str, width: int) -> NDArray[np.int64]:
    """Integers [width] of mean 0 and standard deviation _BYTES_STD, a pure function of the label. Read-only."""
    digest = hashlib.shake_256(label.encode("utf-8", "surrogatepass")).digest(width * _SUMMED_BYTES)
    numbers = (
        np.frombuffer(digest, dtype=np.uint8).reshape(width, _SUMMED_BYTES).sum(axis=1, dtype=np.int64) - _BYTES_MEAN
    )
    numbers.flags.writeable = False
    return numbers


CLIP_TOKENS, T5_TOKENS = 77, 256
_CLIP_FOLDERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
_T5_FOLDERS = ("text_encoder_3", "tokenizer_3")


class SD3TextEncoder:
    """CLIP-L, CLIP-G and T5-XXL, put together as StableDiffusion3Pipeline.encode_prompt does (without clip_skip).

    Tokens 0..76: the penultimate hidden states of both CLIPs side by side on channels, zero-padded to `width`; tokens
    77..332: T5's last hidden states. Pooled: the projected text embeddings of CLIP-L and CLIP-G side by side. Prompts
    are cut at 77 and at 256 tokens; no attention mask is used, padding is attended to, as in SD3.
    Runs in the weights' own dtype. `load_text_encoder` documents the arguments and the errors.
    """

    name = "sd3"
    num_tokens = CLIP_TOKENS + T5_TOKENS

    def __init__(self, folder: Path, *, width: int, pooled_width: int, device: torch.device | str = "cpu") -> None:
        _check_layout(folder)
        try:
            from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel
            from transformers import T5TokenizerFast as T5Tokenizer  # type: ignore[attr-defined]
        except ImportError as error:
            raise UserError(
                f"the text encoders in {folder} need transformers, which does not import ({error}); "
                f"run pip install 'vchitect-fast[sd3]'."
            ) from error
        _check_widths(folder, width, pooled_width)  # before gigabytes are read
        self._width, self._device = width, torch.device(device)
        options: dict[str, Any] = {"stem": "model", "dtype_option": "dtype"}
        self._clips: list[tuple[Any, Any]] = [
            (
                _load_tokenizer(CLIPTokenizer, folder / tokenizer),
                load_frozen(CLIPTextModelWithProjection, folder / model, **options),
            )
            for model, tokenizer in _CLIP_FOLDERS
        ]
        self._t5_tokenizer: Any = _load_tokenizer(T5Tokenizer, folder / _T5_FOLDERS[1])
        self._t5: Any = load_frozen(T5EncoderModel, folder / _T5_FOLDERS[0], **options)
        for model in [*(model for _, model in self._clips), self._t5]:
            model.to(self._device)
        self._facts = _facts(folder)

    @cached_property
    def fingerprint(self) -> str:
        """Of all weights, configs and tokenizer files, and the width; reads every weight once, seconds for T5-XXL."""
        models = {"clip_l": self._clips[0][1], "clip_g": self._clips[1][1], "t5": self._t5}
        return "sd3-" + fingerprint(models, [*self._facts, str(self._width).encode()])

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See TextEncoder.encode."""
        _check_prompts(prompts)
        hidden, pooled = [], []
        with torch.autocast(self._device.type, enabled=False):
            for tokenizer, model in self._clips:
                output = model(self._tokenize(tokenizer, prompts, CLIP_TOKENS), output_hidden_states=True)
                hidden.append(output.hidden_states[-2].float())
                pooled.append(output.text_embeds.float())
            t5 = self._t5(self._tokenize(self._t5_tokenizer, prompts, T5_TOKENS)).last_hidden_state.float()
        clip = torch.cat(hidden, dim=-1)
        clip = F.pad(clip, (0, self._width - clip.shape[-1]))
        return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)

    def _tokenize(self, tokenizer: Any, prompts: list[str], num_tokens: int) -> Tensor:
        batch = tokenizer(prompts, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt")
        ids: Tensor = batch.input_ids.to(self._device)
        return ids


def _check_layout(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"a text encoder is 'hash' or an SD3 folder, got {str(folder)!r}, which is no folder.")
    wanted = [name for pair in (*_CLIP_FOLDERS, _T5_FOLDERS) for name in pair]
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}; SD3's three text encoders and tokenizers are all needed "
            f"(point to the whole SD3 checkpoint, or ask for 'hash')."
        )


def _check_widths(folder: Path, width: int, pooled_width: int) -> None:
    """From the three config.json alone."""
    from transformers import CLIPTextConfig, T5Config

    clips = [_load_config(CLIPTextConfig, folder / model) for model, _ in _CLIP_FOLDERS]
    t5 = _load_config(T5Config, folder / _T5_FOLDERS[0])
    hidden, pooled = sum(clip.hidden_size for clip in clips), sum(clip.projection_dim for clip in clips)
    if t5.d_model != width:
        raise UserError(
            f"T5 must be as wide as the transformer's joint_attention_dim {width}, {folder} has {t5.d_model}; "
            f"use the text encoders that the transformer was trained with."
        )
    if hidden > width:
        raise UserError(
            f"the two CLIPs side by side must fit in joint_attention_dim {width}, {folder} has {hidden}; "
            f"use the text encoders that the transformer was trained with."
        )
    if pooled != pooled_width:
        raise UserError(
            f"the CLIP projections must add up to the transformer's pooled_projection_dim {pooled_width}, {folder} has "
            f"{pooled}; use the text encoders that the transformer was trained with."
        )
    short = [clip.max_position_embeddings for clip in clips if clip.max_position_embeddings < CLIP_TOKENS]
    if short:
        raise UserError(f"both CLIPs must take {CLIP_TOKENS} tokens, {folder} has one of {short[0]}; use SD3's.")


def _load_config(config_class: Any, folder: Path) -> Any:
    require_config(folder)  # transformers would take its own defaults
    try:
        return config_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is not a readable config; copy it again.") from error


def _load_tokenizer(tokenizer_class: Any, folder: Path) -> Any:
    files = {path.name for path in folder.iterdir()}
    if not ({"tokenizer.json", "spiece.model"} & files or {"vocab.json", "merges.txt"} <= files):
        raise UserError(
            f"{folder} needs tokenizer.json, spiece.model, or vocab.json with merges.txt, found "
            f"{', '.join(sorted(files)) or 'nothing'}; copy the whole folder of the checkpoint."
        )
    try:
        return tokenizer_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{folder} does not load as {tokenizer_class.__name__} ({error}); copy it again.") from error


def _facts(folder: Path) -> list[bytes]:
    """Everything but weights that the embeddings depend on: configs and tokenizer files, names included."""
    configs = [folder / model / "config.json" for model, _ in (*_CLIP_FOLDERS, _T5_FOLDERS)]
    tokenizers = [path for _, name in (*_CLIP_FOLDERS, _T5_FOLDERS) for path in sorted((folder / name).iterdir())]
    files = [path for path in (*configs, *tokenizers) if path.is_file()]
    return [path.relative_to(folder).as_posix().encode() + b"\n" + path.read_bytes() for path in files]


def _check_prompts(prompts: list[str]) -> None:
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"prompts must be a list of at least one string, got {prompts!r:.80}; write [prompt] for one.")
