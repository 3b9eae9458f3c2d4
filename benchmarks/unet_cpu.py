"""Train and sampling step of the DDPM U-Net against diffusers' PyTorch U-Net of the same shape, on one pinned core.

    make bench        (needs torch and diffusers: it runs in the environment of `make test-parity`)

Both make the same network (same names, same weights count), float32, batch 16 of 32x32x3, Adam. After a warm-up the two
take turns, and the medians are compared: ratio = PyTorch's time / ours, above 1 where we are faster. Prints one JSON
line a measurement.
"""

import json
import os
import sys

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import UNet2DModel

from diffusion_jax import cosine, denoising_loss, parameterize
from diffusion_jax.nets import count, unet

BATCH, ROUNDS, WIDTHS = 16, int(sys.argv[1]) if len(sys.argv) > 1 else 5, (64, 128, 128)


def ours():
    net = unet((32, 32, 3), channels=64, multipliers=(1, 2, 2), blocks=1)
    schedule, optimizer = cosine(), optax.adam(2e-4)

    def loss(params, x0, t, eps):
        denoiser = parameterize(lambda x, t, c: net.apply(params, x, t, c), schedule, "eps", time=lambda t: 1000 * t)
        return denoising_loss(denoiser, schedule, x0, t, eps).mean()

    @jax.jit
    def train(params, state, x0, t, eps):
        value, grads = jax.value_and_grad(loss)(params, x0, t, eps)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params = jax.jit(net.init)(jax.random.key(0))
    state = [params, optimizer.init(params)]
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.standard_normal((BATCH, 32, 32, 3)), jnp.float32) for _ in range(2))
    t = jnp.linspace(0.1, 0.9, BATCH)
    forward = jax.jit(net.apply)

    def step():
        state[0], state[1], value = train(*state, x0, t, eps)
        value.block_until_ready()

    return step, lambda: forward(state[0], x0, t).block_until_ready(), count(params)


def theirs():
    torch.set_num_threads(1)
    net = UNet2DModel(
        sample_size=32,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    optimizer = torch.optim.Adam(net.parameters(), 2e-4)
    x, eps, t = torch.randn(BATCH, 3, 32, 32), torch.randn(BATCH, 3, 32, 32), torch.linspace(100, 900, BATCH)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = ((net(x, t).sample - eps) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    def forward():
        with torch.no_grad():
            net(x, t)

    return step, forward, sum(p.numel() for p in net.parameters())


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    our_step, our_forward, our_size = ours()
    their_step, their_forward, their_size = theirs()
    assert our_size == their_size, f"not the same network: {our_size} and {their_size} parameters"
    for name, a, b in (("train step", our_step, their_step), ("sampling step", our_forward, their_forward)):
        a(), a(), b(), b()
        pairs = [(timed(a), timed(b)) for _ in range(ROUNDS)]
        mine, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
        line = {"measurement": name, "ratio": round(peer / mine, 3), "parameters": our_size, "batch": BATCH}
        print(json.dumps(line | {"seconds": round(mine, 3), "peer_seconds": round(peer, 3), "rounds": ROUNDS}))


if __name__ == "__main__":
    main()
