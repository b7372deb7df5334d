"""Files that would run something when they are read; a run's checkpoint to put them into."""

import os
from pathlib import Path
from typing import Any


class Call:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Payload(Call):
    """Its pickle creates a file when it is loaded."""

    def __init__(self, marker: Path, function: Any = os.system) -> None:
        super().__init__(function, f"touch {marker}")
