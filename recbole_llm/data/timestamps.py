"""What the timestamps of a data set are, and the days that they name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Timestamps:
    """How the values that models see become points in time.

    Attributes:
        units_per_second: how many units are a second; None where they are mere ranks.
        offset, scale: of a rescaling, which dates undo.
    """

    units_per_second: int | None
    offset: float = 0.0
    scale: float = 1.0

    @property
    def are_dates(self) -> bool:
        """Whether they are points in time."""
        return self.units_per_second is not None

    def days(self, values: np.ndarray) -> list[str]:
        """The day (UTC) of each value, any shape, as ``YYYY-MM-DD``.

        Raises:
            ValueError: they are no dates.
        """
        if self.units_per_second is None:
            raise ValueError("this dataset's timestamps are ranks, not dates: look at has_dates before item_dates")
        times = np.asarray(values, np.float64).ravel() * self.scale + self.offset
        # Undoing a rescaling leaves tiny errors, which must not push midnight into the day before.
        days = np.round(times, 3) // (_SECONDS_PER_DAY * self.units_per_second)
        return np.datetime_as_string(days.astype("datetime64[D]")).tolist()
