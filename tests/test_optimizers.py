"""Optimizers and learning rates against plain NumPy transcriptions of their papers, and against exact factors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import lenient

from diffusion_jax.training import ema, optimizers
from diffusion_jax.training.optimizers import adamw, clip, muon, orthogonalized, projected, schedule_free_adamw
from diffusion_jax.training.state import dotted, init_state
from diffusion_jax.training.step import make_train_step
from diffusion_jax.typing import InputError, Net

SHAPES = {
    "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "attn": {"qkv": {"kernel": (12, 36), "bias": (36,)}},
    "norm": {"scale": (12,)},
    "labels": {"embedding": (5, 12)},
    "out": {"kernel": (12, 4)},
}


def is_shape(leaf):
    return isinstance(leaf, tuple)


def draw(seed):
    """A tree of SHAPES of standard normal numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), SHAPES, is_leaf=is_shape)


def run(optimizer, params, steps=5):
    """The parameters after some updates with gradients that do not depend on them."""

    @jax.jit
    def one(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for i in range(steps):
        params, state = one(params, state, draw(100 + i))
    return params, state


def close(a, b, rtol=2e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def flat(tree):
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


# Learning rates ------------------------------------------------------------------------------------------------------


def at(rate, *steps):
    return [float(rate(jnp.int32(n))) for n in steps]


def test_rates_at_known_points():
    assert at(optimizers.constant(0.5), 0, 10**6) == [0.5, 0.5]
    assert at(optimizers.constant(0.5, warmup=10), 0, 4, 9, 10) == pytest.approx([0.05, 0.25, 0.5, 0.5])
    rate = optimizers.inverse_sqrt(0.01, t_ref=70_000, warmup=100)
    assert at(rate, 0, 49, 99, 70_000) == pytest.approx([0.0001, 0.005, 0.01, 0.01])
    assert at(rate, 280_000, 7_000_000) == pytest.approx([0.005, 0.001])
    rate = optimizers.cosine(0.4, steps=110, warmup=10, end=0.04)
    assert at(rate, 4, 10, 60, 110, 500) == pytest.approx([0.2, 0.4, 0.22, 0.04, 0.04])
    theirs = optax.cosine_decay_schedule(0.4, 100, 0.1)
    assert at(rate, 23, 77) == pytest.approx([float(theirs(13)), float(theirs(67))])


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match="a warm-up of 100 does not fit in 50 steps"):
        optimizers.cosine(1.0, steps=50, warmup=100)


# Adam ----------------------------------------------------------------------------------------------------------------


def plain_adamw(p, grads, rate, b1, b2, eps, decay):
    """Loshchilov and Hutter 2019, algorithm 2, on one array."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate(t - 1) * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
    return p


def grads_of(path, steps=5):
    for i in range(steps):
        leaf = float64(draw(100 + i))
        for name in path.split("."):
            leaf = leaf[name]
        yield leaf


KERNELS = {"conv.kernel", "attn.qkv.kernel", "out.kernel"}


def test_adamw_is_its_algorithm_and_decays_kernels_only():
    rate = optimizers.constant(0.1, warmup=3)
    params, _ = run(adamw(rate, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2), draw(0))

    def expected(path, p):
        decay = 0.2 if dotted(path) in KERNELS else 0.0
        return plain_adamw(p, grads_of(dotted(path)), lambda n: 0.1 * min((n + 1) / 3, 1), 0.8, 0.9, 1e-3, decay)

    close(params, jax.tree_util.tree_map_with_path(expected, float64(draw(0))), rtol=1e-4)


def test_decay_follows_a_given_rule():
    still, _ = run(adamw(0.0, weight_decay=1.0), draw(0))
    close(still, draw(0))
    only_bias = adamw(0.1, weight_decay=1.0, decays=lambda path, leaf: path.endswith("bias"))
    (a, _), (b, _) = (run(o, draw(0)) for o in (only_bias, adamw(0.1)))
    assert np.max(np.abs(a["conv"]["bias"] - b["conv"]["bias"])) > 0.1
    np.testing.assert_array_equal(a["conv"]["kernel"], b["conv"]["kernel"])


def test_the_first_moment_may_be_bfloat16():
    (a, state), (b, _) = (run(adamw(0.01, mu_dtype=dtype), draw(0)) for dtype in (jnp.bfloat16, None))
    kinds = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert kinds.count(jnp.bfloat16) == kinds.count(jnp.float32) == len(jax.tree.leaves(SHAPES, is_leaf=is_shape))
    assert {leaf.dtype for leaf in jax.tree.leaves(a)} == {jnp.dtype(jnp.float32)}
    close(a, b, rtol=0.02, atol=2e-3)


# Muon ----------------------------------------------------------------------------------------------------------------


def test_five_quintic_steps_bring_singular_values_near_one():
    a, b, c = optimizers.QUINTIC
    s = np.linspace(0.002, 1, 100_000)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert 0.67 < s.min() < s.max() < 1.21


@pytest.mark.parametrize("shape", [(16, 16), (40, 8), (8, 40), (3, 24, 12)])
def test_updates_are_close_to_the_polar_factor(shape):
    """Same singular vectors as the matrix, singular values as the scalar map makes them, all between 0.67 and 1.21."""
    m = np.random.default_rng(0).normal(size=shape)
    o = np.asarray(orthogonalized(jnp.asarray(m, jnp.float32)), np.float64)
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    core = np.swapaxes(u, -1, -2) @ o @ np.swapaxes(vt, -1, -2)
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    for _ in range(5):
        s = sum(k * s**p for k, p in zip(optimizers.QUINTIC, (1, 3, 5), strict=True))
    wanted = s[..., None] * np.eye(s.shape[-1])
    np.testing.assert_allclose(core, wanted, atol=2e-4)
    assert np.all(np.linalg.svd(o, compute_uv=False) < 1.21)
    polar = u @ vt
    cosine = np.sum(o * polar, (-1, -2)) / np.linalg.norm(o, axis=(-1, -2)) / np.linalg.norm(polar, axis=(-1, -2))
    assert np.all(cosine > 0.97)


def test_bfloat16_products_find_the_same_direction():
    m = jnp.asarray(np.random.default_rng(0).normal(size=(32, 64)), jnp.float32)
    a, b = (orthogonalized(m, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert a.dtype == jnp.float32
    assert float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.995


def plain_muon(p, grads, rate, decay, rms):
    """Jordan et al. 2024 on one kernel, in float64: its momentum, Nesterov's step ahead, equation (2), its scale."""
    a, b, c = optimizers.QUINTIC
    mu = np.zeros_like(p)
    for g in grads:
        mu = 0.95 * mu + 0.05 * g
        m = np.reshape(0.95 * mu + 0.05 * g, (-1, p.shape[-1]))
        x = m / np.linalg.norm(m)
        for _ in range(5):
            x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
        scale = np.sqrt(max(1, m.shape[1] / m.shape[0])) if rms is None else rms * np.sqrt(max(m.shape))
        p = p - rate * (scale * np.reshape(x, p.shape) + decay * p)
    return p


@pytest.mark.parametrize("rms", [None, 0.2])
def test_muon_is_its_algorithm(rms):
    params, _ = run(muon(0.1, rms=rms, weight_decay=0.3, dtype=jnp.float32), draw(0))
    for path, leaf in flat(params).items():
        if path in KERNELS:
            start = flat(float64(draw(0)))[path]
            np.testing.assert_allclose(leaf, plain_muon(start, grads_of(path), 0.1, 0.3, rms), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rms", [None, 0.2])
def test_the_first_step_equals_that_of_optax(rms):
    """Later ones differ: Optax corrects the bias of the momentum before the step ahead, Jordan's algorithm does not."""
    spec = optax.contrib.MuonDimensionNumbers

    def numbers(params):
        def one(path, leaf):
            return spec(tuple(range(leaf.ndim - 1)), leaf.ndim - 1) if dotted(path) in KERNELS else None

        return jax.tree_util.tree_map_with_path(one, params)

    options = {"muon_weight_dimension_numbers": numbers, "consistent_rms": rms, "weight_decay": 0.3}
    theirs, _ = run(lenient(optax.contrib.muon(0.1, **options)), draw(0), steps=1)
    ours, _ = run(muon(0.1, rms=rms, weight_decay=0.3, dtype=jnp.float32), draw(0), steps=1)
    for path in KERNELS:
        np.testing.assert_allclose(flat(ours)[path], flat(theirs)[path], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_fused_matrices_move_like_separate_ones():
    def parts(tree):
        kernels = jnp.split(tree["attn"]["qkv"]["kernel"], 3, axis=1)
        return {name: {"kernel": kernel} for name, kernel in zip("qkv", kernels, strict=True)}

    options = {"weight_decay": 0.1, "dtype": jnp.float32}
    fused, _ = run(muon(0.1, fused={r"qkv\.kernel$": 3}, **options), draw(0))
    whole, _ = run(muon(0.1, **options), draw(0))
    optimizer, params = muon(0.1, **options), parts(draw(0))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for i in range(5):
        updates, state = update(parts(draw(100 + i)), state, params)
        params = optax.apply_updates(params, updates)
    close(parts(fused), params, rtol=1e-4)
    assert np.max(np.abs(whole["attn"]["qkv"]["kernel"] - fused["attn"]["qkv"]["kernel"])) > 0.01
    np.testing.assert_allclose(fused["conv"]["kernel"], whole["conv"]["kernel"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12, 3, 4, 3), (1, 1, 12, 36), (12, 3, 12)])
def test_the_layout_of_a_fused_kernel_does_not_matter(shape):
    def moved(tree):
        return {"qkv": {"kernel": jnp.reshape(tree["attn"]["qkv"]["kernel"], shape)}}

    optimizer, flat_one = muon(0.1, fused={"qkv": 3}), muon(0.1, fused={"qkv": 3})
    update, _ = optimizer.update(moved(draw(1)), optimizer.init(moved(draw(0))), moved(draw(0)))
    wanted, _ = flat_one.update(draw(1), flat_one.init(draw(0)), draw(0))
    np.testing.assert_allclose(update["qkv"]["kernel"], moved(wanted)["qkv"]["kernel"], rtol=1e-5, atol=1e-7)


def test_what_is_no_matrix_is_left_to_adam():
    ours, _ = run(muon(0.1, adam=adamw(0.03)), draw(0))
    adam, _ = run(adamw(0.03), draw(0))
    for path, leaf in flat(adam).items():
        assert np.array_equal(flat(ours)[path], leaf) == (path not in KERNELS)


def test_parts_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match=r"muon: attn.qkv.kernel of shape \(12, 36\) does not divide into 5 fused"):
        muon(0.1, fused={"qkv": 5}).init(draw(0))


# Schedule-free -------------------------------------------------------------------------------------------------------


def plain_schedule_free(p, grad, rate, b1, b2, eps, decay, steps):
    """Defazio et al. 2024, algorithm 1 (AdamW), on one array: (y, x)."""
    z = x = p
    v, total = np.zeros_like(p), 0.0
    for t in range(1, steps + 1):
        y = (1 - b1) * z + b1 * x
        g, gamma = grad(y), rate(t - 1)
        v = b2 * v + (1 - b2) * g**2
        z = z - gamma * (g / (np.sqrt(v / (1 - b2**t)) + eps) + decay * y)
        total += gamma**2
        x = (1 - gamma**2 / total) * x + gamma**2 / total * z
    return (1 - b1) * z + b1 * x, x


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_free_is_its_algorithm(warmup):
    curvature = np.linspace(0.1, 2, 12).reshape(3, 4)
    start = np.random.default_rng(0).normal(size=(3, 4))
    rate = optimizers.constant(0.05, warmup)
    optimizer = schedule_free_adamw(rate, b1=0.8, b2=0.9, eps=1e-4, weight_decay=0.1)
    params = {"kernel": jnp.asarray(start, jnp.float32)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(20):
        grads = jax.tree.map(lambda p: jnp.asarray(curvature, jnp.float32) * p, params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

    def plain_rate(n):
        return 0.05 * min((n + 1) / max(warmup, 1), 1)

    y, x = plain_schedule_free(start, lambda y: curvature * y, plain_rate, 0.8, 0.9, 1e-4, 0.1, 20)
    np.testing.assert_allclose(params["kernel"], y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ema.evaluation_params(state, params)["kernel"], x, rtol=1e-4, atol=1e-6)
    assert np.max(np.abs(x - y)) > 1e-3


def test_a_train_state_evaluates_what_its_optimizer_averages():
    optimizer = clip(schedule_free_adamw(0.1), 1.0)
    net = Net(lambda key: {"kernel": jax.random.normal(key, (4, 4))}, lambda params, x, t, cond=None: x)

    def loss(params, batch, key):
        return jnp.mean(jnp.square(batch["image"] @ params["kernel"]))

    step = jax.jit(make_train_step(loss, optimizer, ()))
    state = init_state(jax.random.key(0), net, optimizer, averages=0)
    batch = {"image": jax.random.normal(jax.random.key(1), (4, 4))}
    first = loss(state.ema, batch, None)
    for _ in range(10):
        state, _ = step(state, batch)
    assert state.averages == ()
    assert float(jnp.max(jnp.abs(state.ema["kernel"] - state.params["kernel"]))) > 1e-3
    assert float(loss(state.ema, batch, None)) < 0.9 * float(first)


def test_without_averages_the_parameters_are_evaluated():
    params = draw(0)
    assert ema.evaluation_params(adamw(0.1).init(params), params) is params


# Around an optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clip_limits_the_norm_of_all_gradients_together():
    grads, optimizer = draw(1), clip(optax.sgd(1.0), 0.5)
    updates = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(grads), grads)[0])(grads)
    scale = 0.5 / float(optax.global_norm(grads))
    close(updates, jax.tree.map(lambda g: -scale * g, grads))


def unit(params):
    """Each output of a kernel gets the norm 1."""

    def one(path, p):
        if dotted(path) not in KERNELS:
            return p
        return p / jnp.sqrt(jnp.sum(p**2, axis=tuple(range(p.ndim - 1)), keepdims=True))

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.slow
def test_projected_parameters_stay_where_they_are_projected_to():
    params, _ = run(projected(adamw(0.1), unit), draw(0))
    close(unit(params), params, rtol=1e-6, atol=1e-6)
    free, _ = run(adamw(0.1), draw(0))
    # Compiled in another program, a product may be fused with a sum: the last bit differs.
    close(params["norm"]["scale"], free["norm"]["scale"], rtol=1e-6)
    # One step from a projected point is the projection of the plain step.
    once, _ = run(projected(adamw(0.1), unit), unit(draw(0)), steps=1)
    plain, _ = run(adamw(0.1), unit(draw(0)), steps=1)
    close(once, unit(plain), rtol=1e-5)


def test_projected_needs_the_parameters():
    optimizer = projected(adamw(0.1), unit)
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(draw(1), optimizer.init(draw(0)))
