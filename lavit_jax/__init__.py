"""LaVIT in JAX: one language model that reads and writes text and images.

`lavit_jax.LaVIT` is the class that loads a model and does everything with it.
It is imported when it is first asked for, so that `import lavit_jax` is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from lavit_jax.infer.pipeline import LaVIT

__version__ = "0.1.0"
__all__ = ["LaVIT", "__version__"]


def __getattr__(name: str) -> Any:
  """Returns the public class `LaVIT`, imported on first use (PEP 562)."""
  if name == "LaVIT":
    return importlib.import_module("lavit_jax.infer.pipeline").LaVIT
  raise AttributeError(f"module 'lavit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  """Returns the module's names, those of `__all__` included."""
  return sorted({*globals(), *__all__})
