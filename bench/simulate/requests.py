"""One simulated request: what is asked, and its times."""

from dataclasses import dataclass

from bench.serving.outcome import Answered


@dataclass(kw_only=True, slots=True, eq=False)
class SimRequest:
    """Times are of the simulation's clock; 0 where it has not come so far."""

    number: int
    at_s: float
    """When it arrives."""
    num_prompt_tokens: int
    num_new_tokens: int
    num_chains: int
    reserved_s: float = 0.0
    """It has its pages."""
    prefilled_s: float = 0.0
    """Its prompt's keys and values are there."""
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    longest_gap_s: float = 0.0
    error: str = ""
    """Why it was refused."""

    @property
    def name(self) -> str:
        """Its id."""
        return str(self.number)

    @property
    def ttft_s(self) -> float | None:
        """To the first token."""
        return self.first_token_s - self.at_s if self.last_token_s else None

    @property
    def tpot_s(self) -> float | None:
        """A token after the first; None without a second."""
        if self.num_new_tokens < 2 or not self.last_token_s:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_new_tokens - 1)

    def answered(self) -> Answered:
        """As the benchmark of real clusters notes it."""
        is_refused, tpot_s = bool(self.error), self.tpot_s
        return Answered(
            at_s=self.at_s,
            sent_late_s=0.0,
            num_prompt_tokens=self.num_prompt_tokens,
            prefix=None,
            max_new_tokens=self.num_new_tokens,
            num_new_tokens=0 if is_refused else self.num_new_tokens,
            outcome="refused" if is_refused else "finished",
            error=self.error,
            ttft_s=self.ttft_s,
            tpot_s=tpot_s,
            longest_gap_s=None if tpot_s is None else self.longest_gap_s,
            total_s=0.0 if is_refused else self.last_token_s - self.at_s,
            queue_s=None if is_refused else max(0.0, self.reserved_s - self.at_s),
        )
