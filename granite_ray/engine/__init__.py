"""Engines behind the `LLM` protocol: many calls in flight, one model, batched together.

`factory.make_engine` is the door. Importing this package loads no torch.
"""
