"""FedDG's mathematics: the authors' numbers, and what must hold whatever the numbers are."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedseg.algorithms.functional.boundary import inner_band, outer_band
from fedseg.algorithms.functional.contrast import boundary_contrast, nt_xent, pooled_embeddings
from fedseg.algorithms.functional.episode import episode, fast_weights
from fedseg.algorithms.functional.fourier import low_frequency_amplitude, mix_amplitude, window_half_width
from fedseg.models.dice import soft_dice_loss
from tests.lines import golden

METHODS = ["matmul", "fft"]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def centred(amplitude: Tensor, half_width: int) -> Tensor:
    rows = torch.arange(-half_width, half_width + 1)
    return amplitude[..., rows % amplitude.shape[-2], :][..., rows % amplitude.shape[-1]]


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Frequencies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
@pytest.mark.parametrize("case", ["r0", "r1", "r2", "r3"])
def test_mixing_equals_the_authors(case: str, dtype: torch.dtype, tolerance: float, method: str) -> None:
    arrays = golden("feddg_freq")
    image, target, rates = (arrays[f"{case}_{name}"].to(dtype) for name in ("img_local", "img_target", "lam"))
    half_width = window_half_width(float(arrays[f"{case}_L"]), *image.shape[-2:])
    assert half_width == int(arrays[f"{case}_half_width"])
    crop = low_frequency_amplitude(target[None], half_width, method)
    scale = float(arrays[f"{case}_amp_target"].max()) / 255
    close(crop[0], centred(arrays[f"{case}_amp_target"], half_width), tolerance * max(scale, 1.0))
    copies = len(rates)
    mixed = mix_amplitude(image.expand(copies, -1, -1, -1), crop.expand(copies, -1, -1, -1), rates, method=method)
    assert mixed.dtype == dtype
    close(mixed, arrays[f"{case}_out"], tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["tv0", "tv1"])
def test_full_swap_of_the_release(case: str, method: str) -> None:
    arrays = golden("feddg_freq")
    image = arrays["tv_img_hwc"].permute(2, 0, 1)[None]
    half_width = window_half_width(float(arrays[f"{case}_L"]), *image.shape[-2:])
    mixed = mix_amplitude(image, centred(arrays["tv_amp_target"], half_width)[None], 1.0, method=method)
    close(mixed[0].permute(1, 2, 0), arrays[f"{case}_out"], 1e-8)
    close(mixed[0].permute(1, 2, 0).clamp(0, 255), arrays[f"{case}_out_clipped"], 1e-8)


def full_spectrum_mix(images: np.ndarray, donor: np.ndarray, weight: float, half_width: int) -> np.ndarray:
    spectrum = np.fft.fft2(images)
    rows, columns = (np.abs(np.fft.fftfreq(n) * n).round() <= half_width for n in images.shape[-2:])
    amplitude, phase = np.abs(spectrum), np.angle(spectrum)
    amplitude = np.where(rows[:, None] & columns, (1 - weight) * amplitude + weight * donor, amplitude)
    return np.fft.ifft2(amplitude * np.exp(1j * phase)).real


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 12), (12, 8), (9, 8), (8, 9), (2, 2), (2, 3), (1, 1), (1, 5)])
def test_every_window_of_odd_and_even_sizes_up_to_nyquist(size: tuple[int, int], method: str) -> None:
    images, donors = noise(2, 2, *size) - 0.5, noise(2, 2, *size, seed=1) - 0.5
    spectrum = np.abs(np.fft.fft2(donors.numpy()))
    for half_width in range(min(size) // 2 + 1):
        crop = low_frequency_amplitude(donors, half_width, method)
        close(crop, centred(torch.from_numpy(spectrum), half_width), 1e-12)
        expected = full_spectrum_mix(images.numpy(), spectrum, 0.7, half_width)
        close(mix_amplitude(images, crop, 0.7, method=method), torch.from_numpy(expected), 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_f1_f5_nothing_moves_without_a_donor_or_with_oneself(dtype: torch.dtype, tolerance: float, method: str) -> None:
    images, donors = noise(2, 3, 40, 36, dtype=dtype), noise(2, 3, 40, 36, dtype=dtype, seed=1)
    for half_width in (0, 3, 18):
        crop = low_frequency_amplitude(donors, half_width, method)
        close(mix_amplitude(images, crop, 0.0, method=method), images, tolerance)
        own = low_frequency_amplitude(images, half_width, method)
        close(mix_amplitude(images, own, 0.6, method=method), images, tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_f2_phase_and_outer_amplitudes_stay(method: str) -> None:
    images, donors = noise(1, 2, 24, 31), noise(1, 2, 24, 31, seed=1)
    before = torch.fft.fft2(images)
    after = torch.fft.fft2(mix_amplitude(images, low_frequency_amplitude(donors, 4), 0.8, method=method))
    close(after.angle(), before.angle(), 1e-10)
    rows, columns = (torch.fft.fftfreq(n).mul(n).round().abs() <= 4 for n in (24, 31))
    window = rows[:, None] & columns
    close(after.abs()[..., ~window], before.abs()[..., ~window], 1e-10)
    close(after.abs()[..., window], (0.2 * before.abs() + 0.8 * torch.fft.fft2(donors).abs())[..., window], 1e-10)


def test_f3_affine_in_the_weight() -> None:
    images, crop = noise(3, 1, 20, 20), low_frequency_amplitude(noise(3, 1, 20, 20, seed=1), 3)
    weight = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    share = weight.view(-1, 1, 1, 1)
    expected = (1 - share) * images + share * mix_amplitude(images, crop, 1.0)
    close(mix_amplitude(images, crop, weight), expected, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_f4_the_zero_frequency_is_the_mean_with_its_sign(method: str) -> None:
    images = noise(2, 1, 10, 14) - torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    donors = noise(2, 1, 10, 14, seed=1) * 3 - 4
    mean, donor_mean = images.mean((-2, -1), keepdim=True), donors.mean((-2, -1), keepdim=True)
    assert mean.flatten().sign().tolist() == [1, -1]
    expected = images - mean + 0.25 * mean + 0.75 * donor_mean.abs() * mean.sign()
    close(mix_amplitude(images, low_frequency_amplitude(donors, 0), 0.75, method=method), expected, 1e-12)


def test_f6_a_wider_crop_gives_the_same_window() -> None:
    images, donors = noise(2, 3, 32, 30), noise(2, 3, 32, 30, seed=1)
    wide, narrow = low_frequency_amplitude(donors, 9), low_frequency_amplitude(donors, 2)
    assert narrow.shape == (2, 3, 5, 5)
    close(mix_amplitude(images, wide, 0.7, half_width=2), mix_amplitude(images, narrow, 0.7), 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 203.7])
def test_an_image_without_amplitude_takes_the_donors_with_phase_zero(
    level: float, dtype: torch.dtype, method: str
) -> None:
    images, donors = torch.full((1, 1, 33, 47), level, dtype=dtype), noise(1, 1, 33, 47, dtype=dtype) * 255
    mixed = mix_amplitude(images, low_frequency_amplitude(donors, 3), 1.0, method=method)
    spectrum = np.abs(np.fft.fft2(donors.double().numpy()))
    window = np.zeros_like(spectrum)
    rows = np.arange(-3, 4)
    window[..., rows[:, None], rows] = spectrum[..., rows[:, None], rows]
    close(mixed, torch.from_numpy(np.fft.ifft2(window).real), 1e-10 if dtype == torch.float64 else 2e-3)


def test_large_batches_are_transformed_piece_by_piece_to_the_same_result() -> None:
    images, donors = noise(15, 3, 220, 230), noise(15, 3, 220, 230, seed=1)
    crop, weight = low_frequency_amplitude(donors, 100), noise(15, seed=2)
    mixed = mix_amplitude(images, crop, weight, method="fft")
    for i in (0, 7, 14):
        close(mixed[i : i + 1], mix_amplitude(images[[i]], crop[[i]], weight[[i]], method="fft"), 1e-12)


def test_both_ways_agree_in_float32_at_full_size() -> None:
    images, donors = noise(1, 3, 384, 384, dtype=torch.float32) * 255, noise(1, 3, 384, 384, seed=1) * 255
    crop = low_frequency_amplitude(donors.float(), 3)
    expected = mix_amplitude(images.double(), low_frequency_amplitude(donors, 3), 0.5, method="fft")
    for method in ("auto", *METHODS):
        close(mix_amplitude(images, crop, 0.5, method=method), expected, 2e-3)


def test_reduced_precision_products_and_autocast_do_not_blur() -> None:
    images, donors = noise(2, 1, 96, 96, dtype=torch.float32) * 255, noise(2, 1, 96, 96, seed=1) * 255
    crop = low_frequency_amplitude(donors.float(), 2)
    expected = mix_amplitude(images.double(), crop.double(), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(mix_amplitude(images, crop, 0.5), expected, 2e-3)
    try:
        torch.set_float32_matmul_precision("medium")
        close(mix_amplitude(images, crop, 0.5), expected, 2e-3)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mixing_after_inference_mode_still_works() -> None:
    images = noise(1, 1, 17, 19)
    with torch.inference_mode():
        crop = low_frequency_amplitude(images, 2)
    close(mix_amplitude(images, crop.clone(), 0.5), images, 1e-12)


@pytest.mark.parametrize("fraction", [-0.01, 0.51, 0.6, float("nan")])
def test_a_window_beyond_the_spectrum_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        window_half_width(fraction, 32, 32)


def test_wrong_arguments_of_the_mixing_are_refused() -> None:
    images = noise(2, 3, 16, 18)
    crop = low_frequency_amplitude(images, 2)
    with pytest.raises(ValueError, match="half_width 9 does not fit"):
        low_frequency_amplitude(images, 9)
    with pytest.raises(ValueError, match="half_width -1"):
        low_frequency_amplitude(images, -1)
    with pytest.raises(TypeError, match="uint8"):
        low_frequency_amplitude((images * 255).to(torch.uint8), 1)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        low_frequency_amplitude(images[0], 1)
    with pytest.raises(ValueError, match="donor_crop of shape"):
        mix_amplitude(images, crop[:1], 0.5)
    with pytest.raises(ValueError, match="odd n >= 7"):
        mix_amplitude(images, crop, 0.5, half_width=3)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        mix_amplitude(images, crop, 1.5)
    with pytest.raises(ValueError, match=r"one number or \(2,\)"):
        mix_amplitude(images, crop, torch.ones(3))


# Bands


def test_f8_bands_equal_the_authors() -> None:
    arrays = golden("feddg_boundary")
    masks = arrays["mask"].permute(0, 3, 1, 2)
    for dtype in (torch.uint8, torch.float32, torch.bool):
        inner, outer = inner_band(masks.to(dtype), 1), outer_band(masks.to(dtype), 5)
        assert inner.dtype == torch.bool
        assert torch.equal(torch.stack([inner, outer], 2).flatten(1, 2), arrays["bands"].bool())


def test_outer_band_is_a_diamond_and_bands_are_disjoint() -> None:
    mask = torch.zeros(1, 1, 15, 15)
    mask[..., 7, 7] = 1
    row, column = torch.meshgrid(torch.arange(15), torch.arange(15), indexing="ij")
    distance = (row - 7).abs() + (column - 7).abs()
    assert torch.equal(outer_band(mask, 5)[0, 0], (distance <= 5) & (distance > 0))
    assert torch.equal(inner_band(mask, 1)[0, 0], mask[0, 0].bool())
    assert not outer_band(mask, 0).any()
    with pytest.raises(ValueError, match="negative width"):
        outer_band(mask, -1)


def test_inner_band_of_a_full_image_is_its_frame() -> None:
    band = inner_band(torch.ones(6, 7), 2)
    expected = torch.ones(6, 7, dtype=torch.bool)
    expected[2:-2, 2:-2] = False
    assert torch.equal(band, expected)


# Contrast


def test_f9_contrast_equals_the_authors() -> None:
    arrays = golden("feddg_contrast")
    inner, outer = arrays["bands"][:, [0, 2]], arrays["bands"][:, [1, 3]]
    features = (arrays["feat_inner"], arrays["feat_outer"])
    for feature, name in zip(features, ("emb_inner", "emb_outer"), strict=True):
        pooled, present = pooled_embeddings(feature, arrays["bands"])
        close(pooled.transpose(0, 1), arrays[name], 1e-9)
        assert present.all()
    for i, temperature in enumerate(arrays["temperature"].tolist()):
        settings = {"denominator": "positive_and_negatives", "group": "batch"}
        close(boundary_contrast(features, inner, outer, temperature, **settings), arrays["loss_total"][i], 1e-9)
        for s in (0, 1):
            single = boundary_contrast(features, inner[:, [s]], outer[:, [s]], temperature, **settings)
            close(single, arrays["loss_per_structure"][i, s], 1e-9)
        free = nt_xent(arrays["nt_emb"], arrays["nt_label"], temperature, denominator="positive_and_negatives")
        close(free, arrays["nt_loss"][i], 1e-9)
        small = nt_xent(arrays["nt_emb"].float(), arrays["nt_label"], temperature, denominator="positive_and_negatives")
        close(small, arrays["nt_loss"][i], 1e-5)


def naive_nt_xent(rows: Tensor, labels: Tensor, temperature: float, own: bool) -> float:
    unit = rows / rows.norm(dim=1, keepdim=True)
    score = (unit @ unit.T / temperature).exp()
    opposite = [score[a][labels != labels[a]].sum() for a in range(len(rows))]
    pairs = [(a, p) for a in range(len(rows)) for p in range(len(rows)) if a != p and labels[a] == labels[p]]
    losses = [-torch.log(score[a, p] / (opposite[a] + own * score[a, p])) for a, p in pairs]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("denominator", ["positive_and_negatives", "negatives"])
def test_both_denominators_against_their_definition(denominator: str) -> None:
    rows, labels = noise(8, 5) - 0.5, torch.tensor([1, 1, 1, 1, 0, 0, 0, 2])
    expected = naive_nt_xent(rows, labels, 0.2, denominator == "positive_and_negatives")
    assert float(nt_xent(rows, labels, 0.2, denominator=denominator)) == pytest.approx(expected, abs=1e-12)
    scaled = rows * (noise(8, 1, seed=3) + 0.1)
    assert float(nt_xent(scaled, labels, 0.2, denominator=denominator)) == pytest.approx(expected, abs=1e-12)
    order = torch.tensor([3, 0, 2, 1, 6, 5, 4, 7])
    assert float(nt_xent(rows[order], labels, 0.2, denominator=denominator)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("denominator", ["positive_and_negatives", "negatives"])
def test_rows_that_are_not_valid_leave_the_loss(denominator: str) -> None:
    rows, labels = noise(7, 4) - 0.5, torch.tensor([1, 1, 1, 0, 0, 0, 0])
    keep = torch.tensor([True, True, False, True, True, True, False])
    expected = naive_nt_xent(rows[keep], labels[keep], 0.1, denominator == "positive_and_negatives")
    rows = (rows * keep[:, None]).requires_grad_()
    for valid in (keep, None):  # None: rows of zeros have no direction
        loss = nt_xent(rows, labels, 0.1, valid, denominator=denominator)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    assert rows.grad.isfinite().all()
    assert not rows.grad[~keep].any()
    assert rows.grad[keep].any()


@pytest.mark.parametrize("denominator", ["positive_and_negatives", "negatives"])
@pytest.mark.parametrize("group", ["batch", "image"])
def test_empty_and_image_filling_structures_stay_finite(denominator: str, group: str) -> None:
    masks = torch.zeros(3, 2, 12, 12)
    masks[:, 0, 3:9, 3:9] = 1
    masks[0, 0] = 0  # empty
    masks[1, 0] = 1  # fills the image: no background
    features = tuple((noise(3, 4, 12, 12, seed=s) - 0.5).requires_grad_() for s in (0, 1))
    bands = inner_band(masks, 1), outer_band(masks, 5)
    loss = boundary_contrast(features, *bands, 0.05, denominator=denominator, group=group)
    loss.backward()
    assert loss.isfinite()
    assert loss != 0
    for feature in features:
        assert feature.grad.isfinite().all()
        assert not feature.grad[0].any(), "an image without the structure must not enter"
    empty = boundary_contrast(
        features, torch.zeros(3, 2, 12, 12), torch.zeros(3, 2, 12, 12), 0.05, denominator=denominator, group=group
    )
    assert empty.item() == 0
    empty.backward()


def test_grouping_by_image_is_the_mean_over_images() -> None:
    masks = torch.zeros(2, 1, 12, 12)
    masks[..., 3:9, 3:9] = 1
    bands = inner_band(masks, 1), outer_band(masks, 5)
    features = noise(2, 4, 12, 12) - 0.5, noise(2, 4, 12, 12, seed=1) - 0.5
    settings = {"denominator": "negatives", "group": "image"}
    together = boundary_contrast(features, *bands, 0.5, **settings)
    alone = [
        boundary_contrast(
            tuple(f[[i]] for f in features), bands[0][[i]], bands[1][[i]], 0.5, denominator="negatives", group="batch"
        )
        for i in (0, 1)
    ]
    close(together, sum(alone) / 2, 1e-12)


def test_features_of_a_coarser_stride_are_brought_to_the_bands() -> None:
    bands = torch.zeros(1, 1, 16, 16)
    bands[..., 5, 5] = 1
    pooled, _ = pooled_embeddings(torch.full((1, 3, 4, 4), 2.5), bands)
    close(pooled, torch.full((1, 1, 3), 2.5), 1e-6)
    with pytest.raises(ValueError, match="must be positive"):
        nt_xent(pooled[0], torch.tensor([0]), 0.0, denominator="negatives")


# Dice


def test_dice_equals_the_authors() -> None:
    arrays = golden("feddg_dice")
    score = arrays["score"].requires_grad_()
    loss = soft_dice_loss(score, arrays["target"])
    loss.backward()
    close(loss, arrays["loss"], 1e-9)
    close(score.grad, arrays["grad"], 1e-9)
    assert soft_dice_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)) == 0
    with pytest.raises(ValueError, match="differ in shape"):
        soft_dice_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))


# Episode


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.seg = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.c2(self.c1(x).relu()).relu()
        return self.seg(features).sigmoid(), features


def golden_episode(dtype: torch.dtype = torch.float64) -> tuple[Toy, dict[str, Tensor]]:
    arrays = golden("feddg_episode")
    network = Toy().to(dtype)
    network.load_state_dict({key[2:]: value for key, value in arrays.items() if key.startswith("w_")})
    return network, arrays


@pytest.mark.parametrize("prefix", ["a", "b"])
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_f10_episode_equals_the_authors(prefix: str, second_order: bool, dtype: torch.dtype, tolerance: float) -> None:
    network, arrays = golden_episode(dtype)
    before = copy.deepcopy(network.state_dict())
    step, clip = arrays[f"{prefix}_alpha_clip"].tolist()
    images, shifted = arrays["image"].to(dtype), arrays["image_shifted"].to(dtype)

    def dice(output: tuple[Tensor, Tensor]) -> Tensor:
        return soft_dice_loss(output[0], arrays["label"])

    result = episode(network, images, shifted, dice, step=step, clip=clip, second_order=second_order)
    outer = dice(result.outer_output)
    contrast = boundary_contrast(
        (result.inner_output[1], result.outer_output[1]),
        arrays["bands"][:, [0, 2]],
        arrays["bands"][:, [1, 3]],
        0.05,
        denominator="positive_and_negatives",
        group="batch",
    )
    total = result.inner_loss + outer + 0.1 * contrast
    order = "so" if second_order else "fo"
    losses = torch.stack([result.inner_loss, outer, contrast, total])
    close(losses, arrays[f"{prefix}_{order}_losses"], tolerance * 10 if dtype == torch.float32 else tolerance)
    total.backward()
    for name, weight in network.named_parameters():
        close(weight.grad, arrays[f"{prefix}_{order}_grad_{name}"], tolerance)
        assert torch.equal(weight, before[name]), "F12: no weight moves before the optimiser's step"


@pytest.mark.parametrize("prefix", ["a", "b"])
def test_f10_fast_weights_equal_the_authors(prefix: str) -> None:
    network, arrays = golden_episode()
    step, clip = arrays[f"{prefix}_alpha_clip"].tolist()
    loss = soft_dice_loss(network(arrays["image"])[0], arrays["label"])
    fast = fast_weights(loss, dict(network.named_parameters()), step=step, clip=clip, second_order=False)
    for name, weight in fast.items():
        close(weight, arrays[f"{prefix}_fast_{name}"], 1e-9)


def probability_loss(label: Tensor):
    return lambda output: soft_dice_loss(output[0], label)


def test_f11_first_order_gradient_is_the_sum_of_two() -> None:
    network, arrays = golden_episode()
    loss = probability_loss(arrays["label"])
    settings = {"step": 0.5, "clip": 0.002}
    result = episode(network, arrays["image"], arrays["image_shifted"], loss, second_order=False, **settings)
    (result.inner_loss + loss(result.outer_output)).backward()
    here, there = golden_episode()[0], golden_episode()[0]
    inner = loss(here(arrays["image"]))
    fast = fast_weights(inner, dict(here.named_parameters()), second_order=False, **settings)
    there.load_state_dict({name: weight.detach() for name, weight in fast.items()})
    inner.backward()
    loss(there(arrays["image_shifted"])).backward()
    for total, one, two in zip(network.parameters(), here.parameters(), there.parameters(), strict=True):
        close(total.grad, one.grad + two.grad, 1e-12)


def test_f13_without_a_step_and_a_shift_both_passes_agree() -> None:
    network, arrays = golden_episode()
    loss = probability_loss(arrays["label"])
    result = episode(network, arrays["image"], arrays["image"], loss, step=0.0, clip=100.0, second_order=False)
    assert torch.equal(result.inner_loss, loss(result.outer_output))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.unused = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


@pytest.mark.parametrize("updates", [False, True])
def test_running_statistics_come_from_the_inner_images_unless_asked(updates: bool) -> None:
    torch.manual_seed(0)
    network, images = Normed(), noise(4, 1, 8, 8, dtype=torch.float32)
    alone = copy.deepcopy(network)
    alone(images)
    settings = {"step": 0.1, "clip": 1.0, "second_order": False, "outer_updates_statistics": updates}
    episode(network, images, images * 5 + 1, lambda output: output.square().mean(), **settings)
    assert network.norm.num_batches_tracked == 1 + updates
    assert torch.equal(network.norm.running_mean, alone.norm.running_mean) is not updates


def test_frozen_and_unused_weights_pass_through() -> None:
    torch.manual_seed(0)
    network, images = Normed(), noise(2, 1, 8, 8, dtype=torch.float32)
    network.body.weight.requires_grad_(False)
    weights = dict(network.named_parameters())
    loss = (network(images) ** 3).mean()
    fast = fast_weights(loss, weights, step=0.1, clip=1.0, second_order=False)
    same = {name for name in weights if fast[name] is weights[name]}
    assert same == {"body.weight", "unused.weight", "unused.bias"}
    assert not torch.equal(fast["norm.weight"], weights["norm.weight"])
