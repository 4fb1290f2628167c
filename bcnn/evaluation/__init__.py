"""Inference with a trained model, its metrics, and the files that present them."""
