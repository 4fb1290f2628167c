"""The network: backbone, pooling, head; its files of weights; the evidence for its answers."""
