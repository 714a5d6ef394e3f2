"""Settings: their types and bounds, which a sweep varies, and how they are typed."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# in a clone conf/ lies beside the package, in a wheel inside it
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())
