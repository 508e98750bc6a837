"""transformers' own common tests, as they were for the installed version: downloaded, mounted, never committed.

The wheel does not carry them. The sdist carries `tests/test_*.py` without the subfolders that they import; what
is missing is stubbed: export tests and generation tests (not in the sdist at all), sample configs and hub pictures.
"""

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import warnings
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from acformer.fetch.embedded import cache_dir
from acformer.files import locked, whole_folder

PACKAGE = "transformers_tests"


def mount(name: str) -> ModuleType:
    """Module `name` of transformers' `tests` folder; skips the calling module where it cannot be downloaded."""
    if PACKAGE not in sys.modules:
        _add_package(_download())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(f"{PACKAGE}.{name}")


def _download() -> Path:
    """`<cache>/transformers-sdist/<version>/`, with the sdist's tests."""
    folder = cache_dir() / "transformers-sdist" / version("transformers")
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory() as scratch, whole_folder(folder) as staging:
                with tarfile.open(_fetch_sdist(Path(scratch))) as sdist:
                    for member in sdist:
                        path = Path(member.name)
                        if member.isfile() and path.match("*/tests/test_*.py") and len(path.parts) == 3:
                            (staging / path.name).write_bytes(sdist.extractfile(member).read())
                (staging / "__init__.py").touch()
    return folder


def _fetch_sdist(folder: Path) -> Path:
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={version('transformers')}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"transformers' sdist cannot be downloaded: {reason}", allow_module_level=True)
    return next(folder.glob("*.tar.gz"))


def _add_package(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    _stub(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stub(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stub(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
    _stub("fetch_hub_objects_for_ci", url_to_local_path=_local_sample)


def _stub(name: str, **content: Any) -> None:
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        sys.modules[parent] = ModuleType(parent)
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def _local_sample(url: str) -> str:
    """A picture of noise for a picture's address; sound and film are not asked for by our processor."""
    if not url.endswith(".png"):
        return url
    path = Path(tempfile.gettempdir()) / f"acformer-conformance-{Path(url).name}"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)).save(path)
    return str(path)
