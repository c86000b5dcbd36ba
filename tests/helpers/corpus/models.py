"""Tiny Vision Transformers of many libraries, with what a token plan has to know about each.

Every model has 32 x 32 images, patches of 8 (16 patches), width 48, 3 blocks and 3 heads, and seeded random parameters, so that
no norm, scale, bias or position is an identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import timm
import torch
import torchvision
import transformers
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 32, 8, 48, 3, 3, 7
GRID = (SIZE // PATCH, SIZE // PATCH)
Head = Literal["token", "avg", "token+avg", "map"]


@dataclass(frozen=True)
class Family:
    """One architecture of one library. ``make(fused)`` builds it with PyTorch's fused attention or with explicit products.

    ``prefix`` tokens come first; ``head_tokens`` are read by the head one by one, ``pooled`` are averaged or attended over.
    ``pool_input`` names the module whose output (b, N, d) the head averages; ``attentions`` counts attentions per block.
    """

    name: str
    make: Callable[[bool], nn.Module]
    prefix: int = 1
    head: Head = "token"
    head_tokens: tuple[int, ...] = (0,)
    pooled: tuple[int, ...] = ()
    pool_input: str = ""
    attentions: int = 1
    input_name: str = "images"
    features: frozenset[str] = field(default_factory=frozenset)

    @property
    def tokens(self) -> int:
        """N, prefix tokens included."""
        return self.prefix + GRID[0] * GRID[1]


class OneOutput(nn.Module):
    """A Hugging Face model whose output is one tensor of its result, as users wrap it for an export."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, pixel_values: Tensor) -> Tensor:
        result: Tensor = getattr(self.model(pixel_values=pixel_values), self.output)
        return result


def _timm(name: str, fused: bool, **options: Any) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2}
    model: nn.Module = timm.create_model(name, pretrained=False, **{**sizes, "num_classes": CLASSES, **options})
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def _hugging_face(kind: str, fused: bool, output: str = "logits", **options: Any) -> nn.Module:
    sizes = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
    }
    family = getattr(transformers, kind)
    labels = {} if "Vision" in kind else {"num_labels": CLASSES}
    config = family.config_class(**{**sizes, **labels, **options})
    config._attn_implementation = "sdpa" if fused else "eager"
    return OneOutput(family(config), output)


