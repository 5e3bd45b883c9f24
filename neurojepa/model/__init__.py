"""tokens -> latents: encoder with sparse experts, predictor, sparse code."""
