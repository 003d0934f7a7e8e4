"""Reads a folder of reference images with the queries of each image."""

from pathlib import Path

from command_line import naming
from PIL import Image
from text_files import read_json


def read_queries(folder: Path) -> dict[str, list[str]]:
    """Reads the `queries.json` in a folder of references: the queries of each image, by the name of its file."""
    file = folder / "queries.json"
    with naming("--references", file):
        queries = read_json(file)
        if not isinstance(queries, dict) or not all(
            isinstance(each, list) and each and all(isinstance(query, str) and query for query in each)
            for each in queries.values()
        ):
            raise ValueError('it has to be of the form {"image.png": ["first query", "second query"]}')
        for name in queries:
            Image.open(folder / name).close()
    return queries
