"""Changes that break a network, found with few trials."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pysolve.nn.graph.bisection import faults
from pysolve.plan import Collapse, Site


def steps_of(names):
    return {
        i: Collapse(Site(4, writers=(name,), readers=("head",)), np.arange(2)) for i, name in enumerate(names)
    }


class Trials:
    """Fails where a writer is wrong, or two that cannot go together are both there."""

    def __init__(self, wrong, apart=()):
        self.wrong, self.apart, self.count = wrong, apart, 0

    def __call__(self, steps):
        self.count += 1
        names = {step.site.writers[0] for step in steps}
        if found := names & self.wrong:
            return f"a width is written into the code (line {min(found)})"
        return "they count on each other" if self.apart and names >= {*self.apart} else None


blocks = st.lists(st.sampled_from(["attention", "up", "gate"]), min_size=1, max_size=3, unique=True)


@given(blocks, st.integers(1, 9), st.data())
def test_layers_that_fail_in_every_block_are_found_and_the_others_work(parts, depth, data):
    names = [f"blocks.{i}.{part}" for i in range(depth) for part in parts]
    kinds = data.draw(st.sets(st.sampled_from(parts)))
    wrong = {name for name in names if name.rpartition(".")[2] in kinds}
    trials = Trials(wrong)
    works, problems = faults(steps_of(names), trials)
    assert [*problems] == [i for i, name in enumerate(names) if name in wrong]
    assert [*works] == [i for i, name in enumerate(names) if name not in wrong]
    assert all(problem.startswith("a width is written") for problem in problems.values())
    assert trials.count <= 1 + 6 * len(parts)


@given(st.integers(1, 20), st.data())
def test_what_is_left_works_together_whatever_fails(count, data):
    names = [f"{'abcd'[i % 4]}{i}" if data.draw(st.booleans()) else f"x.{i}" for i in range(count)]
    wrong = data.draw(st.sets(st.sampled_from(names)))
    apart = data.draw(st.sampled_from([(), (names[0], names[-1])]))
    trials, steps = Trials(wrong, apart), steps_of(names)
    works, problems = faults(steps, trials)
    assert works.keys() | problems.keys() == steps.keys()
    assert not works.keys() & problems.keys()
    assert trials([*works.values()]) is None
    assert all(names[i] not in wrong for i in works)


@given(st.integers(2, 12), st.data())
def test_one_layer_that_fails_alone_is_the_only_one_that_is_named(count, data):
    names = [f"blocks.{i}.up" for i in range(count)]
    bad = data.draw(st.integers(0, count - 1))
    works, problems = faults(steps_of(names), Trials({names[bad]}))
    assert [*problems] == [bad]
    assert len(works) == count - 1


def test_steps_are_tried_together_with_sound_ones():
    steps = steps_of(["a", "b"])
    works, problems = faults({1: steps[1]}, Trials(set(), ("a", "b")), {0: steps[0]})
    assert not works
    assert problems == {1: "they count on each other"}
