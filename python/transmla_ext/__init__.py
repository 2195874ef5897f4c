"""Multi-head latent attention for models that were trained without it."""
