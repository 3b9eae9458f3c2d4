"""Generated examples as files that can be looked at or heard: what kind they are is read off the decoded array.

    u8[h, w, c]      picture   PNG                                     a sheet: one PNG of all
    u8[t, h, w, c]   video     animated GIF                            a GIF of all, a PNG of film strips
    f32[time, c]     sound     WAV, where there is a sample rate       a PNG of waves and spectrograms, a WAV of all
    f32[time, c]     series    PNG of the curves, where there is none  a PNG of all
    anything else    array     nothing

with c = 1, 3 or 4 for what is seen. A volume is a video through its slices.
"""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.experiment import Experiment
from diffusion_jax.training.pictures import fitting_scale, grid, replace, save_animation, save_picture

Kind = Literal["picture", "video", "sound", "series", "array"]
INK, PAPER = "#22303c", "#ffffff"
STRIP = 16
"""Frames of a film strip, at most."""
PAUSE = 0.15
"""Seconds of silence between the sounds of a sheet."""


class Look(NamedTuple):
    """What the examples of an experiment are and how to show them: `rate` in samples or frames a second."""

    kind: Kind
    rate: float


ROWS: dict[Kind, int] = {"picture": 8, "video": 4, "sound": 2, "series": 4, "array": 0}
"""Rows of a sheet of samples."""
SUFFIX: dict[Kind, str] = {"picture": ".png", "video": ".gif", "sound": ".wav", "series": ".png"}
"""The file of one example."""
NOUN: dict[Kind, str] = {
    "picture": "pictures", "video": "videos", "sound": "sounds", "series": "series", "array": "arrays"
}  # fmt: skip


def look(experiment: Experiment) -> Look:
    """How to show what an experiment makes; nothing is computed."""
    example = jax.eval_shape(experiment.decode, jax.ShapeDtypeStruct((1, *experiment.shape), jnp.float32))
    kind = kind_of(example.shape[1:], example.dtype, experiment.sample_rate)
    return Look(kind, experiment.frame_rate if kind == "video" else experiment.sample_rate or 1.0)


def kind_of(shape: tuple[int, ...], dtype: Any, sample_rate: float | None = None) -> Kind:
    """The kind of one decoded example, by the table above.

    >>> kind_of((8, 8, 1), np.uint8), kind_of((1024, 2), np.float32, sample_rate=8000), kind_of((2,), np.float32)
    ('picture', 'sound', 'array')
    """
    seen = np.issubdtype(dtype, np.uint8) and shape[-1:] in ((1,), (3,), (4,))
    if seen and len(shape) in (3, 4):
        return "picture" if len(shape) == 3 else "video"
    if jnp.issubdtype(dtype, jnp.floating) and len(shape) == 2:
        return "series" if sample_rate is None else "sound"
    return "array"


def save_example(path: Path, example: np.ndarray, how: Look) -> None:
    """Write one example as a file of its kind, whole or not at all; `path` has the kind's suffix."""
    if how.kind == "picture":
        save_picture(path, example)
    elif how.kind == "video":
        scale = fitting_scale(example.shape[2], 1, 128)
        _save_video(path, [grid(frame[None], 1, scale) for frame in example], how.rate)
    elif how.kind == "sound":
        save_sound(path, example, how.rate)
    elif how.kind == "series":
        save_picture(path, plots(example[None], 1, how))


def save_sheet(path: Path, examples: np.ndarray, columns: int, how: Look) -> list[str]:
    """Show examples `[n, *shape]` together: `path` is a PNG, beside which there may be a GIF or a WAV; their names."""
    if how.kind == "array":
        return []
    save_picture(path, sheet(examples, columns, how))
    if how.kind == "video":
        moving, scale = path.with_suffix(".gif"), fitting_scale(examples.shape[3], columns, 480)
        _save_video(moving, [grid(examples[:, t], columns, scale) for t in range(examples.shape[1])], how.rate)
        return [path.name, moving.name]
    if how.kind == "sound":
        heard, silence = path.with_suffix(".wav"), np.zeros((round(PAUSE * how.rate), examples.shape[2]), np.float32)
        save_sound(heard, np.concatenate([part for sound in examples for part in (sound, silence)]), how.rate)
        return [path.name, heard.name]
    return [path.name]


