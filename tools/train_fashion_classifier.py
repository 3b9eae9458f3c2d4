"""Make the frozen classifier of Fashion-MNIST that evaluation measures in. It was run once; its weights ship.

    python tools/train_fashion_classifier.py [OUT.npz]          about half an hour on two cores

AdamW with one cycle of the learning rate, 7 epochs in batches of 128, pictures moved by up to a pixel at random.
Two customs are left out on purpose, since they would blind the features: mirroring (a shoe that points the other way
is a wrong sample), and smoothed labels (they erase how examples of a class differ: Mueller et al. 2019,
arXiv:1906.02629). Prints the accuracy on the real test set, and the sha256 that the code is to know.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from diffusion_jax.evaluation.features import fashion_mnist
from diffusion_jax.evaluation.results import sha256
from diffusion_jax.training.data import batch_indices
from diffusion_jax.training.sources import tfds_images

EPOCHS, BATCH, RATE, MOVE = 7, 128, 3e-3, 1


def moved(key, x):
    """Each picture moved by up to `MOVE` pixels, its border filled with -1."""
    padded = jnp.pad(x, ((0, 0), (MOVE, MOVE), (MOVE, MOVE), (0, 0)), constant_values=-1.0)
    start = jax.random.randint(key, (x.shape[0], 2), 0, 2 * MOVE + 1)
    return jax.vmap(lambda p, s: jax.lax.dynamic_slice(p, (s[0], s[1], 0), x.shape[1:]))(padded, start)


def loss(params, key, x, labels):
    found = fashion_mnist.logits(params, fashion_mnist.hidden(params, moved(key, x)))
    return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()


def main(out: Path) -> None:
    data, net = tfds_images("fashion_mnist"), fashion_mnist.fashion_mnist()
    train, test = data.train, data.test
    n = len(train["label"])
    steps = EPOCHS * n // BATCH
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, RATE, 0.2), weight_decay=0.02)

    @jax.jit
    def step(params, state, i, images, labels):
        key = jax.random.fold_in(jax.random.key(1), i)
        value, grads = jax.value_and_grad(loss)(params, key, fashion_mnist.pixels(images), labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def guess(params, images):
        return jnp.argmax(net.apply(params, images)["logits"], axis=1)

    params = jax.jit(fashion_mnist.init)(jax.random.key(0))
    state, bar = optimizer.init(params), tqdm(range(steps), desc="training", mininterval=30)
    for i in bar:
        rows = batch_indices(0, i, n, BATCH)
        params, state, value = step(params, state, i, train["image"][rows], train["label"][rows])
        if i % 20 == 0:
            bar.set_postfix_str(f"loss {float(value):.4f}", refresh=False)
    found = np.concatenate([guess(params, test["image"][j : j + 500]) for j in range(0, len(test["label"]), 500)])
    print(f"test accuracy {np.mean(found == test['label']):.4f}")
    flat = {f"{layer}.{leaf}": np.asarray(a) for layer, leaves in params.items() for leaf, a in leaves.items()}
    np.savez(out, **flat)
    print(f"sha256 {sha256(out)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else fashion_mnist.WEIGHTS)
