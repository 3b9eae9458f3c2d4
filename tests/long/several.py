"""One of several processes of a command, for test_hosts.py: python several.py COMMAND EXPERIMENT name=value …

With FED in the environment it writes the indices of every batch it has read to that file; with SILENCE, a process is
dead after so many seconds without a sign of life.
"""

import os
import sys

import numpy as np

from diffusion_jax.__main__ import main
from diffusion_jax.training import data, line, loop


def recorded(path):
    """`data.feed` that also keeps what it gives, one array of indices a step."""
    fed = []

    def feed(*arguments, **options):
        inner = data.feed(*arguments, **options)

        def give(k):
            batches = inner.next(k)
            fed.extend((inner.get_state()["step"] - k + i, batches["index"][i]) for i in range(k))
            np.savez(path, steps=[step for step, _ in fed], indices=[index for _, index in fed])
            return batches

        return inner._replace(next=give)

    return feed


if __name__ == "__main__":
    line.SILENCE = float(os.environ.get("SILENCE", line.SILENCE))
    if "FED" in os.environ:
        loop.feed = recorded(os.environ["FED"])
    sys.exit(main(sys.argv[1:]))
