"""The faults that `tests/mutate.py` makes: one token each, and the same for a seed."""

import ast
import io
import tokenize
from collections import Counter
from difflib import SequenceMatcher

import mutate
import pytest

pytestmark = pytest.mark.every

PLACES = mutate.places()


def tokens(text):
    return [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline)]


def test_a_fault_compiles_and_changes_one_token_or_the_order_of_two_arguments():
    for fault in mutate.drawn(0, 40, PLACES):
        text = (mutate.ROOT / fault.file).read_text()
        old, new = tokens(text), tokens(fault.applied(text))
        ast.parse(fault.applied(text))
        if "," in fault.new:
            assert old != new
            assert Counter(old) == Counter(new)
        else:
            blocks = SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes()
            (changed,) = [block for block in blocks if block[0] != "equal"]
            _, start, end, low, high = changed
            assert max(end - start, high - low) == 1


def test_the_same_seed_draws_the_same_faults_and_another_does_not():
    first, same, other = (mutate.drawn(n, 40, PLACES) for n in (0, 0, 1))
    assert first == same
    assert len(set(first) & set(other)) < 10


def test_annotations_messages_and_strings_have_no_faults():
    text = '''def f(x: int | None = None, *, y: bool = True) -> float | None:
    """1 + 1"""
    if isinstance(x, int | float):
        raise ValueError(1 + 1)
    msg = "a" + "b"
    z: int | bool = x <= 1
    return f"{1 + 1}"
'''
    found = mutate.Source("f.py", text).places()
    assert [[fault.new for fault in place] for place in found] == [
        ["False"],
        ["<"],
        ["2", "0"],
    ]


def test_each_kind_of_fault_is_made():
    text = (
        "x = jnp.where(α < 1, -b, min(c, 2.0)) if not (a @ b) ** 2 else (x is None)\n"
    )
    found = [place[0].told(text) for place in mutate.Source("f.py", text).places()]
    changes = {told.split(": ")[1].split(", in")[0] for told in found}
    assert changes == {
        *("-b, min(c, 2.0) → min(c, 2.0), -b", "< → <=", "1 → 2", "- → +"),
        *("min → max", "2.0 → 4.0", "not → nothing", "@ → *", "** → *", "2 → 3"),
        "is → is not",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("test", "outcome"),
    [("assert 1", "passed"), ("assert 0", "killed"), ("while 1: 0", "timed out")],
)
def test_a_fault_is_killed_by_a_test_that_fails_or_does_not_end(
    tmp_path, test, outcome
):
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {test}\n")
    limit = 3 if outcome == "timed out" else 60
    assert mutate.tried(tmp_path, [["test_it.py"]], 1, limit)[0] == outcome
