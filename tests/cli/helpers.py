"""What the tests of several commands use."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fork_server import shared_fork_server
from PIL import Image


def assert_refused(words: Sequence[str], lines: Sequence[str], folder: Path) -> None:
    """The command ends with 2 and prints these parts of lines; nothing is made in the folder."""
    done = shared_fork_server().run(words, folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for line in lines:
        assert line in done.stderr
    assert not list(folder.iterdir())


def rows(database: Path, query: str) -> list[tuple]:
    """What a query of SQLite gives."""
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def write_digits(folder: Path, count: int) -> list[Path]:
    """Some of scikit-learn's digits as PNG files, named by what they show."""
    from sklearn.datasets import load_digits

    images = load_digits()
    files = []
    for number in range(count):
        grey = (images.images[number] * 255 / 16).round().astype(np.uint8)
        files.append(folder / f"{number}-shows-{images.target[number]}.png")
        Image.fromarray(grey).save(files[-1])
    return files
