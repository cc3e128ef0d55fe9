"""The prefix index against a plain search over all slots."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agentrl.sampler import prefix
from agentrl.sampler.prefix import BLOCK, PrefixIndex

# Few different tokens in long runs, so that beginnings meet.
TOKENS = st.lists(st.sampled_from([[1] * BLOCK, [2] * BLOCK, [1], [2], [3] * 5]), max_size=5).map(
    lambda runs: [token for run in runs for token in run]
)


def shared(a, b):
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


class IndexMachine(RuleBasedStateMachine):
    """``put`` replaces what a slot holds (its new content extends the old, or the slot was dropped before)."""

    def __init__(self):
        super().__init__()
        self.index = PrefixIndex()
        self.slots = {}

    @rule(slot=st.integers(0, 4), tokens=TOKENS)
    def put_anew(self, slot, tokens):
        self.index.drop(slot)
        self.index.put(slot, tokens)
        self.slots[slot] = tokens

    @rule(slot=st.integers(0, 4), more=TOKENS)
    def extend(self, slot, more):
        if slot in self.slots:
            self.slots[slot] = self.slots[slot] + more
            self.index.put(slot, self.slots[slot])

    @rule(slot=st.integers(0, 4))
    def drop(self, slot):
        self.index.drop(slot)
        self.slots.pop(slot, None)

    @rule()
    def clear(self):
        self.index.clear()
        self.slots.clear()

    @rule(tokens=TOKENS)
    def find(self, tokens):
        found = self.index.find(tokens)
        counts = {slot: shared(held, tokens) for slot, held in self.slots.items()}
        assert dict(found).items() <= counts.items(), "what is found is true"
        assert [count for _, count in found] == sorted((count for _, count in found), reverse=True)
        longest = max(counts.values(), default=0)
        best = found[0][1] if found else 0
        assert longest - BLOCK < best <= longest, "less than a block is missed"

    @invariant()
    def nothing_is_left_behind(self):
        if not self.slots:
            assert not [*self.index._slots, *self.index._blocks, *self.index._tokens]


TestPrefixIndex = IndexMachine.TestCase


@given(st.lists(TOKENS, min_size=1, max_size=5), TOKENS)
def test_hashes_that_collide_only_cost_time(held, tokens):
    original = prefix._hashes
    prefix._hashes = lambda ids: (0 for _ in original(ids))
    try:
        index = PrefixIndex()
        for slot, content in enumerate(held):
            index.put(slot, content)
        for slot, count in index.find(tokens):
            assert count == shared(held[slot], tokens)
    finally:
        prefix._hashes = original