def _siglip_classifier(fused: bool) -> nn.Module:
    vision = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH}
    vision |= {"num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH, "vision_use_head": False}
    config = transformers.SiglipConfig(vision_config=vision, num_labels=CLASSES)
    config.vision_config._attn_implementation = config._attn_implementation = "sdpa" if fused else "eager"
    return OneOutput(transformers.SiglipForImageClassification(config), "logits")


def _torchvision(fused: bool) -> nn.Module:
    return torchvision.models.VisionTransformer(SIZE, PATCH, DEPTH, HEADS, WIDTH, 2 * WIDTH, num_classes=CLASSES)


def _all(prefix: int, first: int | None = None) -> tuple[int, ...]:
    return tuple(range(prefix if first is None else first, prefix + GRID[0] * GRID[1]))


_VIT, _EVA = "vit_tiny_patch16_224", "eva02_tiny_patch14_336"
_REGISTERS = {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5, "qk_norm": True}
_AVERAGE = {"global_pool": "avg", "class_token": False, "fc_norm": True}
_LAYER_SCALE = {"init_values": 0.5, "pre_norm": True, "qkv_bias": False}
_DINOV3 = {"dynamic_img_size": False, "global_pool": "token"}
_BEIT = {"use_relative_position_bias": True, "use_mean_pooling": True, "layer_scale_init_value": 0.5}

_TIMM = [
    Family("timm_class", partial(_timm, _VIT)),
    Family("timm_distilled", partial(_timm, "deit_tiny_distilled_patch16_224"), prefix=2, head_tokens=(0, 1)),
    Family("timm_registers", partial(_timm, _VIT, **_REGISTERS), prefix=5, features=frozenset({"layer_scale", "qk_norm"})),
    Family("timm_avg", partial(_timm, _VIT, **_AVERAGE), 0, "avg", (), _all(0), "norm"),
    Family("timm_avg_class", partial(_timm, _VIT, global_pool="avg"), 1, "avg", (), _all(1), "norm"),
    Family("timm_map", partial(_timm, "vit_base_patch16_siglip_224"), 0, "map", (), _all(0)),
    Family("timm_layer_scale", partial(_timm, _VIT, **_LAYER_SCALE), features=frozenset({"layer_scale", "pre_norm"})),
    Family("timm_swiglu", partial(_timm, _VIT, mlp_layer=SwiGLUPacked), features=frozenset({"swiglu"})),
    Family(
        "timm_parallel_things",
        partial(_timm, _VIT, block_fn=ParallelThingsBlock, init_values=0.5),
        attentions=2,
        features=frozenset({"parallel_attentions"}),
    ),
    Family(
        "timm_parallel_scaling",
        partial(_timm, _VIT, block_fn=ParallelScalingBlock, qk_norm=True),
        features=frozenset({"parallel_mlp", "qk_norm"}),
    ),
    Family("timm_eva02", partial(_timm, _EVA), 1, "avg", (), _all(1), "norm", features=frozenset({"rope", "swiglu"})),
    Family("timm_dinov3", partial(_timm, "vit_small_patch16_dinov3", **_DINOV3), prefix=5, features=frozenset({"rope"})),
    Family(
        "timm_beit",
        partial(_timm, "beit_base_patch16_224"),
        1,
        "avg",
        (),
        _all(1),
        "norm",
        features=frozenset({"position_bias"}),
    ),
]

_HUGGING_FACE = [
    Family("hf_vit", partial(_hugging_face, "ViTForImageClassification")),
    Family("hf_deit", partial(_hugging_face, "DeiTForImageClassification"), prefix=2),
    Family(
        "hf_deit_teacher",
        partial(_hugging_face, "DeiTForImageClassificationWithTeacher"),
        prefix=2,
        head_tokens=(0, 1),
    ),
    Family(
        "hf_dinov2",
        partial(_hugging_face, "Dinov2ForImageClassification", mlp_ratio=2),
        1,
        "token+avg",
        (0,),
        _all(1),
        "model.dinov2.layernorm",
        features=frozenset({"layer_scale"}),
    ),
    Family(
        "hf_dinov2_registers",
        partial(_hugging_face, "Dinov2WithRegistersForImageClassification", mlp_ratio=2, use_swiglu_ffn=True),
        5,
        "token+avg",
        (0,),
        _all(5),
        "model.dinov2_with_registers.layernorm",
        features=frozenset({"layer_scale", "swiglu"}),
    ),
    Family(
        "hf_clip",
        partial(_hugging_face, "CLIPVisionModelWithProjection", output="image_embeds", projection_dim=CLASSES),
        features=frozenset({"pre_norm", "quick_gelu"}),
    ),
    Family("hf_siglip", partial(_hugging_face, "SiglipVisionModel", output="pooler_output"), 0, "map", (), _all(0)),
    Family("hf_siglip_avg", _siglip_classifier, 0, "avg", (), _all(0), "model.vision_model.post_layernorm"),
    Family(
        "hf_beit",
        partial(_hugging_face, "BeitForImageClassification", **_BEIT),
        1,
        "avg",
        (),
        _all(1),
        "model.beit.layernorm",
        features=frozenset({"position_bias", "layer_scale"}),
    ),
    Family(
        "hf_dinov3",
        partial(_hugging_face, "DINOv3ViTModel", output="pooler_output", num_register_tokens=4),
        prefix=5,
        features=frozenset({"rope", "layer_scale"}),
    ),
]

FAMILIES: dict[str, Family] = {family.name: family for family in [*_TIMM, *_HUGGING_FACE, Family("torchvision", _torchvision)]}


class TextTransformer(nn.Module):
    """A text classifier: ids (b, 17) int64 to logits; the mean over its words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, activation="gelu", norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.encoder(self.embedding(ids)).mean(dim=1))
        return result


def _swin(fused: bool) -> nn.Module:
    sizes = {"patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=SIZE, num_classes=CLASSES, **sizes)


def _cnn(fused: bool) -> nn.Module:
    return timm.create_model("resnet10t", num_classes=CLASSES, channels=(8, 16, 24, 32), stem_width=8)


# Models that are no plain Vision Transformer; whoever looks for blocks has to say so.
MISFITS: dict[str, Callable[[bool], nn.Module]] = {"swin": _swin, "cnn": _cnn, "text": lambda fused: TextTransformer()}


@cache
def torch_model(name: str, fused: bool) -> nn.Module:
    """The seeded model of a family or misfit in eval mode; its parameters do not depend on ``fused``."""
    make = FAMILIES[name].make if name in FAMILIES else MISFITS[name]
    torch.manual_seed(0)
    model = make(fused).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        step = 0.3 if parameter.ndim == 1 else 0.1
        parameter += step * torch.randn(parameter.shape, generator=generator)
    return model
