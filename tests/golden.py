"""Values made with the authors' code: of ``$MLC_GOLDEN`` if it is set, else of ``tests/golden``."""

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("MLC_GOLDEN", Path(__file__).parent / "golden"))


def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())
