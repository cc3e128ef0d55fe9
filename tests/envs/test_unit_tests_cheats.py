"""What submissions do to get a reward that they have not earned, and what comes of it, in a real sandbox."""

from __future__ import annotations

import pytest

from agentrl.envs.unit_tests.inside import MARK

module_loop = pytest.mark.asyncio(loop_scope="module")

EXACT = "def f(x):\n    return 2 * x"


@module_loop
async def test_what_is_allowed_and_right(sandbox, score):
    fine = {
        "helpers": "def g(x):\n    return x\ndef f(x):\n    return g(x) * 2",
        "defined twice, the last counts": "def f(x):\n    return 0\ndef f(x):\n    return 2 * x",
        "a lambda": "f = lambda x: 2 * x",
        "a class": "class f(int):\n    def __new__(cls, x):\n        return int(2 * x)",
        "imports": "import math, numpy\ndef f(x):\n    return int(numpy.int64(2) * math.floor(x))",
        "names of ours and of Python's": "run = json = MARK = list = to_json = None\ndef f(x):\n    return 2 * x",
        "prints a lot": "def f(x):\n    print('no' * 10**6)\n    return 2 * x",
        "a dataclass": "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n"
        "    x: int\ndef f(x):\n    return A(x).x * 2",
        "a main part": f"{EXACT}\nif __name__ == '__main__':\n    f(input())",
        "ends in an expression": f"{EXACT}\nf(3)",
        "replaces stdout": f"import sys\nsys.stdout = None\n{EXACT}",
    }
    found = {name: await score(sandbox, source, deadline=5.0) for name, source in fine.items()}
    assert found == dict.fromkeys(fine, ["passed"] * 4)


@module_loop
async def test_numpy_costs_a_submission_no_time(sandbox, score):
    source = "import numpy\ndef f(x):\n    return int(numpy.int64(2) * x)"
    assert await score(sandbox, source, deadline=0.1) == ["passed"] * 4


@module_loop
async def test_partial_credit_as_computed(sandbox, score):
    assert await score(sandbox, "def f(x):\n    return abs(x) * 2") == ["passed", "passed", "wrong", "passed"]
    assert await score(sandbox, "def f(x):\n    return 30 // x") == ["wrong", "wrong", "wrong", "error"]
    hangs = "def f(x):\n    while x == 5:\n        pass\n    return 2 * x"
    assert await score(sandbox, hangs) == ["passed", "timeout", "passed", "passed"]


MALFORMED = {
    "no Python": "I think that f doubles x.",
    "a syntax error": "def f(x)\n    return 2 * x",
    "another function": "def g(x):\n    return 2 * x",
    "no function": "f = 6",
    "wrong arity": "def f(x, y):\n    return 2 * x",
    "a null byte": "def f(x):\n    return 2 * x\0",
    "half a surrogate": "def f(x):\n    return '\ud800' and",
    "raises when loaded": "1 / 0\ndef f(x):\n    return 2 * x",
    "too deep for the parser": "f = " + "(" * 5000 + ")" * 5000,
}


@module_loop
@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_code_fails_every_test(sandbox, name, score):
    assert await score(sandbox, MALFORMED[name]) == ["error"] * 4


def counting(remember):
    """A submission that knows all answers by their number, and needs to learn which test this is."""
    return f"{remember}\ndef f(x):\n    return [6, 10, -14, 0][min(number(), 3)]"


ON_FILE = """
import os
def number():
    path = {path!r}
    n = len(open(path).read()) if os.path.exists(path) else 0
    open(path, "a").write("x")
    return n
"""

FORGED = f'{MARK}{{\\"value\\": 6}}'

