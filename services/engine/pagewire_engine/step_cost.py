"""What a step costs on this worker, fitted from its own step times; the router's cost model."""

from __future__ import annotations

from pagewire.v1 import worker_pb2 as pb


class LinearFit:
    """y = base + slope * x by least squares with exponential forgetting (half-life about 70 steps)."""

    _KEEP = 0.99
    _LEAST_SLOPE = 0.05  # of y / x: noise must not make more work look free, or all of it goes to one worker

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self.num_samples = 0

    def add(self, x: float, y: float) -> None:
        k = self._KEEP
        self.num_samples += 1
        self._n, self._x, self._y = k * self._n + 1, k * self._x + x, k * self._y + y
        self._xx, self._xy = k * self._xx + x * x, k * self._xy + x * y

    @property
    def mean(self) -> tuple[float, float]:
        """(x, y); (0, 0) before anything was added."""
        return (self._x / self._n, self._y / self._n) if self._n else (0.0, 0.0)

    def fit(self) -> tuple[float, float]:
        """(base, slope), neither negative; (0, 0) before anything was added."""
        if not self._n:
            return 0.0, 0.0
        mean_x, mean_y = self.mean
        variance = self._xx / self._n - mean_x**2
        if variance <= 1e-9 * max(mean_x**2, 1.0):  # one size only: all of it is slope
            return 0.0, mean_y / mean_x if mean_x else 0.0
        least = self._LEAST_SLOPE * mean_y / mean_x
        slope = max((self._xy / self._n - mean_x * mean_y) / variance, least)
        return max(mean_y - slope * mean_x, 0.0), slope


class StepCost:
    """Prefill steps by their tokens, decode steps by their sequences.

    A mixed step tells of prefill once decode is known: its time less that of its decoding sequences' share.

    A step that took far longer than the ones before it tells of the machine, not of the model, and counts
    as OUTLIER times the expected: a worker that was held up once must not look slow for a hundred steps.
    """

    _OUTLIER = 3.0
    _ENOUGH = 4  # steps after which something is expected
    _REACH = 2.0  # times the mean chunk: how far costs are extrapolated
    _LEAST_SHARE = 0.1  # of a mixed step's time that is the prompt's, however slow decoding looks

    def __init__(self) -> None:
        self._prefill, self._decode = LinearFit(), LinearFit()

    def add(self, num_prefill_tokens: int, num_decode: int, milliseconds: float) -> None:
        if num_prefill_tokens and not num_decode:
            self._add(self._prefill, num_prefill_tokens, milliseconds)
        elif num_decode and not num_prefill_tokens:
            self._add(self._decode, num_decode, milliseconds)
        elif num_prefill_tokens and self._decode.num_samples >= self._ENOUGH:
            _, per_sequence = self._decode.fit()
            rest = max(milliseconds - per_sequence * num_decode, self._LEAST_SHARE * milliseconds)
            self._add(self._prefill, num_prefill_tokens, rest)

    def _add(self, fit: LinearFit, x: float, milliseconds: float) -> None:
        base, slope = fit.fit()
        if fit.num_samples >= self._ENOUGH:
            milliseconds = min(milliseconds, self._OUTLIER * (base + slope * x))
        fit.add(x, milliseconds)

    def prefill_tokens(self, delay_ms: float) -> int:
        """Prompt tokens that make a decode step longer by at most `delay_ms`; 0 while that is not known.

        Chunks that are all of nearly one size say little of the slope, so what they took beyond a decode step's base
        counts as theirs; and as few tokens are cheaper apiece than many, twice the usual number is the most.
        """
        (prefill_base, slope), (decode_base, _) = self._prefill.fit(), self._decode.fit()
        usual, milliseconds = self._prefill.mean
        if not usual:
            return 0
        per_token = max(slope, (milliseconds - decode_base) / usual)
        return max(int(min((delay_ms - max(prefill_base - decode_base, 0.0)) / per_token, self._REACH * usual)), 0)

    def to_proto(self) -> pb.StepCost:
        prefill, decode = self._prefill.fit(), self._decode.fit()
        return pb.StepCost(
            prefill_base_ms=prefill[0],
            prefill_ms_per_token=prefill[1],
            decode_base_ms=decode[0],
            decode_ms_per_sequence=decode[1],
        )
