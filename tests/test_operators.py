"""Operators: the laws of adjoint, pseudo-inverse and spectrum, on every kind of array; nonlinear ones; bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from diffusion_jax import operators as ops

KEY = jax.random.key(0)
MASK = np.random.default_rng(0).uniform(size=(8, 12, 1)) < 0.4
SKEW = np.random.default_rng(1).uniform(size=(3, 5))  # no symmetry
# name -> operator, shape of the examples
LINEAR = {
    "identity": (ops.identity(), (8, 12, 3)),
    "mask": (ops.masking(MASK), (8, 12, 3)),
    "mask_line": (ops.masking(np.arange(12) % 3 == 0), (12,)),
    "mask_weights": (ops.masking(np.linspace(0, 2, 12)), (12,)),
    "box": (ops.box(2), (8, 12, 3)),
    "box_audio": (ops.box(3), (12, 2)),
    "box_line": (ops.box(4), (12,)),
    "box_video": (ops.box(2), (4, 4, 6, 1)),
    "grey": (ops.grey(), (8, 12, 3)),
    "blur": (ops.blur(SKEW), (8, 12, 3)),
    "blur_gaussian": (ops.blur(ops.gaussian_kernel(1.0, 3)), (8, 12, 1)),
    "blur_audio": (ops.blur(SKEW[1]), (12, 2)),
    "blur_line": (ops.blur(SKEW[1]), (12,)),
    "blur_video": (ops.blur(ops.gaussian_kernel(0.6, 1, 3)), (4, 4, 6, 1)),
    "bicubic": (ops.bicubic(2), (8, 12, 3)),
    "bicubic_3": (ops.bicubic(3, axes=1), (12, 2)),
    "bicubic_line": (ops.bicubic(4, axes=1), (12,)),
    "compressed_sensing": (ops.compressed_sensing(KEY, (8, 12, 3), 100), (8, 12, 3)),
    "compressed_sensing_line": (ops.compressed_sensing(KEY, (12,), 5), (12,)),
}


def matrix(function, shape):
    """The matrix of a linear function of examples of that shape: f[e d]."""
    d = math.prod(shape)
    return jnp.reshape(function(jnp.reshape(jnp.eye(d), (d, *shape))), (d, -1)).T


@pytest.mark.parametrize("name", LINEAR)
def test_laws_of_linear_operators(name):
    """<A x, y> = <x, A* y>; A A+ A = A, A+ A A+ = A+, A A+ and A+ A symmetric; V g(S) V* from NumPy's eigenvectors."""
    operator, shape = LINEAR[name]

    @jax.jit
    def matrices():
        measured = jax.eval_shape(operator.apply, jnp.zeros((1, *shape))).shape[1:]
        bump = matrix(lambda x: operator.spectral(lambda s: jnp.exp(-s) + s**2, x), shape)
        return matrix(operator.apply, shape), *(matrix(f, measured) for f in operator[2:4]), bump

    with jax.enable_x64(True):
        a, adjoint, plus, bump = map(np.asarray, matrices())
    close = dict(rtol=0, atol=1e-11 * max(np.abs(a).max() ** 2, 1) * max(np.abs(plus).max(), 1) ** 2)
    np.testing.assert_allclose(adjoint, a.T, **close)
    np.testing.assert_allclose(a @ plus @ a, a, **close)
    np.testing.assert_allclose(plus @ a @ plus, plus, **close)
    np.testing.assert_allclose(a @ plus, (a @ plus).T, **close)
    np.testing.assert_allclose(plus @ a, (plus @ a).T, **close)
    square, v = np.linalg.eigh(a.T @ a)
    s = np.sqrt(np.maximum(square, 0))
    np.testing.assert_allclose(bump, (v * (np.exp(-s) + s**2)) @ v.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_types_and_jacobians(name):
    """The dtype of x stays; in float32 the pseudo-inverse keeps the measurement, and the derivative is the operator."""
    operator, shape = LINEAR[name]
    x = jax.random.normal(KEY, (2, *shape))

    @jax.jit
    def compute(x):
        y = operator.apply(x)
        back = operator.pseudo_inverse(y)
        rows = jax.vjp(operator.apply, x)[1](y)[0], operator.adjoint(y)
        return y, back, operator.apply(back), *rows, operator.spectral(jnp.ones_like, x)

    for dtype in (jnp.float32, jnp.bfloat16):
        y, back, again, *rest = jax.eval_shape(compute, x.astype(dtype))
        assert {a.dtype for a in (y, back, again, *rest)} == {jnp.dtype(dtype)}
        assert {a.shape for a in (back, *rest)} == {x.shape}
    y, back, again, vjp, adjoint, same = compute(x)
    np.testing.assert_allclose(again, y, atol=2e-4 * float(jnp.abs(y).max()))
    np.testing.assert_allclose(vjp, adjoint, atol=1e-5 * max(1.0, float(jnp.abs(adjoint).max())))
    np.testing.assert_allclose(same, x, atol=1e-5)


def test_what_is_measured():
    """Against NumPy and SciPy: means over boxes, luma, circular convolution, Keys's kernel, orthogonal rows."""
    x = np.random.default_rng(2).standard_normal((2, 8, 12, 3)).astype(np.float32)

    @jax.jit
    def compute(x):
        return [LINEAR[name][0].apply(x) for name in ("box", "grey", "blur", "bicubic")]

    box, grey, blur, bicubic = compute(x)
    np.testing.assert_allclose(box, x.reshape(2, 4, 2, 6, 2, 3).mean((2, 4)), atol=1e-6)
    np.testing.assert_allclose(grey[..., 0], x @ [0.299, 0.587, 0.114], atol=1e-6)
    want = ndimage.convolve(x.astype(np.float64), SKEW[None, :, :, None], mode="wrap")
    np.testing.assert_allclose(blur, want, atol=1e-5)

    def keys(u):
        u = np.abs(u)
        near, far = 1.5 * u**3 - 2.5 * u**2 + 1, -0.5 * u**3 + 2.5 * u**2 - 4 * u + 2
        return np.where(u <= 1, near, np.where(u < 2, far, 0)) / 2  # stretched by 2, so that it sums to 1

    def rows(n):  # distances on the circle from the middle of each pair
        distance = np.arange(n)[None] - (2 * np.arange(n // 2)[:, None] + 0.5)
        return keys(((distance + n / 2) % n - n / 2) / 2)

    np.testing.assert_allclose(bicubic, np.einsum("ij,bjkc,lk->bilc", rows(8), x, rows(12)), atol=1e-5)
    a = np.asarray(matrix(jax.jit(LINEAR["compressed_sensing_line"][0].apply), (12,)))
    np.testing.assert_allclose(a @ a.T, np.eye(5), atol=1e-6)
    other = np.asarray(matrix(jax.jit(ops.compressed_sensing(jax.random.key(1), (12,), 5).apply), (12,)))
    assert np.abs(a - other).max() > 0.1


def test_bicubic_keeps_constants_and_lines():
    """Away from where the circle closes."""
    x = jnp.stack([jnp.ones(32), jnp.arange(32.0)])
    y = jax.jit(ops.bicubic(4, axes=1).apply)(x)
    np.testing.assert_allclose(y[0], 1, atol=1e-5)
    np.testing.assert_allclose(y[1, 2:-2], np.arange(8)[2:-2] * 4 + 1.5, atol=1e-4)


def test_phase_retrieval_loses_shift_and_sign():
    operator = ops.phase_retrieval(2)
    x = jax.random.normal(KEY, (2, 6, 6, 1))

    @jax.jit
    def compute(x):
        inside = x.at[:, 0].set(0)
        slope = jax.grad(lambda x: jnp.sum(operator.apply(x)))
        return (
            operator.apply(x),
            operator.apply(inside),
            operator.apply(jnp.roll(inside, -1, 1)),
            slope(x),
            slope(0 * x),
        )

    y, inside, shifted, slope, at_zero = compute(x)
    assert y.shape == (2, 12, 12, 1)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 6), (0, 6), (0, 0)))
    np.testing.assert_allclose(y, np.abs(np.fft.fft2(padded, axes=(1, 2))) / 12, atol=1e-5)
    np.testing.assert_allclose(inside, shifted, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(y**2), jnp.sum(x**2), rtol=1e-5)  # Parseval
    assert bool(jnp.all(jnp.isfinite(slope))) and bool(jnp.all(jnp.isfinite(at_zero)))


