"""runtime/sm12x/assemble.py, loaded by path: building needs that one file, not the package and its
dependencies.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from . import ROOT

_NAME = "sm12x_build_assemble"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, ROOT / "runtime" / "sm12x" / "assemble.py")
    if spec is None or spec.loader is None:
        raise ImportError("runtime/sm12x/assemble.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module  # dataclasses look their module up while it is being executed
    spec.loader.exec_module(module)
    return module


_module = _load()
Assembled = _module.Assembled
AssemblyError = _module.AssemblyError
assemble = _module.assemble
tool_version = _module.tool_version
