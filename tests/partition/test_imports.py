"""A plan can be made where no torch is installed: nothing in partition may load it, not even indirectly."""

import pkgutil
import subprocess
import sys

import partition

HEAVY = ("torch", "numpy", "ray", "transformers", "gguf", "safetensors")


def test_no_heavy_package_is_loaded():
    modules = [f"partition.{module.name}" for module in pkgutil.iter_modules(partition.__path__)]
    assert "partition.plan" in modules
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=partition.__path__[0] + "/.."
    )
    assert done.stdout.strip() == "[]"
