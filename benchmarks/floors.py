"""The least that arithmetic allows: model FLOPs of the larger experiments, and examples a second at a chip's peak.

    python benchmarks/floors.py [CHIP]        a name of training/roofline.py, H100 by default

Operations of matrix products and convolutions, counted in the traced program; nothing is computed. One JSON line an
experiment: GFLOP an example in training (three times the forward pass), examples a second at the data sheet's peak, and
the same of sampling with 35 evaluations.
"""

import json
import sys

from diffusion_jax.experiment import find_experiment, loss_fn
from diffusion_jax.training.roofline import batch_shapes, find_chip, train_flops

EVALUATIONS = 35
EXPERIMENTS = [
    ("cifar10", {}), ("cifar10_edm", {}), ("imagenet256_dit_xl2", {"model": "B"}), ("imagenet256_dit_xl2", {}),
    ("imagenet64_edm2_s", {}),
]  # fmt: skip


def main(name: str) -> None:
    chip = find_chip(name)
    assert chip is not None, f"unknown chip {name}"
    for experiment, arguments in EXPERIMENTS:
        e = find_experiment(experiment)(batch=64, **arguments)
        flops = train_flops(e, loss_fn(e), batch_shapes(e)) / e.batch
        line = {"measurement": experiment, **arguments, "chip": chip.name, "train_gflop": round(flops / 1e9, 1)}
        line |= {"train_per_second": round(chip.flops / flops)}
        print(json.dumps(line | {"sample_per_second": round(3 * chip.flops / flops / EVALUATIONS)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "H100")
