"""The Granite decoder in torch: what a checkpoint says, its weights, and one forward pass.

Knows tensors and shapes. Who runs when is decided in `engine`.
"""
