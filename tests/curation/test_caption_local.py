"""Captions by a local model: a small random LLaVA in its own layout says what model.generate says on the same frames.

Model and tokenizer are made here, offline; the frames are real. pytest tests/curation/test_caption_local.py
"""

from __future__ import annotations

import builtins
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from caption_server import spans
from PIL import Image

from vchitect_fast.curation import caption_local as module
from vchitect_fast.curation.caption import PROMPT, NoCaption
from vchitect_fast.curation.caption_local import LocalCaption
from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.stage import Sample
from vchitect_fast.errors import UserError

CHAT = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WORDS = ["<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", *dict.fromkeys(PROMPT.split()), *map(str, range(60))]
SIZE, PATCH = 28, 14  # pixels: 4 tokens a picture
TOKENS = 3 * 4 + 2 + len(PROMPT.split())  # three pictures, USER:, ASSISTANT:, the prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of two layers, 32 wide, with a tokenizer of words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )  # fmt: skip

    words = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    pictures = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**layers, image_size=SIZE, patch_size=PATCH, initializer_range=0.5),
        text_config=LlamaConfig(
            **layers, vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2, initializer_range=0.5
        ),
        image_token_index=WORDS.index("<image>"), vision_feature_layer=-2,
    )  # fmt: skip
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("vlm") / "llava"
    LlavaForConditionalGeneration(config).save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def small(folder: Path, **more: Any) -> LocalCaption:
    return LocalCaption(str(folder), **{"num_frames": 3, "max_tokens": 12, "device": "cpu", **more})


def sample(stage: LocalCaption, number: int) -> Sample:
    span = spans()[number]
    return Sample(span, clip_frames(span, stage.wants(span)), {})


