"""Heads, losses and normalisation, with numbers worked out by hand."""

import math
from typing import Any

import pytest
import segmentation_models_pytorch.losses as smp
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedseg.models import build_loss, build_normalizer, decide, probabilities
from fedseg.models.losses import LOSSES

# two regions, one image of 1 x 4 pixels; sigmoid of these logits is 3/4, 1/2, 1/4, 1/4 and 1/2 everywhere
LOGITS = torch.tensor([[[[math.log(3), 0.0, -math.log(3), -math.log(3)]], [[0.0, 0.0, 0.0, 0.0]]]])
MASK = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])
DICE = [1 - 2 * 1.25 / (1.75 + 2), 1 - 2 * 0.5 / (2 + 1)]  # 1 - 2 sum(p t) / (sum p + sum t)
BCE = [(3 * -math.log(0.75) + math.log(2)) / 4, math.log(2)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dice", sum(DICE) / 2), ("bce", sum(BCE) / 2), ("dice_bce", sum(DICE) / 2 + sum(BCE) / 2)],
)
def test_sigmoid_losses(name: str, expected: float) -> None:
    assert build_loss(name, "sigmoid")(LOGITS, MASK).item() == pytest.approx(expected, rel=1e-5)


def test_focal_loss() -> None:
    terms = [3 * 0.25**2 * -math.log(0.75) + 0.25 * math.log(2), 4 * 0.25 * math.log(2)]
    assert build_loss("focal", "sigmoid")(LOGITS, MASK).item() == pytest.approx(sum(terms) / 8, rel=1e-5)


# background and two regions, 1 x 2 pixels with probabilities (1/2, 1/4, 1/4) and (1/6, 1/2, 1/3)
SOFT = torch.tensor([[[[1 / 2, 1 / 6]], [[1 / 4, 1 / 2]], [[1 / 4, 1 / 3]]]]).log() + 5
SOFT_MASK = torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]]]])  # pixel 1 is background, pixel 2 region 1, region 2 absent
SOFT_DICE = (1 - 2 * 0.5 / (0.75 + 1)) / 2  # the absent region counts as loss 0; background has no term


SMOOTH_DICE = 1 - (2 * 0.5 / (1 + 2 / 3) + 2 * 0.5 / (0.75 + 1) + 1e-5 / (1 / 4 + 1 / 3)) / 3  # all three classes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("smooth_dice", SMOOTH_DICE), ("dice", SOFT_DICE), ("ce", math.log(2)), ("dice_ce", SOFT_DICE + math.log(2))],
)
def test_softmax_losses(name: str, expected: float) -> None:
    assert build_loss(name, "softmax")(SOFT, SOFT_MASK).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_dice_of_empty_masks_is_zero_and_has_no_gradient(activation: str) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask = torch.zeros(2, 3 if activation == "sigmoid" else 2, 4, 4)
    loss = build_loss("dice", activation)(logits, mask)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_dice_counts_pixels_of_the_whole_batch() -> None:
    logits = torch.full((2, 1, 1, 2), 50.0)
    mask = torch.tensor([[[[1.0, 1.0]]], [[[0.0, 0.0]]]])
    assert build_loss("dice", "sigmoid")(logits, mask).item() == pytest.approx(1 - 4 / 6)


@pytest.mark.parametrize(
    ("name", "activation"), [("dice_bce", "sigmoid"), ("dice_ce", "softmax"), ("focal", "sigmoid")]
)
def test_perfect_logits_cost_nothing_and_extremes_stay_finite(name: str, activation: str) -> None:
    mask = torch.zeros(1, 2, 4, 4)
    mask[:, 0, :2], mask[:, 1, 2] = 1, 1
    full = torch.cat([1 - mask.sum(1, keepdim=True), mask], dim=1) if activation == "softmax" else mask
    loss = build_loss(name, activation)
    assert loss(200 * full - 100, mask).item() == pytest.approx(0, abs=1e-5)
    wrong = (100 - 200 * full).requires_grad_()
    loss(wrong, mask).backward()
    assert wrong.grad is not None
    assert wrong.grad.isfinite().all()


