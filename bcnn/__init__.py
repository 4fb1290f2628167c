"""Fine-grained image recognition with bilinear CNNs."""

from bcnn.model.weights import load_model

__all__ = ["load_model"]
