"""Time limit, hang timeout and loss-spike threshold of a job."""

import re
from dataclasses import dataclass
from typing import Optional

from aligner.common.errors import ConfigError


@dataclass(kw_only=True)
class Limits:
    """Limits of one job.

    Args:
        max_time_per_run: `[DD:]HH:MM:SS` after which the job saves and exits with code 75, to be run again. None: no
            limit. The last step ends within the limit, but at least one step is made; leave room for saving.
        hang_timeout_s: seconds without progress after which every rank reports its position. 0: never.
        loss_spike_std: report a loss this many standard deviations above the mean of the last steps. 0: never.

    Raises:
        ConfigError: a value is negative, or `max_time_per_run` is not a positive time.
    """

    max_time_per_run: Optional[str] = None
    hang_timeout_s: float = 600.0
    loss_spike_std: float = 6.0

    def __post_init__(self) -> None:
        for name in ("hang_timeout_s", "loss_spike_std"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"limits.{name}: must not be negative, found {getattr(self, name)}")
        if self.seconds is not None and self.seconds <= 0:
            raise ConfigError(f"limits.max_time_per_run: must be more than 0, found {self.max_time_per_run!r}")

    @property
    def seconds(self) -> float | None:
        """`max_time_per_run` in seconds."""
        if self.max_time_per_run is None:
            return None
        parts = re.fullmatch(r"(?:(\d+):)?(\d+):(\d\d):(\d\d)", str(self.max_time_per_run))
        if parts is None:
            raise ConfigError(
                f"limits.max_time_per_run: {self.max_time_per_run!r} is not a time; write [DD:]HH:MM:SS, as 03:45:00"
            )
        days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