def test_losses_are_computed_in_single_precision() -> None:
    assert build_loss("dice_bce", "sigmoid")(LOGITS.bfloat16(), MASK).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "activation", "words"),
    [
        ("dice_bce", "softmax", "use one of dice_ce"),
        ("ce", "sigmoid", "use one of dice_bce"),
        ("bce", "softmax", "use one of dice_ce"),
        ("lovazs", "sigmoid", "unknown"),
    ],
)
def test_losses_that_do_not_fit_raise(name: str, activation: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_loss(name, activation)


def test_probabilities_have_one_channel_per_region() -> None:
    torch.testing.assert_close(probabilities(LOGITS, "sigmoid")[0, 0, 0], torch.tensor([0.75, 0.5, 0.25, 0.25]))
    torch.testing.assert_close(probabilities(SOFT, "softmax")[0, :, 0, 1], torch.tensor([1 / 2, 1 / 3]))


def test_decisions() -> None:
    given_ = torch.tensor([[[[0.5, 0.51]], [[0.9, 0.0]]]])
    assert decide(given_, "sigmoid").tolist() == [[[[False, True]], [[True, False]]]]
    soft = torch.tensor([[[[0.30, 0.45, 0.2]], [[0.35, 0.10, 0.3]]]])  # background .35, .45, .5: two ties
    assert decide(soft, "softmax").tolist() == [[[[False, False, False]], [[False, False, False]]]]
    assert decide(torch.tensor([[[[0.2]], [[0.5]]]]), "softmax").flatten().tolist() == [False, True]


@given(st.integers(0, 1000))
def test_softmax_decision_is_the_argmax_of_the_logits(seed: int) -> None:
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    masks = decide(probabilities(logits, "softmax"), "softmax")
    winner = logits.argmax(dim=1)
    assert torch.equal(masks, torch.stack([winner == region for region in (1, 2, 3)], dim=1))


@pytest.mark.parametrize("function", [probabilities, decide])
def test_unknown_activation_raises(function: object) -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        function(torch.zeros(1, 1, 1, 1), "tanh")  # type: ignore[operator]


def test_imagenet_normalisation() -> None:
    white = build_normalizer("imagenet", 3)(torch.ones(1, 3, 2, 2))[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))
    grey = build_normalizer("imagenet", 1)(torch.full((1, 1, 2, 2), 0.449))
    torch.testing.assert_close(grey, torch.zeros(1, 1, 2, 2), atol=1e-6, rtol=0)


@given(st.floats(0.1, 1), st.floats(-0.3, 0.3))
def test_zscore_removes_brightness_and_contrast(scale: float, shift: float) -> None:
    images = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    normalize = build_normalizer("zscore", 2)
    torch.testing.assert_close(normalize(images * scale + shift), normalize(images), atol=1e-4, rtol=1e-4)
    assert normalize(images).std(dim=(2, 3), correction=0) == pytest.approx(torch.ones(2, 2), abs=1e-4)


def test_zscore_of_a_constant_image_is_zero() -> None:
    assert not build_normalizer("zscore", 1)(torch.full((1, 1, 4, 4), 0.3)).any()


@pytest.mark.parametrize("name", ["imagenet", "zscore", "none"])
def test_normalisers_are_no_part_of_the_state(name: str) -> None:
    module = nn.ModuleDict({"normalize": build_normalizer(name, 3)})
    assert not module.state_dict()
    assert not list(module.parameters())


def test_unknown_normalisation_raises() -> None:
    with pytest.raises(ValueError, match="imagenet"):
        build_normalizer("image-net", 3)


EVERY_LOSS = [("dice_bce", "sigmoid"), ("dice", "sigmoid"), ("bce", "sigmoid"), ("focal", "sigmoid")]
EVERY_LOSS += [
    ("smooth_dice", "sigmoid"),
    ("smooth_dice", "softmax"),
    ("dice_ce", "softmax"),
    ("dice", "softmax"),
    ("ce", "softmax"),
    *((name, activation) for name in LOSSES for activation in ("sigmoid", "softmax")),
]
every_loss = pytest.mark.parametrize(("name", "activation"), EVERY_LOSS)


