"""What each option of the diffusion transformer costs and brings, on one processor core, at a small size.

    python benchmarks/dit_options.py [steps] [seeds]

One JSON line an option. At the size of DiT-B/2, without computing anything: parameters, and the floating-point
operations of one evaluation. At 4 blocks of width 64 on digits, 8x8 pixels in patches of 2: seconds to compile a
training step, its processor time against plain DiT's (the two take turns, medians; below 1 is faster), and the mean
square error of the velocity on held-out digits, with fixed noise and times, after `steps` steps: mean and half range
over the seeds.
"""

import json
import os
import sys

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import denoising_loss, parameterize, rectified
from diffusion_jax.nets import count, dit
from diffusion_jax.training.sources import digits

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
SEEDS = int(sys.argv[2]) if len(sys.argv) > 2 else 2
BATCH, ROUNDS, SCHEDULE = 64, 15, rectified()
KIT = {"norm": "rms", "rotary": True, "qk_norm": True, "swiglu": True}
OPTIONS = {
    "plain": {},
    "RMSNorm": {"norm": "rms"},
    "rotary instead of added positions": {"rotary": True, "position": False},
    "rotary and added positions": {"rotary": True},
    "QK-norm": {"qk_norm": True},
    "SwiGLU": {"swiglu": True},
    "label in context, 4 tokens from block 1": {"in_context": (4, 1)},
    "all of these": {**KIT, "in_context": (4, 1)},
    "bottleneck of rank 8": {"bottleneck": 8},
    "three products for q, k, v": {"split_qkv": True},
    "scan": {"scan": True},
    "remat dots": {"remat": "dots"},
    "remat full": {"remat": "full"},
    "x0 predicted": {"predicts": "x0"},
    "patches of 4": {"patch": 4},
    "patches of 4, x0 predicted": {"patch": 4, "predicts": "x0"},
    "patches of 4, x0 predicted, all of these": {"patch": 4, "predicts": "x0", **KIT, "in_context": (4, 1)},
}
DATA = digits()
TRAIN, TEST = ((jnp.asarray(part["image"], jnp.float32) / 127.5 - 1, part["label"]) for part in (DATA.train, DATA.test))


def error(net, predicts, params, x0, labels, t, eps):
    """Mean square of the error of the velocity."""
    bound = parameterize(partial(net.apply, params), SCHEDULE, predicts, time=lambda t: 1000 * t)
    return jnp.mean(denoising_loss(bound, SCHEDULE, x0, t, eps, labels, target="velocity"))


def draw(key, n):
    """Times away from data, where x0 is known and the velocity is not, and noise."""
    keys = jax.random.split(key)
    return jax.random.uniform(keys[0], (n,), minval=0.05), jax.random.normal(keys[1], (n, 8, 8, 1))


def make(predicts="velocity", patch=2, **options):
    """A compiled training step, its state's start, the error on held-out digits, seconds of compilation."""
    net = dit((4, 64, 4), patch, (8, 8, 1), classes=10, learned_variance=False, **options)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-3, STEPS // 10, STEPS + 1))
    images, labels = TRAIN[0], jnp.asarray(TRAIN[1])

    @partial(jax.jit, donate_argnums=0)
    def step(state, key):
        keys = jax.random.split(key)
        rows = jax.random.randint(keys[0], (BATCH,), 0, len(images))
        loss = partial(error, net, predicts)
        grads = jax.grad(loss)(state[0], images[rows], labels[rows], *draw(keys[1], BATCH))
        updates, moments = optimizer.update(grads, state[1])
        return optax.apply_updates(state[0], updates), moments

    def start(seed):
        params = net.init(jax.random.key(seed))
        return params, optimizer.init(params)

    begin = time.perf_counter()
    compiled = step.lower(start(0), jax.random.key(0)).compile()
    seconds = time.perf_counter() - begin
    t, eps = draw(jax.random.key(99), len(TEST[0]))
    score = jax.jit(lambda params: error(net, predicts, params, TEST[0], jnp.asarray(TEST[1]), t, eps))
    return compiled, start, score, seconds


def trained(step, start, score, seed):
    state = start(seed)
    for i in range(STEPS):
        state = step(state, jax.random.fold_in(jax.random.key(seed), i))
    return float(score(state[0]))


def timed(step, state):
    """Processor seconds of a step, and the state after it."""
    begin = time.process_time()
    state = jax.block_until_ready(step(state, jax.random.key(0)))
    return time.process_time() - begin, state


def at_full_size(predicts="velocity", patch=2, **options):
    """Parameters, and GFLOP of one evaluation, of a B with these options; a scanned block would count once."""
    net = dit("B", patch, **{**options, "scan": False})
    params = jax.eval_shape(net.init, jax.random.key(0))
    x, t = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    cost = jax.jit(net.apply).lower(params, x, t).cost_analysis()
    return count(params), cost["flops"] / 1e9


def main() -> None:
    plain, plain_start, *_ = make()
    for name, options in OPTIONS.items():
        parameters, gflop = at_full_size(**options)
        step, start, score, seconds = make(**options)
        states, times = [start(0), plain_start(0)], ([], [])
        for _ in range(ROUNDS + 2):
            for i, f in enumerate((step, plain)):
                spent, states[i] = timed(f, states[i])
                times[i].append(spent)
        mine, theirs = (statistics.median(column[2:]) for column in times)
        losses = [trained(step, start, score, seed) for seed in range(SEEDS)]
        line = {"measurement": "dit option", "option": name, "b_parameters": parameters, "b_gflop": round(gflop, 2)}
        line |= {
            "step_ratio": round(mine / theirs, 3),
            "step_ms": round(1000 * mine, 1),
            "compile_s": round(seconds, 1),
        }
        line |= {
            "test_error": round(statistics.mean(losses), 4),
            "half_range": round((max(losses) - min(losses)) / 2, 4),
        }
        print(json.dumps(line | {"steps": STEPS, "batch": BATCH, "dtype": "float32"}), flush=True)


if __name__ == "__main__":
    main()
