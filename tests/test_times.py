"""Grids against the papers' formulas written out anew; draws against their distributions."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import diffusion_jax as dj
from diffusion_jax import times
from diffusion_jax.evaluation import mixtures
from diffusion_jax.times import (
    align_your_steps,
    at_levels,
    beta_quantile,
    draw_importance,
    exponential,
    init_importance,
    optimised,
    update_importance,
)

GRIDS = {
    "uniform": lambda n: dj.uniform(n),
    "quadratic": lambda n: dj.quadratic(n),
    "trailing": lambda n: dj.trailing(n, 1000),
    "leading": lambda n: dj.leading(n, 1000, 0),
    "karras": lambda n: dj.karras(n, 0.002, 80.0, 7.0),
    "logsnr_uniform": lambda n: dj.logsnr_uniform(n, dj.vp_linear(), 1.0, 1e-3),
    "beta_quantile": lambda n: beta_quantile(n),
    "exponential": lambda n: exponential(n, 0.002, 80.0),
    "align_your_steps": lambda n: align_your_steps(n, "svd"),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_grids_fall_to_zero(name, n):
    grid = GRIDS[name](n)
    assert grid.shape == (n + 1,) and grid.dtype == jnp.float32
    assert np.all(np.diff(grid) < 0)
    assert float(grid[-1]) == 0
    start = {
        "karras": 80.0,
        "exponential": 80.0,
        "align_your_steps": 700.0,
        "leading": ((n - 1) * (1000 // n) + 1) / 1000,
    }.get(name, 1.0)
    assert float(grid[0]) == pytest.approx(start, rel=1e-6)


def test_karras_equation_5():
    n, low, high, rho = 18, 0.002, 80.0, 7.0
    expected = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    np.testing.assert_allclose(dj.karras(n, low, high, rho), [*expected, 0.0], rtol=1e-6)


def test_exponential_is_uniform_in_log_snr_and_the_limit_of_karras():
    np.testing.assert_allclose(exponential(9, 0.01, 50.0)[:-1], np.geomspace(50.0, 0.01, 9), rtol=1e-6)
    np.testing.assert_allclose(exponential(9, 0.002, 80.0), dj.logsnr_uniform(9, dj.edm(), 80.0, 0.002), rtol=1e-4)
    np.testing.assert_allclose(exponential(9, 0.01, 50.0), dj.karras(9, 0.01, 50.0, 1e4), rtol=3e-3)


def test_beta_quantiles_are_quantiles():
    """Their distribution function is uniform; Beta(1, 1) is uniform, Beta(1/2, 1/2) the arcsine law."""
    for a, b in ((0.6, 0.6), (2.0, 0.7), (1.0, 3.0)):
        got = np.asarray(beta_quantile(10, a, b), np.float64)
        np.testing.assert_allclose(stats.beta(a, b).cdf(got), np.linspace(1, 0, 11), atol=1e-4)
    np.testing.assert_allclose(beta_quantile(8, 1.0, 1.0), dj.uniform(8), atol=1e-6)
    np.testing.assert_allclose(beta_quantile(8, 0.5, 0.5), np.sin(np.pi / 2 * np.linspace(1, 0, 9)) ** 2, atol=1e-6)


PUBLISHED = {  # the authors' indices of Stable Diffusion's 1000 times for their levels, without the last
    "sd15": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
    "sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_align_your_steps_levels_are_the_published_times(model):
    """The levels of table 3, in the schedule of these models, are the indices that the authors publish with them."""
    schedule = dj.from_betas(dj.scaled_linear_betas(1000))
    index = np.asarray(at_levels(schedule, align_your_steps(11, model))) * 1000 - 1
    np.testing.assert_allclose(index[:10], PUBLISHED[model], atol=1.0)


@pytest.mark.parametrize("model", times.AYS)
def test_align_your_steps_interpolates_logarithms(model):
    table = times.AYS[model]
    np.testing.assert_allclose(align_your_steps(11, model), [*table, 0], rtol=1e-6)
    twice = align_your_steps(21, model)
    np.testing.assert_allclose(twice[:-1:2], table, rtol=1e-6)
    np.testing.assert_allclose(twice[1:-1:2], np.sqrt(np.multiply(table[1:], table[:-1])), rtol=1e-6)


@pytest.mark.slow
def test_at_levels():
    """sigma / alpha has the levels there, and 0 is the clean end; on EDM they are the times."""
    levels = dj.karras(7, 0.02, 50.0)
    np.testing.assert_allclose(at_levels(dj.edm(), levels, 0.0, 80.0), levels, rtol=1e-5)
    for schedule in (dj.rectified(), dj.vp_linear(), dj.from_betas(dj.linear_betas(1000))):
        got = at_levels(schedule, levels)
        assert got.dtype == jnp.float32 and float(got[-1]) == 0
        alpha, sigma = schedule(got[:-1])
        np.testing.assert_allclose(sigma / alpha, levels[:-1], rtol=2e-3)
    with pytest.raises(ValueError, match="do not fall within"):
        at_levels(dj.ve(0.01, 5.0), levels)


def test_trailing_and_leading_indices():
    """Lin et al. 2024, table 2, for T = 1000 and S = 10; with their indices 1..T these are t / T."""
    np.testing.assert_allclose(dj.trailing(10) * 1000, [*range(1000, 0, -100), 0], atol=1e-3)
    np.testing.assert_allclose(dj.leading(10) * 1000, [*range(901, 0, -100), 0], atol=1e-3)
    np.testing.assert_allclose(dj.leading(10, offset=1) * 1000, [*range(902, 1, -100), 0], atol=1e-3)
    np.testing.assert_allclose(dj.trailing(3) * 1000, [1000, 667, 333, 0], atol=1e-3)
    np.testing.assert_allclose(dj.trailing(1000), dj.uniform(1000), atol=1e-7)


def test_quadratic_and_uniform():
    np.testing.assert_allclose(dj.quadratic(5), (np.arange(5, -1, -1) / 5) ** 2, atol=1e-7)
    np.testing.assert_allclose(dj.uniform(5, 0.9, 0.1), 0.9 - 0.16 * np.arange(6), atol=1e-6)


def test_logsnr_uniform_is_uniform():
    schedule, times = dj.vp_linear(), np.asarray(dj.logsnr_uniform(20, dj.vp_linear(), 1.0, 1e-3))[:-1]
    values = np.asarray(dj.logsnr(schedule, jnp.asarray(times)))
    np.testing.assert_allclose(np.diff(values), (values[-1] - values[0]) / 19, rtol=2e-3)
    sigmas = np.asarray(dj.logsnr_uniform(9, dj.edm(), 80.0, 0.002))[:-1]
    np.testing.assert_allclose(sigmas, np.geomspace(80.0, 0.002, 9), rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dj.uniform(0),
        lambda: dj.quadratic(-1),
        lambda: dj.karras(0),
        lambda: dj.karras(5, 0.0, 80.0),
        lambda: dj.karras(5, 2.0, 1.0),
        lambda: dj.trailing(0),
        lambda: dj.trailing(11, 10),
        lambda: dj.leading(11, 10),
        lambda: dj.leading(10, 10, offset=1),
        lambda: dj.uniform(2.5),
        lambda: dj.uniform(5, 0.0, 1.0),
        lambda: dj.uniform(5, 1.0, 1.0),
        lambda: dj.quadratic(5, 1.0, -0.1),
        lambda: dj.quadratic(5, np.nan, 0.0),
        lambda: dj.karras(5, rho=0.0),
        lambda: dj.leading(5, 10, offset=-1),
        lambda: exponential(5, 0.0, 80.0),
        lambda: exponential(5, 80.0, 0.002),
        lambda: beta_quantile(5, 0.0, 1.0),
        lambda: beta_quantile(0),
        lambda: beta_quantile(200, 3.0, 0.3),  # its first times are 1 - 1e-8
        lambda: align_your_steps(5, "sd3"),
        lambda: align_your_steps(0, "svd"),
        lambda: optimised(jax.random.key(0), None, dj.edm(), 1, jnp.ones((1, 2))),
        lambda: optimised(jax.random.key(0), None, dj.edm(), 9, jnp.ones((1, 2)), fine=8),
        lambda: optimised(jax.random.key(0), None, dj.edm(), 5, jnp.ones((1, 2)), order=3),
        lambda: optimised(jax.random.key(0), None, dj.rectified(), 5, jnp.ones((1, 2))),
        lambda: init_importance(0),
        lambda: update_importance(init_importance(4, 2), jnp.ones(3), jnp.ones(2)),
        lambda: dj.logsnr_uniform(5, dj.vp_linear(), 0.1, 0.2),
        lambda: dj.logsnr_uniform(0, dj.vp_linear()),
        lambda: dj.logsnr_uniform(5, dj.cosine(), 1.0, 1e-3),
    ],
)
def test_bad_grids(make):
    with pytest.raises(ValueError, match=r".{10}"):
        make()


DRAWS = {
    "uniform": (dj.draw_uniform(0.1, 0.9), stats.uniform(0.1, 0.8)),
    "stratified": (dj.draw_stratified(0.1, 0.9), stats.uniform(0.1, 0.8)),
    "logit_normal": (dj.draw_logit_normal(0.3, 1.2), stats.norm(0.3, 1.2)),
    "lognormal": (dj.draw_lognormal(-1.2, 1.2), stats.lognorm(1.2, scale=np.exp(-1.2))),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_their_distribution(name):
    draw, law = DRAWS[name]
    t = draw(jax.random.key(5), 4000)
    assert t.shape == (4000,) and t.dtype == jnp.float32
    values = np.asarray(t, np.float64)
    if name == "logit_normal":
        assert np.all((values > 0) & (values < 1))
        values = np.log(values / (1 - values))
    assert stats.kstest(values, law.cdf).pvalue > 0.01
    assert not np.array_equal(t, draw(jax.random.key(6), 4000))


def test_discrete_draws_are_uniform_on_the_table():
    t = np.asarray(dj.draw_discrete(10)(jax.random.key(1), 5000))
    index = np.round(t * 10).astype(int)
    np.testing.assert_allclose(t, index / 10, rtol=1e-6)
    counts = np.bincount(index, minlength=11)
    assert counts[0] == 0 and counts.size == 11
    assert stats.chisquare(counts[1:]).pvalue > 0.01


@pytest.mark.parametrize("b", [1, 7, 64])
def test_stratified_draws_have_one_in_each_cell(b):
    for seed in range(5):
        t = np.asarray(dj.draw_stratified(0.0, 1.0)(jax.random.key(seed), b), np.float64)
        assert np.all((t >= 0) & (t < 1))
        np.testing.assert_array_equal(np.sort(np.floor(t * b)), np.arange(b))


def test_each_stratified_draw_is_uniform_by_itself():
    """Any one example of the batch sees all times: over keys, not only over the batch."""
    draw = dj.draw_stratified(0.0, 1.0)
    t = jax.jit(jax.vmap(lambda key: draw(key, 8)))(jax.random.split(jax.random.key(2), 1000))
    for i in (0, 5):
        assert stats.kstest(np.asarray(t[:, i], np.float64), stats.uniform.cdf).pvalue > 0.01


# --- draws by loss ----------------------------------------------------------------------------------------------------


def test_importance_is_uniform_until_every_time_has_a_history():
    state, table = init_importance(5, 2), 5
    draw = jax.jit(draw_importance, static_argnums=2)
    for i in [1, 1, 2, 3, 3, 4, 5, 5, 4, 2]:
        t, weight = draw(jax.random.key(i), state, 8)
        np.testing.assert_array_equal(weight, np.ones(8, np.float32))
        state = update_importance(state, jnp.asarray([i / table], jnp.float32), jnp.asarray([10.0 * i]))
    assert not np.allclose(draw(jax.random.key(0), state, 8)[1], 1)
    t, weight = draw(jax.random.key(0), state._replace(losses=jnp.zeros((5, 2))), 8)
    assert np.all(np.isfinite(t)) and np.all(weight == 1), "losses that are all 0 say nothing"


def test_importance_weights_are_unbiased_and_less_noisy():
    """p ~ sqrt(E L^2), and sum_i p_i weight_i L_i is the mean of any L over the table, whatever the history."""
    table, b = 50, 40_000
    rng = np.random.default_rng(0)
    losses = rng.gamma(0.5, np.geomspace(1, 1000, table)[::-1, None], (table, 10))
    state = times.LossHistory(jnp.asarray(losses, jnp.float32), jnp.full(table, 10, jnp.int32))
    t, weight = jax.jit(draw_importance, static_argnums=2)(jax.random.key(1), state, b)
    root = np.sqrt((losses**2).mean(1))
    p = 0.999 * root / root.sum() + 0.001 / table
    i = np.round(np.asarray(t) * table).astype(int)
    assert t.dtype == jnp.float32 and i.min() >= 1 and i.max() <= table
    np.testing.assert_allclose(weight * p[i - 1], 1 / table, rtol=1e-4)
    counts = np.bincount(i - 1, minlength=table)
    rare = p * b < 20
    assert stats.chisquare([*counts[~rare], counts[rare].sum()], [*p[~rare] * b, p[rare].sum() * b]).pvalue > 0.01
    expected = root  # the loss itself, at its root mean square
    estimates = np.asarray(weight) * expected[i - 1]
    assert np.mean(estimates) == pytest.approx(expected.mean(), abs=4 * np.std(estimates) / np.sqrt(b))
    print(f"standard deviation of a draw: uniform {np.std(expected):.1f}, by loss {np.std(estimates):.1f}")
    assert np.std(estimates) < 0.05 * np.std(expected)


def test_history_keeps_the_last_losses_of_each_time():
    """Against queues, with batches in which a time comes up several times, even more often than there are places."""
    table, history = 6, 3
    queues = [collections.deque(maxlen=history) for _ in range(table)]
    state, rng, traces = init_importance(table, history), np.random.default_rng(0), []

    @jax.jit
    def update(state, t, losses):
        traces.append(t)
        return update_importance(state, t, losses)

    for _ in range(12):
        i, losses = rng.integers(0, 3 + rng.integers(0, 4), 16) % table, rng.uniform(1, 2, 16)
        state = update(state, jnp.asarray((i + 1) / table, jnp.float32), jnp.asarray(losses, jnp.float32))
        for j, loss in zip(i, losses, strict=True):
            queues[j].append(np.float32(loss))
        for row, queue in zip(np.asarray(state.losses), queues, strict=True):
            np.testing.assert_array_equal(np.sort(row), np.sort([*queue, *[0] * (history - len(queue))]))
    assert len(traces) == 1
    assert int(state.count.sum()) == 12 * 16


# --- grids for a denoiser ---------------------------------------------------------------------------------------------


def test_shortest_path_is_the_best_of_all():
    cost, index = np.random.default_rng(0).uniform(size=(8, 8, 8)), np.arange(8)
    cost[(index[:, None, None] >= index[:, None]) | (index[:, None] >= index)] = np.inf

    def total(path):
        first = first_step[path[0], path[1]]
        return first + sum(cost[i, j, k] for i, j, k in zip(path, path[1:], path[2:], strict=False))

    first_step = np.random.default_rng(1).uniform(size=(8, 8))
    cost[0, 0] = np.where(np.arange(8) > 0, first_step[0], np.inf)
    for steps in (1, 2, 4, 7):
        paths = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)]
        assert tuple(times._shortest(cost, steps)) == min(paths, key=total)


@pytest.mark.slow
def test_defects_are_those_of_the_samplers():
    """E |<a_k, e_k>|, with the steps that the samplers take and with the adjoint by finite differences."""
    law, schedule = mixtures.gaussian(np.array([0.5, -0.2]), np.array([0.3, 0.02])), dj.vp_linear()
    denoiser = mixtures.denoiser(law, schedule)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2)))
        grid = dj.logsnr_uniform(9, schedule, 1.0, 0.01)[:-1].astype("float64")
        key = jax.random.key(0)
        path = times._trajectory(key, denoiser, schedule, x, grid, None)
        at = tuple(np.asarray(a) for a in (*schedule(grid), dj.logsnr(schedule, grid) / 2))
        adjoint, states, *_ = path
        r = np.asarray(dj.normal_like(key, x))

        def denoise(x, t):
            return denoiser(x, jnp.broadcast_to(t, 5))

        def end(k, x, state):
            """<r, x0> at the end from x at time k, per example, with the sampler itself."""
            for t, s in zip(grid[k:-1], grid[k + 1 :], strict=True):
                x, state = two_m.step(key, x, state, t, s, denoise)
            return np.sum(r * np.asarray(denoiser(x, jnp.broadcast_to(grid[-1], 5)).x0), 1)

        def after(i, j):
            """The sampler's memory of a step from time i to j."""
            return two_m.step(key, jnp.asarray(states[i]), two_m.init(x), grid[i], grid[j], denoise)[1]

        two_m, k, step = dj.dpmpp_2m(schedule), 5, 1e-6
        direction = np.random.default_rng(1).standard_normal((5, 2))
        up, down = (end(k, jnp.asarray(states[k] + e * direction), after(k - 1, k)) for e in (step, -step))
        np.testing.assert_allclose(np.sum(adjoint[k] * direction, 1), (up - down) / (2 * step), rtol=1e-6)

        for second, sampler in ((False, dj.ddim(schedule)), (True, two_m)):
            cost = times._defects(at, path, second)
            for i, j, k in ((0, 0, 3), (0, 2, 4), (1, 4, 8)):
                state = after(i, j) if second and i < j else sampler.init(x)
                y, _ = sampler.step(
                    key,
                    jnp.asarray(states[j]),
                    state,
                    grid[j],
                    grid[k],
                    lambda x, t: denoiser(x, jnp.broadcast_to(t, 5)),
                )
                expected = np.mean(np.abs(np.sum(adjoint[k] * (states[k] - np.asarray(y)), 1)))
                assert cost[i, j, k] == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "order", "n", "rivals"),
    [
        ("vp_linear", 1, 10, {"logsnr": 15, "karras": 18}),
        ("edm", 1, 10, {"logsnr": 15, "karras": 16}),
        ("vp_linear", 2, 10, {"logsnr": 13, "karras": 20}),
        ("edm", 2, 10, {"logsnr": 12, "karras": 20}),
    ],
)
def test_optimised_needs_fewer_steps(problem, order, n, rivals):
    """A 64-D mixture: the median distance from the exact flow's end, on new draws, against grids with more steps.

    The median: with any grid a few examples cross to the other component, and a mean says how many these are.
    """
    rng = np.random.default_rng(1)
    means, variances = rng.standard_normal((2, 64)), np.exp(rng.uniform(np.log(1e-3), np.log(0.3), (2, 64)))
    law = mixtures.Mixture(np.ones(2) / 2, 0.3 * means / np.sqrt(np.mean(means**2)), variances)
    schedule, start, end = (dj.vp_linear(), 1.0, 1e-3) if problem == "vp_linear" else (dj.edm(), 80.0, 0.002)
    denoiser = mixtures.denoiser(law, schedule)
    at_start = mixtures.marginal(law, *(float(c) for c in schedule(jnp.float32(start))))
    x, seen = (
        jnp.asarray(mixtures.draw(np.random.default_rng(seed), at_start, b), jnp.float32)
        for seed, b in ((5, 500), (6, 64))
    )
    grid = optimised(jax.random.key(1), denoiser, schedule, n, seen, start=start, end=end, order=order)
    assert grid.shape == (n + 1,) and grid.dtype == jnp.float32 and np.all(np.diff(grid) < 0)
    np.testing.assert_array_equal(grid[jnp.asarray([0, -2, -1])], np.asarray([start, end, 0], np.float32))
    levels = [float(s / a) for a, s in (schedule(jnp.float32(t)) for t in (end, start))]

    def karras(m):
        return at_levels(schedule, dj.karras(m, *levels), 0.0, start)

    grids = {
        "optimised": grid,
        "exact": dj.logsnr_uniform(400, schedule, start, end),
        "logsnr": dj.logsnr_uniform(rivals["logsnr"], schedule, start, end),
        "karras": karras(rivals["karras"]).at[0].set(start),
    }
    sampler = dj.ddim(schedule) if order == 1 else dj.dpmpp_2m(schedule)
    best = dj.dpmpp_2m(schedule)
    go = jax.jit(lambda x, t, i: dj.sample(jax.random.key(0), (sampler, best)[i], denoiser, x, t), static_argnums=2)
    ends = {name: np.asarray(go(x, t, int(name == "exact"))) for name, t in grids.items()}
    errors = {name: float(np.median(np.sqrt(np.mean((y - ends["exact"]) ** 2, axis=1)))) for name, y in ends.items()}
    print(problem, "ddim" if order == 1 else "dpmpp_2m", n, rivals, {k: f"{v:.4f}" for k, v in errors.items()})
    assert 0 < errors["optimised"] < min(errors["logsnr"], errors["karras"])
