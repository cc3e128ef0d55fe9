"""Random programs for sessions, cell by cell, and a cell that tells everything about the state they leave.

Whatever a program does, it never fails to be forked: what cannot be forked has tests of its own.
"""

from __future__ import annotations

from hypothesis import strategies as st

NAMES = ("a", "b", "c")
FILES = ("f", "g", "d/h", "/tmp/t")

START = """
import collections, hashlib, itertools, os, random, stat
import numpy
a, b, c = 1, [], {}
handles = {}
def note(value):
    b.append(value)
    return value
os.makedirs('d', exist_ok=True)
"""

TELL = """
def told():
    import hashlib, os, random, stat
    files = {}
    for root in ('/work', '/tmp'):
        for folder, folders, names in os.walk(root):
            for name in sorted(folders + names):
                path = os.path.join(folder, name)
                s = os.lstat(path)
                content = None
                if stat.S_ISLNK(s.st_mode):
                    content = os.readlink(path)
                elif stat.S_ISREG(s.st_mode):
                    mode = stat.S_IMODE(s.st_mode)
                    os.chmod(path, 0o600)
                    content = hashlib.md5(open(path, 'rb').read()).hexdigest(), s.st_size, s.st_nlink
                    os.chmod(path, mode)
                files[path] = stat.S_IFMT(s.st_mode), stat.S_IMODE(s.st_mode), content
    where = {}
    for name, h in sorted(handles.items()):
        where[name] = h.closed or (h.tell(), h.mode, os.get_inheritable(h.fileno()), os.fstat(h.fileno()).st_nlink)
    shared = [(x, y) for x in handles for y in handles if x < y and not (handles[x].closed or handles[y].closed)
              and os.path.sameopenfile(handles[x].fileno(), handles[y].fileno())]
    drawn = random.random(), random.getstate()[1][:3], float(numpy.random.rand()), int(numpy.random.randint(1 << 30))
    made = {name: repr(value) for name, value in sorted(globals().items())
            if name[0] != '_' and isinstance(value, (int, str, list, dict, tuple, set, collections.deque))
            and name != 'handles'}
    return made, files, where, shared, drawn, os.getcwd(), os.getpid(), os.getppid(), os.umask(0o22)
repr(told())
"""
"""Also draws random numbers and moves the access times on: the last cell of a program."""

_numbers = st.integers(0, 99)
_names = st.sampled_from(NAMES)
_files = st.sampled_from(FILES)
_keys = st.sampled_from(("p", "q", "r"))


def _cell(text: str, **parts: st.SearchStrategy) -> st.SearchStrategy[str]:
    return st.fixed_dictionaries(parts).map(lambda chosen: text.format(**chosen))


STATEMENTS = st.one_of(
    _cell("{x} = {n}", x=_names, n=_numbers),
    _cell("{x} = [{y}, {n}]", x=_names, y=_names, n=_numbers),
    _cell("note(random.randrange(1000)), note(random.random())"),
    _cell("note(numpy.random.normal()), note(numpy.random.default_rng({n}).random())", n=_numbers),
    _cell("generator = numpy.random.default_rng({n}) if 'generator' not in globals() else generator", n=_numbers),
    _cell("note('generator' in globals() and generator.random())"),
    _cell("own = random.Random({n}); note(own.random())", n=_numbers),
    _cell("note('own' in globals() and own.random())"),
    _cell("counter = itertools.count({n}) if 'counter' not in globals() else counter", n=_numbers),
    _cell("note('counter' in globals() and next(counter))"),
    _cell("lazy = (i * {n} for i in range(100)) if 'lazy' not in globals() else lazy", n=_numbers),
    _cell("note('lazy' in globals() and next(lazy, None))"),
    _cell("array = numpy.arange({n} + 1) * 1.5; note(float(array.sum()))", n=_numbers),
    _cell("open({f!r}, 'w').write(str({x})[:200])", f=_files, x=_names),
    _cell("open({f!r}, 'ab').write(bytes({n}))", f=_files, n=_numbers),
    _cell("handles[{k!r}] = open({f!r}, 'w+')", k=_keys, f=_files),
    _cell("handles[{k!r}] = open({f!r}, 'rb') if os.path.exists({f!r}) else open(os.devnull, 'rb')", k=_keys, f=_files),
    _cell("{k!r} in handles and handles[{k!r}].seek({n})", k=_keys, n=_numbers),
    _cell("{k!r} in handles and handles[{k!r}].readable() and note(handles[{k!r}].read({n}))", k=_keys, n=_numbers),
    _cell("{k!r} in handles and '+' in handles[{k!r}].mode and handles[{k!r}].write('w' * {n})", k=_keys, n=_numbers),
    _cell("{k!r} in handles and handles[{k!r}].flush()", k=_keys),
    _cell("{k!r} in handles and handles[{k!r}].close()", k=_keys),
    _cell("handles['dup'] = os.fdopen(os.dup(handles[{k!r}].fileno()), handles[{k!r}].mode)"
          " if {k!r} in handles and not handles[{k!r}].closed else open(os.devnull, 'rb')", k=_keys),
    _cell("os.path.exists({f!r}) and os.unlink({f!r})", f=_files),
    _cell("os.path.exists({f!r}) and os.chmod({f!r}, 0o{m}00)", f=_files, m=st.sampled_from("4567")),
    _cell("os.path.lexists('link') or os.symlink({f!r}, 'link')", f=_files),
    _cell("os.path.lexists('hard') or os.path.exists('f') and os.link('f', 'hard')"),
    _cell("os.makedirs('d/e{n}', exist_ok=True)", n=st.integers(0, 3)),
    _cell("os.chdir({d!r}) if os.path.isdir({d!r}) else None", d=st.sampled_from(("/work", "/work/d", "/tmp", "/"))),
    _cell("os.umask(0o{m}7)", m=st.sampled_from("0257")),
    _cell("f = open('sparse', 'wb'); f.truncate({n} << 12); f.seek({n} << 10); f.write(b'x'); f.close()", n=_numbers),
    _cell("1 / ({n} % 2)", n=_numbers),
    _cell("def note(value, old=note): return old((value, {n}))", n=_numbers),
    _cell("print({x}); {y}", x=_names, y=_names),
)  # fmt: skip

PROGRAMS = st.lists(st.lists(STATEMENTS, min_size=1, max_size=4).map("\n".join), min_size=2, max_size=8)
