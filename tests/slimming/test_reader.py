"""How timm's families are read: every part against timm's own module, and every misfit refused by name with the reason."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, GlobalResponseNormMlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, VisionTransformer

from patchslim.errors import InputRejected
from slimming.api import dense_plan
from slimming.models.attention import AttentionInput
from slimming.models.reader import check_supported, reader_of
from slimming.models.slim_vit import SlimViT
from tests.helpers.timm_models import ALL_KINDS, TINY, build, head_of, images_for, pools, without_fused_attention

pytestmark = pytest.mark.numeric

VIT = "vit_tiny_patch16_224"
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


@functools.cache
def model_of(kind: str) -> Any:
    return build(kind)


def block_inputs(model: Any, images: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any], torch.Tensor]]:
    """What timm gives each block in its own forward pass, and what the block returns: (tokens, other arguments, output)."""
    seen: list[tuple[torch.Tensor, dict[str, Any], torch.Tensor]] = []
    hooks = [
        block.register_forward_hook(lambda _, given, named, output: seen.append((given[0], named, output)), with_kwargs=True)
        for block in model.blocks
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_part_is_what_timm_computes_in_its_own_forward_pass(kind: str) -> None:
    model = model_of(kind)
    images = images_for(model, 2)
    reader = reader_of(model, kind)
    seen = block_inputs(model, images)
    torch.testing.assert_close(reader.embed(images), seen[0][0], **CLOSE)
    assert (reader.tokens, reader.prefix) == (seen[0][0].shape[1], model.num_prefix_tokens)
    for block, rope, (tokens, named, output) in zip(reader.blocks, reader.ropes(), seen, strict=True):
        torch.testing.assert_close(block.run(AttentionInput(tokens, tokens, rope, rope)), output, **CLOSE)
        if named.get("rope") is None:
            assert rope is None
        else:
            assert rope is not None
            torch.testing.assert_close(rope[..., reader.prefix :, :], named["rope"])
            assert rope.shape[-2] == reader.tokens
    last = seen[-1][2]
    torch.testing.assert_close(reader.head.logits(last[:, reader.head.tokens]), model(images), **CLOSE)
    torch.testing.assert_close(model(images), head_of(model, last), **CLOSE)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_head_reads_its_tokens_and_no_others(kind: str) -> None:
    model = model_of(kind)
    reads, reader = reader_of(model).head.tokens, reader_of(model)
    assert reader.head.fixed is not pools(model)
    assert reader.head.pooling == ("map" if model.attn_pool is not None else model.global_pool)
    tokens = torch.randn(2, reader.tokens, 48, generator=torch.Generator().manual_seed(0))
    before = head_of(model, tokens)
    for token in range(reader.tokens):
        moved = tokens.clone()
        moved[:, token] += 3 * torch.randn(2, 48, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(head_of(model, moved), before) is (token not in reads)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_maps_times_the_values_are_timms_attention(kind: str) -> None:
    model = model_of(kind)
    reader = reader_of(model)
    (tokens, named, _), block = block_inputs(model, images_for(model, 2))[1], reader.blocks[1]
    rope = reader.ropes()[1]
    view = AttentionInput(tokens, tokens, rope, rope)
    maps = block.maps(view)
    assert maps.shape[2:] == (reader.tokens, reader.tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]))
    heads = maps.split([attention.heads for _, attention in block.attentions], dim=1)
    for (norm, attention), part in zip(block.attentions, heads, strict=True):
        if attention.module is block.module:
            continue  # the attention of a parallel block is no module of its own; the block as a whole is tested above
        normed = view.normed(norm)
        mixed = attention.output(attention.finish(part @ attention.values(normed), normed.queried))
        torch.testing.assert_close(mixed, attention.module(normed.read, **named), **CLOSE)
    norms = block.value_norms(view)
    assert norms.shape == (2, maps.shape[1], reader.tokens)
    norm, attention = block.attentions[0]
    torch.testing.assert_close(norms[:, : attention.heads], attention.values(view.normed(norm)).norm(dim=-1))
    sink: list[torch.Tensor] = []
    watched = block.run(AttentionInput(tokens, tokens, rope, rope, None, sink))
    torch.testing.assert_close(watched, block.run(view), **CLOSE)
    torch.testing.assert_close(torch.cat(sink, dim=1), maps)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "kind", ["class_token", "parallel_scaling", "parallel_things", "res_post", "rope_mixed", "grouped_query"]
)
def test_a_log_count_on_a_key_is_as_many_copies_of_its_token(kind: str, fused: bool) -> None:
    model = build(kind)
    if not fused:
        without_fused_attention(model)
    reader = reader_of(model)
    tokens, rope, places = reader.embed(images_for(model, 2)), reader.ropes()[0], [*range(reader.tokens), 4, 4]
    bias = torch.zeros(reader.tokens)
    bias[4] = torch.tensor(3.0).log()
    repeated = None if rope is None else rope[..., places, :]
    wanted = reader.blocks[0].run(AttentionInput(tokens[:, places], tokens, repeated, rope))
    torch.testing.assert_close(reader.blocks[0].run(AttentionInput(tokens, tokens, rope, rope, bias)), wanted, **CLOSE)
    assert (reader.blocks[0].run(AttentionInput(tokens, tokens, rope, rope)) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_branches_end_in_a_layer_of_the_model_that_can_be_refitted(kind: str) -> None:
    model = model_of(kind)
    reader = reader_of(model)
    own = {id(module) for module in model.modules()}
    post_norm = kind in ("res_post", "eva_post_norm")
    for block in reader.blocks:
        assert block.can_refit is not post_norm
        for branch in (branch for stage in block.stages for branch in stage.branches):
            sample = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
            if branch.gamma is not None:
                torch.testing.assert_close(branch.scale(sample), sample * branch.gamma)
            elif not post_norm:
                assert torch.equal(branch.scale(sample), sample)
            if branch.projection is not None:
                assert id(branch.projection) in own
                assert branch.projection.out_features == 48
                inner = torch.randn(2, branch.projection.in_features, generator=torch.Generator().manual_seed(1))
                torch.testing.assert_close(branch.output(inner), branch.projection(inner))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_heads_weights_are_how_it_pools(kind: str) -> None:
    model = model_of(kind)
    head = reader_of(model).head
    tokens = torch.randn(2, len(head.tokens), 48, generator=torch.Generator().manual_seed(3))
    weights = head.weights(tokens)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, weights.shape[2]))
    assert (weights >= 0).all()
    if head.pooling == "token":
        assert weights.shape == (2, len(head.tokens), len(head.tokens))
    elif head.pooling == "avg":
        torch.testing.assert_close((weights * model.norm(tokens)).sum(dim=1), head.pooled(tokens), **CLOSE)
    else:
        wanted = _pool_maps(model.attn_pool, model.norm(tokens)).mean(dim=1)
        torch.testing.assert_close(weights[:, : wanted.shape[1], 0], wanted)


def _pool_maps(pool: Any, tokens: torch.Tensor) -> torch.Tensor:
    """timm's attention pool's softmax maps (b, heads, up to n): what it mixes where token i's value is the i-th unit vector."""
    count, mixed = tokens.shape[1], []
    units = torch.eye(count, pool.head_dim).repeat(1, pool.num_heads).expand(len(tokens), -1, -1)
    hooks = [
        pool.kv.register_forward_hook(lambda _, given, output: torch.cat([output[..., : units.shape[-1]], units], dim=-1)),
        pool.proj.register_forward_pre_hook(lambda _, given: mixed.append(given[0])),
    ]
    pool(tokens)
    for hook in hooks:
        hook.remove()
    return mixed[0].unflatten(-1, (pool.num_heads, pool.head_dim))[:, 0, :, :count]  # as many tokens as a head is wide


