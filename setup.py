"""Gives every domain folder, any with scripts/, an importable name: image-classification -> image_classification."""

from pathlib import Path

from setuptools import setup

domains = {folder.parent.name.lower().replace("-", "_"): folder.parent.name for folder in Path().glob("*/scripts")}
setup(packages=["common", *domains], package_dir=domains)
