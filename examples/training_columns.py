"""The columns of training rows, and limits for their content, for the modules that read training sets."""

from collections.abc import Callable


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# If a row could not be read, this column holds the reason. A metadata file is unlikely to use this name.
ERROR_COLUMN = "__error__"
# Limits for one row, for one text file in a shard, and for one text in a row. Without limits, a shard of 2 KB could
# require 20 GB of memory.
MAX_ROW_BYTES = 2**27
MAX_TEXT_BYTES = 2**20
MAX_TEXT = 2**15
MAX_SUBJECTS = 16


def own_columns(columns: dict) -> dict:
    """Removes columns with names that start with `__`. These names are reserved for internal use."""
    return {name: value for name, value in columns.items() if not name.startswith("__")}


def with_lists(row: dict) -> dict:
    """Combines the columns `name.0`, `name.1`, ... into one list in `name`."""
    columns, lists = {}, {}
    for name, value in row.items():
        stem, _, number = name.rpartition(".")
        if stem and number.isdecimal() and len(number) < 9:
            lists.setdefault(stem, {})[int(number)] = value
        else:
            columns[name] = value
    return {**columns, **{stem: [values[number] for number in sorted(values)] for stem, values in lists.items()}}


def row_or_error(read: Callable[[], dict]) -> dict:
    """Returns the row that a function reads, or a row with the reason in `ERROR_COLUMN` if it cannot be read."""
    try:
        return read()
    except Exception as error:  # such as a text in a table that is not UTF-8
        return {ERROR_COLUMN: f"cannot be read: {error}"}
