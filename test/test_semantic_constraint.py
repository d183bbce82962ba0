"""The losses of SCR: known optima, directions, invariances, special cases; attention as the U-Net computes it."""

from __future__ import annotations

import importlib.util
import math

import pytest

torch = pytest.importorskip("torch")
if not all(map(importlib.util.find_spec, ("diffusers", "peft", "transformers"))):
    pytest.skip("expected diffusers, peft and transformers", allow_module_level=True)

from tiny_sd import tiny_unet  # noqa: E402

from glesam_ros.training.semantic_constraint import (  # noqa: E402
    LAYERS,
    AttentionMaps,
    restoration_loss,
    semantic_constraint,
)

VOID = -1
SPANS = [(1, 2), (2, 4)]
"""Class 7 has one token, class 3 two."""
NAMED = [7, 3]
TOKENS = 6


def scene(cell=4):
    """Labels (16, 16) that fill cells of 4 x 4 but for one column that two classes share, and void pixels."""
    labels = torch.full((4 * cell, 4 * cell), 7)
    labels[:, 2 * cell :] = 3
    labels[:, 2 * cell - 1] = 3  # a quarter of the second column of cells
    labels[: cell, :cell] = VOID
    labels[cell : cell + 2, :cell] = VOID  # half a cell
    return labels


def shares(labels, classes, side=4):
    """For each class its share of the labelled pixels of each cell; 0 in cells without any."""
    cells = labels.unfold(0, side, side).unfold(1, side, side).flatten(2)
    labelled = (cells != VOID).sum(2).clamp(min=1)
    return torch.stack([(cells == c).sum(2) / labelled for c in classes])


def attention_of(masks, spans=SPANS, scale=0.2, tokens=TOKENS):
    """(1, T, h, w): the mask of each name, spread over its tokens; token 0 gets the rest."""
    maps = torch.zeros(1, tokens, *masks.shape[1:], dtype=masks.dtype)
    for mask, (first, end) in zip(masks, spans):
        maps[0, first:end] = scale * mask / (end - first)
    maps[0, 0] = 1 - maps[0].sum(0)
    return maps


def loss(attention, labels, spans=SPANS, named=NAMED):
    return semantic_constraint(attention, [spans], [named], labels[None], VOID)


def test_attention_that_is_the_mask_costs_nothing():
    labels = scene()
    attention = attention_of(shares(labels, NAMED).double())
    for found in (loss(attention, labels), loss(0.01 * attention, labels)):
        assert 0 <= float(found.place) < 1e-5 and 0 <= float(found.choice) < 1e-5


def test_any_other_attention_costs():
    labels = scene()
    best = attention_of(shares(labels, NAMED).double())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = best.clone()
        other[:, 1:4] *= 1 + 0.5 * torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64)
        other[:, 1:4] += 0.02 * torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64)
        found = loss(other, labels)
        assert float(found.place) > 1e-3 and float(found.choice) > 1e-3


def test_a_known_value():
    labels = torch.tensor([[7, 7], [3, 3]])
    attention = torch.full((1, TOKENS, 2, 2), 0.1)
    attention[0, 1, 0, 0] = 0.3  # class 7: 0.3, 0.1, 0.1, 0.1 instead of 1/2, 1/2, 0, 0
    found = semantic_constraint(attention, [SPANS], [NAMED], labels[None], VOID)
    first = 0.5 * math.log(0.5 / (0.3 / 0.6)) + 0.5 * math.log(0.5 / (0.1 / 0.6))
    second = math.log(0.5 / 0.25)
    assert float(found.place) == pytest.approx((first + second) / 2, abs=1e-5)
    # class 3 has two tokens: 0.2 everywhere
    right = [0.3 / 0.5, 0.1 / 0.3, 0.2 / 0.3, 0.2 / 0.3]
    assert float(found.choice) == pytest.approx(-sum(map(math.log, right)) / 4, abs=1e-5)


def test_neither_term_is_enough_alone():
    labels = scene()
    masks = shares(labels, NAMED).double()
    louder = attention_of(masks * torch.tensor([1.0, 4.0])[:, None, None], scale=0.1)
    assert float(loss(louder, labels).place) < 1e-5
    assert float(loss(louder, labels).choice) > 1e-2  # one class outshouts the other where they share a cell
    somewhere = torch.linspace(0.2, 2, 16, dtype=torch.float64).reshape(4, 4)
    uneven = attention_of(masks * somewhere, scale=0.1)
    assert float(loss(uneven, labels).choice) < 1e-5
    assert float(loss(uneven, labels).place) > 1e-2  # each class is attended to at some of its places more than others


