"""What an engine has done so far, counted as it goes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class PhaseStats:
    """The steps of one program: `steps` of them took `seconds`."""

    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Stats:
    """An engine at one moment: what is in it now, and what it has done since it was loaded."""

    waiting: int = 0
    """Requests in line."""

    running: int = 0
    """Requests with a place."""

    pages_in_use: int = 0
    """Pages of the KV pool that requests hold."""

    pages: int = 0
    """Pages of the KV pool."""

    finished: int = 0
    """Requests that were decoded to their end."""

    cancelled: int = 0
    """Requests that were cancelled, or not done at their deadline."""

    failed: int = 0
    """Requests whose step failed."""

    refused: int = 0
    """Requests that were not taken: they could never be served, or the line was full."""

    preemptions: int = 0
    """Places that were taken from a request for a more urgent one."""

    tokens: int = 0
    """Tokens committed."""

    phases: Mapping[str, PhaseStats] = field(default_factory=dict)
    """Steps and their seconds by the program that ran: "dense", "refresh", "reuse", or "mixed" of both."""

    @property
    def steps(self) -> int:
        """Steps run."""
        return sum(phase.steps for phase in self.phases.values())

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens committed a second of steps; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def since(self, earlier: "Stats") -> "Stats":
        """What was done since an earlier moment; what is in the engine now stays."""
        done = ("finished", "cancelled", "failed", "refused", "preemptions", "tokens")
        phases = {}
        for name, phase in self.phases.items():
            before = earlier.phases.get(name, PhaseStats())
            phases[name] = PhaseStats(phase.steps - before.steps, phase.seconds - before.seconds)
        changed = {name: getattr(self, name) - getattr(earlier, name) for name in done}
        return replace(self, **changed, phases=phases)


class Metrics:
    """The counters behind `Stats`."""

    def __init__(self) -> None:
        self.finished = self.cancelled = self.failed = self.refused = self.tokens = 0
        self._phases: dict[str, PhaseStats] = {}

    def stepped(self, phase: str, seconds: float, tokens: int) -> None:
        """Count a step."""
        before = self._phases.get(phase, PhaseStats())
        self._phases[phase] = PhaseStats(before.steps + 1, before.seconds + seconds)
        self.tokens += tokens

    @property
    def steps(self) -> int:
        """Steps counted."""
        return sum(phase.steps for phase in self._phases.values())

    def snapshot(self, waiting: int, running: int, pages_in_use: int, pages: int, preemptions: int) -> Stats:
        """All of it at once, with what is in the engine now."""
        return Stats(
            waiting=waiting,
            running=running,
            pages_in_use=pages_in_use,
            pages=pages,
            finished=self.finished,
            cancelled=self.cancelled,
            failed=self.failed,
            refused=self.refused,
            preemptions=preemptions,
            tokens=self.tokens,
            phases=dict(self._phases),
        )