# What is tried, how, and the share that it must get: a constant 6 is right for a quarter of DOUBLING.
CHEATS = {
    "equal to everything": ("class A:\n    __eq__ = lambda s, o: True\ndef f(x):\n    return A()", 0),
    "an int equal to everything": ("class A(int):\n    __eq__ = lambda s, o: True\ndef f(x):\n    return A(1)", 0),
    "an int that reads as another": (
        "class A(int):\n    __repr__ = __str__ = lambda s: '6'\ndef f(x):\n    return A(1)",
        0,
    ),
    "a string with the result as repr": (
        "class A(str):\n    __repr__ = lambda s: '6'\ndef f(x):\n    return A('6')",
        0,
    ),
    "an object that claims to be an int": (
        "class A:\n    __class__ = property(lambda s: int)\ndef f(x):\n    return A()",
        0,
    ),
    "True for 1 and the like": ("def f(x):\n    return 2.0 * x", 0),
    "False for 0": ("def f(x):\n    return False", 0),
    "NaN": ("def f(x):\n    return float('nan')", 0),
    "infinity": ("def f(x):\n    return float('inf')", 0),
    "a generator": ("def f(x):\n    yield 2 * x", 0),
    "a coroutine": ("async def f(x):\n    return 2 * x", 0),
    "an iterator": ("def f(x):\n    return iter([2 * x])", 0),
    "itself": ("def f(x):\n    return f", 0),
    "a list in itself": ("def f(x):\n    a = []\n    a.append(a)\n    return a", 0),
    "a very deep list": ("def f(x):\n    a = []\n    for _ in range(10**5):\n        a = [a]\n    return a", 0),
    "a very long list": ("def f(x):\n    return [0] * 10**6", 0),
    "a very long string": ("def f(x):\n    return 'a' * 10**7", 0),
    "a list too wide for time": (
        "def f(x):\n    a = [0]\n    for _ in range(60):\n        a = [a, a]\n    return a",
        0,
    ),
    # Its own answer it may forge; 6 is right for one input of four.
    "json patched": ("import json\njson.dumps = lambda *a, **k: '{\"value\": 6}'\ndef f(x):\n    return 1", 0.25),
    "builtins patched": (
        "import builtins\nbuiltins.isinstance = builtins.all = builtins.any = lambda *a: True\ndef f(x):\n    return A",
        0,
    ),
    "type patched": ("import builtins\nbuiltins.type = lambda *a: int\ndef f(x):\n    return object()", 0),
    "the reporting function patched": (
        "import sys\nsys.modules['__main__']._reply = lambda v: '{\"value\": 6}'\ndef f(x):\n    return 1",
        0.25,
    ),
    "a printed result": (f'def f(x):\n    print("\\n{FORGED}")\n    return 1', 0),
    "a printed result, then the end": (
        f'import sys, os\ndef f(x):\n    sys.__stdout__.write("\\n{FORGED}\\n")\n'
        "    sys.__stdout__.flush()\n    os._exit(0)",
        0,
    ),
    "a result printed at exit": (f'import atexit\natexit.register(print, "{FORGED}")\ndef f(x):\n    return 1', 0),
    "a result of 5,000 digits": (
        f'import os\ndef f(x):\n    os.write(1, b"\\n{MARK}" + b\'{{"value": \' + b"1" * 5000 + b"}}\\n")\n'
        "    return 6",
        0,
    ),
    "a result that overflows the reader": (
        f'import os\ndef f(x):\n    os.write(1, b"\\n{MARK}" + b"[" * 50000 + b"\\n")\n    return 6',
        0,
    ),
    "a result that is no object": (f'import os\ndef f(x):\n    os.write(1, b"\\n{MARK}3\\n")\n    return 6', 0),
    "nonsense on the control socket": ("import os\ndef f(x):\n    os.write(3, b'\\xff' * 64)\n    return 2 * x", 0),
    "the control socket closed": ("import os\ndef f(x):\n    os.close(3)\n    return 2 * x", 0),
    "every descriptor closed": ("import os\ndef f(x):\n    os.closerange(0, 64)\n    return 2 * x", 0),
    "sys.exit": ("import sys\ndef f(x):\n    sys.exit(0)", 0),
    "os._exit": ("import os\ndef f(x):\n    os._exit(0)", 0),
    "os._exit when loaded": (f"import os\nos._exit(0)\n{EXACT}", 0),
    "a signal to itself": (
        "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGKILL)\n    return 2 * x",
        1,
    ),
    "a limit of its own on CPU time": (
        "import resource\ndef f(x):\n    resource.setrlimit(resource.RLIMIT_CPU, (0, 0))\n"
        "    while True:\n        pass",
        0,
    ),
    "a seccomp filter of its own": (
        "import ctypes\ndef f(x):\n    ctypes.CDLL(None).prctl(22, 1, 0, 0, 0)\n    open('/tmp/x')\n    return 1",
        0,
    ),
    "an endless loop": ("def f(x):\n    while True:\n        pass", 0),
    "an endless loop when loaded": (f"while True:\n    pass\n{EXACT}", 0),
    "a loop that catches everything": (
        "def f(x):\n    while True:\n        try:\n            while True:\n                pass\n"
        "        except BaseException:\n            pass",
        0,
    ),
    "a loop deaf to signals": (
        "import signal\ndef f(x):\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    while True:\n        pass",
        0,
    ),
    "right, but too late": (
        "import signal, time\ndef f(x):\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    time.sleep(0.9)\n"
        "    return 2 * x",
        0,
    ),
    "sleep": ("import time\ndef f(x):\n    time.sleep(10**6)", 0),
    "a memory bomb": ("def f(x):\n    return len(bytearray(10**11))", 0),
    "a slow memory bomb": ("def f(x):\n    a = [0] * 1000\n    while True:\n        a += a", 0),
    "a fork bomb": ("import os\ndef f(x):\n    while True:\n        os.fork()", 0),
    "endless recursion": ("def f(x):\n    return f(x)", 0),
    "a crash": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x)", 0),
    "threads that outlive the call": (
        "import threading, time\ndef f(x):\n    threading.Thread(target=time.sleep, args=(3600,)).start()\n"
        "    return 2 * x",
        1,
    ),
    "a child that outlives the call": (
        "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(3600)\n"
        "    return 2 * x",
        1,
    ),
    "a child that answers too": ("import os\ndef f(x):\n    os.fork()\n    return 6", 0.25),
    "a count in a global": (counting("n = -1\ndef number():\n    global n\n    n += 1\n    return n"), 0.25),
    "a count in a builtin": (
        counting(
            "import builtins\ndef number():\n    builtins.n = getattr(builtins, 'n', -1) + 1\n    return builtins.n"
        ),
        0.25,
    ),
    "a count in /tmp": (counting(ON_FILE.format(path="/tmp/n")), 0.25),
    "a count in /work": (counting(ON_FILE.format(path="n")), 0.25),
    "a count in /dev/shm": (counting(ON_FILE.format(path="/dev/shm/n")), 0.25),
    "a count in shared memory": (
        counting("import mmap\nm = mmap.mmap(-1, 8)\ndef number():\n    m[0] += 1\n    return m[0] - 1"),
        0.25,
    ),
    "a count in System V memory": (
        counting(
            "import ctypes\nC = ctypes.CDLL(None)\nC.shmat.restype = ctypes.c_void_p\ndef number():\n"
            "    place = C.shmat(C.shmget(1234, 8, 0o1666), None, 0)\n"
            "    if place in (None, 2**64 - 1):\n        return 0\n"
            "    n = ctypes.c_long.from_address(place)\n    n.value += 1\n    return n.value - 1"
        ),
        0.25,
    ),
    "a count of processes": (
        counting("import os\ndef number():\n    return len(os.listdir('/proc')) - 1 if os.path.exists('/proc') else 0"),
        0.25,
    ),
    "a count by random numbers": (
        counting(
            "import random\nfirst = random.Random(0).random()\ndef number():\n    return random.random() != first"
        ),
        0.25,
    ),
}


