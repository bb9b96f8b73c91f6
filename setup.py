"""Import names: the core is kd.common, and every domain, a folder with scripts/, is kd.NAME: image-classification is
kd.image_classification.
"""

from pathlib import Path

from setuptools import find_packages, setup

folders = {"common": "common"} | {
    scripts.parent.name.lower().replace("-", "_"): scripts.parent.name for scripts in Path().glob("*/scripts")
}
setup(
    package_dir={f"kd.{name}": folder for name, folder in folders.items()},
    packages=[f"kd.{name}" for name in folders]
    + [f"kd.{name}.{part}" for name, folder in folders.items() for part in find_packages(folder)],
    package_data={"": ["*.yaml", "*.sh", "*.pyi", "weights/*/*"]},
)
