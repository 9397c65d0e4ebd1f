"""A folder with a folder of images for each class, as a table."""
import os
from pathlib import Path

import pandas as pd

from timm_multilabel.data.folders import images_of_folder
from timm_multilabel.errors import DataError, escaped, is_utf8
from timm_multilabel.places import Address, folders_in


def has_class_folders(folder: Path) -> bool:
    """Whether a folder has folders in it, as one of classes does."""
    if isinstance(folder, Address):
        return any(not name.startswith('.') for name in folders_in(str(folder)))
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_dir() and not entry.name.startswith('.') for entry in entries)
    except OSError:
        return False


def read_class_folders(folder: Path, image_column: str, head: str) -> pd.DataFrame:
    """The images in the folders of a folder, each labelled with the name of the folder, as a table of two columns.

    Images may lie in folders below that of their class.

    Args:
        folder: The folder of folders.
        image_column: The column of the image paths, which are relative to the folder.
        head: The column of the classes.

    Returns:
        Rows that all have the number 0, since they stand in no file.

    Raises:
        DataError: There are no images, an image is in no folder, or a class has a name that cannot be shown.
    """
    if head == image_column:
        raise DataError(f'--class-head {head}: the column of the images is called so; choose another name')
    start = os.path.join(folder, '')
    paths = [path.removeprefix(start) for path in images_of_folder(folder, lambda line: None)]
    classes = [path.partition(os.sep)[0] if os.sep in path else '' for path in paths]
    without = [path for path, name in zip(paths, classes) if not name]
    if without:
        raise DataError(f'{folder / without[0]}: of no class; move it into the folder of its class, or write a CSV '
                        f'(there are {len(without)} such images)')
    for name in dict.fromkeys(classes):
        if not is_utf8(name) or not name.isprintable() or name != name.strip():
            raise DataError(f'{escaped(folder / name)}: this name of a class holds blanks around it or a character '
                            'that cannot be shown; rename the folder')
    return pd.DataFrame({image_column: paths, head: classes}, [0] * len(paths), dtype=object)