@module_loop
@pytest.mark.parametrize("name", CHEATS)
async def test_a_cheat_gets_what_it_deserves(sandbox, name, score):
    source, share = CHEATS[name]
    kinds = await score(sandbox, source)  # which also says that none of them passes for a failure of the sandbox
    assert kinds.count("passed") / 4 == share, kinds


SECRETS = [f"canary-{i}{'0123456789abcdef' * 2}" for i in range(3)]

SEARCH = """
import re
def search(text):
    found = re.findall("can" + "ary-[0-9a-f]{33}", text)
    return found[0] if found else None
"""

SEARCHES = {
    "all objects": """
import gc
def f(x):
    for thing in gc.get_objects():
        try:
            found = search(repr(thing))
        except Exception:
            continue
        if found:
            return found
""",
    "frames and modules": """
import sys
def f(x):
    places, frame = list(map(vars, sys.modules.values())), sys._getframe()
    while frame:
        places += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    return search(repr(places))
""",
    "traced calls": """
import sys
seen = []
sys.settrace(lambda frame, event, argument: seen.append(repr(frame.f_locals)))
def f(x):
    return search("".join(seen))
""",
    "files": """
import os
def f(x):
    for folder, folders, files in os.walk("/"):
        if folder.startswith(("/proc", "/usr", "/lib", "/packages")):
            folders.clear()
            continue
        for name in files:
            try:
                with open(os.path.join(folder, name), errors="replace") as file:
                    found = search(file.read(10**6))
            except OSError:
                continue
            if found:
                return found
""",
    "processes": """
import os
def f(x):
    text = ""
    for pid in os.listdir("/proc"):
        for name in ("environ", "cmdline", "stat"):
            try:
                text += open(f"/proc/{pid}/{name}", errors="replace").read()
            except OSError:
                pass
    return search(text)
""",
    "memory": """
def f(x):
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            if " rw" in line:
                low, high = (int(n, 16) for n in line.split()[0].split("-"))
                try:
                    memory.seek(low)
                    found = search(memory.read(high - low).decode("latin-1"))
                except (OSError, OverflowError):
                    continue
                if found:
                    return found
""",
}