@pytest.mark.parametrize("quality", [5, 50, 90])
def test_jpeg(quality):
    """SciPy's cosine transform, rounded; decoding and coding again changes nothing; the error falls with the table."""
    from scipy.fft import dctn

    operator = ops.jpeg(quality)
    x = np.clip(np.random.default_rng(3).standard_normal((2, 16, 24, 3)) / 2, -1, 1).astype(np.float32)
    y, back, again = jax.jit(lambda x: (y := operator.apply(x), z := operator.pseudo_inverse(y), operator.apply(z)))(x)
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(y, np.round(y))
    blocks = dctn(127.5 * np.asarray(x, np.float64).reshape(2, 2, 8, 3, 8, 3), axes=(2, 4), norm="ortho")
    coefficients = np.asarray(y, np.float64).reshape(blocks.shape)
    first = {5: 160, 50: 16, 90: 3}[quality]  # libjpeg's table, first entry
    np.testing.assert_array_equal(coefficients[:, :, 0, :, 0], np.round(blocks[:, :, 0, :, 0] / first))
    rms = float(np.sqrt(np.mean((np.asarray(back) - x) ** 2)))
    assert rms < {5: 0.5, 50: 0.25, 90: 0.06}[quality]


def test_composition_and_latent():
    """Blur, then mask: adjoint, no pseudo-inverse. A latent operator is the operator after the decoder."""
    inner, outer = ops.blur(SKEW), ops.masking(MASK)
    both = ops.compose(outer, inner)
    x = jax.random.normal(KEY, (2, 8, 12, 3))
    seen = ops.latent(both, lambda z: jnp.repeat(z, 3, axis=-1))

    @jax.jit
    def compute(x):
        y = both.apply(x)
        return (
            jnp.sum(y * y),
            jnp.sum(x * both.adjoint(y)),
            seen.apply(x[..., :1]),
            both.apply(x[..., :1].repeat(3, -1)),
        )

    left, right, decoded, direct = compute(x)
    np.testing.assert_allclose(left, right, rtol=1e-5)
    np.testing.assert_allclose(decoded, direct, rtol=1e-6)
    with pytest.raises(ValueError, match="'mask of blur' has no pseudo_inverse"):
        both.pseudo_inverse(x)
    with pytest.raises(ValueError, match="'phase retrieval of mask' has no adjoint"):
        ops.compose(ops.phase_retrieval(), outer).adjoint(x)
    with pytest.raises(ValueError, match="'mask of a latent' has no spectral"):
        ops.latent(outer, lambda z: z).spectral(lambda s: s, x)


