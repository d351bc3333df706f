"""Images re-styled per second: the window way against the per-image numpy way and the plain real FFT.

The real FFT takes the batch at once (rfft) or image by image (rfft/1), which a CPU's cache may like better. Prints one
table: ``OMP_NUM_THREADS=1 python -m benchmarks.frequency``. Every repetition times all ways one after
another and counts CPU time of the one thread, so that other work on the machine disturbs little; medians of the
repetitions, speed-ups of paired times.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedseg.algorithms.functional.fourier import low_frequency_amplitude, mix_amplitude

HALF_WIDTHS = [0, 1, 2, 3, 8, 19, 32, 38, 64, 96, 128, 153, 191]


def release_one(image: np.ndarray, donor: np.ndarray, weight: float, half_width: int) -> np.ndarray:
    """The way of the release, one image (C, H, W): full complex spectrum, amplitude and phase, centred, float64."""
    spectrum = np.fft.fft2(image, axes=(-2, -1))
    amplitude, phase = np.abs(spectrum), np.angle(spectrum)
    amplitude = np.fft.fftshift(amplitude, axes=(-2, -1))
    donor = np.fft.fftshift(donor, axes=(-2, -1))
    row, column = amplitude.shape[-2] // 2, amplitude.shape[-1] // 2
    window = (
        slice(None),
        slice(row - half_width, row + half_width + 1),
        slice(column - half_width, column + half_width + 1),
    )
    amplitude[window] = (1 - weight) * amplitude[window] + weight * donor[window]
    amplitude = np.fft.ifftshift(amplitude, axes=(-2, -1))
    return np.real(np.fft.ifft2(amplitude * np.exp(1j * phase), axes=(-2, -1)))


def real_fft(images: Tensor, crop: Tensor, weight: float, half_width: int) -> Tensor:
    """The plain fast way, without any check: one real FFT, window scaled, inverse."""
    height = images.shape[-2]
    spectrum = torch.fft.rfft2(images)
    rows = [(slice(0, half_width + 1), slice(half_width, None))]
    if half_width:
        rows.append((slice(height - half_width, height), slice(0, half_width)))
    for place, of_crop in rows:
        window = spectrum[..., place, : half_width + 1]
        window *= (crop[..., of_crop, half_width:] * weight).div_(window.abs()).add_(1 - weight)
    mixed: Tensor = torch.fft.irfft2(spectrum, s=images.shape[-2:])
    return mixed


def ways(images: Tensor, donors: Tensor, weight: float, half_width: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed: each call re-styles the whole batch. Donor amplitudes are ready beforehand, as in a bank."""
    crop = low_frequency_amplitude(donors, half_width)
    spectra = np.abs(np.fft.fft2(donors.double().numpy()))

    def release() -> Tensor:
        pairs = zip(images.double().numpy(), spectra, strict=True)
        return torch.from_numpy(np.stack([release_one(image, donor, weight, half_width) for image, donor in pairs]))

    return {
        "numpy": release,
        "rfft": lambda: real_fft(images, crop, weight, half_width),
        "rfft/1": lambda: torch.cat(
            [real_fft(images[i, None], crop[i, None], weight, half_width) for i in range(len(images))]
        ),
        "matmul": lambda: mix_amplitude(images, crop, weight, half_width, "matmul"),
        "fft": lambda: mix_amplitude(images, crop, weight, half_width, "fft"),
        "auto": lambda: mix_amplitude(images, crop, weight, half_width),
    }


def measure(images: Tensor, donors: Tensor, half_width: int, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Seconds per image for every way and repetition, and the largest deviation of ours from numpy's."""
    timed = ways(images, donors, 0.5, half_width)
    reference = timed["numpy"]()
    deviation = max(float((timed[name]() - reference).abs().max()) for name in ("matmul", "fft", "auto"))
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, way in timed.items():
            start = time.process_time()
            way()
            seconds[name].append((time.process_time() - start) / len(images))
    return seconds, deviation


def speed_up(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--half-widths", type=int, nargs="+", default=HALF_WIDTHS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    images = torch.rand(shape, generator=generator) * 255
    donors = torch.rand(shape, generator=generator) * 255
    print(f"{shape[1]} x {shape[2]} x {shape[3]}, batch {arguments.batch}, float32, one thread: images per second")
    names = ["numpy", "rfft", "rfft/1", "matmul", "fft", "auto"]
    heads = [*names, *(f"auto/{name}" for name in names[:3])]
    print(f"{'b':>4}" + "".join(f"{name:>12}" for name in heads) + "  deviation (of 255)")
    for half_width in (b for b in arguments.half_widths if b <= arguments.size // 2):
        seconds, deviation = measure(images, donors, half_width, arguments.repeats)
        rates = "".join(f"{1 / statistics.median(seconds[name]):12.0f}" for name in names)
        gains = "".join(f"{speed_up(seconds, name, 'auto'):12.2f}" for name in names[:3])
        print(f"{half_width:4d}{rates}{gains}{deviation:20.1e}", flush=True)


if __name__ == "__main__":
    main()
