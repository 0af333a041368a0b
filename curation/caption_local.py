"""Captions from a vision-language model in a folder, in this process: Hugging Face layout, greedy, one clip at a time.

The folder holds config.json, the processor's files and safetensors; nothing is downloaded, no code of the folder runs, no
pickle is read. A folder that lacks a file or a tensor is a UserError: transformers would fill a missing one with chance.
The frames go in as pictures, in order, before the prompt, in the chat form that the folder defines; without one, as the
model's picture marks and the bare prompt. For many clips a server with continuous batching is far quicker (caption.py).

Frames, prompt, limits and scores are those of caption.py, whose backend this is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vchitect_fast.curation.caption import COLUMNS, MAX_TOKENS, NUM_FRAMES, PROMPT, SHORT_SIDE, NoCaption
from vchitect_fast.curation.clip_model import pick_device
from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, Stage, Want, weights_hash
from vchitect_fast.errors import UserError

# What decides a caption beside the tensors: sizes, vocabulary, the chat form, how pictures are cut, when to stop.
DECIDING = (".safetensors", ".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class LocalCaption(Stage):
    """A caption by a model of this machine.

    model        folder of the model, for example a copy of llava-hf/llava-onevision-qwen2-0.5b-ov-hf
    prompt       what it is asked
    num_frames   frames spread over the clip; a shorter clip shows each of its frames once
    short_side   pixels that frames are shrunk to, before the model's own resize
    max_tokens   longest answer
    device       "auto", "cpu", "cuda", "cuda:N"

    Token counts are those of the model: prompt_tokens with the pictures', completion_tokens with the one that ends.
    """

    model: str = field(metadata={"key": False})  # its hash is in the key
    prompt: str = PROMPT
    num_frames: int = NUM_FRAMES
    short_side: int = SHORT_SIDE
    max_tokens: int = MAX_TOKENS
    device: str = field(default="auto", metadata={"key": False})

    name = "caption"
    backend = "transformers"
    version = 1
    cost = 60000
    columns = COLUMNS
    main = "num_words"
    extra = "models"

    def wants(self, span: ClipSpan) -> list[Want]:
        """`num_frames` at the middles of equal parts of the clip; never a frame twice."""
        return [Want(time_s, self.short_side) for time_s in span.spread(min(self.num_frames, span.num_frames))]

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """One clip after the other: in a batch, padding would change what a clip gets. NoCaption for an empty answer."""
        return [self._score(sample) for sample in samples]

    def check(self) -> None:
        """Reads the model once and lets go of it; UserError where the folder is not whole or is no such model."""
        for name in ("num_frames", "short_side", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of the caption stage must be 1 or more, got {getattr(self, name)}.")
        pick_device(self.device)
        processor, _ = _load.__wrapped__(self.model, "cpu")
        _question(processor, self.model, [np.zeros((28, 28, 3), np.uint8)], self.prompt)

    @property
    def weights(self) -> str:
        """Hash of the tensors and of the files that say how they are used."""
        return weights_hash(*_files(self.model))

    def _score(self, sample: Sample) -> Scores:
        import torch

        processor, model = _load(self.model, pick_device(self.device))
        inputs = _question(processor, self.model, sample.frames, self.prompt).to(model.device, model.dtype)
        with torch.inference_mode():
            answer = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_tokens)
        num_asked = inputs["input_ids"].shape[1]
        said = answer[0, num_asked:].tolist()
        caption = processor.decode(said, skip_special_tokens=True).strip()
        if not caption:
            raise NoCaption(f"the model {Path(self.model).name} gave an empty caption")
        ends = model.generation_config.eos_token_id
        finished = said[-1] in (ends if isinstance(ends, list) else [ends])
        return {
            "caption": caption,
            "num_words": len(caption.split()),
            "truncated": not finished,
            "finish_reason": "stop" if finished else "length",
            "prompt_tokens": num_asked,
            "completion_tokens": len(said),
        }


def _question(processor: Any, folder: str, frames: Sequence[np.ndarray], prompt: str) -> Any:
    """What the processor makes of the frames (uint8 RGB [H,W,3]) and the prompt: token ids [1,n], pixel values."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    if processor.chat_template or getattr(processor.tokenizer, "chat_template", None):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=None if processor.chat_template else processor.tokenizer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    mark = getattr(processor, "image_token", None)
    if not mark:
        raise UserError(
            f"the model folder {folder} must define a chat template or a mark for pictures, got neither; "
            "add its chat_template.jinja."
        )
    return processor(text=f"{mark * len(images)}\n{prompt}", images=images, return_tensors="pt")


@lru_cache(maxsize=1)
def _load(folder: str, device: str) -> tuple[Any, Any]:
    """(processor, model) of a folder, once a process; UserError naming what is missing."""
    _files(folder)
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError:
        raise UserError(
            "captions by a local model need transformers (it builds the model); pip install 'vchitect-fast[models]'."
        ) from None
    processor = _read(AutoProcessor, folder)
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise UserError(
            f"{folder} must hold a processor of pictures and text, got a {type(processor).__name__}; copy it again."
        )
    model, found = _read(
        AutoModelForImageTextToText, folder, dtype="auto", use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"the safetensors in {folder} must hold every tensor of the model, got none named "
            f"{', '.join(missing[:3])}{rest}; copy the model again."
        )
    return processor, model.eval().to(device)


def _read(kind: Any, folder: str, **how: Any) -> Any:
    """kind.from_pretrained, without network and without code of the folder."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **how)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError, ImportError and others
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{folder} must be a vision-language model that transformers loads without code of its own, got: {said}"
        ) from None


def _files(folder: str) -> list[Path]:
    """The files that decide a caption, by name; UserError where the folder lacks its config, processor or tensors."""
    place = Path(folder)
    found = sorted(f for f in place.iterdir() if f.suffix in DECIDING and f.is_file()) if place.is_dir() else []
    names = {file.name for file in found}
    lacking = [
        what
        for what, there in (
            ("config.json", "config.json" in names),
            ("preprocessor_config.json or processor_config.json", names & {"preprocessor_config.json", "processor_config.json"}),
            ("*.safetensors", any(file.suffix == ".safetensors" for file in found)),
        )
        if not there
    ]  # fmt: skip
    if lacking:
        raise UserError(
            f"the caption model {folder} must be a folder in Hugging Face layout, got none with {lacking[0]}; "
            "copy the whole model there."
        )
    return found
