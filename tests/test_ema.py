"""Averages: recursions, closed forms, power functions against their integral, reconstructed against tracked ones."""

import itertools
import zipfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from diffusion_jax.training import ema
from diffusion_jax.training.draw import draw_to_folder
from diffusion_jax.training.loop import fit
from diffusion_jax.training.snapshots import keep_until, reconstruct, save_snapshots, snapshots
from diffusion_jax.training.state import TrainState, init_state
from diffusion_jax.training.step import make_train_step
from diffusion_jax.typing import InputError, Net

# Decays --------------------------------------------------------------------------------------------------------------


def averaged(decay, values):
    """The average by the closed form sum: weights (1 - d_i) prod of later d, in float64."""
    d = [float(decay(jnp.int32(i))) for i in range(len(values))]
    out = values[0] * 0 + 1.0  # the start
    for d_i, value in zip(d, values, strict=True):
        out = d_i * out + (1 - d_i) * value
    return out


@pytest.mark.parametrize(
    "decay",
    [ema.constant(0.9), ema.warmup(0.95), ema.half_life(100, 10), ema.half_life(5, 2, None), ema.power_function(0.1)],
)
def test_averages_follow_their_recursion(decay):
    values = np.random.default_rng(0).normal(size=30)
    average = jnp.ones(())
    for i, value in enumerate(values):
        average = ema.update(average, jnp.float32(value), decay(jnp.int32(i)))
    assert float(average) == pytest.approx(averaged(decay, values), rel=1e-5, abs=1e-6)


def test_decays_in_closed_form():
    steps = [0, 1, 10, 89, 890, 100_000]
    assert [float(ema.constant(0.9999)(jnp.int32(s))) for s in steps] == pytest.approx([0.9999] * 6)
    warm = [min(0.99, (1 + s) / (10 + s)) for s in steps]
    assert [float(ema.warmup(0.99)(jnp.int32(s))) for s in steps] == pytest.approx(warm)
    life = [0.5 ** (10 / max(min(500, 0.05 * 10 * s), 1e-8)) for s in steps]
    assert [float(ema.half_life(500, 10)(jnp.int32(s))) for s in steps] == pytest.approx(life)
    # A step's share has halved after exactly that many examples.
    assert float(ema.half_life(500, 10, None)(jnp.int32(0))) ** 50 == pytest.approx(0.5, rel=1e-5)


# Power functions -----------------------------------------------------------------------------------------------------


def exact(theta, sigma_rel, n=None):
    """The integral (1) of a path [steps, ...] that is constant over each update, in float64."""
    n = len(theta) if n is None else n
    g, i = ema.exponent(sigma_rel), np.arange(1, n + 1)
    return np.tensordot((i / n) ** (g + 1) - ((i - 1) / n) ** (g + 1), theta[:n], 1)


def walk(steps=4096, size=64):
    return np.cumsum(np.random.default_rng(0).normal(size=(steps, size)), 0) / np.sqrt(steps)


def test_exponents_and_widths():
    # The pair of the paper, section 3.2: 0.05 and 0.10 are gamma = 16.97 and 6.94.
    assert [round(ema.exponent(s), 2) for s in (0.05, 0.10)] == [16.97, 6.94]
    for sigma_rel in (0.01, 0.02, 0.15, 0.25, 0.288):
        gamma = ema.exponent(sigma_rel)
        assert ema.width(gamma) == pytest.approx(sigma_rel, rel=1e-9)
        tau = (np.arange(200_000) + 0.5) / 200_000
        p = (gamma + 1) * tau**gamma / len(tau)
        assert np.sqrt(p @ tau**2 - (p @ tau) ** 2) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, 1.0])
def test_widths_that_no_power_function_has_are_refused(sigma_rel):
    with pytest.raises(InputError, match="between 0 and 0.288"):
        ema.power_function(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25])
def test_the_recursion_is_the_integral(sigma_rel):
    theta = walk(1000)

    def step(average, row):
        i, value = row
        return ema.update(average, value, ema.power_function(sigma_rel)(i)), None

    rows = jnp.arange(1000), jnp.asarray(theta, jnp.float32)
    average, _ = jax.jit(lambda start: jax.lax.scan(step, start, rows))(jnp.full((64,), 99.0))  # the start is forgotten
    np.testing.assert_allclose(average, exact(theta, sigma_rel), rtol=1e-4, atol=1e-5)


def test_the_decay_keeps_its_digits_in_long_runs():
    for n in (10**4, 10**6):
        exactly = (n / (n + 1)) ** (ema.exponent(0.05) + 1)
        assert 1 - float(ema.power_function(0.05)(jnp.int32(n))) == pytest.approx(1 - exactly, abs=6.1e-8)


# Reconstruction ------------------------------------------------------------------------------------------------------


