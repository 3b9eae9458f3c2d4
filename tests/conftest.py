"""Every test runs with implicit broadcasting and implicit dtype promotion turned into errors."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
