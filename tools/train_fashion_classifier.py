"""Make the frozen classifier of Fashion-MNIST that evaluation measures in. It was run once; its weights ship.

    python tools/train_fashion_classifier.py [OUT.npz]          about half an hour on two cores

AdamW with one cycle of the learning rate, 12 epochs in batches of 128, pictures mirrored and moved by up to two pixels
at random, labels smoothed by 0.1. Prints the accuracy on the real test set.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from diffusion_jax.evaluation.features import fashion_mnist
from diffusion_jax.training.data import batch_indices
from diffusion_jax.training.sources import tfds_images

EPOCHS, BATCH, RATE, MOVE, SMOOTH = 12, 128, 3e-3, 2, 0.1


def augmented(key, x):
    """Each picture mirrored with probability 1/2 and moved by up to `MOVE` pixels, white border of value -1."""
    k_flip, k_move = jax.random.split(key)
    flip = jax.random.bernoulli(k_flip, shape=(x.shape[0], 1, 1, 1))
    x = jnp.where(flip, x[:, :, ::-1], x)
    padded = jnp.pad(x, ((0, 0), (MOVE, MOVE), (MOVE, MOVE), (0, 0)), constant_values=-1.0)
    start = jax.random.randint(k_move, (x.shape[0], 2), 0, 2 * MOVE + 1)
    return jax.vmap(lambda p, s: jax.lax.dynamic_slice(p, (s[0], s[1], 0), x.shape[1:]))(padded, start)


def loss(params, key, x, labels):
    found = fashion_mnist.logits(params, fashion_mnist.hidden(params, augmented(key, x)))
    wanted = optax.smooth_labels(jax.nn.one_hot(labels, fashion_mnist.CLASSES), SMOOTH)
    return optax.softmax_cross_entropy(found, wanted).mean()


def main(out: Path) -> None:
    data = tfds_images("fashion_mnist")
    train, test = data.train, data.test
    n = len(train["label"])
    steps = EPOCHS * n // BATCH
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, RATE, 0.2), weight_decay=0.02)

    @jax.jit
    def step(params, state, i, images, labels):
        x = images.astype(jnp.float32) / 127.5 - 1.0
        value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(jax.random.key(1), i), x, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def guess(params, images):
        return jnp.argmax(fashion_mnist.logits(params, fashion_mnist.features(params, images)), axis=1)

    params = jax.jit(fashion_mnist.init)(jax.random.key(0))
    state, bar = optimizer.init(params), tqdm(range(steps), desc="training", mininterval=30)
    for i in bar:
        rows = batch_indices(0, i, n, BATCH)
        params, state, value = step(params, state, i, train["image"][rows], train["label"][rows])
        if i % 100 == 0:
            bar.set_postfix_str(f"loss {float(value):.4f}", refresh=False)
    found = np.concatenate([guess(params, test["image"][j : j + 500]) for j in range(0, len(test["label"]), 500)])
    print(f"test accuracy {np.mean(found == test['label']):.4f}")
    flat = {f"{layer}.{leaf}": np.asarray(a) for layer, leaves in params.items() for leaf, a in leaves.items()}
    np.savez(out, **flat)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else fashion_mnist.WEIGHTS)
