"""What several test files share."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack_cifar10.py"


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the real CIFAR-10 as torchvision's files: DATA_DIR, or unpacked from ../shared; else skipped."""
    given = Path(os.environ.get("DATA_DIR", ""))
    if (given / "cifar-10-batches-py").is_dir():
        yield given
        return
    if not UNPACK.is_file():
        pytest.skip(f"no CIFAR-10: set DATA_DIR to the folder of cifar-10-batches-py (nor is there {UNPACK})")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(UNPACK), str(folder)], check=True, stdout=subprocess.DEVNULL)
    yield folder
    shutil.rmtree(folder)  # 184 MB, which pytest would keep for three sessions