def three_regions(activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and masks of two images of 5 x 4 pixels."""
    torch.manual_seed(0)
    winner = torch.randint(4, (2, 5, 4))
    masks = torch.stack([(winner == region).float() for region in (1, 2, 3)], dim=1)
    return torch.randn(2, 4 if activation == "softmax" else 3, 5, 4), masks


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
@every_loss
def test_pixels_that_are_not_known_might_as_well_not_be_there(
    name: str, activation: str, weights: list[float] | None
) -> None:
    logits, mask = three_regions(activation)
    known = torch.ones_like(mask)
    known[..., 3:, :] = 0
    loss = build_loss(name, activation, weights=weights)
    expected = loss(logits[..., :3, :], mask[..., :3, :])
    torch.testing.assert_close(loss(logits, mask, known), expected)
    torch.testing.assert_close(loss(logits, 1 - mask * known, known), loss(logits, 1 - mask, known))
    torch.testing.assert_close(loss(logits, mask, torch.ones_like(mask)), loss(logits, mask))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
@every_loss
def test_a_loss_with_nothing_known_is_zero_and_has_no_gradient(
    name: str, activation: str, weights: list[float] | None
) -> None:
    logits, mask = three_regions(activation)
    logits.requires_grad_()
    loss = build_loss(name, activation, weights=weights)(logits, mask, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@every_loss
def test_equal_weights_change_nothing_and_one_weight_alone_leaves_its_region(name: str, activation: str) -> None:
    logits, mask = three_regions(activation)
    equal = build_loss(name, activation, weights=[2.0] * 4)(logits, mask)
    torch.testing.assert_close(equal, build_loss(name, activation)(logits, mask))
    second = build_loss(name, activation, weights=[1e-9, 1e-9, 1.0, 1e-9])(logits, mask)
    if activation == "sigmoid":
        torch.testing.assert_close(second, build_loss(name, activation)(logits[:, 1:2], mask[:, 1:2]))
    else:
        elsewhere = build_loss(name, activation, weights=[1.0, 1e-9, 1.0, 1e-9])(logits, mask)
        assert second.isfinite()
        assert (elsewhere == second) == (name not in ("ce", "dice_ce", "smooth_dice")), "the background counts there"


@pytest.mark.parametrize("volume", [False, True])
def test_the_weighted_cross_entropy_is_pytorchs(volume: bool) -> None:
    logits, mask = three_regions("softmax")
    if volume:
        logits, mask = logits.unsqueeze(-1), mask.unsqueeze(-1)
    weights = [0.5, 1.0, 2.0, 3.0]
    target = torch.cat([1 - mask.sum(1, keepdim=True), mask], dim=1).argmax(dim=1)
    expected = nn.functional.cross_entropy(logits, target, torch.tensor(weights))
    torch.testing.assert_close(build_loss("ce", "softmax", weights=weights)(logits, mask), expected)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("tversky", {"alpha": 0.3, "beta": 0.7}, smp.TverskyLoss),
        ("tversky", {}, smp.DiceLoss),
        ("jaccard", {}, smp.JaccardLoss),
    ],
)
def test_losses_of_overlap_are_smps(name: str, options: dict[str, float], theirs: Any, activation: Any) -> None:
    logits, mask = three_regions(activation)
    shares = probabilities(logits, activation)
    found = build_loss(name, activation, options)(logits, mask)
    torch.testing.assert_close(found, theirs("multilabel", from_logits=False, **options)(shares, mask))
    correlations = [smp.MCCLoss()(shares[:, r], mask[:, r]) for r in range(3)]
    torch.testing.assert_close(build_loss("mcc", activation)(logits, mask), torch.stack(correlations).mean())


def test_lovasz_is_smps_hinge_and_lovasz_softmax() -> None:
    logits, mask = three_regions("sigmoid")
    hinges = [smp.LovaszLoss("binary")(logits[:, r], mask[:, r]) for r in range(3)]
    torch.testing.assert_close(build_loss("lovasz", "sigmoid")(logits, mask), torch.stack(hinges).mean())
    logits, mask = three_regions("softmax")
    classes = torch.cat([1 - mask.sum(1, keepdim=True), mask], dim=1)
    expected = smp.LovaszLoss("multiclass")(logits, classes.argmax(dim=1))
    beside = torch.cat([torch.full_like(logits[:, :1], -1e9), logits], dim=1)  # a background that is nowhere
    torch.testing.assert_close(build_loss("lovasz", "softmax")(beside, classes), expected)


def test_a_region_that_is_not_known_joins_the_background_under_softmax() -> None:
    known = torch.ones_like(SOFT_MASK)
    known[:, 1] = 0  # pixel 1: background or region 2, 1/2 + 1/4; pixel 2: region 1, 1/2
    expected = (-math.log(3 / 4) + math.log(2)) / 2
    assert build_loss("ce", "softmax")(SOFT, SOFT_MASK, known).item() == pytest.approx(expected, rel=1e-5)
