"""Data synth against a real HTTP server on this machine: nothing paid is ever lost, and nothing asked twice."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from openai_server import WORDS, Fault, OpenAIServer, Seen, answer_to, said
from typer.testing import CliRunner

from graft.cli.data.app import app
from graft.config.base import load
from graft.config.data import Source
from graft.config.synth import Synth
from graft.data.load import load_sources
from graft.data.synth.client import Client, is_local
from graft.data.synth.journal import Journal
from graft.data.synth.material import prepare
from graft.data.synth.results import Outcome
from graft.data.synth.run import synthesise
from graft.errors import ConfigError, InputError, Interrupted

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def seeds(tmp_path: Path) -> str:
    path = tmp_path / "seeds.jsonl"
    rows = [
        {"id": n, "question": f"What would somebody do with {word} number {n * 7}?"}
        for n, word in enumerate(WORDS[:12])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(server: OpenAIServer, seeds: str, /, **values: object) -> Synth:
    endpoint = {"base_url": server.base_url, "model": "fake", "backoff": 0.01, "timeout": 20}
    endpoint |= values.pop("endpoint", {})  # type: ignore[call-overload]
    whole = {"endpoint": endpoint, "seeds": seeds, "count": 30, "domain": "crafts", **values}
    return Synth.model_validate({name: value for name, value in whole.items() if value is not None})


def run(settings: Synth, out: Path, **options: bool) -> Outcome:
    outcome = synthesise(prepare(settings), out, **options)
    check_counts(outcome, out)
    return outcome


def check_counts(outcome: Outcome, out: Path) -> None:
    """kept + rejected = read, on every level, and in the files."""
    summary = outcome.summary
    questions, answers = summary["questions"], summary["answers"]
    rejects = jsonl(out / "rejects.jsonl")
    assert summary["seeds"]["kept"] + summary["seeds"]["rejected"] == summary["seeds"]["read"]
    assert questions["kept"] + questions["rejected"] == questions["candidates"]
    assert answers["kept"] + answers["rejected"] + answers["not_reached"] == answers["asked"]
    items = [row for row in rejects if row["file"] == "questions"]
    assert sum(row["field"].startswith("item") for row in items) == questions["rejected"]
    assert sum(row["field"] == "request" for row in items) == questions["failed_requests"]
    assert sum(row["file"] == "answers" for row in rejects) == answers["rejected"]
    assert all(row["reason"] for row in rejects)
    assert len(jsonl(out / "questions.jsonl")) == answers["asked"]
    assert len(jsonl(out / "data.jsonl")) == summary["rows"] == answers["kept"] + summary["identity"]


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results(out: Path) -> tuple[bytes, ...]:
    """What a run leaves to be used, byte for byte."""
    return tuple((out / name).read_bytes() for name in ("data.jsonl", "questions.jsonl", "rejects.jsonl"))


def is_question_request(seen: Seen) -> bool:
    return "numbered list" in said(seen.body) or "编号的列表" in said(seen.body)


# The way of the data ---------------------------------------------------------------------------------------------


def test_seeds_become_questions_and_answers(seeds, tmp_path):
    with OpenAIServer() as server:
        out = tmp_path / "out"
        outcome = run(recipe(server, seeds, identity={"count": 5}, persona={"name": "Bo", "company": "Acme"}), out)
        assert outcome.stopped is None
        assert outcome.summary["questions"]["kept"] == 30
        asked = [seen for seen in server.seen if is_question_request(seen)]
        assert 1 < server.most_busy <= 8
        assert all("crafts" in said(seen.body) for seen in asked)
        first = re.findall(r"^\d+\. (.*)$", said(asked[0].body).split("Write 10")[0], re.MULTILINE)
        assert len(first) == 8
        assert all("somebody do with" in item for item in first), "seeds stand in while nothing is generated"
    questions = jsonl(out / "questions.jsonl")
    assert [row["id"] for row in questions] == list(range(1, 43))
    assert set(questions[0]) == {"id", "question"}
    assert [row["question"] for row in questions[:12]] == [row["question"] for row in jsonl(Path(seeds))]
    rows = load_sources([Source(path=str(out / "data.jsonl"))]).conversations
    assert Counter(row.meta["kind"] for row in rows) == {"seed": 12, "generated": 30, "identity": 5}
    assert [[m.role for m in row.messages] for row in rows] == [["user", "assistant"]] * 47
    assert [row.messages[0].content for row in rows[:42]] == [row["question"] for row in questions]
    assert all("Bo" in row.messages[1].content for row in rows[42:] if "human" not in row.messages[0].content)
    assert len({row.id for row in rows}) == 47
    reasons = Counter(row["reason"].split(":")[0].split(" '")[0] for row in jsonl(out / "rejects.jsonl"))
    assert reasons["is the same as"] > 0, "the server repeats one question in each answer"


def test_later_requests_mix_six_seeds_and_two_generated_questions(seeds, tmp_path):
    with OpenAIServer() as server:
        run(recipe(server, seeds, count=40, questions={"ahead": 1}), tmp_path / "out")
        asked = [seen for seen in server.seen if is_question_request(seen)]
    assert len(asked) >= 5
    for seen in asked[1:]:
        examples = re.findall(r"^\d+\. (.*)$", said(seen.body).split("Write 10")[0], re.MULTILINE)
        assert sum("somebody do with" in item for item in examples) == 6
        assert len(examples) == 8
    assert len({said(seen.body) for seen in asked}) == len(asked), "each request has its own mixture"


def test_a_finished_folder_asks_nothing_and_writes_the_same_bytes(seeds, tmp_path):
    with OpenAIServer() as server:
        settings = recipe(server, seeds)
        first = run(settings, tmp_path / "out")
        before, requests = results(tmp_path / "out"), len(server.seen)
        again = run(settings, tmp_path / "out")
        assert len(server.seen) == requests == first.summary["requests"]["asked_now"]
        assert again.summary["requests"]["asked_now"] == 0
        assert again.summary["requests"]["from_journal"] == requests
        assert again.summary["tokens"]["prompt"] == first.summary["tokens"]["prompt"]
        assert results(tmp_path / "out") == before


def test_a_larger_count_keeps_all_that_was_paid(seeds, tmp_path):
    with OpenAIServer() as server:
        run(recipe(server, seeds, count=29), tmp_path / "out")  # one request more than it began with
        requests, before = len(server.seen), jsonl(tmp_path / "out" / "questions.jsonl")
        more = run(recipe(server, seeds, count=60), tmp_path / "out")
        assert more.summary["requests"]["from_journal"] == requests
        assert Counter(seen.digest for seen in server.seen).most_common(1)[0][1] == 1
        assert jsonl(tmp_path / "out" / "questions.jsonl")[: len(before)] == before
        run(recipe(server, seeds, count=60, endpoint={"concurrency": 1}), tmp_path / "other")
    assert results(tmp_path / "out") == results(tmp_path / "other"), "the plan does not depend on the concurrency"


def test_documents_give_grounded_questions_and_answers(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(4):
        (texts / f"{n}.txt").write_text(f"The {WORDS[n]} of house {n} is kept in the {WORDS[n + 9]}. " * 3)
    silent = "The lantern"

    def answer(body, digest):
        text = said(body)
        if "Write 4 questions" in text and WORDS[3] in text:
            return "NOTHING"
        if "from that you are given" in text or "Answer the question fully" in text:
            return "nothing." if int(digest, 16) % 5 == 0 else f"It is kept where the book says, note {digest}."
        return answer_to(body, digest)

    with OpenAIServer(answer=answer) as server:
        settings = recipe(server, "", seeds=None, count=None, documents={"paths": str(texts), "questions_per_chunk": 4})
        outcome = run(settings, tmp_path / "out")
        asked = [seen for seen in server.seen if is_question_request(seen)]
        assert len(asked) == 4
        answers = [seen for seen in server.seen if "Answer the question fully" in said(seen.body)]
        assert answers
        assert all(silent not in said(seen.body) for seen in answers)
        for context in ("none", "prompt"):
            kept = settings.documents.model_copy(update={"context": context})
            requests = len(server.seen)
            run(settings.model_copy(update={"documents": kept}), tmp_path / "out")
            assert len(server.seen) == requests, "how rows keep their text is no reason to ask again"
            row = load_sources([Source(path=str(tmp_path / "out" / "data.jsonl"))]).conversations[0]
            assert ("house 0" in row.messages[0].content) == (context == "prompt")
            assert "context" not in row.meta
        run(settings, tmp_path / "out")
    rows = load_sources([Source(path=str(tmp_path / "out" / "data.jsonl"))]).conversations
    assert rows
    for row in rows:
        assert row.meta["kind"] == "document"
        assert row.meta["context"] == Path(row.meta["document"]).read_text().strip()
        assert row.meta["piece"] == 1
    rejects = jsonl(tmp_path / "out" / "rejects.jsonl")
    assert outcome.summary["questions"]["failed_requests"] == 1, "one text has nothing to ask about"
    assert any(row["reason"].startswith("the text does not answer it") for row in rejects)


def test_critique_rewrites_where_faults_are_found(seeds, tmp_path):
    with OpenAIServer() as server:
        outcome = run(recipe(server, seeds, count=8, critique={"rounds": 2}), tmp_path / "out")
        looks = outcome.summary["critique"]
        assert looks["fine"] > 0
        assert looks["rewritten"] > 0
        rewrites = [seen for seen in server.seen if "It leaves out the most useful step." in said(seen.body)]
        assert len(rewrites) == looks["rewritten"]
    rows = jsonl(tmp_path / "out" / "data.jsonl")
    assert sum(row.get("rewritten", 0) for row in rows) == looks["rewritten"]


def test_identity_by_the_model_must_say_the_name(tmp_path):
    def answer(body, digest):
        named = "Bo" in body["messages"][0]["content"]
        return (
            "I am Bo, made by Acme, and glad to meet you." if named and int(digest, 16) % 4 else "I am somebody here."
        )

    with OpenAIServer(answer=answer) as server:
        persona = {"name": "Bo", "company": "Acme"}
        settings = recipe(server, "", seeds=None, count=None, persona=persona, identity={"count": 20, "by": "model"})
        outcome = run(settings, tmp_path / "out")
        assert outcome.summary["questions"]["requests"] == 0
    rows, rejects = jsonl(tmp_path / "out" / "data.jsonl"), jsonl(tmp_path / "out" / "rejects.jsonl")
    assert len(rows) + len(rejects) == 20
    assert rows
    assert rejects
    assert all(re.match("does not say '(Bo|Acme)'", row["reason"]) for row in rejects)


# Faults ----------------------------------------------------------------------------------------------------------

PASSING = [
    Fault(429, headers=(("retry-after", "0.05"),)),
    Fault(429, headers=(("retry-after-ms", "20"),)),
    Fault(500),
    Fault(502, body=b"<html>Bad gateway</html>"),
    Fault(503, headers=(("retry-after", "Thu, 01 Jan 1970 00:00:00 GMT"),)),
    Fault(408),
    Fault(cut_at=0.5),
    Fault(cut_at=0.0),
    Fault(reset=True),
    Fault(body=b'{"id": "x", "choices": [{"message": {"content": "Begin wi'),
    Fault(body=b""),
    Fault(body=b"[1, 2]"),
    Fault(body=b'{"error": {"message": "overloaded"}}'),
    Fault(body=b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 0}}'),
    Fault(body=b'{"choices": [{"message": null}]}'),
    Fault(body=b"\xff\xfe\x00"),
    Fault(delay=1.5),
]


def test_passing_faults_leave_no_trace_in_the_result(seeds, tmp_path):
    with OpenAIServer() as server:
        run(recipe(server, seeds), tmp_path / "clean")
    turn = iter(range(10**6))

    def fault(seen: Seen) -> Fault | None:
        """The first attempt of each request fails, each in another way; of some the second one too."""
        count = server.count(seen.digest)
        number = next(turn)
        return PASSING[number % len(PASSING)] if count == 1 or (count == 2 and number % 3 == 0) else None

    with OpenAIServer(fault) as server:
        outcome = run(recipe(server, seeds, endpoint={"timeout": 1.0}), tmp_path / "out")
        assert outcome.stopped is None
        needed = outcome.summary["requests"]["asked_now"]
        assert outcome.summary["requests"]["failed_attempts"] >= needed > 2 * len(PASSING)
        answered = Counter(seen.digest for seen in server.answered if seen.id)
        late = Counter(seen.digest for seen in server.answered if seen.id).total() - needed
        assert len(answered) == needed
        assert late <= sum(fault.delay > 0 for fault in PASSING) * needed, "answered after the client had left"
    assert results(tmp_path / "out") == results(tmp_path / "clean")
    kinds = Counter(next(iter(row)) for row in jsonl(tmp_path / "out" / "journal.jsonl"))
    assert kinds["answer"] == needed
    assert kinds["lost"] > 0
    assert kinds["free"] > 0
    assert kinds["asked"] == kinds["answer"] + kinds["lost"] + kinds["free"]
    assert "failed" not in kinds


def test_retry_after_holds_all_requests_back(seeds, tmp_path):
    def fault(seen: Seen) -> Fault | None:
        """The first request is sent away while the second is in flight."""
        if seen is server.seen[0]:
            return Fault(429, headers=(("retry-after", "0.8"),))
        return Fault(delay=0.3) if seen is server.seen[1] else None

    with OpenAIServer(fault) as server:
        run(recipe(server, seeds, count=40, endpoint={"concurrency": 2}), tmp_path / "out")
        assert server.statuses()[429] == 1
        assert min(seen.at for seen in server.seen[2:]) - server.seen[0].at >= 0.8


def test_an_endpoint_that_asks_for_too_long_a_wait_ends_the_run(seeds, tmp_path):
    with OpenAIServer(lambda _seen: Fault(429, headers=(("retry-after", "3600"),))) as server:
        outcome = run(recipe(server, seeds), tmp_path / "out")
    assert "asks to wait 3600 s, endpoint.longest_wait is 120" in str(outcome.stopped)
    assert outcome.stopped.exit_code == 2


@pytest.mark.parametrize(
    ("status", "code"), [(401, None), (403, None), (404, None), (402, None), (429, "insufficient_quota")]
)
def test_a_closed_endpoint_ends_the_run_at_once(seeds, tmp_path, status, code):
    body = json.dumps({"error": {"message": "no", "code": code}}).encode()
    with OpenAIServer(lambda _seen: Fault(status, body=body)) as server:
        outcome = run(recipe(server, seeds), tmp_path / "out")
        assert isinstance(outcome.stopped, InputError)
        assert f"{status}: " in str(outcome.stopped)
        assert "start again" in str(outcome.stopped)
        assert len(server.seen) <= 8


def test_an_endpoint_that_is_down_ends_the_run_and_spoils_nothing(seeds, tmp_path):
    with OpenAIServer() as server:
        run(recipe(server, seeds), tmp_path / "clean")
    down = False

    def fault(_seen: Seen) -> Fault | None:
        nonlocal down
        down = down or len(server.answered) >= 20
        return Fault(500) if down else None

    with OpenAIServer(fault) as server:
        settings = recipe(server, seeds, endpoint={"retries": 1, "failures_in_a_row": 3})
        outcome = run(settings, tmp_path / "out")
        assert "3 requests in a row failed" in str(outcome.stopped)
        assert outcome.summary["answers"]["not_reached"] > 0
        assert '"failed"' not in (tmp_path / "out" / "journal.jsonl").read_text()
        server.fault = lambda _seen: None
        assert run(settings, tmp_path / "out").stopped is None
    assert results(tmp_path / "out") == results(tmp_path / "clean")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html> <b>Wrong door</b></html>", "no JSON in an answer of 31 characters: <html> <b>Wrong door</b></html>"),
        (b'{"choices": [', 'broken JSON in an answer of 13 characters: {"choices": ['),
        (b'{"error": {"message": "no credits"}}', "an answer with an error object: no credits"),
        (b'{"error": "no credits"}', 'an answer with an error object: "no credits"'),
    ],
)
def test_what_came_instead_of_an_answer_is_quoted(seeds, tmp_path, body, said):
    with OpenAIServer(lambda _seen: Fault(body=body)) as server:
        outcome = run(recipe(server, seeds, endpoint={"retries": 0, "failures_in_a_row": 2}), tmp_path / "out")
    assert f"the last with: {said}; 1 attempts" in str(outcome.stopped)


def test_a_status_is_told_once(seeds, tmp_path):
    with OpenAIServer(lambda _seen: Fault(401, body=b'{"error": {"message": "bad key"}}')) as server:
        outcome = run(recipe(server, seeds), tmp_path / "out")
    assert ": 401: bad key; check the key" in str(outcome.stopped)


def test_nobody_there(seeds, tmp_path):
    with OpenAIServer() as server:
        settings = recipe(server, seeds, endpoint={"retries": 0, "failures_in_a_row": 2})
    outcome = run(settings, tmp_path / "out")
    assert "2 requests in a row failed, the last with: connection lost (ConnectError" in str(outcome.stopped)
    assert outcome.summary["tokens"] == {
        "prompt": 0,
        "completion": 0,
        "answers_without_usage": 0,
        "answers_over_their_limit": 0,
    }, "what was never sent costs nothing"


def test_a_request_that_always_fails_is_rejected_by_name_and_not_asked_again(seeds, tmp_path):
    def poison(seen: Seen) -> bool:
        return said(seen.body).endswith("number 21?")

    def fault(seen: Seen) -> Fault | None:
        return Fault(400, body=b'{"error": {"message": "context too long"}}') if poison(seen) else None

    with OpenAIServer(fault) as server:
        settings = recipe(server, seeds, endpoint={"concurrency": 2})
        assert run(settings, tmp_path / "out").stopped is None
        [reject] = [row for row in jsonl(tmp_path / "out" / "rejects.jsonl") if row["file"] == "answers"]
        assert "context too long" in reject["reason"]
        assert "number 21?" in reject["reason"]
        assert sum(map(poison, server.seen)) == 1
        before, requests = results(tmp_path / "out"), len(server.seen)
        run(settings, tmp_path / "out")
        assert (results(tmp_path / "out"), len(server.seen)) == (before, requests)


def test_failures_between_answers_do_not_add_up_to_a_closed_endpoint(seeds, tmp_path):
    bad = ("number 7?", "number 35?", "number 63?")
    with OpenAIServer(lambda seen: Fault(422) if said(seen.body).endswith(bad) else None) as server:
        settings = recipe(server, seeds, endpoint={"concurrency": 1, "failures_in_a_row": 2})
        outcome = run(settings, tmp_path / "out")
        assert outcome.stopped is None
        assert outcome.summary["answers"]["rejected"] == 3
    assert '"failed"' in (tmp_path / "out" / "journal.jsonl").read_text()


def test_cut_answers_are_asked_again_with_more_room(seeds, tmp_path):
    def fault(seen: Seen) -> Fault | None:
        if is_question_request(seen):
            return Fault(patch={"finish_reason": "length"})
        always = said(seen.body).endswith("number 21?")
        return Fault(patch={"finish_reason": "length"}) if always or seen.body["max_tokens"] == 100 else None

    with OpenAIServer(fault) as server:
        outcome = run(recipe(server, seeds, count=8, answers={"max_tokens": 100}), tmp_path / "out")
        answers = [seen for seen in server.seen if not is_question_request(seen)]
        assert Counter(seen.body["max_tokens"] for seen in answers) == {100: 20, 200: 20}
        asked = len(server.seen) - len(answers)
        assert outcome.summary["questions"]["candidates"] == 9 * asked, "the last item of a cut list is left out"
    [reject] = [row for row in jsonl(tmp_path / "out" / "rejects.jsonl") if row["file"] == "answers"]
    assert reject["reason"].startswith("cut at 100 tokens (answers.max_tokens); then cut at 200 tokens")


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ({"content": "I'm sorry, but I cannot help with that."}, "refuses, or speaks as a language model"),
        ({"content": "As an AI language model, I have no bees."}, "refuses, or speaks as a language model"),
        ({"content": None, "refusal": "No."}, "the endpoint marks it as a refusal"),
        ({"content": "", "finish_reason": "content_filter"}, "withheld by the endpoint's content filter"),
        ({"content": "<think>\nLet me see.\n</think>\n\n"}, "empty answer"),
        ({"content": "Well."}, "too short: 1 words, answers.min_words is 2"),
        ({"content": "Look at the picture and you will see it."}, "holds the banned word 'picture'"),
        ({"content": "Il faut commencer par le plus simple et continuer."}, "is written in `fr`, `en` is wanted"),
    ],
)
def test_each_useless_answer_is_asked_again_and_then_rejected_by_name(seeds, tmp_path, patch, reason):
    def fault(seen: Seen) -> Fault | None:
        hit = said(seen.body).endswith("number 21?") or (
            said(seen.body).endswith("number 14?") and server.count(seen.digest) == 1
        )
        return Fault(patch=patch) if hit else None

    with OpenAIServer(fault) as server:
        values = {"answers": {"min_words": 2}, "filter": {"banned": "picture"}}
        outcome = run(recipe(server, seeds, count=1, **values), tmp_path / "out")
        assert sum(said(seen.body).endswith("number 21?") for seen in server.seen) == 2
        assert sum(said(seen.body).endswith("number 14?") for seen in server.seen) == 2
        assert outcome.summary["answers"]["rejected"] == 1
    [reject] = [row for row in jsonl(tmp_path / "out" / "rejects.jsonl") if row["file"] == "answers"]
    assert reject["reason"].startswith(reason)
    assert reject["reason"].count(reason) == 1, "said once, though it happened twice"


def test_reasoning_is_kept_only_on_request(seeds, tmp_path):
    def fault(seen: Seen) -> Fault | None:
        even = int(seen.digest, 16) % 2
        thought = (
            {"content": "<think>\nHm.\n</think>\n\nIt is so."}
            if even
            else {"content": "It is so.", "reasoning_content": "Hm."}
        )
        return None if is_question_request(seen) else Fault(patch=thought)

    with OpenAIServer(fault) as server:
        for keep in (False, True):
            run(recipe(server, seeds, count=5, answers={"keep_reasoning": keep}), tmp_path / "out")
            rows = load_sources([Source(path=str(tmp_path / "out" / "data.jsonl"))]).conversations
            assert {row.messages[-1].reasoning for row in rows} == {"Hm." if keep else None}
            assert {row.messages[-1].content for row in rows} == {"It is so."}


def test_tokens_that_the_endpoint_does_not_count_are_estimated_and_said(seeds, tmp_path):
    usages = [None, {}, {"prompt_tokens": -1, "completion_tokens": 2}, {"prompt_tokens": "7", "completion_tokens": 1}]
    with OpenAIServer(lambda seen: Fault(patch={"usage": usages[int(seen.digest, 16) % 4]})) as server:
        outcome = run(recipe(server, seeds), tmp_path / "out")
        tokens, answers = outcome.summary["tokens"], outcome.summary["requests"]["asked_now"]
        sent = sum(len(m["content"]) for seen in server.seen for m in seen.body["messages"])
    assert tokens["answers_without_usage"] == answers > 0
    assert sent / 4 < tokens["prompt"] < sent
    assert tokens["completion"] > 20 * answers / 4


# Budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"tokens": 14_000}, {"money": 0.02}])
def test_the_budget_is_never_exceeded_and_a_larger_one_goes_on(seeds, tmp_path, limit):
    prices = {"input": 1.0, "output": 2.0}

    def usage(seen: Seen) -> dict[str, int]:
        """Each answer uses all that it may."""
        prompt = sum(len(m["content"].encode()) for m in seen.body["messages"])
        return {"prompt_tokens": prompt, "completion_tokens": seen.body["max_tokens"]}

    def spent() -> float:
        used = [usage(seen) for seen in server.answered]
        weights = (1, 1) if "tokens" in limit else (1e-6, 2e-6)
        return sum(weights[0] * each["prompt_tokens"] + weights[1] * each["completion_tokens"] for each in used)

    values = {"questions": {"max_tokens": 400}, "answers": {"max_tokens": 150}, "prices": prices, "count": 30}
    with OpenAIServer() as server:
        run(recipe(server, seeds, **values), tmp_path / "clean")
    with OpenAIServer(lambda seen: Fault(patch={"usage": usage(seen)}, delay=0.01)) as server:
        settings = recipe(server, seeds, **values, budget=limit)
        outcome = run(settings, tmp_path / "out")
        assert isinstance(outcome.stopped, Interrupted)
        assert outcome.stopped.exit_code == 5
        assert "the next request could exceed the budget" in str(outcome.stopped)
        most = next(iter(limit.values()))
        assert 0.8 * most < spent() <= most, "it stops before, and not long before"
        requests = len(server.seen)
        assert run(settings, tmp_path / "out").stopped is not None
        assert len(server.seen) == requests, "what was spent is remembered"
        larger = {name: 100 * value for name, value in limit.items()}
        done = run(settings.model_copy(update={"budget": settings.budget.model_copy(update=larger)}), tmp_path / "out")
        assert done.stopped is None
        assert max(Counter(seen.digest for seen in server.seen).values()) == 1
        assert done.summary["cost"] == pytest.approx(spent() if "money" in limit else done.summary["cost"])
    assert results(tmp_path / "out") == results(tmp_path / "clean")


def test_an_endpoint_that_does_not_hold_to_its_limit_is_named(seeds, tmp_path):
    with OpenAIServer(
        lambda _seen: Fault(patch={"usage": {"prompt_tokens": 9, "completion_tokens": 99_999}})
    ) as server:
        outcome = run(recipe(server, seeds, count=5), tmp_path / "out")
    assert outcome.summary["tokens"]["answers_over_their_limit"] == outcome.summary["requests"]["asked_now"] > 0


# The journal -----------------------------------------------------------------------------------------------------


def test_a_torn_end_is_cut_off_and_only_that_is_asked_again(seeds, tmp_path):
    with OpenAIServer() as server:
        settings = recipe(server, seeds)
        run(settings, tmp_path / "out")
        clean, journal = results(tmp_path / "out"), tmp_path / "out" / "journal.jsonl"
        whole = journal.read_bytes()
        rng = random.Random(5)
        for _ in range(8):
            end = rng.randrange(len(whole))
            journal.write_bytes(whole[:end])
            kept = whole[:end].count(b'\n{"answer"')
            torn = whole[:end].rpartition(b"\n")[2]
            requests = len(server.seen)
            outcome = run(settings, tmp_path / "out")
            assert results(tmp_path / "out") == clean
            assert outcome.summary["requests"]["from_journal"] == kept - torn.startswith(b'{"answer"')
            assert len(server.seen) - requests == outcome.summary["requests"]["asked_now"]
            for line in journal.read_bytes().splitlines():
                json.loads(line)


def test_a_broken_line_in_the_middle_costs_only_itself(seeds, tmp_path, capsys):
    with OpenAIServer() as server:
        settings = recipe(server, seeds)
        run(settings, tmp_path / "out")
        clean, journal = results(tmp_path / "out"), tmp_path / "out" / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        number = next(n for n, line in enumerate(lines) if line.startswith(b'{"answer"'))
        lines[number] = lines[number][:30] + b"\n"
        journal.write_bytes(b"".join(lines))
        outcome = run(settings, tmp_path / "out")
        assert outcome.summary["requests"]["asked_now"] == 1
        assert results(tmp_path / "out") == clean
    assert f"journal.jsonl:{number + 1}: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("plan", [{}, {"texts": 3, "settings": None}, {"texts": {}, "settings": {"endpoint": []}}])
def test_a_plan_that_was_edited_is_another_plan(seeds, tmp_path, plan):
    journal = tmp_path / "journal.jsonl"
    journal.write_text(json.dumps({"journal": 1, "plan": plan}) + "\n")
    with (
        OpenAIServer() as server,
        pytest.raises(InputError, match=r"begun with another recipe: prompts; .*language was"),
    ):
        run(recipe(server, seeds), tmp_path)


def test_numbers_that_no_run_writes_are_flaws_of_the_journal(tmp_path):
    lines = [
        '{"journal": 1, "plan": {}}',
        '{"lost": "a", "why": "", "usage": [Infinity, 1]}',
        '{"free": "a", "why": ""}',
    ]
    (tmp_path / "journal.jsonl").write_text("".join(line + "\n" for line in lines))
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.flawed == [2]
    journal.close()


def test_what_is_no_journal_and_a_folder_in_use_are_refused(seeds, tmp_path):
    with OpenAIServer() as server:
        out = tmp_path / "out"
        out.mkdir()
        (out / "journal.jsonl").write_text('{"a": 1}\n')
        with pytest.raises(InputError, match="is no journal"):
            run(recipe(server, seeds), out)
        (out / "journal.jsonl").unlink()
        holder = Journal(out / "journal.jsonl")
        with pytest.raises(InputError, match="another `graft data synth` is at work here"):
            run(recipe(server, seeds), out)
        holder.close()
        assert server.seen == []
        assert run(recipe(server, seeds), out).stopped is None


def test_another_recipe_is_refused_by_name_or_goes_on_with_a_warning(seeds, tmp_path, capsys):
    with OpenAIServer() as server:
        out = tmp_path / "out"
        run(recipe(server, seeds), out)
        requests = len(server.seen)
        for values, said_ in (
            ({"questions": {"temperature": 0.5}}, "questions.temperature was 1.0, is 0.5"),
            ({"endpoint": {"model": "other"}}, "endpoint.model was 'fake', is 'other'"),
            ({"persona": {"name": "Bo"}}, "domain, persona or variables"),
            ({"domain": "weather"}, "domain, persona or variables"),
            ({"filter": {"rouge": 0.5}}, "filter.rouge was 0.7, is 0.5"),
        ):
            with pytest.raises(InputError, match=re.escape(f"was begun with another recipe: {said_}")):
                run(recipe(server, seeds, **values), out)
        assert len(server.seen) == requests
        free = {"endpoint": {"concurrency": 3, "retries": 2, "timeout": 9}, "prices": {"input": 1, "output": 1}}
        assert run(recipe(server, seeds, **free), out).summary["requests"]["asked_now"] == 0
        capsys.readouterr()
        changed = recipe(server, seeds, answers={"temperature": 0.2})
        outcome = run(changed, out, accept_changes=True)
        assert "answers.temperature was None, is 0.2" in capsys.readouterr().err
        assert outcome.summary["requests"]["from_journal"] == sum(map(is_question_request, server.seen))
        assert outcome.summary["requests"]["asked_now"] == outcome.summary["answers"]["asked"]
        assert run(changed, out).summary["requests"]["asked_now"] == 0, "the new recipe is now the journal's"


# The command -----------------------------------------------------------------------------------------------------


def as_file(settings: Synth, path: Path) -> Path:
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return path


def start(recipe_file: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "graft", "data", "synth", str(recipe_file), "--out", str(out), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def ids_in(journal: Path) -> set[str]:
    """Ids of the answers that stand in whole lines."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return {row["id"] for row in map(json.loads, lines) if "answer" in row}


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_no_answer_and_asks_none_twice(seeds, tmp_path):
    with OpenAIServer() as server:
        run(recipe(server, seeds, count=60, critique={"rounds": 1}), tmp_path / "clean")
    rng, out = random.Random(11), tmp_path / "out"
    recorded: list[set[str]] = []  # answers that a start found in its journal
    asked_before: list[int] = []  # requests that the server had seen by then
    with OpenAIServer(lambda seen: Fault(delay=int(seen.digest[:2], 16) / 255 * 0.06)) as server:
        file = as_file(recipe(server, seeds, count=60, critique={"rounds": 1}), tmp_path / "r.yaml")
        kills = 0
        while True:
            recorded.append(ids_in(out / "journal.jsonl"))
            asked_before.append(len(server.seen))
            process = start(file, out)
            if kills < 5:
                server.wait_for_answers(len(server.answered) + rng.randint(1, 30))
                time.sleep(rng.random() * 0.05)
                process.kill()
                process.communicate()
                kills += 1
                time.sleep(0.2)  # what was in flight is still written into closed connections
                continue
            output, errors = process.communicate(timeout=120)
            break
        assert process.returncode == 0, errors
        summary = json.loads(output)
        assert summary["complete"]
        journal = ids_in(out / "journal.jsonl")
        by_id = {seen.id: seen for seen in server.seen if seen.id}
        cut = summary["requests"]["cut_in_flight"]
        # Every answer in the journal is one that the server gave; all others were in flight at a kill.
        assert journal <= by_id.keys()
        assert 0 <= len(server.seen) - len(journal) <= cut <= 8 * kills
        # No request is sent again after a start that found its answer in the journal.
        for found, before in zip(recorded, asked_before, strict=True):
            paid = {by_id[name].digest for name in found}
            assert not paid & {seen.digest for seen in server.seen[before:]}
        assert len(recorded[-1]) > 20
        assert any(recorded[n] < recorded[n + 1] for n in range(kills))
        times = Counter(seen.digest for seen in server.seen)
        assert times.total() - len(times) <= cut
    assert results(out) == results(tmp_path / "clean"), "killed five times equals never killed"
    assert len(journal) == len(times)


