"""Whether LIBERO is there, asked before anything else is done.

LIBERO asks questions when it is imported for the first time, and fetches its meshes when the first simulator starts.
Here it does neither: what is missing is said, and what it would ask for is answered for this process.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

ASSETS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
"""Folders that LIBERO's meshes and textures lie in."""
ASSETS_REPOSITORY = "lerobot/libero-assets"
"""The data set on the Hugging Face hub that LIBERO would fetch them from."""

_CONFIG_VARIABLE, _CONFIG_FILE = "LIBERO_CONFIG_PATH", "config.yaml"
_MODULES = {"libero": "hf-libero", "robosuite": "robosuite", "bddl": "bddl", "lerobot": "lerobot"}


class LiberoError(RuntimeError):
    """LIBERO or its assets are not installed; the message says what to install, and where."""


def check_installation() -> None:
    """Raise `LiberoError` unless episodes can run; nothing is asked, fetched or written to a home directory."""
    if missing := [name for module, name in _MODULES.items() if find_spec(module) is None]:
        raise LiberoError(
            f"LIBERO needs {', '.join(missing)}: pip install 'omega-qvla[policies,libero]' (Linux, with cmake and a "
            "compiler)"
        )
    _check_assets()
    prepare_import()


def prepare_import() -> None:
    """Make `import libero.libero` quiet: tell it its folders, unless its user has.

    Raises `LiberoError` if it is not installed or its user's configuration names folders that do not exist.
    """
    config = _config_directory() / _CONFIG_FILE
    if not config.is_file():
        config = _own_configuration()
        os.environ[_CONFIG_VARIABLE] = str(config.parent)  # inherited by worker processes
    for key in ("bddl_files", "init_states"):
        if not Path(_read(config).get(key, "")).is_dir():
            raise LiberoError(
                f"{config} names no folder as {key}: correct it, or remove the file to use LIBERO's own folders"
            )


def _check_assets() -> None:
    places = (_package() / "assets", Path.home() / ".cache" / "libero" / "assets")
    for place in places:
        if place.is_dir():  # the first that exists is what LIBERO takes
            if missing := [folder for folder in ASSETS if not (place / folder).is_dir()]:
                raise LiberoError(f"{place} lacks {', '.join(missing)}: copy all of LIBERO's assets there")
            return
    raise LiberoError(
        "LIBERO's meshes and textures are not installed: put them into "
        f"{places[1]} (hf download {ASSETS_REPOSITORY} --repo-type dataset --local-dir {places[1]}) "
        f"or, from LIBERO's own repository, into {places[0]}"
    )


def _package() -> Path:
    """Where LIBERO's files lie, found without importing it."""
    spec = find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise LiberoError("LIBERO is not installed: pip install 'omega-qvla[policies,libero]'")
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def _config_directory() -> Path:
    return Path(os.environ.get(_CONFIG_VARIABLE, Path.home() / ".libero"))


def _own_configuration() -> Path:
    """LIBERO's own folders, for as long as this process lives."""
    package = _package()
    folders = {
        "benchmark_root": package,
        "bddl_files": package / "bddl_files",
        "init_states": package / "init_files",
        "datasets": package.parent / "datasets",
        "assets": package / "assets",
    }
    directory = Path(tempfile.mkdtemp(prefix="omega-qvla-libero-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    config = directory / _CONFIG_FILE
    config.write_text(json.dumps({key: str(folder) for key, folder in folders.items()}))  # JSON is YAML
    return config


def _read(config: Path) -> dict[str, str]:
    import yaml

    try:
        found = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise LiberoError(f"{config} is no YAML: {error}") from error
    return found if isinstance(found, dict) else {}