class Unlike(VisionTransformer):  # type: ignore[misc]
    """A subclass may do anything in its forward pass."""


class OwnAttention(Attention):  # type: ignore[misc]
    """As may this."""


def _own_mlp() -> Any:
    model = timm.create_model(VIT, **TINY)
    model.blocks[0].mlp = GlobalResponseNormMlp(48, 192)
    return model


def _unlike_blocks() -> Any:
    model = timm.create_model(VIT, **TINY)
    model.blocks[2] = Block(48, 3, mlp_ratio=2.0)
    return model


SMALL: dict[str, Any] = {**TINY, "depth": 2}
REFUSED: dict[str, tuple[Any, str]] = {
    "swin": (
        partial(timm.create_model, "swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1), num_heads=(1, 1)),
        "its family SwinTransformer cannot be slimmed: its attention is windowed",
    ),
    "beit": (
        partial(timm.create_model, "beit_base_patch16_224", **SMALL),
        "its family Beit cannot be slimmed: its relative-position bias ties",
    ),
    "relpos": (
        partial(timm.create_model, "vit_relpos_small_patch16_224", **SMALL),
        "its family VisionTransformerRelPos cannot be slimmed: its relative-position bias ties",
    ),
    "sam": (
        partial(timm.create_model, "samvit_base_patch16", **SMALL),
        "its family VisionTransformerSAM cannot be slimmed: its attention is windowed and has a relative-position bias",
    ),
    "hiera": (
        partial(timm.create_model, "hiera_tiny_224", embed_dim=12, num_heads=1, stages=(1, 1, 1, 1)),
        "its family Hiera cannot be slimmed: its tokens are pooled over windows",
    ),
    "naflex": (
        partial(timm.create_model, "naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3),
        "its family NaFlexVit cannot be slimmed: it takes grids of any size",
    ),
    "resnet": (partial(timm.create_model, "resnet10t"), "its family ResNet is not supported"),
    "subclass": (partial(Unlike, **SMALL), "its family Unlike is not supported"),
    "diff parallel": (
        partial(timm.create_model, VIT, **{**SMALL, "num_heads": 2, "block_fn": DiffParallelScalingBlock}),
        "block 0: DiffParallelScalingBlock is not a block that is supported",
    ),
    "differential attention": (
        partial(timm.create_model, VIT, **{**SMALL, "num_heads": 2, "attn_layer": "diff"}),
        "block 0: attention DiffAttention is not supported",
    ),
    "own attention": (
        partial(timm.create_model, VIT, **SMALL, attn_layer=OwnAttention),
        "block 0: attention OwnAttention is not supported",
    ),
    "own mlp": (
        _own_mlp,
        "block 0: MLP GlobalResponseNormMlp is not supported",
    ),
    "blocks of unlike size": (_unlike_blocks, "its blocks differ in size"),
    "keys of unlike size": (
        partial(timm.create_model, "vit_base_patch16_sapiens2", **SMALL, dynamic_img_size=False, num_kv_heads=(1, 3)),
        "its blocks differ in size",
    ),
    "dynamic size": (partial(timm.create_model, VIT, **SMALL, dynamic_img_size=True), "dynamic_img_size gives every image"),
    "dynamic size in eva": (partial(timm.create_model, "vit_small_patch16_dinov3", **SMALL), "dynamic_img_size gives every"),
    "max pooling": (partial(timm.create_model, VIT, **SMALL, global_pool="max"), "its pooling 'max' is not supported"),
    "avgmax pooling": (partial(timm.create_model, "eva02_tiny_patch14_336", **SMALL, global_pool="avgmax"), "pooling 'avgmax'"),
    "other pool": (partial(timm.create_model, VIT, **SMALL, global_pool="prr"), "its attention pool AttentionPoolPrr is not"),
    "no head": (partial(timm.create_model, VIT, **{**SMALL, "num_classes": 0}), r"no classifier head \(num_classes=0\)"),
    "no head, a pool": (
        partial(timm.create_model, "vit_base_patch16_siglip_224", **{**SMALL, "num_classes": 0}),
        r"no classifier head \(num_classes=0\)",
    ),
    "no blocks": (partial(timm.create_model, VIT, **{**SMALL, "depth": 0}), "it has no blocks"),
    "grey images": (partial(timm.create_model, VIT, **SMALL, in_chans=1), "it takes 1 channels, and images are read as RGB"),
    "hybrid stem": (partial(timm.create_model, "vit_tiny_r_s16_p8_224", img_size=64), "patch embedding HybridEmbed is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_misfit_is_refused_by_name_with_the_reason(case: str) -> None:
    make, reason = REFUSED[case]
    model, plan = make().eval(), dense_plan(model_of("class_token"), "the/model")
    for refusing in (
        lambda: check_supported(model, "the/model"),
        lambda: reader_of(model, "the/model"),
        lambda: dense_plan(model, "the/model"),
        lambda: SlimViT(model, plan),
    ):
        with pytest.raises(InputRejected, match=reason) as raised:
            refusing()
        message = str(raised.value)
        assert message.startswith("model the/model: ")
        assert message.endswith("supported families are timm's Eva, VisionTransformer, VisionTransformerDistilled")
        assert raised.value.exit_code == 3


def test_without_a_name_the_class_is_named() -> None:
    with pytest.raises(InputRejected, match="model Unlike: its family Unlike is not supported"):
        reader_of(Unlike(**SMALL))
    assert reader_of(VisionTransformerDistilled(**SMALL)).head.tokens == [0, 1]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_kind_is_taken_and_its_geometry_is_said_in_the_shortest_way(kind: str) -> None:
    model = model_of(kind)
    check_supported(model, kind)
    geometry = reader_of(model).geometry()
    assert geometry.embed_dim == 48
    # widths are named only where they differ, so that a plan of a plain model says nothing of them
    assert (geometry.attn_dim is None) is (kind != "parallel_things")
    assert (geometry.key_dim is None) is (kind != "grouped_query")
    assert geometry.gate is (kind == "gated")
    assert geometry.packed_qkv is (kind not in ("grouped_query", "eva02_inner_norms"))
    assert geometry.packed_mlp_dim == (4 * 48 if kind.startswith("parallel_scaling") else 0)
    assert geometry.attention_norms == {"res_post": 0, "eva_post_norm": 0, "parallel_things": 2}.get(kind, 1)
    assert (geometry.pool_macs > 0) is (geometry.pool_tokens > 0) is (model.attn_pool is not None)
