"""The contracts of every sampler of `conformance/table.py`, its order and its law; and the driver."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import D, check_law, exact_denoiser, flow_errors, law_at, law_errors, measured_order, mixture, run_law

import diffusion_jax as dj
from conformance.table import PROBLEMS, SAMPLERS
from diffusion_jax.evaluation import mixtures
from diffusion_jax.samplers.driver import ravelled


def counted(sampler, log):
    """Append to `log`, for each evaluation that runs, the number of the step that it belongs to."""

    def step(key, x, state, t, s, denoise):
        inner, i = state

        def watched(x, t):
            jax.debug.callback(lambda i: log.append(int(i)), i)
            return denoise(x, t)

        x, inner = sampler.step(key, x, inner, t, s, watched)
        return x, (inner, i + 1)

    return dj.Sampler(lambda x: (sampler.init(x), jnp.zeros((), jnp.int32)), step)


@pytest.mark.parametrize("name", SAMPLERS)
def test_contracts_and_law(name):
    """From a time without signal to one without noise, by v-prediction, one key per example, all in one compilation.

    A mixture in 16 dimensions, n = 2000. An example fills whole vector registers: of a loop's remainder XLA's CPU
    compiler rounds the last bit differently.
    """
    entry, log, traces = SAMPLERS[name], [], []
    problem, law = PROBLEMS[entry.ends], mixture()
    schedule = problem.schedule
    truth = mixtures.denoiser(law, schedule)

    def net(x, t, cond):
        traces.append(x.shape)
        v = dj.to_v(schedule, truth(x, t), t)
        return jnp.concatenate([v, jnp.zeros_like(v)], axis=-1)

    denoiser = dj.parameterize(net, schedule, "v", learned_variance=True)
    sampler = counted(entry.make(problem, dj.white), log)
    go = jax.jit(lambda keys, x, times: dj.sample(keys, sampler, denoiser, x, times, trajectory=True))

    n = 60 if (entry.order or 1) > 1 else 200
    times = jnp.asarray(np.linspace(problem.top, 0, n + 1), jnp.float32)
    keys, others = jax.random.split(jax.random.key(0), (2, 2000))
    x = jnp.asarray(mixtures.draw(np.random.default_rng(0), law_at(law, schedule, problem.top), 2000), jnp.float32)
    path = np.asarray(go(keys, x, times))
    jax.effects_barrier()
    assert path.shape == (n + 1, 2000, D) and np.all(np.isfinite(path))
    np.testing.assert_array_equal(path[0], x)
    assert entry.evaluations in (None, collections.Counter(log)[n - 2]), "evaluations of the last step but one"
    if entry.law:
        check_law(path[-1], law_at(law, schedule, 0.0))

    traced = len(traces)
    moved = np.asarray(go(keys, x, times * (0.5 + 0.5 * times / times[0])))[-1]
    mixed = np.asarray(go(jnp.concatenate([keys[3:], others[:3]]), jnp.roll(x, -3, axis=0), times))[-1]
    assert len(traces) == traced, "traced again for other keys, times or examples"
    assert not np.array_equal(moved, path[-1])
    if entry.independent:
        np.testing.assert_array_equal(mixed[:-3], path[-1][3:])
        assert np.array_equal(mixed[-3:], path[-1][:3]) != entry.random
    else:
        np.testing.assert_allclose(mixed, np.roll(path[-1], -3, axis=0), atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm_small", "heun", "dpmpp_2m_sde"])
def test_a_grid_filled_up_with_its_last_time_is_the_shorter_one(name):
    """To the bit, without an evaluation more, in one program for all lengths; also where it ends above 0."""
    problem, log = PROBLEMS["cosine"], []
    sampler, denoiser = SAMPLERS[name].make(problem, dj.white), exact_denoiser(mixture(), problem.schedule)

    def watched(x, t, cond):
        jax.debug.callback(lambda: log.append(1))
        return denoiser(x, t, cond)

    go = jax.jit(lambda times: dj.sample(jax.random.key(0), dj.skipping(sampler), watched, x, times))
    x = jax.random.normal(jax.random.key(1), (4, D))
    for end in (0.0, 0.1):
        times = jnp.linspace(1, end, 6)
        go(times)
        log.clear()
        plain = go(times)
        jax.effects_barrier()
        evaluations = len(log)
        filled = jnp.concatenate([times[2:], jnp.full((2,), end)])
        shorter = jax.jit(lambda t: dj.sample(jax.random.key(0), sampler, denoiser, x, t))(times[2:])
        log.clear()
        np.testing.assert_array_equal(go(filled), shorter)
        jax.effects_barrier()
        assert len(log) == evaluations * 3 // 5 or (name == "heun" and len(log) == evaluations - 4)
        assert not np.array_equal(plain, shorter)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddim", "ddpm_small", "restart_heun"])
def test_an_example_depends_neither_on_the_size_of_its_batch_nor_on_its_place(name):
    problem = PROBLEMS["cosine"]
    sampler, denoiser = SAMPLERS[name].make(problem, dj.white), exact_denoiser(mixture(), problem.schedule)
    go = jax.jit(lambda keys, x, times: dj.sample(keys, sampler, denoiser, x, times))
    keys, times = jax.random.split(jax.random.key(0), 4), jnp.linspace(1, 0, 6)
    x = jax.random.normal(jax.random.key(1), (4, D))
    four = np.asarray(go(keys, x, times))
    for pick in (np.array([3, 1]), np.array([0, 2])):
        np.testing.assert_array_equal(go(keys[pick], x[pick], times), four[pick])


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_shapes_and_dtypes(name):
    """Points, audio, images, video; float32 stays so where float64 is enabled; times stay float32 for bfloat16."""
    entry = SAMPLERS[name]
    problem = PROBLEMS[entry.ends]
    sampler = entry.make(problem, dj.white)

    def denoiser(x, t, cond):
        assert t.dtype == times.dtype
        return dj.from_v(problem.schedule, x, t, 0.1 * x)._replace(variance_fraction=jnp.full_like(x, 0.5))

    def run(key, x, times, batched):
        return dj.sample(jax.random.split(key, 3) if batched else key, sampler, denoiser, x, times)

    for shape, dtype, wide in (
        ((3, 2), "float32", True),
        ((3, 5, 2), "bfloat16", False),
        ((3, 4, 4, 2), "float32", False),
        ((3, 2, 4, 4, 2), "float64", True),
    ):
        with jax.enable_x64(wide):
            x, times = (
                jax.ShapeDtypeStruct(shape, dtype),
                jax.ShapeDtypeStruct((4,), "float64" if dtype == "float64" else "float32"),
            )
            out = jax.eval_shape(functools.partial(run, batched=len(shape) % 2), jax.random.key(0), x, times)
            assert out.shape == shape and out.dtype == dtype


@pytest.mark.parametrize("name", [name for name, entry in SAMPLERS.items() if entry.order is not None])
def test_order_of_convergence(name):
    """Of the flow for a deterministic sampler, of the law for a random one, in float64 against exact answers."""
    entry = SAMPLERS[name]
    errors = (
        law_errors(entry, (128, 256))
        if entry.random
        else flow_errors(entry, (128, 256) if entry.order < 3 else (256, 512))
    )
    print(f"{name}: order {measured_order(errors):.3f}, errors {errors}")
    assert measured_order(errors) == pytest.approx(entry.order, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "problem"),
    [(name, "rectified") for name in ("ddpm_small", "heun", "churn_heun")]
    + [("ddpm_large", "vp_linear"), ("ddim", "edm"), ("churn_heun", "edm"), ("ddim_half", "ve")],
)
def test_law_on_other_schedules(name, problem):
    run_law(SAMPLERS[name].make(PROBLEMS[problem], dj.white), problem, steps=200)


# --- the driver -------------------------------------------------------------------------------------------------------


def test_one_key_for_the_whole_batch_draws_different_examples():
    law, schedule = mixtures.gaussian(np.zeros(3), np.ones(3)), dj.cosine()
    x = jnp.zeros((4, 3))
    y = dj.sample(jax.random.key(0), dj.ddpm(schedule), mixtures.denoiser(law, schedule), x, dj.uniform(3))
    assert len(np.unique(np.asarray(y)[:, 0])) == 4


def test_shape_does_not_change_the_numbers():
    schedule, rng = dj.vp_linear(), np.random.default_rng(0)
    mean, variance, noise = rng.normal(size=(2, 2, 3)), rng.uniform(0.1, 1, (2, 2, 3)), rng.normal(size=(4, 2, 2, 3))
    x = jnp.asarray(noise, jnp.float32)
    image, flat = mixtures.gaussian(mean, variance), mixtures.gaussian(mean.ravel(), variance.ravel())

    def run(law, x):
        denoiser = mixtures.denoiser(law, schedule)
        return jax.jit(lambda x: dj.sample(jax.random.key(0), dj.heun(schedule), denoiser, x, dj.uniform(5)))(x)

    np.testing.assert_allclose(run(image, x).reshape(4, -1), run(flat, x.reshape(4, -1)), rtol=1e-5, atol=1e-6)


def test_evaluations_are_counted_to_the_last_step():
    """Heun needs 2n - 1 on Karras's grid, which ends without noise; ten of Langevin cost ten at each time."""
    schedule, n = dj.edm(), 6
    denoiser = mixtures.denoiser(mixtures.gaussian(np.zeros(2), np.ones(2)), schedule)
    for sampler, expected in ((dj.heun(schedule), 2 * n - 1), (dj.langevin(schedule, 0.15, 10), 10 * n)):
        log = []
        go = jax.jit(
            lambda x, s=sampler, log=log: dj.sample(jax.random.key(0), counted(s, log), denoiser, x, dj.karras(n))
        )
        jax.block_until_ready(go(jnp.ones((3, 2))))
        jax.effects_barrier()
        assert len(log) == expected


