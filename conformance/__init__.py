"""Every sampler, likelihood and inverse-problem method, measured against exact answers: `make conformance`."""
