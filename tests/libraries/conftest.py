"""Tests with libraries that users bring along: `make test-libraries` installs them beside the environment.

They are not installed in it: the mere presence of some changes what transformers imports, for every command.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "method"))  # for method_models, word_tokenizer

if not all(find_spec(library) for library in ("trl", "bitsandbytes", "torchao", "lmms_eval", "vlmeval")):
    collect_ignore_glob = ["test_*.py"]
