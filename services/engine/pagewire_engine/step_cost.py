"""What a step costs on this worker, fitted from its own step times; the router's cost model.

prompts    base + per_token * tokens + per_attended * the tokens that each of them attends to, added up
decoding   base + per_sequence * sequences + per_kv_token * their tokens
"""

from __future__ import annotations

from pagewire.v1 import worker_pb2 as pb

Triple = tuple[float, float, float]


class LinearFit:
    """y = a + b * x + c * z by recursive least squares with directional forgetting, no part negative.

    Only what a new sample tells anew is forgotten of the old ones (Kulhavy, "Restricted exponential forgetting in
    real-time identification", Automatica 23, 1987): steps that are all alike do not wear down what others told.
    `spread` is how large each part may well be, before anything is known; the noise of y is 1.
    """

    _KEEP = 0.99  # half-life about 70 samples
    _LEAST_SLOPE = 0.05  # of y / x: noise must not make more work look free, or all of it goes to one worker

    def __init__(self, spread: Triple) -> None:
        self._spread = spread
        self._parts = [0.0, 0.0, 0.0]  # in units of the spread, as is the covariance
        self._covariance = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        self._mean = (0.0, 0.0, 0.0)  # of x, z and y
        self.num_samples = 0

    def add(self, x: float, z: float, y: float) -> None:
        self.num_samples += 1
        new = max(1 - self._KEEP, 1 / self.num_samples)
        mean_x, mean_z, mean_y = self._mean
        self._mean = (mean_x + new * (x - mean_x), mean_z + new * (z - mean_z), mean_y + new * (y - mean_y))
        u0, u1, u2 = self._spread[0], self._spread[1] * x, self._spread[2] * z
        gain = [row[0] * u0 + row[1] * u1 + row[2] * u2 for row in self._covariance]
        told = gain[0] * u0 + gain[1] * u1 + gain[2] * u2  # variance of what was expected of y
        parts = self._parts
        error = (y - parts[0] * u0 - parts[1] * u1 - parts[2] * u2) / (1 + told)
        self._parts = [part + g * error for part, g in zip(parts, gain, strict=True)]
        self._learn(gain, told)
        self._keep_positive()

    def _learn(self, gain: list[float], told: float) -> None:
        if told <= 0:
            return
        weight = self._KEEP - (1 - self._KEEP) / told  # negative: less is known after it than before
        shrink = weight / (1 + weight * told)
        for row, g in zip(self._covariance, gain, strict=True):
            for j in range(3):
                row[j] -= shrink * g * gain[j]

    def _keep_positive(self) -> None:
        """Where a part is negative, the best parts with 0 for it."""
        for j in range(3):
            part, column = self._parts[j], [row[j] for row in self._covariance]
            if part < 0 < column[j]:
                self._parts = [other - c * part / column[j] for other, c in zip(self._parts, column, strict=True)]
        self._parts = [max(part, 0.0) for part in self._parts]

    @property
    def mean(self) -> Triple:
        """(x, z, y) of late; zeros before anything was added."""
        return self._mean

    def fit(self) -> Triple:
        """(a, b, c); zeros before anything was added."""
        a, b, c = (part * spread for part, spread in zip(self._parts, self._spread, strict=True))
        mean_x, mean_z, mean_y = self._mean
        least = self._LEAST_SLOPE * mean_y / mean_x - c * mean_z / mean_x if mean_x else 0.0
        if b < least:
            a, b = max(a - (least - b) * mean_x, 0.0), least
        return a, b, c

    def at(self, x: float, z: float) -> float:
        a, b, c = self.fit()
        return a + b * x + c * z


class StepCost:
    """Learns from every step: prompt tokens, what they attend to, decoding sequences, their KV tokens.

    A mixed step tells of prefill once decode is known: its time less that of its decoding sequences' share.

    A step that took far longer than the ones before it tells of the machine, not of the model, and counts
    as OUTLIER times the expected: a worker that was held up once must not look slow for a hundred steps.

    attention_work: of attending to one token, as a share of a token's other work (FLOPs): no less is expected of
    attention, so that the first long prompt does not look as cheap as if it were many short ones.
    """

    _OUTLIER = 3.0
    _ENOUGH = 4  # steps after which something is expected
    _REACH = 2.0  # times the mean chunk: how far costs are extrapolated
    _LEAST_SHARE = 0.1  # of a mixed step's time that is the prompt's, however slow decoding looks
    _PREFILL: Triple = (3.0, 10.0, 1e-3)  # milliseconds
    _DECODE: Triple = (3.0, 10.0, 1e-2)

    def __init__(self, attention_work: float = 0.0) -> None:
        self._attention_work = attention_work
        self._prefill, self._decode = LinearFit(self._PREFILL), LinearFit(self._DECODE)

    def add(self, prefill: tuple[int, float], decode: tuple[int, int], milliseconds: float) -> None:
        """prefill: prompt tokens, and what they attend to; decode: sequences, and their KV tokens."""
        work = (prefill[0] + self._attention_work * prefill[1], prefill[1])
        if prefill[0] and not decode[0]:
            self._add(self._prefill, work, milliseconds)
        elif decode[0] and not prefill[0]:
            self._add(self._decode, decode, milliseconds)
        elif prefill[0] and self._decode.num_samples >= self._ENOUGH:
            _, per_sequence, per_kv_token = self._decode.fit()
            rest = milliseconds - per_sequence * decode[0] - per_kv_token * decode[1]
            self._add(self._prefill, work, max(rest, self._LEAST_SHARE * milliseconds))

    def _add(self, fit: LinearFit, work: tuple[float, float], milliseconds: float) -> None:
        if fit.num_samples >= self._ENOUGH:
            milliseconds = min(milliseconds, self._OUTLIER * fit.at(*work))
        fit.add(*work, milliseconds)

    def prefill_tokens(self, delay_ms: float) -> int:
        """Prompt tokens that make a decode step longer by at most `delay_ms`; 0 while that is not known.

        Chunks that are all of nearly one size say little of the slope, so what they took beyond a decode step's base
        counts as theirs; and as few tokens are cheaper apiece than many, twice the usual number is the most.
        """
        (prefill_base, per_token, per_attended), (decode_base, _, _) = self._prefill_parts(), self._decode.fit()
        work, attended, milliseconds = self._prefill.mean
        usual = work - self._attention_work * attended
        if not usual:
            return 0
        slope = max(per_token + per_attended * attended / usual, (milliseconds - decode_base) / usual)
        return max(int(min((delay_ms - max(prefill_base - decode_base, 0.0)) / slope, self._REACH * usual)), 0)

    def _prefill_parts(self) -> Triple:
        """Milliseconds: of a step, of each token, and of each that it attends to."""
        base, per_work, more_per_attended = self._prefill.fit()
        return base, per_work, per_work * self._attention_work + more_per_attended

    def to_proto(self) -> pb.StepCost:
        prefill, decode = self._prefill_parts(), self._decode.fit()
        return pb.StepCost(
            prefill_base_ms=prefill[0],
            prefill_ms_per_token=prefill[1],
            prefill_ms_per_attended=prefill[2],
            decode_base_ms=decode[0],
            decode_ms_per_sequence=decode[1],
            decode_ms_per_kv_token=decode[2],
        )