def test_velocity_prediction_at_both_ends_of_the_straight_line():
    schedule, law = dj.rectified(), mixtures.gaussian(np.array([0.5, -0.2]), np.array([0.3, 0.6]))
    truth = mixtures.denoiser(law, schedule)
    denoiser = dj.parameterize(lambda x, t, c: dj.to_velocity(schedule, truth(x, t), t), schedule, "velocity")
    x = jnp.asarray([[1.0, -1.0], [0.3, 2.0]])
    exact = mixtures.flow(law, schedule, x, jnp.float32(1.0), jnp.float32(0.0))
    for sampler in (dj.euler(schedule), dj.heun(schedule), dj.ddim(schedule)):
        y = jax.jit(lambda s=sampler: dj.sample(jax.random.key(0), s, denoiser, x, dj.uniform(64)))()
        np.testing.assert_allclose(y, exact, atol=0.05)


def test_a_pytree_of_images_and_vectors_is_sampled_as_one_vector():
    """By the exact flow of each part, from a denoiser of trees, with one key per example and a condition."""
    schedule, shapes = dj.cosine(), {"image": (2, 2, 1), "vector": (3,)}
    laws = {k: mixtures.gaussian(np.full(shape, 0.5), np.full(shape, len(shape))) for k, shape in shapes.items()}

    def trees(x, t, cond):
        parts = {k: mixtures.denoiser(law, schedule)(x[k] + 0 * dj.bcast(cond, x[k]), t) for k, law in laws.items()}
        return dj.Prediction({k: p.x0 for k, p in parts.items()}, {k: p.eps for k, p in parts.items()})

    denoiser, ravel, unravel = ravelled(trees, {k: jnp.zeros(shape) for k, shape in shapes.items()})
    x = {k: jax.random.normal(jax.random.key(0), (5, *shape)) for k, shape in shapes.items()}
    for k, part in unravel(ravel(x)).items():
        np.testing.assert_array_equal(part, x[k])

    @jax.jit
    def go(keys, x, times):
        y = unravel(dj.sample(keys, dj.heun(schedule), denoiser, ravel(x), times, jnp.ones(5)))
        return y, {k: mixtures.flow(law, schedule, x[k], times[0], times[-1]) for k, law in laws.items()}

    y, exact = go(jax.random.split(jax.random.key(0), 5), x, jnp.linspace(1, 0, 65))
    for k in shapes:
        np.testing.assert_allclose(y[k], exact[k], atol=0.02)


