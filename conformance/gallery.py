"""Pictures of the same exact problems: one function a picture, (folder) -> caption, and paths of each sampler."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from PIL import Image

import diffusion_jax as dj
from conformance.posterior import exact_posterior
from conformance.samplers import LEVEL, TESTS, TOLERANCES, exact, grid, quantile
from conformance.table import PROBLEMS, SAMPLERS
from diffusion_jax import guidance, inverse, operators, schedules
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture
from diffusion_jax.typing import Array, Denoiser, Schedule

INK, FLOW, RANDOM, EXACT = "#22303c", "#1f6fb2", "#d1495b", "#2a9d5c"
CLEAN = schedules.edm()  # x_t is x0 at t = 0
ORDERS = {1: "#8d99ae", 2: "#1f6fb2", 3: "#2a9d5c", 4: "#d1495b"}
STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.edgecolor": "#8d99ae",
    "axes.linewidth": 0.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "legend.frameon": False,
}


def ring() -> Mixture:
    """Eight components on a circle, in turns narrow and wide."""
    angles = np.arange(8) * np.pi / 4
    means = 1.8 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return Mixture(np.full(8, 1 / 8), means, np.repeat(np.tile([0.02, 0.06], 4)[:, None], 2, axis=1))


def propeller() -> Mixture:
    """Three long components that overlap in the middle: three classes."""
    angles = np.pi / 2 + np.arange(3) * 2 * np.pi / 3
    axes = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    basis = np.stack([np.stack([a, [-a[1], a[0]]], axis=1) for a in axes])
    return Mixture(np.full(3, 1 / 3), 1.0 * axes, np.tile([0.5, 0.05], (3, 1)), basis)


# --- drawing ----------------------------------------------------------------------------------------------------------


def save(figure: Any, folder: Path, name: str) -> None:
    """A PNG with a palette of 256 colours, which keeps it small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(256).save(folder / name, optimize=True)


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False, **options)
    return figure, np.ravel(axes)


def square(axis: Any, limit: float, title: str = "", up: float = 0.0) -> None:
    axis.set(xlim=(-limit, limit), ylim=(up - limit, up + limit), xticks=[], yticks=[], aspect="equal", title=title)
    axis.spines[["top", "right"]].set_visible(True)


