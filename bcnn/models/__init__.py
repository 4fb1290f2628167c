"""The network: backbone, pooling, head; its files of weights; attribution; export."""
