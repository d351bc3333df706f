"""LC-Fed's mathematics: the authors' numbers, and what must hold whatever the numbers are."""

import pytest
import torch
from torch import Tensor, nn

from fedseg.algorithms.functional.calibration import (
    ChannelSelection,
    HeadCalibration,
    attention_scale,
    disagreement,
    gaussian,
    gaussian_histogram,
    minmax,
    peaks,
    peer_probabilities,
    site_contrast,
    smooth,
    standard_deviation,
)
from fedseg.models.dice import soft_dice_loss
from tests.lines import golden


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


# Channel selection


def golden_selection(dtype: torch.dtype) -> tuple[ChannelSelection, dict[str, Tensor]]:
    arrays = golden("lcfed_pcs")
    selection = ChannelSelection(channels=32, sites=4).to(dtype)
    names = {"code": "fc1_0", "mix": "fc1_2", "squeeze.0": "fc2_0", "squeeze.2": "fc2_2"}
    weights = {f"{ours}.weight": arrays[f"w_{theirs}_weight"][..., 0, 0] for ours, theirs in names.items()}
    selection.load_state_dict(weights)
    return selection, arrays


@PRECISIONS
def test_p1_channel_selection_equals_the_authors(dtype: torch.dtype, tolerance: float) -> None:
    selection, arrays = golden_selection(dtype)
    features = arrays["x"].to(dtype)
    close(selection.codes(), arrays["site_code"], tolerance)
    gates = selection.gates(features)
    close(gates, arrays["hmap"], tolerance)
    assert ((gates > 0) & (gates < 1)).all()
    for site in (0, 1):
        close(selection(features, site), arrays["y"][site], tolerance)
        assert torch.equal(selection(features, site).sign(), features.sign())
    for site in range(4):
        close(selection.gate(features, site), arrays["hmap"][site], tolerance)
        close(site_contrast(gates, site), arrays["contrast_loss"][site], tolerance)
    site_contrast(gates, 0).backward()
    close(selection.squeeze[2].weight.grad, arrays["contrast_grad_fc2_last_site0"], tolerance)


def test_p1_contrast_is_zero_only_for_equal_gates() -> None:
    gates = noise(3, 2, 5)
    assert site_contrast(gates, 1) < 0
    assert site_contrast(gates[:1].expand(3, 2, 5), 1) == 0
    assert site_contrast(gates[:1], 0) == 0, "a single site has no others"
    by_hand = -((gates[1] - gates[0]).square().mean() + (gates[1] - gates[2]).square().mean()) / 2
    close(site_contrast(gates, 1), by_hand, 1e-15)


def test_contrast_moves_the_own_gate_only() -> None:
    gates = noise(3, 2, 5).requires_grad_()
    site_contrast(gates, 1).backward()
    assert gates.grad[1].any()
    assert not gates.grad[[0, 2]].any()


def test_p2_all_weights_of_the_channel_selection_are_registered_and_learn() -> None:
    torch.manual_seed(0)
    selection = ChannelSelection(channels=256, sites=4)
    assert sum(weight.numel() for weight in selection.parameters()) == 78_848
    before = {name: weight.clone() for name, weight in selection.state_dict().items()}
    assert len(before) == 4
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    features = noise(2, 256, 3, 3).float()
    (selection(features, 2).square().mean() + site_contrast(selection.gates(features), 2)).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], weight) for name, weight in selection.state_dict().items())
    assert not selection.code.weight.grad[:, [0, 1, 3]].any(), "only the own site's code learns"


def test_few_channels_keep_a_hidden_layer_and_unknown_sites_are_refused() -> None:
    selection = ChannelSelection(channels=5, sites=3)
    features = torch.ones(1, 5, 2, 2)
    assert selection(features, 2).shape == features.shape
    for site in (3, -1):
        with pytest.raises(ValueError, match="codes for 3 sites and none for site index"):
            selection(features, site)


# Disagreement