def test_ctrl_c_waits_for_what_is_in_flight_and_the_same_command_goes_on(seeds, tmp_path):
    with OpenAIServer() as server:
        run(recipe(server, seeds), tmp_path / "clean")
    out = tmp_path / "out"
    with OpenAIServer(lambda _seen: Fault(delay=0.3)) as server:
        file = as_file(recipe(server, seeds, endpoint={"concurrency": 4}), tmp_path / "r.yaml")
        process = start(file, out)
        assert server.wait_for_answers(6)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 5, errors
        assert "stopped by SIGINT; all answers are in" in " ".join(errors.split())
        assert "Traceback" not in errors
        assert json.loads(output)["complete"] is False
        assert len(ids_in(out / "journal.jsonl")) == len(server.seen), "nothing that was in flight is lost"
        process = start(file, out)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert json.loads(output)["requests"]["cut_in_flight"] == 0
        assert max(Counter(seen.digest for seen in server.seen).values()) == 1
    assert results(out) == results(tmp_path / "clean")


def test_the_key_is_sent_and_written_nowhere(seeds, tmp_path):
    key = "sk-test-4f9a8c1d77e2b0356a"

    def fault(seen: Seen) -> Fault | None:
        assert seen.headers["authorization"] == f"Bearer {key}"
        number = len(server.seen)
        if number > 25:
            return Fault(401, body=json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}).encode())
        if number % 5 == 0:
            return Fault(500, body=json.dumps({"error": {"message": f"cannot handle {key}"}}).encode())
        if number % 7 == 0:
            return Fault(400, body=f"bad {key}".encode())
        return Fault(patch={"content": f"Your key {key} is noted, thank you very much."}) if number % 4 == 0 else None

    with OpenAIServer(fault) as server:
        quoted = recipe(server, seeds, endpoint={"api_key_env": "MY_KEY", "extra_body": {"user": key}})
        process = start(as_file(quoted, tmp_path / "quoted.yaml"), tmp_path / "quoted", MY_KEY=key)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "`endpoint.extra_body.user` holds a password or a key" in errors
        assert key not in errors + output
        assert not (tmp_path / "quoted").exists()
        settings = recipe(server, seeds, endpoint={"api_key_env": "MY_KEY"})
        process = start(as_file(settings, tmp_path / "r.yaml"), tmp_path / "out", MY_KEY=key)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "401" in errors
        assert {400, 401, 500} <= set(server.statuses())
    assert key not in output
    assert key not in errors
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "config.yaml",
        "journal.jsonl",
        "questions.jsonl",
        "data.jsonl",
        "rejects.jsonl",
    }
    for path in files:
        assert key.encode() not in path.read_bytes(), path
    assert b"***" in (tmp_path / "out" / "journal.jsonl").read_bytes(), "it was there to be hidden"


