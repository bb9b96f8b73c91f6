"""A domain's folder and the name that it is imported under."""


def import_name(folder: str) -> str:
    """image-classification -> image_classification, as setup.py has it."""
    return folder.lower().replace("-", "_")
