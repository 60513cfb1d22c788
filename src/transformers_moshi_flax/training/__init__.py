"""Training of Moshi: data, objective, step and loop."""