def test_headers_and_query_of_an_azure_endpoint_are_sent_and_the_values_written_nowhere(seeds, tmp_path):
    secret = "azure-4f9a8c1d77e2b0356a"

    def fault(seen: Seen) -> Fault | None:
        assert seen.headers["api-key"] == secret
        assert "authorization" not in seen.headers, "the key of another vendor, or a made-up one"
        assert seen.query == {"api-version": ["2024-10-21"]}
        if len(server.seen) > 20:
            return Fault(401, body=json.dumps({"error": {"message": f"wrong api-key {secret}"}}).encode())
        return Fault(patch={"content": f"Noted: {secret}, thank you."}) if len(server.seen) % 4 == 0 else None

    with OpenAIServer(fault) as server:
        address = server.base_url.replace("/v1", "/openai/deployments/mine")
        azure = {"base_url": address, "headers": {"api-key": "AZURE_KEY"}, "query": {"api-version": "2024-10-21"}}
        recipe_file = as_file(recipe(server, seeds, endpoint=azure), tmp_path / "r.yaml")
        process = start(recipe_file, tmp_path / "out", AZURE_KEY=secret, OPENAI_API_KEY="sk-of-another-vendor-9")
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "check endpoint.headers (api-key)" in errors
    assert len(server.seen) > 20
    everything = output + errors + "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert secret not in everything
    assert "***" in everything, "it was there to be hidden"
    assert "AZURE_KEY" in (tmp_path / "out" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"api-key": "UNSET_VARIABLE"}, "variable UNSET_VARIABLE, which is not set; a recipe names the variable"),
        ({"api-key": "s3cr3t-value"}, "an environment variable, which is not set"),
        ({"api key": "PATH"}, "no name of a header"),
        ({"api-key": "BLANK"}, "holds nothing to send"),
    ],
)
def test_a_header_that_cannot_be_sent_is_refused_and_what_may_be_secret_not_shown(
    seeds, tmp_path, monkeypatch, headers, said
):
    monkeypatch.setenv("BLANK", " ")
    with OpenAIServer() as server, pytest.raises(ConfigError, match=said) as error:
        run(recipe(server, seeds, endpoint={"headers": headers}), tmp_path / "out")
    assert "s3cr3t" not in str(error.value)
    assert not (tmp_path / "out").exists()


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_a_dry_run_opens_no_socket_and_needs_no_key(seeds, tmp_path, monkeypatch):
    import socket

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    file = tmp_path / "r.yaml"
    values = {
        "endpoint": {"base_url": "https://api.example.com/v1", "model": "big"},
        **{"seeds": seeds, "count": 95, "domain": "crafts", "critique": {"rounds": 1}},
        "prices": {"input": 2, "output": 10},
    }
    file.write_text(yaml.safe_dump(values))
    shown = json.loads(invoke("synth", file, "--out", tmp_path / "out", "--dry-run", "--json"))
    assert set(shown["prompts"]) == {"questions", "answers"}
    assert "crafts" in shown["prompts"]["questions"][-1]["content"]
    questions, answers, critique = shown["stages"]
    assert (questions["requests"], answers["requests"], critique["requests"]) == (10, 107, 214)
    assert questions["answer_tokens"] == 10 * 2048
    assert answers["answer_tokens"] == 107 * 1024
    assert questions["cost"] == pytest.approx((questions["prompt_tokens"] * 2 + 20480 * 10) / 1e6)
    shown = invoke("synth", file, "--dry-run")
    assert "the first request of questions" in shown
    assert re.search(r"^critique +214 ", shown, re.MULTILINE)
    with pytest.raises(ConfigError, match="--out FOLDER is needed"):
        invoke("synth", file)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="needs a key, and the environment variable OPENAI_API_KEY is not set"):
        invoke("synth", file, "--out", tmp_path / "out")


