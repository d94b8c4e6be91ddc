"""Typed configuration: every key that YAML or an override may set, with type, default and allowed values.

`load` turns Hydra's `DictConfig` into these classes once; nothing after it sees a dictionary.
"""

from mixlora_cli.config.commands import *  # noqa: F403
from mixlora_cli.config.groups import *  # noqa: F403
from mixlora_cli.config.settings import Settings as Settings
from mixlora_cli.config.settings import Text as Text
from mixlora_cli.config.settings import load as load
from mixlora_cli.config.settings import parse as parse