def test_bad_input():
    schedule, x, key = dj.rectified(), jnp.ones((2, 3)), jax.random.key(0)
    denoiser = mixtures.denoiser(mixtures.gaussian(np.zeros(3), np.ones(3)), schedule)

    def go(times=(1.0, 0.5), x=x, key=key):
        return dj.sample(key, dj.ddpm(schedule), denoiser, x, jnp.asarray(times))

    for times in (1.0, (1.0,), ((1.0,), (0.5,))):
        with pytest.raises(ValueError, match="times must be f32"):
            go(times)
    for times in ((1.0, 0.5, 0.7), (1.0, 0.5, 0.5), (1.0, 0.5, float("nan")), (1.0, 0.5, -float("inf"))):
        with pytest.raises(ValueError, match=r"finite and fall strictly: times\[1\] = 0.5, times\[2\] = "):
            go(times)
    for times in ((1.5, 0.5), (1.0, 0.5, -0.5)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            go(times)
    for bad in (jnp.ones(3), jnp.ones((2, 3), jnp.int32)):
        with pytest.raises(ValueError, match="batch axis first"):
            go(x=bad)
    with pytest.raises(ValueError, match=r"3 keys for x of shape \(2, 3\)"):
        go(key=jax.random.split(key, 3))
    with pytest.raises(ValueError, match="expected a key"):
        go(key=jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match="at least one"):
        dj.chain()


def test_checking_times_traces_no_network():
    """The denoiser is traced once, by the scan, also where times are known; where they are not, they go unchecked."""
    schedule, traces = dj.rectified(), []

    def denoiser(x, t, cond):
        traces.append(1)
        return dj.from_velocity(schedule, x, t, x)

    x, sampler = jnp.ones((2, 3)), dj.ddim(schedule)
    dj.sample(jax.random.key(0), sampler, denoiser, x, dj.uniform(3))
    assert len(traces) == 1
    jax.jit(lambda times: dj.sample(jax.random.key(0), sampler, denoiser, x, times))(jnp.asarray([0.5, 0.7]))