def test_the_gradient_points_into_the_mask():
    labels = torch.full((4, 4), 7)
    labels[:, 2:] = 3
    logits = torch.zeros(1, TOKENS, 4, 4, dtype=torch.float64, requires_grad=True)
    sum(loss(logits.softmax(1), labels)).backward()
    downhill = -logits.grad[0]
    assert (downhill[1, :, :2] > 0).all() and (downhill[1, :, 2:] < 0).all()
    assert (downhill[2:4, :, 2:] > 0).all() and (downhill[2:4, :, :2] < 0).all()


def test_descent_ends_where_attention_is_the_mask():
    labels = scene()
    masks = shares(labels, NAMED)
    logits = torch.randn(1, TOKENS, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        sum(loss(logits.softmax(1), labels)).backward()
        optimizer.step()
    attention = logits.detach().softmax(1)[0]
    heard = torch.stack([attention[1], attention[2] + attention[3]])
    labelled = torch.ones(4, 4, dtype=torch.bool)
    labelled[0, 0] = False
    torch.testing.assert_close((heard / heard.sum(0))[:, labelled], masks[:, labelled], rtol=0, atol=0.02)
    weight = labels.unfold(0, 4, 4).unfold(1, 4, 4).flatten(2).ne(VOID).float().mean(2)
    for found, mask in zip(heard, masks):
        found, mask = found * weight, mask * weight
        torch.testing.assert_close(found / found.sum(), mask / mask.sum(), rtol=0, atol=0.005)


def test_void_pixels_count_nowhere():
    labels = scene()
    labels[4:8, :4] = VOID  # a whole cell more
    attention = attention_of(shares(labels, NAMED).double())
    other = attention.clone()
    other[0, 1:4, :2, 0] = 0.3
    assert [float(x) for x in loss(other, labels)] == pytest.approx([float(x) for x in loss(attention, labels)])
    nothing = torch.full_like(labels, VOID)
    assert [float(x) for x in loss(other, nothing)] == [0, 0]


def test_a_name_without_pixels_is_not_attended_to():
    labels = torch.full((4, 4), 7)
    attention = torch.full((1, TOKENS, 4, 4), 1 / TOKENS, requires_grad=True)
    found = loss(attention, labels)
    assert float(found.place.detach()) == pytest.approx(0, abs=1e-6)  # class 7 is everywhere
    assert float(found.choice.detach()) == pytest.approx(math.log(3), abs=1e-5)  # one of three tokens
    found.choice.backward()
    assert (attention.grad[0, 2:4] > 0).all() and (attention.grad[0, 1] < 0).all()


def test_place_is_the_mean_of_the_names_that_have_pixels():
    labels = torch.full((4, 4), 7)
    attention = torch.full((1, TOKENS, 4, 4), 0.1)
    attention[0, 1, :2] = 0.3
    alone = float(loss(attention, labels, spans=SPANS[:1], named=NAMED[:1]).place)
    assert alone == pytest.approx(-0.5 * math.log(0.75), abs=1e-5)  # 3/4 and 1/4 of the attention instead of halves
    assert float(loss(attention, labels).place) == pytest.approx(alone, rel=1e-5)


def test_choice_weighs_a_place_by_its_named_pixels():
    labels = torch.full((4, 8), 7)
    labels[:, 4:7] = VOID  # of the second place a quarter is left
    attention = torch.full((1, TOKENS, 1, 2), 0.1)
    attention[0, 1, 0, 1] = 0.6
    # 0.1 of 0.3 for the right name, and 0.6 of 0.8
    expected = (math.log(3) + 0.25 * math.log(4 / 3)) / 1.25
    assert float(loss(attention, labels).choice) == pytest.approx(expected, abs=1e-5)
    labels[:, 4:7] = 9  # as without a name
    assert float(loss(attention, labels).choice) == pytest.approx(expected, abs=1e-5)


def test_pixels_of_no_name_count_against_all_names_in_place_alone():
    labels = torch.full((4, 4), 7)
    labels[:, 2:] = 9
    attention = torch.full((1, TOKENS, 4, 4), 1e-3)
    attention[0, 1, :, :2] = 0.5
    quiet = loss(attention, labels, spans=[(1, 2)], named=[7])
    attention[0, 1, :, 2:] = 0.5
    loud = loss(attention, labels, spans=[(1, 2)], named=[7])
    assert float(loud.place) == pytest.approx(math.log(2), abs=1e-5) and float(quiet.place) < 0.01
    assert float(loud.choice) == pytest.approx(0, abs=1e-6)


def test_tokens_of_a_name_count_together():
    labels = scene()
    attention = attention_of(shares(labels, NAMED).double())
    moved = attention.clone()
    moved[0, 2], moved[0, 3] = attention[0, 2] + attention[0, 3], 0
    assert [float(x) for x in loss(moved, labels)] == pytest.approx([float(x) for x in loss(attention, labels)])


def test_pictures_of_a_batch_have_prompts_of_their_own():
    labels = torch.stack([scene(), torch.full((16, 16), 5)])
    attention = torch.rand(2, TOKENS, 4, 4, generator=torch.Generator().manual_seed(0))
    both = semantic_constraint(attention, [SPANS, [(1, 3)]], [NAMED, [5]], labels, VOID)
    first = semantic_constraint(attention[:1], [SPANS], [NAMED], labels[:1], VOID)
    second = semantic_constraint(attention[1:], [[(1, 3)]], [[5]], labels[1:], VOID)
    for k in range(2):
        assert float(both[k]) == pytest.approx((float(first[k]) + float(second[k])) / 2, rel=1e-5)
    # a picture without names counts as one that costs nothing
    half = semantic_constraint(attention, [SPANS, []], [NAMED, []], labels, VOID)
    assert [float(x) for x in half] == pytest.approx([float(x) / 2 for x in first], rel=1e-5)
    # a prompt that had no place for the second name
    short = semantic_constraint(attention[:1], [SPANS[:1]], [NAMED], labels[:1], VOID)
    alone = semantic_constraint(attention[:1], [SPANS[:1]], [NAMED[:1]], labels[:1], VOID)
    assert short == alone
    none = semantic_constraint(attention.requires_grad_(), [[], []], [[], []], labels, VOID)
    assert [float(x.detach()) for x in none] == [0, 0]
    sum(none).backward()


@pytest.mark.parametrize(
    ("spans", "named", "expected"),
    [
        ([SPANS, SPANS], [NAMED], "got 2, 1 and 1"),
        ([SPANS], [[3, 3]], "2 different classes other than -1, got \\[3, 3\\]"),
        ([SPANS], [[3, VOID]], "other than -1"),
        ([SPANS], [[3]], "2 different classes"),
        ([[(1, 2), (5, 7)]], [NAMED], "ranges of tokens within 0..6"),
        ([[(1, 2), (2, 2)]], [NAMED], "ranges of tokens"),
    ],
)
def test_what_does_not_fit_is_named(spans, named, expected):
    with pytest.raises(ValueError, match=expected):
        semantic_constraint(torch.rand(1, TOKENS, 4, 4), spans, named, scene()[None], VOID)


# restoration


def pictures(seed):
    return torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_only_the_clear_picture_costs_nothing():
    clear = pictures(0)
    assert float(restoration_loss(clear, clear)) == 0
    assert float(restoration_loss(pictures(1), clear)) > 0.1


def test_known_restoration_losses():
    clear = pictures(0)
    assert float(restoration_loss(clear + 0.1, clear)) == pytest.approx(0.01, rel=1e-4)  # no gradient in a constant
    ramp = torch.arange(12.0) * 0.01
    found = restoration_loss(clear + ramp, clear, detail=1.0)
    # 0.01 a pixel to the right, half of it at both borders, 0 downwards
    detail = (10 * 0.01 + 2 * 0.005) / 12 / 2
    assert float(found) == pytest.approx(float(ramp.square().mean()) + detail, rel=1e-3)
    tenth = float(ramp.square().mean()) + 0.1 * detail
    assert float(restoration_loss(clear + ramp, clear)) == pytest.approx(tenth, rel=1e-3)
    with pytest.raises(ValueError, match="expected the shape of clear"):
        restoration_loss(clear[:1], clear)


def test_a_blurred_edge_costs_more_than_its_pixels():
    clear = torch.zeros(1, 3, 16, 16)
    clear[..., 8:] = 1
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(clear, (2, 2, 2, 2), mode="replicate"), 5, 1)
    assert float(restoration_loss(blurred, clear)) > 1.1 * float(restoration_loss(blurred, clear, detail=0))


