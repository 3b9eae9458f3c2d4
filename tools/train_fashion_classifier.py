"""Make the frozen classifier of Fashion-MNIST that evaluation measures in. It was run once; its weights ship.

    python tools/train_fashion_classifier.py [OUT.npz]          about an hour on two cores

AdamW in four cycles of the learning rate: first the convolutions under a mean over the places, on pictures moved by up
to a pixel at random; then all layers, on the pictures as they are; then all on moved ones, twice. What a cycle came to
stays beside OUT, so that the script goes on behind it.
Two customs are left out on purpose, since they would blind the features: mirroring (a shoe that points the other way
is a wrong sample), and smoothed labels (they erase how examples of a class differ: Mueller et al. 2019,
arXiv:1906.02629). Prints the accuracy on the real test set, and the sha256 that the code is to know.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from diffusion_jax.evaluation.features import fashion_mnist
from diffusion_jax.evaluation.results import sha256
from diffusion_jax.training.data import batch_indices
from diffusion_jax.training.sources import tfds_images
from diffusion_jax.weights import trees


class Cycle(NamedTuple):
    """epochs of batches of so many pictures, moved by up to `move` pixels, with the peak learning `rate`.

    places: whether the dense layer learns, or stays the mean over the places that it begins as, without its SiLU.
    """

    epochs: int
    batch: int
    rate: float
    move: int
    places: bool


CYCLES = (
    Cycle(7, 128, 3e-3, 1, False),
    Cycle(3, 64, 1e-3, 0, True),
    Cycle(6, 64, 1e-3, 1, True),
    Cycle(9, 64, 1e-3, 1, True),
)


def moved(key, x, move):
    """Each picture moved by up to `move` pixels, its border filled with -1."""
    padded = jnp.pad(x, ((0, 0), (move, move), (move, move), (0, 0)), constant_values=-1.0)
    start = jax.random.randint(key, (x.shape[0], 2), 0, 2 * move + 1)
    return jax.vmap(lambda p, s: jax.lax.dynamic_slice(p, (s[0], s[1], 0), x.shape[1:]))(padded, start)


def loss(params, key, x, labels, cycle):
    x = moved(key, x, cycle.move)
    mean = jnp.mean(fashion_mnist.convolved(params, x), axis=(1, 2)) if not cycle.places else None
    found = fashion_mnist.logits(params, fashion_mnist.hidden(params, x) if cycle.places else mean)
    return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()


def trained(params, train, cycle, seed):
    """The parameters after a cycle."""
    n = len(train["label"])
    steps = cycle.epochs * n // cycle.batch
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, cycle.rate, 0.2), weight_decay=0.02)

    @jax.jit
    def step(params, state, i, images, labels):
        key = jax.random.fold_in(jax.random.key(seed + 1), i)
        value, grads = jax.value_and_grad(loss)(params, key, fashion_mnist.pixels(images), labels, cycle)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, bar = optimizer.init(params), tqdm(range(steps), desc="training", mininterval=30)
    for i in bar:
        rows = batch_indices(seed, i, n, cycle.batch)
        params, state, value = step(params, state, i, train["image"][rows], train["label"][rows])
        if i % 500 == 499:
            tqdm.write(f"step {i + 1}: accuracy on 2000 training pictures {accuracy(params, train, 2000):.4f}")
        if i % 20 == 0:
            bar.set_postfix_str(f"loss {float(value):.4f}", refresh=False)
    return params


def accuracy(params, test, n=None):
    guess = jax.jit(lambda images: jnp.argmax(fashion_mnist.fashion_mnist().apply(params, images)["logits"], axis=1))
    found = np.concatenate([guess(test["image"][j : j + 500]) for j in range(0, n or len(test["label"]), 500)])
    return float(np.mean(found == test["label"][:n]))


def main(out: Path) -> None:
    data = tfds_images("fashion_mnist")
    params = jax.jit(fashion_mnist.init)(jax.random.key(0))
    for i, cycle in enumerate(CYCLES):
        file = out.with_suffix(f".{i}.npz")
        if file.is_file():
            with np.load(file) as arrays:
                params |= trees.nested({tuple(name.split(".")): value for name, value in arrays.items()})
        else:
            params = trained(params, data.train, cycle, i)
            flat: dict[str, Any] = {".".join(path): np.asarray(value) for path, value in trees.leaves(params)}
            np.savez(file, **flat)
        print(f"cycle {i}: accuracy on the test set {accuracy(params, data.test):.4f}", flush=True)
    file.replace(out)
    print(f"sha256 {sha256(out)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else fashion_mnist.WEIGHTS)
