"""What the tests of ``unit_tests`` share."""

from __future__ import annotations

import json

import pytest
import pytest_asyncio

from agentrl.envs.unit_tests.grader import Case, Submission, grade
from agentrl.envs.unit_tests.inside import to_json
from agentrl.errors import IsolationUnavailable
from agentrl.sandbox.local import LocalSandbox


class Watched:
    """A sandbox, and which of its sessions are open."""

    def __init__(self, sandbox):
        self.sandbox, self.live = sandbox, set()
        self.fork_level = sandbox.fork_level

    async def open(self, *arguments, **options):
        return WatchedSession(self, await self.sandbox.open(*arguments, **options))


class WatchedSession:
    def __init__(self, sandbox, session):
        self._sandbox, self._session = sandbox, session
        self.exec, self.put_file, self.get_file = session.exec, session.put_file, session.get_file
        sandbox.live.add(self)

    async def fork(self, *arguments, **options):
        return WatchedSession(self._sandbox, await self._session.fork(*arguments, **options))

    async def close(self):
        self._sandbox.live.discard(self)
        await self._session.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def manager():
    async with LocalSandbox() as made:
        try:
            await (await made.open()).close()
        except IsolationUnavailable as error:
            pytest.skip(str(error))
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def sandbox(manager):
    """A sandbox that must have no open session when the test is over."""
    watched = Watched(manager)
    yield watched
    assert not watched.live


def cases(*pairs):
    return [Case(json.dumps(to_json(list(arguments))), to_json(expected)) for arguments, expected in pairs]


@pytest.fixture(scope="session")
def make_cases():
    """Hidden tests from (arguments, expected) pairs."""
    return cases


@pytest.fixture(scope="session")
def score():
    """How each test of a function ``f`` ended; by default it has to double its argument."""
    doubling = cases(((3,), 6), ((5,), 10), ((-7,), -14), ((0,), 0))

    async def _score(sandbox, source, hidden=None, *, deadline=0.5, total=60.0):
        verdicts = await grade(sandbox, Submission(source, "f"), hidden or doubling, deadline=deadline, total=total)
        return [str(verdict.kind) for verdict in verdicts]

    return _score
