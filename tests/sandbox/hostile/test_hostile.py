"""Every hostile program on every backend. What must become of it is said with the program, in the modules beside."""

from __future__ import annotations

import pytest

from . import PROGRAMS, THEMES

BACKENDS = {"root", "ordinary user", "docker"}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", PROGRAMS)
async def test_the_program_gets_nowhere(stage, name):
    wrong = await stage.play(name)
    assert not wrong, "\n".join(wrong)


def test_no_program_is_left_out(request, ends):
    option, arguments = request.config.option, request.config.args
    if option.keyword or option.markexpr not in ("", "not slow") or any("::" in argument for argument in arguments):
        pytest.skip("only some of the programs were asked for")
    played = {
        (item.callspec.params["stage"], item.callspec.params["name"]): ends[item.nodeid]
        for item in request.session.items
        if item.originalname == test_the_program_gets_nowhere.__name__
    }
    assert set(played) == {(backend, name) for backend in BACKENDS for name in PROGRAMS}
    assert sum(map(len, THEMES.values())) == len(PROGRAMS) > 60
    assert all(reason for outcome, reason in played.values() if outcome == "skipped")