def sheet(examples: np.ndarray, columns: int, how: Look) -> np.ndarray:
    """One picture u8[H,W,c] of many examples, in rows of `columns`; of videos the first row, each as a film strip."""
    if how.kind == "picture":
        return grid(examples, columns, fitting_scale(examples.shape[2], columns))
    if how.kind == "video":
        return film_strips(examples[:columns])
    return plots(examples, columns, how)


def film_strips(videos: np.ndarray, target: int = 640) -> np.ndarray:
    """Each of `u8[n,t,h,w,c]` as a row of frames, at most `STRIP` of them: u8[H,W,c], about `target` pixels wide."""
    t, h, w, c = videos.shape[1:]
    chosen = np.unique(np.round(np.linspace(0, t - 1, min(t, STRIP))).astype(int))
    return grid(videos[:, chosen].reshape(-1, h, w, c), len(chosen), fitting_scale(w, len(chosen), target))


def _save_video(path: Path, frames: list[np.ndarray], rate: float) -> None:
    milliseconds = round(1000 / rate)
    save_animation(path, frames, milliseconds, milliseconds)


def save_sound(path: Path, sound: np.ndarray, rate: float) -> None:
    """Write `f32[time, c]` in [-1, 1], clipped, as a WAV file of 16 bits; it appears whole or not at all."""
    samples = np.round(np.clip(np.nan_to_num(sound), -1, 1) * 32767).astype("<i2")

    def write(part: Path) -> None:
        with wave.open(str(part), "wb") as file:
            file.setnchannels(sound.shape[1])
            file.setsampwidth(2)
            file.setframerate(round(rate))
            file.writeframes(samples.tobytes())

    replace(path, write)


# Curves and spectrograms, by figures of matplotlib without its global state, so that threads may draw ----------------


def plots(examples: np.ndarray, columns: int, how: Look) -> np.ndarray:
    """Examples `f32[n, time, c]` as curves, sounds with the spectrogram of their first channel below: u8[H,W,3]."""
    return _rendered(_curves(examples, columns, how, spectrograms=how.kind == "sound")[0])


def film_of_curves(frames: np.ndarray, columns: int, how: Look) -> list[np.ndarray]:
    """Curves that change, `f32[frames, n, time, c]`, as pictures u8[H,W,3] of equal axes."""
    figure, lines = _curves(frames[-1], columns, how, spectrograms=False)
    _rendered(figure)
    figure.set_layout_engine("none")  # the places are found: finding them again would be most of the work
    pictures = []
    for frame in frames:
        for example, group in zip(frame, lines, strict=True):
            for c, line in enumerate(group):
                line.set_ydata(example[:, c])
        pictures.append(_rendered(figure))
    return pictures