def stored(count, steps=4096, tracked=(0.05, 0.10)):
    times = np.repeat(np.arange(1, count + 1) * steps // count, len(tracked))
    return list(times), list(np.tile(tracked, count))


@pytest.mark.parametrize("target", [0.03, 0.075, 0.15, 0.2])
def test_any_width_is_reconstructed_the_better_the_more_snapshots(target):
    theta, errors, promised = walk(), [], []
    for count in (8, 16, 32, 64):
        times, widths = stored(count)
        weights, error = ema.reconstruction(times, widths, 4096, target)
        assert weights.dtype == np.float64
        assert weights.sum() == pytest.approx(1, abs=1e-10)
        made = weights @ np.stack([exact(theta, w, n) for n, w in zip(times, widths, strict=True)])
        errors.append(np.sqrt(np.mean((made - exact(theta, target)) ** 2)))
        promised.append(error)
    # The profile's error falls with the square of the interval; that of the average of a random walk falls faster.
    assert all(a > 3 * b for a, b in itertools.pairwise(errors))
    assert all(a > 2.5 * b for a, b in itertools.pairwise(promised))
    assert errors[-1] < 1e-4 * np.std(theta[-1])


def test_a_tracked_width_is_found_as_it_is():
    times, widths = stored(16)
    weights, error = ema.reconstruction(times, widths, 4096, 0.10)
    np.testing.assert_allclose(weights, np.eye(32)[31], atol=1e-6)
    assert error < 1e-6


def test_the_weights_are_those_of_least_squares():
    """No weights that sum to 1 come closer, and the promised error is that of the profiles by quadrature."""
    times, widths = stored(6, 60)
    weights, error = ema.reconstruction(times, widths, 60, 0.15)
    tau = (np.arange(12_000) + 0.5) / 200

    def profile(t, sigma_rel):
        g = ema.exponent(sigma_rel)
        return np.where(tau <= t, (g + 1) * tau**g / t ** (g + 1), 0)

    basis, wanted = np.stack([profile(t, w) for t, w in zip(times, widths, strict=True)]), profile(60, 0.15)

    def distance(x):
        return np.linalg.norm(x @ basis - wanted) / np.linalg.norm(wanted)

    assert distance(weights) == pytest.approx(error, rel=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(200):
        away = rng.normal(size=12) * 10.0 ** rng.uniform(-4, 0)
        assert distance(weights + away - away.mean()) > distance(weights)


def test_a_target_before_the_end_of_training():
    theta, (times, widths) = walk(), stored(32)
    used = [(t, w) for t, w in zip(times, widths, strict=True) if t <= 2048]
    weights, _ = ema.reconstruction(*zip(*used, strict=True), 2048, 0.08)
    made = weights @ np.stack([exact(theta, w, t) for t, w in used])
    np.testing.assert_allclose(made, exact(theta, 0.08, 2048), atol=1e-3)


# In a run ------------------------------------------------------------------------------------------------------------

WIDTHS = (0.05, 0.10, 0.075)
NET = Net(
    lambda key: {"a": {"0": {"kernel": jax.random.normal(key, (5, 3))}}, "b": jnp.zeros((3,))},
    lambda params, x, t, cond=None, *, key=None: x @ params["a"]["0"]["kernel"] + params["b"][None],
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A regression with noisy gradients that tracks three widths and keeps two of them: (folder, last state)."""
    folder = tmp_path_factory.mktemp("run") / "averages"
    optimizer, tracked = optax.sgd(0.05), tuple(map(ema.power_function, WIDTHS))

    def loss(params, batch, key):
        noise = jax.random.normal(key, (5, 3))
        return jnp.mean(jnp.square(NET.apply(params, batch["x"], None) - 1)) + jnp.vdot(
            noise, params["a"]["0"]["kernel"]
        )

    step = jax.jit(make_train_step(loss, optimizer, tracked))
    state = init_state(jax.random.key(0), NET, optimizer, averages=3)
    batch = {"x": jax.random.normal(jax.random.key(1), (16, 5))}
    for i in range(1, 321):
        state, _ = step(state, batch)
        if i % 10 == 0:
            save_snapshots(folder, state._replace(averages=state.averages[:2]), tracked[:2])
    return folder, state


def distance(a, b):
    return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_several_averages_are_kept_and_the_first_is_evaluated(trained):
    _, state = trained
    assert state.ema is state.averages[0]
    assert len({float(average["b"][0]) for average in state.averages}) == 3


def test_an_untracked_average_is_made_of_snapshots(trained):
    folder, state = trained
    params, error, step = reconstruct(folder, 0.075)
    assert step == 320
    assert error < 0.002
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    apart = distance(state.averages[0], state.averages[2])
    assert apart > 0.01
    assert distance(params, state.averages[2]) < 0.02 * apart


def test_a_tracked_average_comes_back_to_half_precision(trained):
    folder, state = trained
    params, _, _ = reconstruct(folder, 0.05)
    assert distance(params, state.averages[0]) < 2e-3 * distance(state.averages[0], jax.tree.map(np.zeros_like, params))


def test_small_arrays_stay_exact_and_large_ones_are_halved(tmp_path):
    average = {"phases": jnp.linspace(0, 1, 7), "kernel": jnp.linspace(0, 1, 4096)}
    state = TrainState(jnp.int32(10), average, (average,), (), jax.random.key(0))
    save_snapshots(tmp_path, state, ema.power_function(0.1))
    with np.load(tmp_path / "0000010-0.1.npz") as kept:
        assert kept["phases"].dtype == np.float32
        np.testing.assert_array_equal(kept["phases"], average["phases"])
        assert kept["kernel"].dtype == np.float16


def test_an_earlier_step_uses_only_what_was_there(trained):
    folder, _ = trained
    params, _, step = reconstruct(folder, 0.05, step=160)
    with np.load(folder / "0000160-0.05.npz") as file:
        np.testing.assert_allclose(params["a"]["0"]["kernel"], file["a.0.kernel"], atol=1e-3)
    assert step == 160


def test_snapshots_of_steps_to_be_made_again_are_removed(trained, tmp_path):
    _, state = trained
    for i in (10, 20, 30):
        save_snapshots(tmp_path, state._replace(step=jnp.int32(i)), tuple(map(ema.power_function, WIDTHS)))
    keep_until(tmp_path, 20)
    assert [(s.step, s.sigma_rel) for s in snapshots(tmp_path)] == [
        (step, width) for step in (10, 20) for width in sorted(WIDTHS)
    ]
    assert not list(tmp_path.glob("*.partial"))


def test_only_power_functions_are_kept(trained, tmp_path):
    save_snapshots(tmp_path, trained[1], (ema.constant(), ema.power_function(0.1), ema.warmup()))
    assert [s.path.name for s in snapshots(tmp_path)] == ["0000320-0.1.npz"]


def test_missing_and_damaged_snapshots_are_named(trained, tmp_path):
    with pytest.raises(InputError, match="no snapshots in .*train with snapshot_every="):
        reconstruct(tmp_path, 0.1)
    save_snapshots(tmp_path, trained[1], tuple(map(ema.power_function, WIDTHS)))
    path = tmp_path / "0000320-0.1.npz"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("a.0.kernel.npy").header_offset
    content = bytearray(path.read_bytes())
    content[start + 190] ^= 1  # a bit of a number
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"0000320-0.1.npz cannot be read \(.*CRC"):
        reconstruct(tmp_path, 0.1)


def test_one_average_for_each_decay():
    state = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, (), (), jax.random.key(0))
    step = make_train_step(lambda p, b, k: jnp.sum(p["w"]), optax.identity(), ema.constant())
    with pytest.raises(ValueError):
        step(state, {})


# From the loop to drawing --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that keeps snapshots, stopped half way and continued: (experiment, folder)."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    decays = ema.power_function(0.05), ema.power_function(0.10)
    experiment = replace(toy.experiment(checkpoint_every=10, dispatch=3), ema=decays, snapshot_every=4)
    fit(replace(experiment, steps=10), folder, {})
    assert sorted({s.step for s in snapshots(folder / "averages")}) == [4, 8, 10]
    fit(experiment, folder, {})
    return experiment, folder


@pytest.mark.slow
def test_the_loop_keeps_snapshots_and_the_last_state(finished):
    _, folder = finished
    assert sorted({s.step for s in snapshots(folder / "averages")}) == [4, 8, 10, 12, 16, 20]
    assert {s.sigma_rel for s in snapshots(folder / "averages")} == {0.05, 0.1}


@pytest.mark.slow
def test_averages_of_a_continued_run_are_those_of_an_uninterrupted_one(finished, tmp_path):
    experiment, folder = finished
    fit(experiment, tmp_path, {})
    for one in snapshots(tmp_path / "averages"):
        with np.load(one.path) as wanted, np.load(folder / "averages" / one.path.name) as got:
            assert sorted(wanted) == sorted(got)
            for name in wanted:
                np.testing.assert_array_equal(got[name], wanted[name])


@pytest.mark.slow
def test_drawing_takes_a_reconstructed_average(finished):
    experiment, folder = finished
    options = {
        "n": 4, "seed": 0, "sampler": "default", "steps": None, "guidance": None, "label": None, "format": "npz",
        "out": "", "devices": None,
    }  # fmt: skip
    drawn = {}
    for sigma_rel in (None, 0.05, 0.15):
        said = draw_to_folder(experiment, folder, {**options, "checkpoint": "newest", "ema": sigma_rel})
        name = "drawn-step=20-seed=0" + (f"-ema={sigma_rel}" if sigma_rel else "")
        assert name in said
        drawn[sigma_rel] = np.load(folder / name / "images.npz")["images"].astype(int)
    # The tracked one comes back but for half precision; another one is another.
    assert np.max(np.abs(drawn[0.05] - drawn[None])) <= 2
    assert np.max(np.abs(drawn[0.15] - drawn[None])) > 2
    with pytest.raises(InputError, match="checkpoint=best: for ema=0.05 give a step"):
        draw_to_folder(experiment, folder, {**options, "checkpoint": "best", "ema": 0.05})
    with pytest.raises(InputError, match="no snapshots in .* until step 3"):
        draw_to_folder(experiment, folder, {**options, "checkpoint": "3", "ema": 0.05})


def test_snapshots_need_power_functions():
    with pytest.raises(InputError, match="snapshot_every: only averages by ema.power_function"):
        replace(toy.experiment(), snapshot_every=5)
