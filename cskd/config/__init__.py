"""Configs: a strict schema of frozen dataclasses, read from YAML with dotted overrides. No torch in here."""

from cskd.config.load import from_dict as from_dict
from cskd.config.load import load_config as load_config
from cskd.config.load import read_config as read_config
from cskd.config.load import to_dict as to_dict
from cskd.config.load import to_yaml as to_yaml
from cskd.config.schema import CacheConfig as CacheConfig
from cskd.config.schema import Config as Config
from cskd.config.schema import DataConfig as DataConfig
from cskd.config.schema import LossConfig as LossConfig
from cskd.config.schema import RecipeConfig as RecipeConfig
from cskd.config.schema import StudentConfig as StudentConfig
from cskd.config.schema import TeacherConfig as TeacherConfig
from cskd.config.schema import TrainConfig as TrainConfig
