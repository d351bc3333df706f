"""Low-frequency amplitudes of images: read them, and mix in those of another site (FedDG, Liu et al., CVPR 2021).

An image keeps its phase; inside the window of signed integer frequencies |u| <= b, |v| <= b its amplitude A becomes
``(1 - donor_weight) * A + donor_weight * donor``. Two ways lead to the same numbers, on the images' own device:

* ``"matmul"``: the window's few frequencies are computed, and their change is added to the image, by two thin matrix
  products each (rows, then columns). No full transform: the cheapest way for small windows.
* ``"fft"``: real FFT of all rows, then of the window's columns only, and back: for wide windows. For the widest, of
  all columns at once.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Method = Literal["auto", "matmul", "fft"]

# Crossovers on one CPU core, at 128 to 512 pixels (benchmarks/frequency.py): matrix products win up to
# b = min(H, W) / 32; above this share of the columns, transforming the window's columns alone saves nothing.
SMALLEST_SIZE_PER_HALF_WIDTH = 32
WIDE = 0.41
# A CPU transforms a batch in pieces of about so many values, so that their spectra stay in its cache.
FFT_PIECE = 2**19


def window_half_width(fraction: float, height: int, width: int) -> int:
    """Half width b of the window that covers a fraction of the spectrum.

    Args:
        fraction: L of the paper, in [0, 0.5].
        height: rows of the image, in pixels.
        width: columns of the image, in pixels.

    Returns:
        b = floor(L * min(height, width)); the window spans 2b + 1 frequencies in each direction.

    Raises:
        ValueError: if the fraction is outside of [0, 0.5].
    """
    if not 0.0 <= fraction <= 0.5:
        raise ValueError(f"window fraction L = {fraction}: must lie in [0, 0.5] (0.5 covers the whole spectrum)")
    return math.floor(fraction * min(height, width))


@torch.no_grad()
def low_frequency_amplitude(images: Tensor, half_width: int, method: Method = "auto") -> Tensor:
    """Amplitudes inside the low-frequency window: all that a site has to publish.

    Args:
        images: (B, C, H, W), float32 or float64, any range.
        half_width: b, 0 <= b <= min(H, W) // 2.
        method: how the window is computed; ``"auto"`` takes the cheaper way.

    Returns:
        (B, C, 2b+1, 2b+1) amplitudes of the unnormalised transform; the zero frequency is at [..., b, b]. For b equal
        to half of an even size the first and last line repeat the same (Nyquist) frequency.

    Raises:
        TypeError: if the images are not float32 or float64.
        ValueError: if the images are not 4-D or the window exceeds the spectrum.
    """
    _check_images(images, half_width)
    with torch.autocast(images.device.type, enabled=False):
        if _by_matmul(images, half_width, method):
            half = _analyse(images, half_width).abs()
        else:
            half = _window(torch.fft.rfft2(images), half_width).abs()
    mirrored = half[..., 1:].flip(-2, -1)  # |X(-u, -v)| = |X(u, v)|
    return torch.cat([mirrored, half], dim=-1)


@torch.no_grad()
def mix_amplitude(
    images: Tensor,
    donor_crop: Tensor,
    donor_weight: Tensor | float,
    half_width: int | None = None,
    method: Method = "auto",
) -> Tensor:
    """Re-style images with the low-frequency amplitude of donors; phase and higher frequencies stay.

    Args:
        images: (B, C, H, W), float32 or float64, before any intensity normalisation.
        donor_crop: (B, C, 2d+1, 2d+1) with d >= b, from ``low_frequency_amplitude`` on images of the same size and
            value range. Its centre is used if it is wider than the window; of two mirrored entries, which an image's
            amplitude has in common, the one of positive column frequency is read.
        donor_weight: lambda in [0, 1], one for all or one per image (B,): 0 returns the images, 1 takes the
            donor's amplitude fully.
        half_width: b of the window; None takes the crop's own (d).
        method: how the window is computed; ``"auto"`` takes the cheaper way.

    Returns:
        (B, C, H, W) re-styled images, not clipped. Where an image has no amplitude its phase counts as 0.

    Raises:
        TypeError: if the images are not float32 or float64.
        ValueError: if shapes do not fit, the window exceeds the spectrum or a weight is outside of [0, 1].
    """
    half_width = donor_crop.shape[-1] // 2 if half_width is None else half_width
    _check_images(images, half_width)
    donor = _half_of_crop(images, donor_crop, half_width)
    weight = _weight_per_image(images, donor_weight)
    with torch.autocast(images.device.type, enabled=False):
        if _by_matmul(images, half_width, method):
            return _mix_by_matmul(images, donor, weight)
        size = _images_at_a_time(images)
        if size >= len(images):
            return _mix_by_fft(images, donor, weight)
        parts = zip(*(torch.split(tensor, size) for tensor in (images, donor, weight)), strict=True)
        return torch.cat([_mix_by_fft(*part) for part in parts])


def _check_images(images: Tensor, half_width: int) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"images must be float32 or float64, got {images.dtype}: convert them before mixing")
    largest = min(images.shape[-2:]) // 2
    if not 0 <= half_width <= largest:
        size = f"{images.shape[-2]} x {images.shape[-1]}"
        raise ValueError(f"half_width {half_width} does not fit images of {size} pixels: must lie in [0, {largest}]")


def _half_of_crop(images: Tensor, crop: Tensor, half_width: int) -> Tensor:
    """Non-negative column frequencies of the donor's window, (B, C, 2b+1, b+1)."""
    side = crop.shape[-1]
    fits = crop.ndim == 4 and crop.shape[:2] == images.shape[:2] and crop.shape[-2] == side and side % 2 == 1
    if not fits or side < 2 * half_width + 1:
        raise ValueError(
            f"donor_crop of shape {tuple(crop.shape)} does not fit images of shape {tuple(images.shape)} and "
            f"half_width {half_width}: expected (B, C, n, n) with the same B and C and an odd n >= {2 * half_width + 1}"
        )
    margin = side // 2 - half_width
    crop = crop[..., margin : side - margin, margin : side - margin].to(images)
    return crop[..., half_width:]