def by_hand(folder: Path, sample: Sample, text: str, num_tokens: int) -> tuple[list[int], str]:
    """The original's way, step by step: the text written out, the processor, generate."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    processor = LlavaProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    inputs = processor(text=text, images=[Image.fromarray(f) for f in sample.frames], return_tensors="pt")
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens)[0, inputs["input_ids"].shape[1] :]
    return answer.tolist(), processor.tokenizer.decode(answer, skip_special_tokens=True)


def test_it_says_what_generate_says(folder: Path) -> None:
    stage = small(folder)
    stage.check()
    samples = [sample(stage, k) for k in (0, 2, 4)]
    found = stage.score(samples)
    text = f"USER: {'<image> ' * 3}{PROMPT} ASSISTANT:"
    for scores, one in zip(found, samples, strict=True):
        tokens, caption = by_hand(folder, one, text, 12)
        assert len(tokens) == 12
        assert scores == {
            "caption": caption, "num_words": len(caption.split()), "truncated": True, "finish_reason": "length",
            "prompt_tokens": TOKENS, "completion_tokens": 12,
        }  # fmt: skip
        assert scores.keys() == stage.columns.keys()
    assert len({scores["caption"] for scores in found}) == 3  # the frames matter
    assert stage.score(samples[::-1]) == found[::-1]
    assert stage.score([]) == []


def test_sixteen_frames_by_default_and_none_twice(folder: Path) -> None:
    stage = LocalCaption(str(folder), device="cpu", max_tokens=1)
    assert [len(stage.wants(spans()[k])) for k in (1, 5)] == [16, 7]
    assert {want.short_side for want in stage.wants(spans()[1])} == {336}
    scores = stage.score([sample(stage, 1)])[0]
    assert scores["prompt_tokens"] == TOKENS + 13 * 4


def test_an_answer_that_ends_by_itself(folder: Path, copied: Path) -> None:
    """The fifth token that the model says is made the one that ends an answer."""
    stage = small(folder)
    one = sample(stage, 2)
    tokens, _ = by_hand(folder, one, f"USER: {'<image> ' * 3}{PROMPT} ASSISTANT:", 12)
    last = next(k for k in range(4, 12) if tokens[k] not in tokens[:k])
    settings = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, tokens[last]]}))
    [scores] = small(copied).score([one])
    assert (scores["truncated"], scores["finish_reason"], scores["completion_tokens"]) == (False, "stop", last + 1)
    assert scores["caption"].split() == [WORDS[token] for token in tokens[: last + 1]]


def test_without_a_chat_template_marks_and_prompt(folder: Path, copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    stage = small(copied)
    stage.check()
    one = sample(stage, 0)
    [scores] = stage.score([one])
    assert scores["caption"] == by_hand(copied, one, f"{'<image>' * 3}\n{PROMPT}", 12)[1]
    assert scores["prompt_tokens"] == TOKENS - 2
    assert stage.key() != small(folder).key()


def test_an_empty_answer_is_no_caption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = small(folder)
    _, model = module._load(str(folder), "cpu")
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[2]])], 1))
    with pytest.raises(NoCaption, match="the model llava gave an empty caption"):
        stage.score([sample(stage, 0)])


def test_the_key_holds_the_folders_bytes_and_not_its_place(folder: Path, copied: Path) -> None:
    stage = small(folder)
    assert small(copied).key() == stage.key() == replace(stage, device="auto").key()
    assert (
        len({s.key() for s in (stage, *(replace(stage, **{n: 9}) for n in ("num_frames", "short_side", "max_tokens")))})
        == 4
    )
    for name in ("model.safetensors", "generation_config.json", "chat_template.jinja", "tokenizer.json"):
        before = (copied / name).read_bytes()
        (copied / name).write_bytes(before + b" ")
        assert small(copied).key() != stage.key(), name
        (copied / name).write_bytes(before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "must be a folder in Hugging Face layout, got none with config.json"),
        ("processor_config.json", "got none with preprocessor_config.json or processor_config.json"),
        ("model.safetensors", r"got none with \*.safetensors"),
        (
            "tokenizer.json",
            "must be a vision-language model that transformers loads|must hold a processor of pictures and text",
        ),
    ],
)
def test_a_missing_file_is_named(copied: Path, name: str, message: str) -> None:
    (copied / name).unlink()
    with pytest.raises(UserError, match=f"{copied}.*{message}"):
        small(copied).check()


def test_a_processor_of_pictures_alone_is_refused(copied: Path) -> None:
    config = json.loads((copied / "processor_config.json").read_text())
    (copied / "preprocessor_config.json").write_text(json.dumps(config["image_processor"]))
    (copied / "config.json").write_text(json.dumps({"model_type": "vit"}))
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    with pytest.raises(UserError, match="must hold a processor of pictures and text, got a CLIPImageProcessor"):
        small(copied).check()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere must be a folder in Hugging Face layout"):
        small(tmp_path / "nowhere").check()
    with pytest.raises(UserError, match="Hugging Face layout"):  # a name on a hub is not looked up
        small(Path("llava-hf/llava-1.5-7b-hf")).check()


def test_a_tensor_that_is_missing_or_misshapen_is_refused(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    for changed, message in (
        ({}, "must hold every tensor of the model, got none named .*layers.1.mlp.up_proj.weight; copy"),
        ({name: tensors[name][:1].clone()}, "transformers loads without code of its own, got: .*mismatched"),
    ):
        others = {n: t for n, t in tensors.items() if n != name}
        save_file({**others, **changed}, copied / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            small(copied).check()


def test_code_in_the_folder_does_not_run(copied: Path, tmp_path: Path) -> None:
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("modeling_own.py", "configuration_own.py", "processing_own.py"):
        (copied / name).write_text(code)
    config = json.loads((copied / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "configuration_own.Config", "AutoModelForImageTextToText": "modeling_own.Model",
            "AutoProcessor": "processing_own.Processor",
        },
    }  # fmt: skip
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="transformers loads without code of its own"):
        small(copied).check()
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_not_read(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"got none with \*.safetensors"):
        small(copied).check()


@pytest.mark.parametrize("field", ["num_frames", "short_side", "max_tokens"])
def test_parameters_out_of_range(folder: Path, field: str) -> None:
    with pytest.raises(UserError, match=f"{field} of the caption stage must be 1 or more, got 0"):
        small(folder, **{field: 0}).check()


def test_without_transformers_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"need transformers .*vchitect-fast\[models\]"):
        small(folder).check()
