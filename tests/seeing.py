"""Tiny image-text models with processors of their own, and data sets of pictures for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3Processor,
    Idefics3Config,
    Idefics3Processor,
    LlavaConfig,
    LlavaProcessor,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from llmprune.checkpoint.resolve import BUNDLED

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"vocab_size": 2064, "max_position_embeddings": 512, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}"
    "{% if part.type == 'image' %}PLACE{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
)
WORDS = ("the", "river", "runs", "slowly", "past", "a", "stone", "house", "where", "three", "old", "boats", "wait", "for", "morning", "light")


def tokenizer_with(**special: str) -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED / "llama", extra_special_tokens=special)


def llava(folder: Path) -> tuple[Any, Any]:
    tokenizer = tokenizer_with(image_token="<image>")
    vision = VISION | {"model_type": "clip_vision_model"}
    config = LlavaConfig(vision_config=vision, text_config=TEXT | {"model_type": "llama"}, image_token_index=tokenizer.image_token_id)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return config, LlavaProcessor(images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1)


def qwen2_vl(folder: Path) -> tuple[Any, Any]:
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
    tokenizer = tokenizer_with(**names)
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(names[f"{kind}_token"]) for kind in ("image", "video")}
    ids |= {f"vision_{part}_token_id": tokenizer.convert_tokens_to_ids(names[part]) for part in ("start", "end")}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 7, "spatial_merge_size": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **ids)
    images = Qwen2VLImageProcessorPil(patch_size=7, merge_size=2, min_pixels=14 * 14, max_pixels=42 * 42)
    return config, OfImages(images, tokenizer)


class OfImages(Qwen2VLProcessor):
    """Without the processor of videos, which needs torchvision; loading it again would look for one."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any) -> None:
        self.image_token, self.video_token = tokenizer.image_token, "<|video_pad|>"
        self.image_token_id, self.video_token_id = (tokenizer.convert_tokens_to_ids(t) for t in (self.image_token, self.video_token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def gemma3(folder: Path) -> tuple[Any, Any]:
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tokenizer_with(**names)
    ids = {"image_token_index": tokenizer.image_token_id, "boi_token_index": tokenizer.boi_token_id, "eoi_token_index": tokenizer.eoi_token_id}
    text = TEXT | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **ids)
    return config, Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, image_seq_length=4)


def idefics3(folder: Path) -> tuple[Any, Any]:
    names = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    tokenizer = tokenizer_with(**names, end_of_utterance_token="<end_of_utterance>")
    text = TEXT | {"model_type": "llama"}
    config = Idefics3Config(text_config=text, vision_config=VISION, image_token_id=tokenizer.image_token_id, scale_factor=2)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False)
    return config, Idefics3Processor(images, tokenizer, image_seq_len=4)


KINDS = {kind.__name__: kind for kind in (llava, qwen2_vl, gemma3, idefics3)}


def save_seeing(kind: str, folder: Path, template: bool = True) -> Any:
    """Save a random image-text model of a kind with a processor, which is returned; its columns have different scales."""
    config, processor = KINDS[kind](folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5).mul_(torch.randn(parameter.shape[-1]).mul(0.5).exp())
    model.save_pretrained(folder)
    place = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}.get(kind, processor.image_token)
    processor.chat_template = TEMPLATE.replace("PLACE", place) if template else None
    processor.save_pretrained(folder)
    return processor


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def save_rows(folder: Path, count: int = 24, form: str = "messages") -> Path:
    """A .jsonl of rows with one picture or two beside it, as dialogues or as text."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(1)
    rows = []
    for number in range(count):
        names = [f"{number}-{k}.png" for k in range(1 + number % 2)]
        for k, name in enumerate(names):
            picture(2 * number + k).save(folder / name)
        said = " ".join(draw.choices(WORDS, k=20))
        if form == "messages":
            asked = [{"type": "image"} for _ in names] + [{"type": "text", "text": "What is it?"}]
            rows.append(
                {
                    "images": names,
                    "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": said}]}],
                }
            )
        else:
            rows.append({"images": names, "text": said})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
