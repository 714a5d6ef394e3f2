"""Settings: their types and bounds, which of them a sweep varies, and how they are typed."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# conf/ is next to the package in a clone, and inside it in an installed wheel
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())
