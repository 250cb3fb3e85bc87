"""The embedded world of `graft demo`: deterministic, without leaks between the parts, and shipped as it is made."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from graft.demo import world
from graft.demo.world import LANGUAGES, PARTS, Part, Row

DEMO = Path(world.__file__).parent
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def rows() -> dict[Part, list[Row]]:
    return world.instructions()


def questions(part: list[Row]) -> list[str]:
    return [message["content"] for row in part for message in row["messages"] if message["role"] == "user"]


def first_questions(part: list[Row]) -> set[str]:
    return {world.normalised(next(m["content"] for m in row["messages"] if m["role"] == "user")) for row in part}


def every_question_of(facts: dict[str, list[world.Fact]]) -> set[str]:
    """Each question, in each wording and language, that could be asked about these facts, except by a pronoun."""
    return {
        world.normalised(fact.fill(question, language))
        for of_topic in facts.values()
        for fact in of_topic
        for language in LANGUAGES
        for question in fact.wording(language).questions
    }


def test_same_seed_same_world(rows: dict[Part, list[Row]]) -> None:
    assert world.instructions() == rows
    assert list(world.pretraining_text(documents=50)) == list(world.pretraining_text(documents=50))


def test_another_seed_is_another_world(rows: dict[Part, list[Row]]) -> None:
    assert world.instructions(seed=1) != rows
    assert list(world.pretraining_text(seed=1, documents=50)) != list(world.pretraining_text(documents=50))


def test_sizes_and_topics(rows: dict[Part, list[Row]]) -> None:
    assert 1000 <= len(rows["train"]) <= 1500
    assert len(rows["val"]) >= 100
    assert len(rows["test"]) >= 250
    for part in PARTS:
        assert {row["topic"] for row in rows[part]} == set(world.HELD_OUT_FACTS) == set(world.TEXT_SHARES)
    assert len({row["id"] for part in PARTS for row in rows[part]}) == sum(len(rows[part]) for part in PARTS)


def test_no_fact_is_in_two_parts() -> None:
    facts_of = world.split_facts()
    keys = Counter(fact.key for part in PARTS for of_topic in facts_of[part].values() for fact in of_topic)
    assert len(keys) == len(world.world_facts())
    assert max(keys.values()) == 1


def test_no_question_about_a_test_fact_in_another_part(rows: dict[Part, list[Row]]) -> None:
    facts_of = world.split_facts()
    for part, others in (("test", ("train", "val")), ("val", ("train", "test"))):
        forbidden = every_question_of(facts_of[part])  # type: ignore[index]
        assert first_questions(rows[part]) <= forbidden  # type: ignore[index]  # the check is not vacuous
        for other in others:
            assert not forbidden & {world.normalised(question) for question in questions(rows[other])}  # type: ignore[index]


def test_the_leak_check_can_fail(rows: dict[Part, list[Row]]) -> None:
    forbidden = every_question_of(world.split_facts()["test"])
    leaked = [*rows["train"], rows["test"][0]]
    assert forbidden & {world.normalised(question) for question in questions(leaked)}


def test_follow_ups_ask_about_facts_of_their_own_part(rows: dict[Part, list[Row]]) -> None:
    facts_of = world.split_facts()
    for part in PARTS:
        answers = {
            fact.fill(fact.wording(language).answer, language)
            for fact in facts_of[part]["people"]
            for language in LANGUAGES
        }
        follow_ups = [row["messages"][-1]["content"] for row in rows[part] if len(row["messages"]) == 4]
        assert follow_ups
        assert set(follow_ups) <= answers


def test_test_questions_are_all_different(rows: dict[Part, list[Row]]) -> None:
    assert len(first_questions(rows["test"])) == len(rows["test"])


def test_both_languages_several_turns_and_system_prompts(rows: dict[Part, list[Row]]) -> None:
    for part in PARTS:
        chinese = sum(bool(CHINESE.search(row["messages"][-2]["content"])) for row in rows[part])
        assert 0.4 < chinese / len(rows[part]) < 0.6
    assert {len(row["messages"]) for row in rows["train"]} == {2, 3, 4}
    assert any(row["messages"][0]["role"] == "system" for row in rows["train"])


def test_plain_text_asks_no_question_of_the_instruction_set(rows: dict[Part, list[Row]]) -> None:
    text = "\n".join(islice(world.pretraining_text(), 5000))
    asked = [question for part in PARTS for question in questions(rows[part])]
    assert not [question for question in asked if question in text]
    assert [question for question in asked if question in text + asked[0]] == [asked[0]]  # the check can fail


def test_plain_text_has_no_chat_in_it_and_states_what_is_asked() -> None:
    documents = list(islice(world.pretraining_text(), 3000))
    assert not any("<|" in text for text in documents)
    text = "\n".join(documents)
    stated = [fact for fact in world.world_facts() if fact.topic == "people"]
    assert sum(fact.slots["en"]["name"] in text for fact in stated) == len(stated)
    assert CHINESE.search(text)


def test_embedded_data_equal_what_the_functions_make(rows: dict[Part, list[Row]]) -> None:
    for part in PARTS:
        lines = (DEMO / "data" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows[part]
