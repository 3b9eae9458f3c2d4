"""Sound and video made on the spot, as pure functions of a seed: nothing to download.

A tone of pitch f, with the loudness g, the brightness r, the phases phi_k and the times of rise and decay u and v drawn
at random and f up to a tenth of a semitone off,

    x(t) = g / max|.|  (1 - exp(-t / u)) exp(-t / v) sum_k r^(k-1) sin(2 pi k f t + phi_k),   k f below rate / 2     (1)

A moving digit is one of scikit-learn's 8x8 pictures whose corner p goes straight on and bounces off the walls,

    p(n) = reflect(p_0 + n s),   reflect(y) = w - |(y mod 2w) - w| in each axis, w = the room there is            (2)

at a constant velocity s, drawn at the whole pixel next to p.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffusion_jax.training.data import Data
from diffusion_jax.training.sources import digits
from diffusion_jax.typing import InputError

NOTES = {"C4": 0, "D4": 2, "E4": 4, "F4": 5, "G4": 7, "A4": 9, "B4": 11, "C5": 12}
"""A scale: semitones above middle C, 440 Hz 2^(-9/12) = 261.6 Hz."""
PITCHES = tuple(440.0 * 2 ** ((semitones - 9) / 12) for semitones in NOTES.values())
"""Their frequencies in Hz."""
HARMONICS = 4


def tones(length: int = 1024, rate: int = 4000, *, train: int = 4096, test: int = 512, seed: int = 0) -> Data:
    """Tones of equation (1), one class for each of `NOTES`: {"image": f32[n, length, 1] in [-1, 1], "label": i32[n]}.

    rate: in Hz. Decay takes 0.1 to 0.5 s, rise 5 to 20 ms. InputError if a pitch is above rate / 2.
    """
    if max(PITCHES) >= rate / 2:
        raise InputError(f"rate={rate}: the highest note has {max(PITCHES):.0f} Hz and needs more than twice as much")
    splits = [_tones(n, length, rate, np.random.default_rng([seed, i])) for i, n in enumerate((train, test))]
    return Data(splits[0], splits[1], tuple(NOTES), (length, 1))


def _tones(n: int, length: int, rate: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    labels = np.arange(n, dtype=np.int32) % len(PITCHES)
    t, k = np.arange(length) / rate, np.arange(1, HARMONICS + 1)
    pitch = np.asarray(PITCHES)[labels] * 2 ** (rng.uniform(-0.1, 0.1, n) / 12)
    rise, decay = rng.uniform(0.005, 0.02, n), np.exp(rng.uniform(math.log(0.1), math.log(0.5), n))
    weight = rng.uniform(0.2, 0.6, n)[:, None] ** (k - 1) * (pitch[:, None] * k < rate / 2)
    phase = rng.uniform(0, 2 * np.pi, (n, HARMONICS))
    x = np.zeros((n, length))
    for j in range(HARMONICS):
        x += weight[:, j, None] * np.sin(2 * np.pi * (j + 1) * pitch[:, None] * t + phase[:, j, None])
    x *= (1 - np.exp(-t / rise[:, None])) * np.exp(-t / decay[:, None])
    x *= rng.uniform(0.5, 0.95, (n, 1)) / np.max(np.abs(x), axis=1, keepdims=True)
    return {"image": x.astype(np.float32)[:, :, None], "label": labels}


def moving_digits(
    frames: int = 8, size: int = 16, *, copies: int = 4, speed: tuple[float, float] = (0.5, 2.0), seed: int = 0
) -> Data:
    """Digits that move by equation (2): {"image": u8[n, frames, size, size, 1], "label": i32[n]}, ten classes.

    copies: videos of each picture, with different paths; pictures held out from training are in `test` alone.
    speed: between these, in pixels a frame, in any direction. InputError if the digit does not fit.
    """
    if size <= 8 or frames < 1 or copies < 1:
        raise InputError(f"an 8x8 digit moves in frames of more than 8x8, got size={size}, frames={frames}")
    data = digits()
    splits = [
        _moving(part, frames, size, copies, speed, np.random.default_rng([seed, i]))
        for i, part in enumerate((data.train, data.test))
    ]
    return Data(splits[0], splits[1], data.classes, (frames, size, size, 1))


def _moving(
    part: Any, frames: int, size: int, copies: int, speed: tuple[float, float], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    pictures, labels = (np.repeat(part[name], copies, axis=0) for name in ("image", "label"))
    n, room = len(labels), size - 8
    angle, fast = rng.uniform(0, 2 * np.pi, n), rng.uniform(speed[0], speed[1], n)
    velocity = fast[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    straight = rng.uniform(0, room, (n, 1, 2)) + np.arange(frames)[None, :, None] * velocity[:, None, :]
    place = np.round(reflect(straight, room)).astype(int)
    video = np.zeros((n, frames, size, size, 1), np.uint8)
    across = np.arange(8)
    rows, columns = (place[..., axis, None] + across for axis in (0, 1))
    i, j = np.arange(n)[:, None, None, None], np.arange(frames)[None, :, None, None]
    video[i, j, rows[:, :, :, None], columns[:, :, None, :]] = pictures[:, None]
    return {"image": video, "label": labels}


def reflect(y: np.ndarray, width: float) -> np.ndarray:
    """A straight path y folded into [0, width], as by a ball between two walls.

    >>> reflect(np.array([-1.0, 0.0, 3.0, 5.0, 9.0]), 4.0).tolist()
    [1.0, 0.0, 3.0, 3.0, 1.0]
    """
    return width - np.abs(np.mod(y, 2 * width) - width)