def lattice(limit: float, n: int, up: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """n by n points f[n n 2], and as a batch f[n^2 2]."""
    line = np.linspace(-limit, limit, n)
    points = np.stack(np.meshgrid(line, line + up), axis=-1)
    return points, points.reshape(-1, 2)


@functools.partial(jax.jit, static_argnums=1)
def log_density(law: Mixture, schedule: Schedule, x: Array, t: Array) -> Array:
    return mixtures.log_density(law, schedule, x, jnp.broadcast_to(t, x.shape[:1]))


def contours(
    axis: Any, law: Mixture, limit: float, colour: str = "#5b6b7a", alpha: float = 0.35, up: float = 0
) -> None:
    """The density of x0 by four lines, 0.7 to 6 nats below its top."""
    points, batch = lattice(limit, 121, up)
    value = np.asarray(log_density(law, CLEAN, batch, np.float64(0.0))).reshape(121, 121)
    levels = value.max() - np.array([6.0, 4.0, 2.0, 0.7])
    lines = {"linewidths": 0.6, "linestyles": "solid"}
    axis.contour(points[..., 0], points[..., 1], value, levels, colors=colour, alpha=alpha, **lines)


# --- pictures ---------------------------------------------------------------------------------------------------------


def path(name: str, steps: int = 8) -> np.ndarray:
    """Paths f32[steps + 1, n, 2] of one sampler from noise to the ring."""
    problem, law = PROBLEMS["vp_linear"], ring()
    x = np.random.default_rng(3).standard_normal((16, 2))
    sampler = SAMPLERS[name].make(problem, dj.white)

    @jax.jit
    def go(x: Array, times: Array) -> Array:
        denoiser = exact(law, problem.schedule)
        return dj.sample(jax.random.key(1), sampler, denoiser, x, times, trajectory=True)

    return np.asarray(go(np.float32(x), np.float32(grid("vp_linear", steps))))


def trajectories(folder: Path, paths: dict[str, np.ndarray]) -> str:
    columns, limit, ends = 9, 2.7, path("heun", 500)[-1]
    figure, axes = panels(-(-len(paths) // columns), columns, 1.3, 1.46)
    for axis in axes[len(paths) :]:
        axis.axis("off")
    for axis, (name, points) in zip(axes, paths.items(), strict=False):
        random = SAMPLERS[name].random
        colour, shown = (RANDOM, 5) if random else (FLOW, len(ends))
        contours(axis, ring(), limit)
        axis.plot(points[:, :shown, 0], points[:, :shown, 1], color=colour, lw=0.6, alpha=0.6)
        axis.scatter(*points[-1].T, s=6, color=colour, linewidths=0, zorder=3)
        if not random:
            axis.scatter(*ends.T, s=14, facecolors="none", edgecolors=EXACT, linewidths=0.7, zorder=2)
        square(axis, limit)
        axis.set_title(name, fontsize=7.5, pad=2)
    save(figure, folder, "trajectories.png")
    return (
        "Sixteen examples from noise to data (dots) by each sampler in only eight steps, with the exact denoiser of a "
        "ring of eight Gaussians (grey) on the VP schedule. Blue follows the probability flow, whose exact ends are "
        "the green circles; red adds noise, and the paths of five examples are drawn."
    )


def score_field(folder: Path) -> str:
    schedule, law, limit = schedules.vp_linear(), ring(), 2.8
    figure, axes = panels(1, 4, 2.7, 3.05)
    points, batch = lattice(limit, 121)
    coarse, few = lattice(2.55, 16)
    field = jax.jit(lambda x, t: mixtures.score(law, schedule, x, jnp.broadcast_to(t, x.shape[:1])))
    colours = ListedColormap(plt.get_cmap("Blues")(np.linspace(0, 0.62, 64)))
    for axis, t in zip(axes, (0.5, 0.25, 0.14, 0.07), strict=True):
        value = np.asarray(log_density(law, schedule, batch, np.float64(t))).reshape(121, 121)
        levels = value.max() - np.arange(10.0)[::-1]
        axis.contourf(points[..., 0], points[..., 1], value, levels, cmap=colours, extend="min")
        arrows = np.asarray(field(few, np.float64(t))).reshape(coarse.shape)
        length = np.linalg.norm(arrows, axis=-1, keepdims=True)
        arrows = 0.34 * arrows / length * np.sqrt(length / length.max())
        ends = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
        axis.quiver(*coarse.T, *arrows.T, color=RANDOM, **ends)
        alpha, sigma = (float(c) for c in schedule(jnp.asarray(t)))
        square(axis, limit, f"t = {t:g}: alpha {alpha:.2f}, sigma {sigma:.2f}")
    save(figure, folder, "score_field.png")
    return (
        "The score of the noised ring over its log density, one nat a shade, from much noise to little. An arrow's "
        "length is the square root of the score's, in units of the longest of its panel."
    )


FAMILIES: dict[str, tuple[Schedule, float]] = {
    "vp_linear": (schedules.vp_linear(), 1.0),
    "sub_vp": (schedules.sub_vp(), 1.0),
    "cosine": (schedules.cosine(), 1.0),
    "sigmoid": (schedules.sigmoid(), 1.0),
    "laplace": (schedules.laplace(), 1.0),
    "rectified": (schedules.rectified(), 1.0),
    "ve": (schedules.ve(0.05, 10.0), 1.0),
    "edm": (schedules.edm(), 10.0),
}


def marginals(folder: Path) -> str:
    figure, axes = panels(2, 4, 2.6, 2.1, sharey=True)
    y, p = np.linspace(-3, 3, 240), np.linspace(0.02, 0.98, 13)
    data = Mixture(np.array([0.3, 0.3, 0.4]), np.array([[-1.4], [0.2], [1.3]]), np.array([[0.03], [0.01], [0.05]]))
    for axis, (name, (schedule, top)) in zip(axes, FAMILIES.items(), strict=True):
        times = np.linspace(0.005, 0.995, 121) * top
        levels = np.stack(jax.jit(jax.vmap(schedule))(times.astype(np.float32)), axis=1)
        image, paths = [], []
        for alpha, sigma in np.asarray(levels, np.float64):
            law, scale = mixtures.marginal(data, alpha, sigma), np.hypot(alpha, sigma)
            z = (y[:, None] * scale - law.means[:, 0]) / np.sqrt(law.variances[:, 0])
            density = np.exp(-(z**2) / 2) @ (law.weights / np.sqrt(law.variances[:, 0]))
            image.append(density / density.max())
            if len(image) % 3 == 1:
                paths.append(quantile(law, p) / scale)
        axis.imshow(np.array(image).T, extent=(0, top, -3, 3), origin="lower", aspect="auto", cmap="Blues", vmax=1.2)
        axis.plot(times[::3], np.array(paths), color=RANDOM, lw=0.6, alpha=0.8)
        axis.set(title=name, xlabel="t", ylim=(-3, 3), xticks=np.array([0, 0.5, 1]) * top)
    for axis in axes[::4]:
        axis.set_ylabel(r"$x_t\,/\,\sqrt{\alpha^2 + \sigma^2}$")
    save(figure, folder, "marginals.png")
    return (
        "The law of x_t over time for a mixture of three Gaussians, each column in units of its own peak, and the "
        "exact probability flow, whose lines are quantiles."
    )


def schedule_curves(folder: Path) -> str:
    table = schedules.scaled_linear_betas(1000)
    curves = {name: schedule for name, (schedule, top) in FAMILIES.items() if top == 1.0} | {
        "trigonometric": schedules.trigonometric(),
        "scaled_linear_betas": schedules.from_betas(table),
        "zero_terminal_snr": schedules.from_betas(schedules.zero_terminal_snr(table)),
        "shifted(rectified, 3)": schedules.shifted(schedules.rectified(), 3.0),
    }
    figure, axes = panels(1, 3, 3.6, 3.3)
    t = np.linspace(0, 1, 401).astype(np.float32)
    for i, (name, schedule) in enumerate(curves.items()):
        alpha, sigma = (np.asarray(c) for c in jax.jit(schedule)(t))
        style: Any = {"color": plt.get_cmap("turbo")(0.03 + 0.94 * i / len(curves)), "lw": 1.5, "label": name}
        style["ls"] = ("-", (0, (4, 1.5)), (0, (1.2, 1)))[i % 3]
        axes[0].plot(t, alpha, **style)
        axes[1].plot(t, sigma, **style)
        with np.errstate(divide="ignore"):
            axes[2].plot(t, 2 * (np.log(alpha) - np.log(sigma)), **style)
    axes[0].set(title="alpha(t)", xlabel="t", ylim=(0, 1.05))
    axes[1].set(title="sigma(t)", xlabel="t", ylim=(0, 1.05))
    axes[2].set(title="log SNR(t)", xlabel="t", ylim=(-12, 14))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, folder, "schedules.png")
    return "Signal, noise and log signal-to-noise ratio on [0, 1]. `ve` goes on to sigma = 10; `edm` is (1, t)."


def guided(folder: Path) -> str:
    schedule, law, null, steps = schedules.cosine(), propeller(), 3, 60
    model = mixtures.conditional(jax.tree.map(jnp.asarray, law), schedule)
    worse = mixtures.conditional(jax.tree.map(jnp.asarray, law._replace(variances=law.variances + 0.3)), schedule)
    rules: dict[str, Denoiser] = {
        "conditional (scale 1)": model,
        "classifier-free, 2": guidance.classifier_free(model, null, 2.0),
        "classifier-free, 4": guidance.classifier_free(model, null, 4.0),
        "4 for 0.3 < sigma / alpha < 2": guidance.classifier_free(
            model, null, guidance.interval(schedule, 4.0, 0.3, 2.0)
        ),
        "CFG++, 0.4": guidance.cfg_pp(model, null, 0.4),
        "APG, 4": guidance.apg(model, schedule, null, 4.0, 0.0),
        "CFG rescale, 4": guidance.cfg_rescale(model, schedule, null, 4.0, 0.7),
        "autoguidance, 2": guidance.autoguidance(model, worse, 2.0),
    }
    upright = Mixture(np.ones(1), *(np.asarray(part)[:1] for part in law[1:]))
    figure, axes = panels(2, 4, 2.3, 2.45)
    x, cond = np.random.default_rng(0).standard_normal((500, 2)).astype(np.float32), jnp.zeros(500, jnp.int32)
    for axis, (name, rule) in zip(axes, rules.items(), strict=True):
        y = sampled(dj.ddim(schedule), rule, x, np.linspace(1, 0, steps + 1), cond)
        contours(axis, law, 3.0, up=0.9)
        contours(axis, upright, 3.0, EXACT, 0.9, up=0.9)
        axis.scatter(*y.T, s=3, color=FLOW, alpha=0.5, linewidths=0)
        square(axis, 3.0, name, up=0.9)
    save(figure, folder, "guidance.png")
    return (
        "Guidance towards the upright one of three classes (green: its true density; grey: all classes), DDIM, 60 "
        "steps. Scale 1 samples the class; larger scales move away from where the classes overlap and lose the "
        "spread; a limited interval and autoguidance (away from the same model with more variance) keep more of it."
    )


def sampled(sampler: dj.Sampler, denoiser: Denoiser, x: np.ndarray, times: np.ndarray, cond: Any = None) -> np.ndarray:
    go = jax.jit(lambda x, times: dj.sample(jax.random.key(0), sampler, denoiser, x, times, cond))
    return np.asarray(go(x, np.float32(times)))


def posterior(folder: Path) -> str:
    schedule, law, n, sigma_y = schedules.vp_linear(), ring(), 400, 0.25
    a, y, operator = np.diag([1.0, 0.0]), jnp.asarray([[1.45, 0.0]]), operators.masking(np.array([True, False]))
    truth, _ = exact_posterior(law, a, np.asarray(y)[0], sigma_y)
    x, times = np.random.default_rng(1).standard_normal((n, 2)).astype(np.float32), grid("vp_linear", 100)
    prior, ddpm, flow = exact(law, schedule), dj.ddpm(schedule), dj.dpmpp_2m(schedule)
    runs: dict[str, tuple[dj.Sampler, Denoiser]] = {
        "replacement": (inverse.replacement(ddpm, schedule, operator, y), prior),
        "RePaint, 5 jumps": (inverse.repaint(ddpm, schedule, y, np.array([True, False]), 5), prior),
        "DDNM": (ddpm, inverse.ddnm(prior, schedule, operator, y)),
        "DDNM+": (inverse.ddnm_plus(schedule, operator, y, sigma_y), prior),
        "DDRM": (inverse.ddrm(schedule, operator, y, sigma_y), prior),
        "DPS": (inverse.dps(ddpm, operator, y, 0.1), prior),
        "DiffPIR": (inverse.remix(schedule, 0.5), inverse.diffpir(prior, schedule, operator, y, sigma_y, 1.0)),
        "Pi-GDM": (flow, inverse.pigdm(prior, schedule, operator, y, sigma_y)),
        "TMPD": (flow, inverse.tmpd(prior, schedule, operator, y, sigma_y)),
        "MMPS": (flow, inverse.mmps(prior, schedule, operator, y, sigma_y, 1)),
    }
    points = {"exact draws": mixtures.draw(np.random.default_rng(0), truth, n)}
    points |= {name: sampled(sampler, denoiser, x, times) for name, (sampler, denoiser) in runs.items()}
    points["twisted SMC"] = particles(prior, schedule, operator, y, sigma_y, times)
    figure, axes = panels(2, 6, 1.8, 2.0)
    for axis, (name, z) in zip(axes, points.items(), strict=True):
        axis.axvspan(1.45 - sigma_y, 1.45 + sigma_y, color="#edae49", alpha=0.18, lw=0)
        contours(axis, law, 2.9)
        contours(axis, truth, 2.9, EXACT, 0.9)
        axis.scatter(*z.T, s=3, color=FLOW if name != "exact draws" else INK, alpha=0.5, linewidths=0)
        square(axis, 2.9, name)
    save(figure, folder, "posterior.png")
    return (
        "Samples of the ring given a noisy measurement of the horizontal coordinate (yellow: one standard deviation). "
        "Green: the true posterior. Only exact draws and, with many particles, twisted SMC have its law; the table has "
        "the distances in 64 dimensions."
    )


def particles(prior: Denoiser, schedule: Schedule, operator: Any, y: Array, sigma_y: float, times: np.ndarray) -> Any:
    """400 of 4,000 particles."""
    twist = inverse.gaussian_twist(schedule, operator, y, sigma_y, measurements=1)

    @jax.jit
    def go(key: Array, x: Array, times: Array) -> Array:
        swarm = inverse.twisted_smc(jax.random.fold_in(key, 1), prior, schedule, twist, x, times)
        pick = inverse.systematic_resampling(jax.random.fold_in(key, 2), swarm.log_weights)
        return swarm.x[jax.random.permutation(jax.random.fold_in(key, 3), pick)[:400]]

    x = np.random.default_rng(2).standard_normal((4000, 2)).astype(np.float32)
    return np.asarray(go(jax.random.key(0), x, np.float32(times)))


# --- pictures of the measures -----------------------------------------------------------------------------------------


def convergence(folder: Path, rows: list[dict[str, Any]]) -> str:
    figure, axes = panels(1, 2, 5.4, 6.4, sharey=True)
    markers = "osD^v<>Ph*X"
    for axis, random in zip(axes, (False, True), strict=True):
        seen: dict[float, int] = {}
        for row in sorted(rows, key=lambda row: row["theory"] or 0):
            if row["random"] == random and row["theory"] and row.get("curve"):
                i = seen[row["theory"]] = seen.get(row["theory"], -1) + 1
                style = {"color": ORDERS[int(row["theory"])], "marker": markers[i % len(markers)], "label": row["name"]}
                axis.loglog(*np.array(row["curve"]).T, ms=3, lw=0.8, markevery=(i % 3, 4), alpha=0.85, **style)
        for tolerance in TOLERANCES:
            axis.axhline(tolerance, color=INK, lw=0.5, ls=":")
        axis.set(xlim=(2, 1100), ylim=(7e-4, 1.2), xlabel="evaluations of the denoiser")
        if seen:
            axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), handlelength=1.6)
    axes[0].set(title="probability flow, on a mixture", ylabel="error, in the data's standard deviation")
    axes[1].set_title("random, law on Gaussians")
    save(figure, folder, "convergence.png")
    return (
        "Error against evaluations on each sampler's own grid, until it is below 1e-3. Colours are theory's order: "
        "grey 1, blue 2, green 3, red 4."
    )


def summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The table as a picture: orders, evaluations needed, p-values, and what is missed."""
    plt.rcParams.update(STYLE)
    size, shares = (11, 0.8 + 0.185 * len(rows)), (1.2, 1.4, 1.5, 1.0)
    figure, axes = plt.subplots(1, 4, figsize=size, sharey=True, width_ratios=shares)
    for y, row in enumerate(rows):
        colour = RANDOM if row["random"] else FLOW
        if y % 2:
            for axis in axes:
                axis.axhspan(y - 0.5, y + 0.5, color="#eef2f6", lw=0)
        draw_orders(axes[0], y, row, colour)
        draw_needed(axes[1], y, row, colour)
        draw_p_values(axes[2], y, row, colour)
        text, tone = (row["misses"][0][:32], RANDOM) if row["misses"] else ("holds", EXACT)
        axes[3].text(0.02, y, text, va="center", fontsize=7, color=tone)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7.5)
    for label, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_color(RANDOM if row["random"] else FLOW)
    axes[0].set(title="order: theory |, measured", xlim=(0.5, 4.6), ylim=(len(rows) - 0.4, -0.6))
    axes[1].set(title="evaluations for 1e-2 (dot), 1e-3", xscale="log", xlim=(4, 3000))
    axes[2].set(title="p-values: 1-D hollow, 64-D full", xscale="log", xlim=(7e-4, 1.5))
    axes[2].axvspan(7e-4, LEVEL, color=RANDOM, alpha=0.12, lw=0)
    axes[3].set(title="what it claims", xlim=(0, 1), xticks=[])
    for axis in axes:
        axis.tick_params(length=0, which="both")
        axis.spines[["left", "bottom"]].set_visible(False)
    save(figure, folder, "conformance.png")


def draw_orders(axis: Any, y: int, row: dict[str, Any], colour: str) -> None:
    if row["theory"]:
        axis.plot([row["theory"]] * 2, [y - 0.38, y + 0.38], color=INK, lw=2.2, alpha=0.35, solid_capstyle="butt")
        for law, value in row.get("orders", {}).items():
            if value is not None:
                face = colour if law == "Gaussians" else "none"
                axis.scatter(np.clip(value, 0.55, 4.55), y, s=16, facecolors=face, edgecolors=colour, lw=0.9, zorder=3)


def draw_needed(axis: Any, y: int, row: dict[str, Any], colour: str) -> None:
    found = [(k, marker) for k, marker in zip(row.get("needed", {}).values(), "o^", strict=False) if k]
    axis.plot([k for k, _ in found], [y] * len(found), color=colour, lw=0.8, alpha=0.6)
    for k, marker in found:
        axis.scatter(k, y, s=15, color=colour, marker=marker, lw=0, zorder=3)


def draw_p_values(axis: Any, y: int, row: dict[str, Any], colour: str) -> None:
    for dimension, law in row.get("laws", {}).items() if row["claims_law"] else ():
        p = np.clip([law[name] for name in TESTS], 8e-4, 1)
        face = "none" if dimension == "1-D" else colour
        axis.scatter(p, [y] * len(p), s=13, facecolors=face, edgecolors=colour, lw=0.7, alpha=0.8, zorder=3)
    if not row["claims_law"]:
        axis.text(8e-4, y, "no claim", va="center", fontsize=6.5, color="#8d99ae")


PICTURES: dict[str, Callable[[Path], str]] = {
    "schedules": schedule_curves,
    "marginals": marginals,
    "score_field": score_field,
    "guidance": guided,
    "posterior": posterior,
}
TITLES = {
    "trajectories": "Every sampler",
    "convergence": "Error against evaluations",
    "schedules": "Schedules",
    "marginals": "The forward process",
    "score_field": "The score",
    "guidance": "Guidance",
    "posterior": "Posterior sampling",
}


def write(folder: Path, captions: dict[str, str]) -> None:
    """gallery.md, in the order of `TITLES`."""
    page = "# Gallery\n\nDrawn by the run that wrote the [conformance table](README.md); nothing here is trained.\n"
    for name, title in TITLES.items():
        page += f"\n## {title}\n\n![{title}]({name}.png)\n\n{captions[name]}\n"
    (folder / "gallery.md").write_text(page)
