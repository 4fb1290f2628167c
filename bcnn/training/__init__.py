"""Both stages of training, from a configuration."""