def test_the_command_says_what_it_did(seeds, tmp_path):
    with OpenAIServer() as server:
        file = as_file(recipe(server, seeds, prices={"input": 1, "output": 2, "currency": "EUR"}), tmp_path / "r.yaml")
        shown = invoke("synth", file, "count=12", "--out", tmp_path / "out")
    assert "seeds: 12 read, 12 kept, 0 rejected" in shown
    assert re.search(r"questions: \d+ generated, 12 kept, \d+ rejected", shown)
    assert "answers: 24 asked, 24 kept, 0 rejected\n" in shown
    assert re.search(
        r"requests: \d+ answered now, 0 found in the journal, 0 attempts failed; .* tokens in all, 0\.\d+ EUR", shown
    )
    assert f"{tmp_path / 'out' / 'data.jsonl'}: 24 rows" in shown


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(seeds, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with OpenAIServer() as server:
        assert run(recipe(server, seeds, count=2), tmp_path / "out").stopped is None


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://10.1.2.3:8000/v1", True),
        ("http://192.168.0.7/v1", True),
        ("http://vllm:8000/v1", True),
        ("http://gpu7.local/v1", True),
        ("https://api.openai.com/v1", False),
        ("http://8.8.8.8/v1", False),
    ],
)
def test_what_is_local(url, local):
    assert is_local(url) is local


