"""What a slab counts, and keeps over restarts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Counters:
    """Sums since the slab was made. Changed with the slab's lock held."""

    hits: int = 0
    missed_absent: int = 0
    missed_authentication: int = 0
    missed_tokens: int = 0
    missed_io: int = 0
    writes: int = 0
    touched: int = 0
    refused: int = 0
    evicted_space: int = 0
    evicted_age: int = 0
    evicted_orphan: int = 0
    evicted_forgotten: int = 0
    evicted_bad: int = 0
    io_errors: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0

    def as_mapping(self) -> Mapping[str, float]:
        """All counters by name."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, float]) -> "Counters":
        """Counters as they were written down; what is unknown or missing is zero."""
        counters = cls()
        for field in fields(cls):
            kind = float if field.name.endswith("seconds") else int
            setattr(counters, field.name, kind(values.get(field.name, 0)))
        return counters