# attention


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def inputs(batch=2, size=(16, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, *size, generator=generator), torch.randn(batch, 77, 12, generator=generator)


def run(unet, latent, text):
    return unet(latent, torch.tensor([1]), encoder_hidden_states=text).sample


def test_the_output_is_that_of_the_default_attention(unet):
    latent, text = inputs()
    with torch.no_grad():
        expected = run(unet, latent, text)
        maps = AttentionMaps(unet, [""])
        torch.testing.assert_close(run(unet, latent, text), expected, rtol=1e-4, atol=1e-5)
        maps.close()
        assert torch.equal(run(unet, latent, text), expected)


def test_maps_are_softmax_of_query_and_key(unet):
    latent, text = inputs()
    layer = unet.get_submodule("up_blocks.2.attentions.0.transformer_blocks.0.attn2")
    seen = []
    hook = layer.to_q.register_forward_hook(lambda module, args, output: seen.append(output))
    maps = AttentionMaps(unet, ["up_blocks.2.attentions.0."])
    with torch.no_grad():
        run(unet, latent, text)
        found = maps.take((16, 8))
        heads, width = layer.heads, seen[0].shape[2] // layer.heads
        query = seen[0].reshape(2, -1, heads, width)
        key = layer.to_k(text).reshape(2, 77, heads, width)
        expected = torch.einsum("bqhc,bkhc->bhqk", query, key).div(math.sqrt(width)).softmax(-1).mean(1)
    hook.remove()
    maps.close()
    assert heads > 1 and found.shape == (2, 77, 8, 4)  # half of the latent's side
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 8, 4))