def _curves(examples: np.ndarray, columns: int, how: Look, spectrograms: bool) -> tuple[Any, list[list[Any]]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(columns, len(examples))
    rows, time = -(-len(examples) // columns), examples.shape[1] / how.rate
    top = 1.0 if how.kind == "sound" else 1.05 * max(1e-6, float(np.max(np.abs(examples))))
    heights = [1.0, 1.1] if spectrograms else [1.0]
    figure = Figure(
        figsize=(max(3.0, 1.45 * columns + 0.6), 0.85 * sum(heights) * rows + 0.55), dpi=100, facecolor=PAPER,
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02),
    )  # fmt: skip
    axes = figure.subplots(
        rows * len(heights), columns, squeeze=False, sharex=True, sharey="row",
        gridspec_kw={"height_ratios": heights * rows},
    )  # fmt: skip
    lines = []
    for i in range(rows * columns):
        place = axes[i // columns * len(heights), i % columns]
        below = axes[i // columns * len(heights) + 1, i % columns] if spectrograms else None
        if i >= len(examples):
            for empty in filter(None, (place, below)):
                empty.set_axis_off()
            continue
        lines.append(_curve(place, examples[i], how, top))
        if below is not None:
            _spectrogram(below, examples[i, :, 0], how)
    for bottom in axes[-1]:
        bottom.set_xlim(0, time)
        for label, side in zip(bottom.set_xticks([0, time], ["0", f"{time:.3g}"]), ("left", "right"), strict=True):
            label.label1.set_horizontalalignment(side)
    middle = axes[-1, columns // 2]
    middle.set_xlabel("seconds" if how.kind == "sound" else "step", fontsize=8, color=INK)
    return figure, lines


def _curve(place: Any, example: np.ndarray, how: Look, top: float) -> list[Any]:
    time = np.arange(len(example)) / how.rate
    colours = [INK, "#d1495b", "#1f6fb2", "#2a9d5c"]
    lines = [place.plot(time, y, lw=0.5, color=colours[c % 4])[0] for c, y in enumerate(example.T)]
    place.set_ylim(-top, top)
    place.set_yticks([-top, 0, top], [f"{-top:.2g}", "0", f"{top:.2g}"])
    _tidy(place)
    return lines


def _spectrogram(place: Any, sound: np.ndarray, how: Look) -> None:
    level = spectrogram(sound)
    edges = (0, len(sound) / how.rate, 0, how.rate / 2)
    place.imshow(level.T, origin="lower", aspect="auto", extent=edges, cmap="magma", vmin=-60, vmax=0)
    place.set_yticks([0, how.rate / 2], ["0", f"{how.rate / 2:.4g} Hz"])
    _tidy(place)


def _tidy(place: Any) -> None:
    place.tick_params(labelsize=7, length=2, colors=INK)
    place.label_outer()
    for side in place.spines.values():
        side.set_color("#c9d1d8")
        side.set_linewidth(0.6)


def _rendered(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def spectrogram(sound: np.ndarray) -> np.ndarray:
    """Decibels below the loudest, `f[time] -> f[windows, frequencies]`: overlapping windows of an eighth of it."""
    n = int(np.clip(2 ** round(np.log2(max(len(sound), 2) / 8)), 16, 1024))
    padded = np.pad(np.nan_to_num(sound), n // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, n)[:: max(1, n // 8)]
    power = np.abs(np.fft.rfft(windows * np.hanning(n), axis=1)) ** 2
    return 10 * np.log10(np.maximum(power / max(np.max(power), 1e-12), 1e-9))


# Noise becoming examples ---------------------------------------------------------------------------------------------


def tamed(path: jax.Array) -> jax.Array:
    """A trajectory `f32[steps, b *d]`, every step with at most the standard deviation of the last one."""
    wanted = jnp.std(path[-1])

    def tame(x: jax.Array) -> jax.Array:
        size = jnp.std(x)
        return x * jnp.where(size > wanted, wanted / jnp.maximum(size, 1e-6), 1.0)

    return jax.lax.map(tame, path)


def save_film(path: Path, frames: np.ndarray, columns: int, how: Look) -> None:
    """An animation of sheets, `[frames, n, *shape]`, as a GIF that rests on the last one."""
    if how.kind in ("sound", "series"):
        pictures = film_of_curves(frames, columns, how)
    elif how.kind == "video":
        pictures = [film_strips(frame[:columns], 480) for frame in frames]
    else:
        pictures = [grid(frame, columns, fitting_scale(frames.shape[3], columns, 480)) for frame in frames]
    save_animation(path, pictures)


def film_program(
    draw: Callable[..., jax.Array], decode: Callable[[jax.Array], jax.Array], most: int = 40
) -> Callable[..., jax.Array]:
    """(params, keys, labels) -> at most `most` decoded steps of a `draw` that returns its trajectory."""

    def film(params: Any, keys: jax.Array, labels: jax.Array | None) -> jax.Array:
        path = tamed(draw(params, keys, labels))
        chosen = np.unique(np.round(np.linspace(0, len(path) - 1, most)).astype(int))
        return jax.lax.map(decode, path[chosen])

    return film
