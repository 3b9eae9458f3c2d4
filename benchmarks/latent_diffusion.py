"""Latent diffusion on Fashion-MNIST from scratch: both stages trained, measured by the frozen protocol, and a report.

    python benchmarks/latent_diffusion.py                  on one H100, about half an hour (arithmetic, not measured)
    python benchmarks/latent_diffusion.py --size cpu       reduced, for two cores
    python benchmarks/latent_diffusion.py --size toy       a minute or two, of which the numbers say nothing

What is done already is not done again: the same command goes on where it stopped. OUT/README.md is the report.

Measured: what the autoencoder keeps of held-out pictures (error of a pixel, and the protocol's distances of
reconstructions); and for some scales of guidance, samples of captions as the training set has them (the protocol's
numbers beside their floors), and of all captions alike, whether the class is the one asked for by the protocol's
classifier, and whether the cloth is darker, or brighter, than the median of its class as the caption says: both, the
attribute accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = "ldm_fashion_mnist"


class Size(NamedTuple):
    """Arguments of the stages; n: samples measured; each: of every caption; real: training pictures compared with.

    guidance: the scales that samples are drawn with.
    """

    autoencoder: dict[str, Any]
    ldm: dict[str, Any]
    n: int
    each: int
    guidance: tuple[float, ...] = (1.5, 3.0, 5.0)
    real: int | None = None


FULL = {"dispatch": 20, "precision": "bfloat16"}
SIZES = {
    "full": Size({"steps": 15_000, "batch": 256, **FULL}, {"steps": 40_000, "batch": 512, **FULL}, 10_000, 200),
    "cpu": Size(
        {"steps": 1500, "batch": 32, "width": 16, "start": 700, "learning_rate": 2e-3, "sample_every": 0},
        {"steps": 4000, "batch": 32, "width": 64, "learning_rate": 1e-3, "sample_every": 0, "checkpoint_every": 500},
        500, 10,
    ),
    "toy": Size(
        {"steps": 4, "batch": 8, "width": 8, "start": 2, "log_every": 2, "sample_every": 0},
        {"steps": 4, "batch": 8, "width": 8, "log_every": 2, "sample_every": 0, "sample_steps": 2},
        50, 2, (1.5,), 300,
    ),
}  # fmt: skip


def train(out: Path, size: Size, data_dir: str) -> dict[str, float]:
    """Both stages, as a user would; the seconds each has taken here, with what came before where it went on."""
    data = [f"data_dir={data_dir}"] if data_dir else []
    runs, seconds = f"runs={out / 'runs'}", {}
    words = {
        "autoencoder": ["autoencoder", "data=fashion_mnist", "run=first", *_words(size.autoencoder), *data],
        "ldm": [EXPERIMENT, f"autoencoder={out / 'runs/autoencoder/first'}", "run=second", *_words(size.ldm)],
    }
    for name, arguments in words.items():
        done = out / f"{name}.seconds"
        if not done.is_file():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "diffusion_jax", "train", *arguments, runs], cwd=ROOT, check=True)
            done.write_text(str(time.perf_counter() - begin))
        seconds[name] = float(done.read_text())
    return seconds


def _words(arguments: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in arguments.items()]


def measured(out: Path, size: Size) -> dict[str, Any]:
    """Every number of the report; the pictures of it go to files."""
    import jax
    import numpy as np

    from diffusion_jax.evaluation import fashion_mnist as protocol
    from diffusion_jax.training.checkpoint import quieten
    from diffusion_jax.training.data import prepare, to_uint8
    from diffusion_jax.training.first_stage import first_stage
    from diffusion_jax.training.generate import at_a_time, make_draw, make_pictures
    from diffusion_jax.training.mesh import make_mesh
    from diffusion_jax.training.pictures import grid, save_picture
    from diffusion_jax.training.teacher import find_teacher, teacher_params

    quieten()
    stage, teacher = (
        first_stage(str(out / "runs/autoencoder/first")),
        find_teacher(str(out / f"runs/{EXPERIMENT}/second")),
    )
    made, experiment, params = teacher.function.__globals__, teacher.experiment, teacher_params(teacher)
    (train_x, train_y), (test_x, test_y) = (made["whole"](part) for part in (stage.data().train, stage.data().test))
    kept = slice(0, size.real)
    real = _real(out, train_x[kept], train_y[kept], test_x, test_y)
    n = min(size.n, len(test_x))

    back = jax.jit(lambda p, x: to_uint8(stage.decode(p, stage.encode(p, prepare(x))[0])))
    again = np.concatenate([np.asarray(back(stage.params, x)) for x in np.array_split(test_x[:n], max(1, n // 50))])
    error = np.abs(again.astype(int) - test_x[:n]) / 255
    found: dict[str, Any] = {"reconstruction": {"mean absolute error of a pixel": float(error.mean())}}
    found["reconstruction"] |= _numbers(protocol.measure(again, test_y[:n], real))

    bounds = made["tone_bounds"](train_x, train_y)
    captions = 3 * train_y + made["tones"](train_x, train_y, bounds)
    chosen = np.random.default_rng(0).permutation(captions)[:n]
    asked = np.repeat(np.arange(30), size.each)

    def attributes(shown: np.ndarray, told: np.ndarray) -> dict[str, float]:
        looks, bright = protocol.look(shown).looks, made["brightness"](shown)
        right, free = looks == told // 3, told % 3 == 1
        tone = (bright > bounds[told // 3, 1]) == (told % 3 == 2)
        rates = {"class": right, "tone": tone[~free], "class and tone": right & (tone | free)}
        return {name: float(rate.mean()) for name, rate in rates.items()} | {"pictures": len(told)}

    of_test = 3 * test_y[:n] + made["tones"](test_x[:n], test_y[:n], bounds)
    found["reconstruction"] |= attributes(again, of_test)
    found["floor"] = _numbers(protocol.floors(n, real)) | attributes(test_x[:n], of_test)
    for scale in size.guidance:
        pictures = make_pictures(
            make_draw(experiment, guidance=scale), make_mesh(1), at_a_time(experiment), experiment.decode
        )
        begin = time.perf_counter()
        samples = _drawn(pictures, params, chosen, 0)
        seconds = (time.perf_counter() - begin) / n
        drawn = _drawn(pictures, params, asked, 1)
        numbers = _numbers(protocol.measure(samples, chosen // 3, real))
        found[f"guidance {scale}"] = numbers | attributes(drawn, asked) | {"seconds a sample": seconds}
        order = drawn.reshape(10, 3, size.each, 28, 28, 1)[:, :, :2].reshape(-1, 28, 28, 1)
        save_picture(out / f"samples-{scale}.png", grid(order, 12, 2))
    save_picture(out / "reconstructions.png", grid(np.stack([test_x[:20], again[:20]]).reshape(-1, 28, 28, 1), 20, 2))
    return found


def _drawn(pictures: Any, params: Any, captions: Any, seed: int) -> Any:
    """A picture for each number of a caption."""
    import numpy as np

    return np.concatenate(list(pictures(params, len(captions), seed, captions.astype(np.int32))))


def _real(out: Path, train_x: Any, train_y: Any, test_x: Any, test_y: Any) -> Any:
    from diffusion_jax.evaluation import fashion_mnist as protocol

    file = out / "real.npz"
    if not file.is_file():
        sets = ({"image": train_x, "label": train_y}, {"image": test_x, "label": test_y})
        protocol.write_real(file, protocol.real(*sets))
    return protocol.read_real(file)


def _numbers(results: list[Any]) -> dict[str, float]:
    return {result.metric: result.value for result in results}


def report(out: Path, size: str, seconds: dict[str, float], found: dict[str, Any]) -> str:
    """The page."""
    import jax

    metrics = ("fd", "kd", "c2st", "copy", "authenticity", "class", "tone", "class and tone")
    named = {"floor": "real held-out pictures", "reconstruction": "reconstructions of held-out pictures"}
    order = [name for name in found if name.startswith("guidance")] + ["reconstruction", "floor"]
    cells = {name: [f"{found[name][metric]:.4g}" for metric in metrics] for name in order}
    rows = [" | ".join([f"| {named.get(name, name)}", *cells[name], ""]).rstrip() for name in order]
    off = found["reconstruction"]["mean absolute error of a pixel"]
    lines = [
        "# Latent diffusion on Fashion-MNIST", "",
        f"`python benchmarks/latent_diffusion.py --size {size}` on {jax.devices()[0].device_kind}: "
        f"autoencoder {seconds['autoencoder'] / 60:.1f} min, U-Net {seconds['ldm'] / 60:.1f} min of training.", "",
        "| | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics), *rows, "",
        f"A pixel of a reconstruction is off by {100 * off:.2f} % of the range.", "",
        "Class: the share that the protocol's classifier takes for the class of its caption. Tone: of those whose "
        "caption names one, the share that is darker, or brighter, than the median of its class. Class and tone: both, "
        f"where no tone is named the class alone; of {found[order[0]]['pictures']} samples of the 30 captions.", "",
        *(line for name in order[:-2] for line in (
            f"![Two samples of each caption: dark, as it comes, bright; {name}](samples-{name.split()[1]}.png)", "")),
        "![Held-out pictures above what comes back of them](reconstructions.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", default="", help="folder of everything; by default runs/latent-SIZE")
    parser.add_argument("--data-dir", default="", help="where tensorflow-datasets keeps its data")
    given = parser.parse_args(words)
    out = Path(given.out or ROOT / "runs" / f"latent-{given.size}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    seconds = train(out, SIZES[given.size], given.data_dir)
    found = measured(out, SIZES[given.size])
    (out / "results.json").write_text(json.dumps({"seconds": seconds, **found}, indent=2) + "\n")
    (out / "README.md").write_text(report(out, given.size, seconds, found))
    print(json.dumps({"seconds": seconds, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