def golden_peers(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    arrays = golden("lcfed_disagreement")
    head = nn.Conv2d(8, 2, 1).to(dtype)
    states = [
        {"weight": weight[..., None, None].to(dtype), "bias": bias.to(dtype)}
        for weight, bias in zip(arrays["head_weight"], arrays["head_bias"], strict=True)
    ]
    kept = head.weight.clone()
    probabilities = peer_probabilities(head, states, arrays["feature"].to(dtype), torch.sigmoid)
    assert torch.equal(head.weight, kept)
    return probabilities, arrays


@PRECISIONS
def test_p3_disagreement_equals_the_authors(dtype: torch.dtype, tolerance: float) -> None:
    probabilities, arrays = golden_peers(dtype)
    assert probabilities.shape == (4, 2, 2, 40, 36)
    for site in (0, 1):
        maps = disagreement(probabilities, site, normalization="map")
        close(maps, arrays["disagreement_normalised"][site], tolerance)
        assert (maps.amax((-2, -1)) == 1).all()
        assert maps.min() >= 0
    for site in range(4):
        found = peaks(disagreement(probabilities, site, normalization="map"), window=31, threshold=0.2)
        assert torch.equal(found.to(torch.uint8), arrays["disagreement_peaks"][site])
    close(standard_deviation(probabilities, normalization="none"), arrays["std_over_heads_legacy"], tolerance)


def test_other_normalisations() -> None:
    probabilities = noise(3, 2, 2, 6, 6)
    raw = disagreement(probabilities, 0, normalization="none")
    by_hand = (((probabilities[1:] - probabilities[0]) ** 2).sum(0) / 2).sqrt()
    close(raw, by_hand, 1e-15)
    close(disagreement(probabilities, 0, normalization="batch"), raw / raw.max(), 1e-15)
    spread = standard_deviation(probabilities, normalization="batch")
    assert spread.max() == 1


def test_p3_agreeing_heads_and_a_single_site_give_zero_maps() -> None:
    probabilities = noise(1, 2, 2, 8, 8)
    for sites in (1, 4):
        same = probabilities.expand(sites, -1, -1, -1, -1)
        for maps in (disagreement(same, 0, normalization="map"), standard_deviation(same, normalization="map")):
            assert not maps.any()
            assert not peaks(maps, window=3, threshold=0.2).any()
    calibration = HeadCalibration(3, 2, 2, attention="minmax").double()
    features = noise(2, 3, 8, 8)
    assert calibration(features, probabilities[0], torch.zeros(2, 2, 8, 8, dtype=torch.float64)).isfinite().all()


def test_peaks_are_local_maxima_above_the_threshold() -> None:
    maps = torch.zeros(1, 1, 9, 9)
    maps[..., 1, 1], maps[..., 2, 2], maps[..., 7, 7], maps[..., 0, 8] = 1.0, 0.9, 0.5, 0.2
    assert peaks(maps, window=3, threshold=0.2).nonzero()[:, 2:].tolist() == [[1, 1], [7, 7]]
    with pytest.raises(ValueError, match="odd"):
        peaks(maps, window=4, threshold=0.2)


# Attention and head calibration


@pytest.fixture
def full_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' kernel, that of 384 x 384 pixels, on maps that are smaller."""
    monkeypatch.setattr("fedseg.algorithms.functional.calibration.attention_scale", lambda *size: (31, 6.0))


@pytest.mark.usefixtures("full_kernel")
def test_kernels_and_attention_equal_the_authors() -> None:
    arrays = golden("lcfed_soft")
    for side in (31, 5):
        factor = gaussian(side, 6.0)
        close(torch.outer(factor, factor), arrays[f"gauss_k{side}_s6"], 1e-6)
        assert factor.max() == 1
    older = gaussian_histogram(31)
    close(torch.outer(older, older), arrays["gkern_31_4"], 1e-6)
    assert float(torch.outer(older, older).sum()) == pytest.approx(1)
    close(minmax(3 * arrays["map_dense"] - 1), arrays["minmax_dense"], 1e-9)
    for kind in ("sparse", "dense"):
        maps = arrays[f"map_{kind}"]
        for attention, expected in (("raw", "conv"), ("minmax", "soft")):
            calibration = HeadCalibration(1, 1, 1, attention=attention)
            scale = max(1.0, float(arrays[f"{expected}_{kind}"].max()))
            close(calibration.attend(maps), arrays[f"{expected}_{kind}"], 1e-6 * scale)
            close(calibration.attend(maps.float()), arrays[f"{expected}_{kind}"], 1e-5 * scale)
    with pytest.raises(ValueError, match="odd"):
        gaussian(4, 1.0)


def test_the_kernel_is_scaled_with_the_image() -> None:
    assert attention_scale(384, 384) == (31, 6.0)
    assert attention_scale(384, 800) == (31, 6.0)
    assert attention_scale(128, 128) == (11, 2.0)
    assert attention_scale(8, 8)[0] == 3


def test_smoothing_is_the_plain_convolution() -> None:
    maps, factor = noise(2, 3, 20, 17), gaussian(7, 1.5)
    kernel = torch.outer(factor, factor).view(1, 1, 7, 7).expand(3, 1, 7, 7)
    close(smooth(maps, factor), torch.nn.functional.conv2d(maps, kernel, padding=3, groups=3), 1e-12)


@pytest.mark.usefixtures("full_kernel")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_p4_head_calibration_equals_the_authors(dtype: torch.dtype, tolerance: float) -> None:
    arrays = golden("lcfed_hc")
    calibration = HeadCalibration(5, 2, 2, attention="raw").to(dtype)
    calibration.head.load_state_dict({"weight": arrays["w_head_weight"], "bias": arrays["w_head_bias"]})
    peak_maps = arrays["disagreement"].to(dtype)
    close(calibration.attend(peak_maps), arrays["att_from_disagreement"], 1e-6 if dtype == torch.float64 else 1e-5)
    logits = calibration(arrays["feature"].to(dtype), arrays["pred"].to(dtype), peak_maps)
    close(logits.sigmoid(), arrays["out"], tolerance)


def test_p4_the_gaussian_is_neither_trained_nor_sent() -> None:
    calibration = HeadCalibration(32, 1, 1, attention="raw")
    assert sum(weight.numel() for weight in calibration.parameters()) == 577
    assert set(calibration.state_dict()) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("attention", ["raw", "minmax"])
def test_p5_its_loss_reaches_the_calibration_only(attention: str) -> None:
    torch.manual_seed(0)
    calibration = HeadCalibration(4, 2, 3, attention=attention).double()
    inputs = [noise(2, 4, 16, 16), noise(2, 2, 16, 16, seed=1), noise(2, 2, 16, 16, seed=2)]
    for tensor in inputs:
        tensor.requires_grad_()
    logits = calibration(*inputs)
    assert logits.shape == (2, 3, 16, 16)
    logits.square().sum().backward()
    assert all(tensor.grad is None for tensor in inputs)
    assert all(weight.grad.abs().sum() > 0 for weight in calibration.parameters())


@pytest.mark.usefixtures("full_kernel")
def test_minmax_attention_stays_in_the_unit_interval_and_raw_does_not() -> None:
    maps = noise(1, 1, 40, 40)
    bounded = HeadCalibration(1, 1, 1, attention="minmax").attend(maps)
    assert bounded.min() >= 0
    assert bounded.max() <= 1
    assert HeadCalibration(1, 1, 1, attention="raw").attend(maps).max() > 10


@pytest.mark.parametrize("stride", [1, 4])
def test_coarser_features_give_maps_of_full_size(stride: int) -> None:
    torch.manual_seed(0)
    calibration = HeadCalibration(6, 1, 1, attention="minmax")
    peak = torch.zeros(1, 1, 32, 32)
    peak[..., 13, 18] = 1
    features = torch.ones(1, 6, 32 // stride, 32 // stride)
    quiet = calibration(features, torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32))
    steered = calibration(features, torch.zeros(1, 1, 32, 32), peak)
    assert steered.shape == (1, 1, 32, 32)
    place = (steered - quiet).abs()[0, 0].flatten().argmax().item()
    assert abs(place // 32 - 13) <= stride + 1, "the answer changes where the sites disagree"
    assert abs(place % 32 - 18) <= stride + 1


# Dice


def test_p10_dice_equals_the_authors() -> None:
    arrays = golden("lcfed_misc")
    score = arrays["score"].requires_grad_()
    loss = soft_dice_loss(score, arrays["target"])
    loss.backward()
    close(loss, arrays["dice_loss"], 1e-9)
    close(score.grad, arrays["dice_grad"], 1e-9)