def _weight_per_image(images: Tensor, donor_weight: Tensor | float) -> Tensor:
    weight = torch.as_tensor(donor_weight, dtype=images.dtype)
    if weight.ndim > 0 and weight.shape != images.shape[:1]:
        raise ValueError(f"donor_weight must be one number or ({images.shape[0]},), got shape {tuple(weight.shape)}")
    if not all(0 <= number <= 1 for number in weight.flatten().tolist()):
        raise ValueError(f"donor_weight must lie in [0, 1], got {weight.tolist()}")
    weight = weight.to(images.device)
    return weight.expand(len(images)).reshape(-1, 1, 1, 1)


def _by_matmul(images: Tensor, half_width: int, method: Method) -> bool:
    if method == "auto":
        small = SMALLEST_SIZE_PER_HALF_WIDTH * half_width <= min(images.shape[-2:])
        return small and _products_are_exact(images.dtype)
    return method == "matmul"


def _products_are_exact(dtype: torch.dtype) -> bool:
    """Whether matrix products keep the precision of their dtype (TF32 or bfloat16 products would blur the phases)."""
    if dtype == torch.float64:
        return True
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses to say after a precision was set for a single backend
        return False


def _images_at_a_time(images: Tensor) -> int:
    if images.device.type != "cpu":
        return max(1, len(images))
    return max(1, FFT_PIECE // images[0].numel())


def _mix_by_fft(images: Tensor, donor: Tensor, weight: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    columns = donor.shape[-1]
    if columns > WIDE * width:
        rows = torch.fft.rfft2(images)
        _restyle_columns(rows[..., :columns], donor, weight)
        mixed: Tensor = torch.fft.irfft2(rows, s=(height, width))
    else:
        rows = torch.fft.rfft(images)
        spectrum = torch.fft.fft(rows[..., :columns], dim=-2)
        _restyle_columns(spectrum, donor, weight)
        rows[..., :columns] = torch.fft.ifft(spectrum, dim=-2)
        mixed = torch.fft.irfft(rows, n=width)
    return mixed


def _restyle_columns(spectrum: Tensor, donor: Tensor, weight: Tensor) -> None:
    """In place: re-style the window inside of its columns of the spectrum, (B, C, H, b+1)."""
    height, half_width = spectrum.shape[-2], donor.shape[-1] - 1
    noise = _rounding_noise(spectrum[..., :1, :1])
    _restyle(spectrum[..., : half_width + 1, :], noise, donor[..., half_width:, :], weight)
    negative = min(half_width, height - half_width - 1)  # at the Nyquist frequency, rows -b and b are one and the same
    if negative:
        above = donor[..., half_width - negative : half_width, :]
        _restyle(spectrum[..., height - negative :, :], noise, above, weight)


def _restyle(window: Tensor, noise: Tensor, donor: Tensor, weight: Tensor) -> None:
    """In place: amplitude A of (a part of) the spectrum becomes (1 - weight) * A + weight * donor."""
    amplitude = _amplitude(window)
    gain = torch.addcmul(1.0 - weight, weight, donor / amplitude)
    # what is no more than rounding noise has no phase to keep: it counts as 0, as that of a true zero does
    if float(amplitude.amin()) <= float(noise.amax()):
        silent = amplitude <= noise
        window.copy_(torch.where(silent, torch.ones_like(window), window))
        gain = torch.where(silent, amplitude.lerp(donor, weight), gain)
    window.mul_(gain)


def _rounding_noise(zero_frequency: Tensor) -> Tensor:
    amplitude = zero_frequency.abs()
    return amplitude * (2 * torch.finfo(amplitude.dtype).eps)


def _amplitude(spectrum: Tensor) -> Tensor:
    """Absolute values, in half the time of `abs`, whose care for extreme values no image needs."""
    real, imaginary = spectrum.real, spectrum.imag
    return (real * real).addcmul_(imaginary, imaginary).sqrt_()


# A window holds the row frequencies -b..b and the column frequencies 0..b, (B, C, 2b+1, b+1); the rest of the
# square follows by symmetry, since images are real.


def _window(spectrum: Tensor, half_width: int) -> Tensor:
    height, columns = spectrum.shape[-2], half_width + 1
    negative = spectrum[..., height - half_width :, :columns]
    return torch.cat([negative, spectrum[..., : half_width + 1, :columns]], dim=-2)


def _mix_by_matmul(images: Tensor, donor: Tensor, weight: Tensor) -> Tensor:
    half_width = donor.shape[-1] - 1
    window = _analyse(images, half_width)
    mixed = window.clone()
    _restyle(mixed, _rounding_noise(window[..., half_width : half_width + 1, :1]), donor, weight)
    return _add_waves(images, mixed.sub_(window))


def _analyse(images: Tensor, half_width: int) -> Tensor:
    batch, channels, height, width = images.shape
    across = torch.view_as_real(_waves(width, 0, half_width, images.dtype, images.device))
    down = _waves(height, -half_width, half_width, images.dtype, images.device)
    rows = images.reshape(-1, width) @ across.transpose(0, 1).reshape(width, -1)
    window: Tensor = down @ torch.view_as_complex(rows.view(batch, channels, height, half_width + 1, 2))
    return window


def _add_waves(images: Tensor, change: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    half_width = change.shape[-1] - 1
    across = torch.view_as_real(_waves(width, 0, half_width, images.dtype, images.device))
    down = _waves(height, -half_width, half_width, images.dtype, images.device)
    counted = change * (_multiplicity(height, width, half_width, images.dtype, images.device) / (height * width))
    rows = torch.view_as_real(down.mH @ counted).reshape(-1, 2 * (half_width + 1))
    mixed = torch.addmm(images.reshape(-1, width), rows, across.transpose(1, 2).reshape(-1, width))
    return mixed.view(images.shape)


@lru_cache(maxsize=16)
def _waves(size: int, lowest: int, highest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """exp(-2 pi i f p / size) for the frequencies f = lowest..highest (rows) and the positions p (columns)."""
    with torch.inference_mode(False):
        turns = torch.outer(torch.arange(lowest, highest + 1), torch.arange(size)) % size  # exact: integers
        angles = turns.double() * (-2 * math.pi / size)
        return torch.polar(torch.ones_like(angles), angles).to(device=device, dtype=dtype.to_complex())


@lru_cache(maxsize=16)
def _multiplicity(height: int, width: int, half_width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How often each bin of a window stands in the full spectrum, (2b+1, b+1).

    A column frequency stands for its mirror image too, unless it is its own (zero and Nyquist); the first and last
    row are one and the same bin, each counted half, if they reach the Nyquist frequency.
    """
    with torch.inference_mode(False):
        rows = torch.ones(2 * half_width + 1, dtype=dtype)
        columns = torch.full((half_width + 1,), 2.0, dtype=dtype)
        columns[0] = 1.0
        if 2 * half_width == height:
            rows[0] = rows[-1] = 0.5
        if 2 * half_width == width:
            columns[-1] = 1.0
        return torch.outer(rows, columns).to(device)
