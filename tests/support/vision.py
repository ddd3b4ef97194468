"""Tiny vision-language models with their processors, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.models import tiny_tokenizer

ARCHS = ("llava", "qwen")
PLACE = {"llava": "<image>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>"}
SPECIAL = {
    "llava": ["<image>"],
    "qwen": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
}

_TEXT: dict[str, Any] = dict(
    vocab_size=392,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)

# Contents in parts alone, as the templates of vision-language models have it.
TEMPLATE = (
    "{% if style is defined %}{{ style }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_processor(arch: str = "llava") -> Any:
    """LLaVA's, for images of 28 x 28 pixels in four patches, or Qwen's, for images of any size."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[arch]})
    template = TEMPLATE.replace("IMAGE", PLACE[arch])
    if arch == "qwen":
        images = Qwen2VLImageProcessorPil(
            patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 56
        )
        return _QwenProcessor(images, tokenizer, None, chat_template=template)
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


class _QwenProcessor(Qwen2VLProcessor):
    """One without videos, whose processor would need torchvision."""

    def check_argument_for_proper_class(self, *args: Any) -> None:
        pass


def tiny_vlm(arch: str = "llava", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random LLaVA (CLIP, a projector and a Llama) or Qwen2.5-VL, in eval mode."""
    torch.manual_seed(seed)
    tokens = tiny_processor(arch).tokenizer.convert_tokens_to_ids(SPECIAL[arch])
    model: Any = _llava(*tokens) if arch == "llava" else _qwen(*tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def _llava(image: int) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**_TEXT),
            image_token_index=image,
            vision_feature_layer=-1,
        )
    )


def _qwen(image: int, video: int, start: int, end: int) -> Qwen2_5_VLForConditionalGeneration:
    vision = dict(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=32,
        patch_size=14,
        spatial_merge_size=2,
        fullatt_block_indexes=[1],
        window_size=56,
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )


def with_lora(
    model: Any, targets: str = r".*language_model.*\.(q_proj|v_proj|up_proj)", seed: int = 1
) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    made = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return made


def picture(seed: int, size: tuple[int, int] = (28, 28)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture_file(folder: Path, seed: int, **options: Any) -> str:
    path = folder / f"picture-{seed}.png"
    picture(seed, **options).save(path)
    return str(path)
