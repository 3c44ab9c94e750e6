"""How the embedded checkpoint is trained: `python -m granite_ray.quickstart.training`."""