def test_a_mask_may_change_without_recompilation():
    traces = []

    @jax.jit
    def go(mask, x):
        traces.append(1)
        return ops.masking(mask).apply(x)

    x = jnp.ones((2, 4))
    for k in range(3):
        mask = jnp.arange(4) < k
        np.testing.assert_array_equal(go(mask, x), np.broadcast_to(mask, (2, 4)))
    each = jnp.asarray([[True, False, True, False], [False, False, False, True]])
    np.testing.assert_array_equal(go(each, x), each)
    assert len(traces) == 2  # one for each shape


def test_bad_input():
    x = jnp.ones((2, 8, 9, 3))
    with pytest.raises(ValueError, match=r"mask of shape \(8, 8, 1\) for x of shape \(2, 8, 9, 3\)"):
        jax.eval_shape(ops.masking(np.ones((8, 8, 1))).apply, x)
    with pytest.raises(ValueError, match=r"mask of shape \(8, 9\) for x of shape"):
        jax.eval_shape(ops.masking(np.ones((8, 9))).apply, x)
    with pytest.raises(ValueError, match="not multiples of 2"):
        jax.eval_shape(ops.box(2).apply, x)
    with pytest.raises(ValueError, match="not multiples of 2"):
        jax.eval_shape(ops.bicubic(2).apply, x)
    with pytest.raises(ValueError, match=r"3 weights for x of shape \(2, 4\)"):
        jax.eval_shape(ops.grey().apply, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"kernel of shape \(3, 5\) for x of shape \(2, 4\)"):
        jax.eval_shape(ops.blur(SKEW).apply, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="no middle"):
        ops.blur(np.ones(4))
    with pytest.raises(ValueError, match=r"made for \(12,\), got x of shape \(2, 8, 9, 3\)"):
        jax.eval_shape(LINEAR["compressed_sensing_line"][0].apply, x)
    with pytest.raises(ValueError, match="m = 0 of the 12 rows"):
        ops.compressed_sensing(KEY, (12,), 0)
    with pytest.raises(ValueError, match=r"\[b h w c\]"):
        jax.eval_shape(ops.jpeg().apply, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="quality"):
        ops.jpeg(0)
    for make in (ops.box, ops.bicubic, ops.phase_retrieval):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            make(0)
    for method in ("adjoint", "pseudo_inverse"):
        with pytest.raises(ValueError, match=f"'phase retrieval' has no {method}"):
            jax.eval_shape(getattr(ops.phase_retrieval(), method), x)
