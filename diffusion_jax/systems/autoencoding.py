"""Training an autoencoder for latent diffusion: what it should keep, and what it may lose.

With x^ = D(z), z ~ E(x), and a discriminator C with features phi (Esser et al. 2021, arXiv:2012.09841, section 3.2;
Rombach et al. 2022, arXiv:2112.10752, appendix G), the autoencoder lessens

    L_rec = mean |x^ - x| + a |phi(x^) - phi(x)|,    L = L_rec + b KL / (numbers in x) + w lambda L_adv            (1)
    L_adv = -mean C(x^),    lambda = |dL_rec / dx^| / |dL_adv / dx^|                                             (2)

and C lessens its hinge loss on x and x^. Each sees the other's parameters as constants, so that the gradient of the sum
moves both at once, in one step of one optimizer. In place of the reference's ratio of gradients at the decoder's last
layer, lambda is their ratio at x^ itself (Défossez et al. 2022, arXiv:2210.13438, section 3.4), which costs no backward
pass through the decoder. phi are C's own features (Larsen et al. 2016, arXiv:1512.09300), learned from the data
alone: a metric's features never enter the training of what it measures. w is 0 before `start` updates.
With a codebook in place of the Gaussian, b times its loss stands for the KL term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.nets.autoencoder import Autoencoder, Gaussian, draw_latent, kl_to_standard
from diffusion_jax.nets.discriminator import Judgement, feature_distance, freeze, hinge
from diffusion_jax.nets.vq import VectorAutoencoder
from diffusion_jax.ops import fold
from diffusion_jax.typing import Array, Cond, Key, Net, Params


class Pass(NamedTuple):
    """A picture through the autoencoder, and what the discriminator thinks.

    judge: pictures -> `Judgement` by constants; real and fake: what C is trained on; rate: f32[b], KL in nats over the
    numbers in x, or the codebook's loss with a quarter of the commitment's.
    """

    decoded: Array
    rate: Array
    judge: Callable[[Array], Judgement]
    real: Judgement
    fake: Judgement


class Weights(NamedTuple):
    """a, b, w of equation (1), and the number of updates before w counts."""

    features: float = 1.0
    rate: float = 1e-6
    adversarial: float = 0.5
    start: int = 1000


def absorbed(autoencoder: VectorAutoencoder) -> Autoencoder:
    """An autoencoder with a codebook as one of latents before it, the codebook being part of the decoder.

    Its Gaussians have no width to speak of (Rombach et al. 2022, section 3.1, "VQ-reg.").
    """

    def encode(params: Params, x: Array) -> Gaussian:
        z = autoencoder.encode(params, x)
        return Gaussian(z, jnp.full_like(z, -30.0))

    def decode(params: Params, z: Array) -> Array:
        return autoencoder.decode(params, autoencoder.quantize(params, z).z)

    return Autoencoder(autoencoder.init, encode, decode)


def with_discriminator(autoencoder: Autoencoder | VectorAutoencoder, discriminator: Net) -> Net:
    """Both as one network, with the parameters {"autoencoder": ..., "discriminator": ...}: apply(params, x, t) -> Pass.

    Without a key, z is the Gaussian's mean.
    """

    def init(key: Key) -> Params:
        pair = (autoencoder.init(fold(key, 0)), discriminator.init(fold(key, 1)))
        return dict(zip(("autoencoder", "discriminator"), pair, strict=True))

    def apply(params: Params, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Pass:
        z, rate = _coded(autoencoder, params["autoencoder"], x, key)
        decoded = autoencoder.decode(params["autoencoder"], z)

        def judged(params: Params, pictures: Array) -> Judgement:
            judgement: Any = discriminator.apply(params, pictures, t)
            return judgement

        own, fixed = params["discriminator"], freeze(params["discriminator"])
        fake = judged(own, jax.lax.stop_gradient(decoded))
        return Pass(decoded, rate, lambda y: judged(fixed, y), judged(own, x), fake)

    network: Any = apply  # gives more than an array, which its objective knows
    return Net(jax.jit(init), network)


def objective(weights: Weights) -> Callable[..., Array]:
    """Equations (1) and (2) as the staged objective of an experiment: (key, network, x, cond, step=...) -> f32[b].

    Judged without a step, the adversarial terms count.
    """

    def loss(key: Key, network: Callable[..., Pass], x: Array, cond: Cond, *, step: Array | None = None) -> Array:
        p = network(x, jnp.zeros(x.shape[:1], x.dtype), cond)
        phi = freeze(p.judge(x).features)

        def reconstruction(decoded: Array) -> Array:
            return jnp.mean(jnp.abs(decoded - x)) + weights.features * feature_distance(p.judge(decoded).features, phi)

        def adversarial(decoded: Array) -> Array:
            return -jnp.mean(p.judge(decoded).logits)

        w = jnp.where(True if step is None else step >= weights.start, weights.adversarial, 0.0)
        total = reconstruction(p.decoded) + weights.rate * jnp.mean(p.rate)
        total += w * balance(reconstruction, adversarial, p.decoded) * adversarial(p.decoded)
        total += hinge(p.real.logits, p.fake.logits)
        return jnp.broadcast_to(total, x.shape[:1])

    return loss


def _coded(
    autoencoder: Autoencoder | VectorAutoencoder, params: Params, x: Array, key: Key | None
) -> tuple[Array, Array]:
    """What the decoder is given, and what it costs."""
    if isinstance(autoencoder, VectorAutoencoder):
        found = autoencoder.quantize(params, autoencoder.encode(params, x))
        return found.z, found.codebook + 0.25 * found.commitment
    q = autoencoder.encode(params, x)
    z = q.mean if key is None else draw_latent(fold(key, 2), q)
    return z, kl_to_standard(q) / x[0].size


def balance(first: Callable[[Array], Array], second: Callable[[Array], Array], x: Array) -> Array:
    """lambda of equation (2) at x, f32[] at most 10^4, a constant to gradients."""
    sizes = [jnp.linalg.norm(jnp.ravel(jax.grad(f)(jax.lax.stop_gradient(x)))) for f in (first, second)]
    return jax.lax.stop_gradient(jnp.minimum(sizes[0] / (sizes[1] + 1e-6), 1e4))


def beside_their_originals(x: Array, decoded: Array) -> Array:
    """Pictures with their reconstructions to the right: two f32[b, h, w, c] -> f32[b, h, 2 w, c]."""
    return jnp.concatenate([x, decoded], axis=2)
