"""Precision, devices, safe files, the torchvision shim."""
