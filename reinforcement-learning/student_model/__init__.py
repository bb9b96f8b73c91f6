"""Student policies: networks, distillation and evaluation."""
