"""Measuring a model: pictures to features to numbers, and the commands around them."""