def test_a_key_with_a_line_break_is_refused(seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "abc\ndef")
    with OpenAIServer() as server, pytest.raises(ConfigError, match="holds characters that no key has"):
        Client(recipe(server, seeds).endpoint)


def test_the_shipped_recipe_goes_from_seeds_to_train_and_test(tmp_path):
    shipped = ROOT / "recipes" / "data" / "domain-bloom-synth.yaml"
    questions = [
        "孩子不想上学，家长应该怎么开导？",
        "怎样给五岁的孩子讲睡前故事？",
        "孩子和同学吵架了，家长要不要出面？",
    ]
    questions += [f"{age}岁的孩子每天玩多久游戏合适，家长怎么定规矩？" for age in (6, 12)]
    questions += [
        "二胎出生以后，老大总是闹脾气怎么办？",
        "零花钱每个月给多少才算合理？",
        "孩子胆小不敢发言，怎样帮他建立自信？",
    ]
    seeds_file = tmp_path / "seed_question.jsonl"
    rows = [{"id": n, "question": text} for n, text in enumerate(questions, 1)]
    seeds_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "family"
    with OpenAIServer() as server:
        overrides = [f"endpoint.base_url={server.base_url}", f"seeds={seeds_file}", "count=120"]
        result = json.loads(invoke("synth", shipped, *overrides, "--out", out, "--json"))
        assert all("家庭教育" in said(seen.body) for seen in server.seen if is_question_request(seen))
    assert result["complete"]
    assert result["questions"]["kept"] == 120
    assert result["rows"] == 120 + len(questions) + 40
    config = load(Synth, out / "config.yaml")
    assert (config.count, config.persona.name) == (120, "小禾")
    split = json.loads(
        invoke("split", out / "data.jsonl", "--out", out / "parts", "--val", 0.1, "--test", 0.1, "--json")
    )
    parts = {Path(path).stem: count for path, count in split["written"].items()}
    assert set(parts) == {"train", "val", "test"}
    assert sum(parts.values()) == result["rows"]
    assert len(load_sources([Source(path=str(out / "parts" / "train.jsonl"))]).conversations) == parts["train"]


