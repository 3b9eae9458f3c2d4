"""Numbers about generated sound and video of known make: is it what was asked for, and does it hold together?"""

from __future__ import annotations

import numpy as np


def strongest_frequency(sounds: np.ndarray, rate: float) -> np.ndarray:
    """The frequency in Hz of the highest peak of each spectrum: `f32[n, time] -> f64[n]`.

    Of 8 times as many frequencies as the length gives, under Hann's window, whose side lobes are low.

    >>> t = np.arange(1000) / 1000
    >>> float(strongest_frequency(np.sin(2 * np.pi * 50 * t)[None], rate=1000.0)[0])
    50.0
    """
    n = sounds.shape[1]
    spectrum = np.abs(np.fft.rfft(sounds * np.hanning(n), n=8 * n, axis=1))
    return np.argmax(spectrum, axis=1) * rate / (8 * n)


def in_tune(sounds: np.ndarray, rate: float, wanted: np.ndarray) -> float:
    """The share of `f32[n, time]` whose strongest frequency is within half a semitone of `wanted` f64[n], in Hz."""
    with np.errstate(divide="ignore"):
        off = 12 * np.log2(strongest_frequency(sounds, rate) / wanted)
    return float(np.mean(np.abs(off) < 0.5))


def harmonic_share(sounds: np.ndarray, rate: float, wanted: np.ndarray, width: float = 20.0) -> float:
    """The mean share of the energy within `width` Hz of a multiple of the wanted pitch: 1 for a clean tone."""
    n = sounds.shape[1]
    power = np.abs(np.fft.rfft(sounds * np.hanning(n), axis=1)) ** 2
    frequency = np.fft.rfftfreq(n, 1 / rate)
    nearest = np.maximum(1, np.round(frequency / wanted[:, None])) * wanted[:, None]
    near = np.abs(frequency - nearest) <= width
    return float(np.mean(np.sum(power * near, axis=1) / np.maximum(np.sum(power, axis=1), 1e-12)))


def brightest_window(frames: np.ndarray, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The square of most light in each of `u8[n, h, w, 1]`: its pixels u8[n, size, size, 1] and its corner i32[n, 2].

    Where several have the same light, as when the border of a digit is black, it is the one in their middle.
    """
    windows = np.lib.stride_tricks.sliding_window_view(frames[..., 0].astype(np.int64), (size, size), axis=(1, 2))
    light = np.sum(windows, axis=(3, 4))
    best = light == np.max(light, axis=(1, 2), keepdims=True)
    rows, columns = (np.arange(best.shape[axis]).reshape((1, -1, 1) if axis == 1 else (1, 1, -1)) for axis in (1, 2))
    total = np.sum(best, axis=(1, 2))
    corner = np.stack([np.sum(best * where, axis=(1, 2)) / total for where in (rows, columns)], axis=1)
    corner = np.floor(corner).astype(np.int32)
    return windows[np.arange(len(frames)), corner[:, 0], corner[:, 1], :, :, None].astype(np.uint8), corner


def centres(videos: np.ndarray) -> np.ndarray:
    """The centre of light of each frame of `u8[n, t, h, w, 1]`, in pixels: f64[n, t, 2]."""
    light = videos[..., 0].astype(np.float64)
    total = np.maximum(np.sum(light, axis=(2, 3)), 1.0)
    return np.stack(
        [
            np.einsum("nthw,h->nt", light, np.arange(light.shape[2])) / total,
            np.einsum("nthw,w->nt", light, np.arange(light.shape[3])) / total,
        ],
        axis=2,
    )


def jolt(videos: np.ndarray) -> float:
    """How far from going straight on: median |c(n+1) - 2 c(n) + c(n-1)| of the centres of light, in pixels.

    Rounding to whole pixels gives about 0.5 to 1; independent places in the frame several pixels.
    """
    c = centres(videos)
    return float(np.median(np.linalg.norm(c[:, 2:] - 2 * c[:, 1:-1] + c[:, :-2], axis=2)))


def steadiness(videos: np.ndarray, size: int = 8) -> float:
    """How much the moving thing stays the same: mean correlation of the brightest windows of neighbouring frames."""
    n, t = videos.shape[:2]
    windows = brightest_window(videos.reshape(n * t, *videos.shape[2:]), size)[0].reshape(n, t, -1).astype(np.float64)
    z = windows - np.mean(windows, axis=2, keepdims=True)
    z /= np.maximum(np.linalg.norm(z, axis=2, keepdims=True), 1e-9)
    return float(np.mean(np.sum(z[:, 1:] * z[:, :-1], axis=2)))