def test_maps_are_float32_in_mixed_precision(unet):
    latent, text = inputs()
    found = []
    for kind in (torch.float32, torch.bfloat16):
        maps = AttentionMaps(unet)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            output = run(unet, latent, text)
        assert output.dtype == kind
        found.append(maps.take((16, 8)))
        maps.close()
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1].sum(1), torch.ones(2, 8, 4))
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=1e-3)


def test_layers_are_averaged_at_the_finest(unet):
    latent, text = inputs()
    names = ["down_blocks.2.", "up_blocks.2.attentions.0."]
    single = []
    with torch.no_grad():
        for name in names:
            maps = AttentionMaps(unet, [name])
            run(unet, latent, text)
            single.append(maps.take((16, 8)))
            maps.close()
        maps = AttentionMaps(unet, names)
        run(unet, latent, text)
        both = maps.take((16, 8))
        maps.close()
    coarse = torch.nn.functional.interpolate(single[0], (8, 4), mode="bilinear")
    torch.testing.assert_close(both, (coarse + single[1]) / 2)


def test_a_pass_is_taken_once(unet):
    maps = AttentionMaps(unet)
    with pytest.raises(RuntimeError, match="expected a pass"):
        maps.take((16, 8))
    with torch.no_grad():
        run(unet, *inputs())
    assert maps.take((16, 8)).shape == (2, 77, 8, 4)
    with pytest.raises(RuntimeError, match="expected a pass"):
        maps.take((16, 8))
    maps.close()
    with pytest.raises(ValueError, match="beginnings of names"):
        AttentionMaps(unet, ["up_blocks.9."])
    assert all(any(name.startswith(layer) for name in unet.attn_processors) for layer in LAYERS)


def test_gradients_reach_the_layers_also_with_checkpointing():
    latent, text = inputs(1)
    labels = torch.full((1, 16, 8), 7)
    labels[:, :, 4:] = 3
    found = []
    for checkpointing in (False, True):
        unet = tiny_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        maps = AttentionMaps(unet)
        output = run(unet, latent, text)
        terms = semantic_constraint(maps.take((16, 8)), [SPANS], [NAMED], labels, VOID)
        (sum(terms) + output.square().mean()).backward()
        maps.close()
        found.append({name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6)
    key = "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert found[0][key].abs().max() > 0


def test_a_mask_of_tokens_is_refused(unet):
    latent, text = inputs(1)
    maps = AttentionMaps(unet)
    try:
        with pytest.raises(ValueError, match="attention_mask"), torch.no_grad():
            unet(latent, torch.tensor([1]), encoder_hidden_states=text, encoder_attention_mask=torch.ones(1, 77))
    finally:
        maps.close()