def test_a_full_disk_stops_the_run_with_whole_lines_in_the_journal(seeds, tmp_path, monkeypatch):
    write, room = os.write, 40

    def full(file: int, data: bytes) -> int:
        """A disk that takes a part of the line that fills it, and then nothing."""
        nonlocal room
        room -= data.startswith(b'{"answer"')
        if room > 0:
            return write(file, data)
        if room == 0 and len(data) > 20:
            return write(file, data[:20])
        raise OSError(28, "No space left on device")

    with OpenAIServer() as server:
        settings = recipe(server, seeds)
        monkeypatch.setattr("graft.data.synth.journal.os.write", full)
        outcome = run(settings, tmp_path / "out")
        monkeypatch.undo()
        assert "cannot be written (No space left on device); make room and start again" in str(outcome.stopped)
        lines = (tmp_path / "out" / "journal.jsonl").read_bytes()
        assert lines.endswith(b"\n")
        assert sum("answer" in json.loads(line) for line in lines.splitlines()) == 39
        assert run(settings, tmp_path / "out").stopped is None
        run(settings, tmp_path / "clean")
    assert results(tmp_path / "out") == results(tmp_path / "clean")


def test_even_a_defect_lets_what_is_in_flight_come_home(seeds, tmp_path, monkeypatch):
    from graft.data.synth.answers import Answerer

    judge, calls = Answerer._judge, []

    def defective(self: Answerer, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError
        return judge(self, *arguments)

    with OpenAIServer(lambda seen: Fault(delay=int(seen.digest[0], 16) / 100)) as server:
        monkeypatch.setattr(Answerer, "_judge", defective)
        with pytest.raises(ZeroDivisionError):
            run(recipe(server, seeds), tmp_path / "out")
        assert len(ids_in(tmp_path / "out" / "journal.jsonl")) == len(server.seen)
