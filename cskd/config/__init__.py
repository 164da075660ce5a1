"""Configs: a strict schema of frozen dataclasses, read from YAML with dotted overrides. No torch in here."""

from cskd.config.load import Config, from_dict, load_config, to_dict, to_yaml
from cskd.config.schema import (
    CacheConfig,
    DataConfig,
    LossConfig,
    RecipeConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "CacheConfig",
    "Config",
    "DataConfig",
    "LossConfig",
    "RecipeConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "from_dict",
    "load_config",
    "to_dict",
    "to_yaml",
]
