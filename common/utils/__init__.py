"""Errors, files, folders, devices, ranges of arguments, and how a script starts and ends."""


def import_name(folder: str) -> str:
    """The name under which the folder of a domain is imported: image-classification -> image_classification."""
    return folder.lower().replace("-", "_")
