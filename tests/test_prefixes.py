"""Which prompts are answered together: everyone once, stems that all share, neighbours that share more."""

from hypothesis import given
from hypothesis import strategies as st

from graft.tokens.prefixes import LEAST_PROMPTS, Group, group_prompts


def test_one_system_text_is_one_group_with_its_stem():
    system = list(range(100, 200))
    prompts = [[*system, n, *range(n % 7)] for n in range(30)]
    (group,) = group_prompts(prompts)
    assert group.stem == 100
    assert sorted(group.order) == list(range(30))
    assert len(prompts[group.order[0]]) == 107


def test_large_groups_get_their_own_stem_small_ones_stay_with_the_rest():
    first, second, third = [1] * 80, [2] * 90, [3] * 90
    counts = ((first, 16), (second, 20), (third, 15))
    prompts = [[*stem, 5, n] for stem, count in counts for n in range(100, 100 + count)]
    found = sorted((group.stem, len(group.order)) for group in group_prompts([*prompts, [7], [8, 8]]))
    assert found == [(0, 17), (81, 16), (91, 20)]


def test_prompts_about_one_document_stand_together_the_longest_document_first():
    documents = {n: [n] * (30 + n) for n in range(5)}
    prompts = [[*documents[n % 5], 50 + turn, *[9] * (turn % 3)] for turn, n in enumerate(range(15))]
    (group,) = group_prompts(prompts)
    assert [index % 5 for index in group.order] == [n for n in (4, 3, 2, 1, 0) for _ in range(3)]


def test_a_stem_leaves_every_prompt_a_token():
    same = list(range(40))
    (group,) = group_prompts([same, [*same, 1], [*same, 2]])
    assert group.stem == 39
    assert group_prompts([[1, 2]]) == [Group(0, (0,))]
    assert group_prompts([]) == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=90), max_size=60), st.booleans())
def test_every_prompt_is_in_one_group_and_begins_with_its_stem(prompts, long):
    prompts = [[1] * 70 + prompt for prompt in prompts] if long else prompts
    groups = group_prompts(prompts)
    assert sorted(index for group in groups for index in group.order) == list(range(len(prompts)))
    for group in groups:
        stems = {tuple(prompts[index][: group.stem]) for index in group.order}
        assert len(stems) == 1
        assert all(len(prompts[index]) > group.stem for index in group.order)
    if long and len(prompts) >= LEAST_PROMPTS:
        assert any(group.stem for group in groups)
