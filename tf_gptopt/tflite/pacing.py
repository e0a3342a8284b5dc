"""How many tokens to draft before the target is asked: what is fastest, by what was measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_BELIEF = 0.7  # the chance of a drafted token, before any is seen
_WEIGHT = 2  # drafted tokens that this belief counts for
_WINDOW = 32  # drafted tokens that an average remembers
_PAUSES = 16, 256  # tokens: the first pause, and the longest
_REFRESH = 32  # calls with a draft after which one goes without: a decode gets slower by position


class Pace:
    """Chooses the draft's length, 0 for plain decoding, from the times and successes so far.

    Let d, v and s be the seconds of a decode, of a verify and of drafting one token; q the share of
    calls for which the drafter proposes anything; and a the chance that the target says a proposed
    token when it said those before it. Drafting up to k tokens and asking the target once then
    brings

        1 + q (a + a^2 + ... + a^k)  tokens in  s (1 + q (k - 1)) + q v + (1 - q) d  seconds

    (Leviathan et al. 2023, arXiv:2211.17192, section 3.3, where q is 1), and plain decoding brings
    1 in d. The k with most tokens a second is taken.

    Where that is 0, nothing is drafted for a while: 16 tokens, then 32, and so on up to 256, and
    again 16 once drafting has gone on for 32 calls. After a pause all but d is forgotten and
    drafting tried again. A text that nothing can be drafted for costs a call or two at each of
    these points.

    The tokens never depend on it: a target says the same whatever is drafted for it.

    Args:
        lengths: tokens that the target verifies at once, in rising order: a draft and one more.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.most = max(lengths) - 1
        self._decode, self._draft = _Seconds(), _Seconds()
        self._verify = {n: _Seconds() for n in lengths}
        self._pause, self._paused, self._drafted_calls = _PAUSES[0], 0, 0
        self._proposes, self._accepts = Share(1.0), Share(_BELIEF)

    def choose(self) -> int:
        """How many tokens to draft now, at most."""
        if self._decode.least is None:
            return 0
        if self._paused:
            self._paused -= 1
            if not self._paused:
                self._forget()
            return 0
        if self._drafted_calls % _REFRESH == _REFRESH - 1:
            self._drafted_calls += 1
            self._pause = _PAUSES[0]
            return 0
        best = max(range(self.most + 1), key=self.rate)
        if best:
            self._drafted_calls += 1
        else:
            self._drafted_calls = 0
            self._paused, self._pause = self._pause, min(2 * self._pause, _PAUSES[1])
        return best

    def rate(self, count: int) -> float:
        """Tokens a second to be expected of drafts of up to `count` tokens."""
        decode = self._decode.least
        if not count:
            return 1.0 / decode
        a, q = self._accepts.value, self._proposes.value
        verify = self._verify[min(n for n in self._verify if n > count)].least
        verify = decode if verify is None else verify  # what is not known is tried
        seconds = (self._draft.least or 0.0) * (1 + q * (count - 1)) + q * verify + (1 - q) * decode
        return (1 + q * sum(a**i for i in range(1, count + 1))) / seconds

    def saw_decode(self, seconds: float) -> None:
        """A plain decode took so long."""
        self._decode.add(seconds)

    def saw_draft(self, proposed: int, seconds: float) -> None:
        """The drafter was asked, and proposed so many tokens in this time."""
        self._proposes.add(proposed > 0)
        self._draft.add(seconds / max(1, proposed))

    def saw_verify(self, proposed: int, accepted: int, seconds: float) -> None:
        """So many of the proposed tokens were said, and the call took so long."""
        self._verify[min(n for n in self._verify if n > proposed)].add(seconds)
        for i in range(min(accepted + 1, proposed)):
            self._accepts.add(i < accepted)

    def _forget(self) -> None:
        self._proposes, self._accepts = Share(1.0), Share(_BELIEF)
        for seconds in (self._draft, *self._verify.values()):
            seconds.forget()


class _Seconds:
    """The least of the last five readings: others were interrupted. The very first one, in which
    buffers and operations are set up, does not count."""

    def __init__(self) -> None:
        self._readings: deque[float] | None = None

    @property
    def least(self) -> float | None:
        return min(self._readings) if self._readings else None

    def add(self, seconds: float) -> None:
        if self._readings is None:
            self._readings = deque(maxlen=5)
        else:
            self._readings.append(seconds)

    def forget(self) -> None:
        if self._readings:
            self._readings.clear()


class Share:
    """An average of yes and no that begins with a belief and forgets exponentially.

    Attributes:
        value: from 0 to 1.
    """

    def __init__(self, belief: float) -> None:
        self.value, self._count = belief, _WEIGHT

    def add(self, yes: bool) -> None:
        """One more."""
        self._count = min(self._count + 1, _WINDOW)
        self.value += (yes - self.value) / self._count

    def forget(self, belief: float) -> None:
        """Go a little way back to a belief, so that what is not tried is tried again some time."""
        self.value += (belief - self.value) / (64 * _WINDOW)