@module_loop
@pytest.mark.parametrize("name", SEARCHES)
async def test_there_is_nothing_to_find(sandbox, score, make_cases, name):
    hidden = make_cases(*(((number,), secret) for number, secret in enumerate(SECRETS)))
    kinds = await score(sandbox, SEARCH + SEARCHES[name], hidden, deadline=10.0)
    assert "passed" not in kinds, kinds


@module_loop
@pytest.mark.parametrize("name", ["all objects", "frames and modules"])
async def test_the_search_would_find_it(sandbox, score, make_cases, name):
    planted = f"planted = {SECRETS[0]!r}\n{SEARCH}{SEARCHES[name]}"
    assert await score(sandbox, planted, make_cases(((0,), SECRETS[0])), deadline=10.0) == ["passed"]


@module_loop
@pytest.mark.parametrize("module", ["agentrl.envs.unit_tests", "agentrl.envs", "agentrl.types", "envs.unit_tests"])
async def test_the_solutions_cannot_be_imported(sandbox, module, score):
    assert await score(sandbox, f"import {module}\n{EXACT}") == ["error"] * 4


@module_loop
async def test_a_forged_reply_is_its_own_answer_and_no_more(sandbox, score):
    """The socket can be written to; what it says is a result of this one test, here a constant 6."""
    forge = """
import json, os, struct, sys
def f(x):
    frame = sys._getframe()
    while "request" not in frame.f_locals:
        frame = frame.f_back
    wire = sys.modules["agentrl.sandbox.wire"]
    head = {"id": frame.f_locals["request"]["id"], "status": "ok", "error": None, "cut": 0}
    os.write(3, wire.encode(head, b'FORGED\\n'))
    os._exit(0)
""".replace("FORGED", MARK + '{"value": 6}')
    assert (await score(sandbox, forge)).count("passed") <= 1
