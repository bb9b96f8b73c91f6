"""Distillation from Python, for any models and data: `kd.common.distill`."""
