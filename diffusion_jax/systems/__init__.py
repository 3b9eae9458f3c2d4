"""Whole systems: networks, schedule, sampler and guidance put together as pure functions of parameters."""
