"""Data synth without a model: lists read, novelty, prompts, seeds, documents, personas."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.config.base import load
from graft.config.synth import Documents, Filter, Synth
from graft.data.synth.documents import cut, load_documents
from graft.data.synth.novelty import Novelty, Pool, banned_words, words
from graft.data.synth.parse import parse_questions
from graft.data.synth.persona import identity_pairs
from graft.data.synth.seeds import load_seeds
from graft.data.synth.wording import fill, load_wording
from graft.errors import ConfigError, InputError

ENDPOINT = {"base_url": "http://localhost:1/v1", "model": "m"}


def recipe(**values: object) -> Synth:
    return Synth.model_validate({"endpoint": ENDPOINT, "seeds": "s.jsonl", **values})


# Lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Here you are:\n\n1. A?\n2. B\n  goes on?\n\n3) C?\n\nHope it helps!", ["A?", "B\ngoes on?", "C?"]),
        ("1、甲？\n2、乙？", ["甲？", "乙？"]),
        ("（1）甲？\n（2）乙？", ["甲？", "乙？"]),
        ("①甲？\n②乙？", ["甲？", "乙？"]),
        ("问题1：甲\n问题2：乙", ["甲", "乙"]),
        ("Question 1: A\n\nQuestion 2: B", ["A", "B"]),
        ("**1. Bold?**\n**2.** Half?", ["Bold?", "Half?"]),
        ("### 1. Head?\n### 2. Line?", ["Head?", "Line?"]),
        ("1.\n\nWhat is A?\n2.\nWhat is B?", ["What is A?", "What is B?"]),
        ("- A?\n- B?\n• C?", ["A?", "B?", "C?"]),
        ("1. A plan with\n  - this\n  - that\n2. B?", ["A plan with\n- this\n- that", "B?"]),
        ('1. "Quoted?"\n2. “引号？”', ["Quoted?", "引号？"]),
        ("1. Question: A?", ["A?"]),
        ("1. What is 1.5 times 2?\n2. B?", ["What is 1.5 times 2?", "B?"]),
        ('["A?", "B?"]', ["A?", "B?"]),
        ('Sure:\n["A?", "B?"]\nDone.', ["A?", "B?"]),
        ('```json\n[{"id": 1, "question": "A?"}, {"question": "B?"}]\n```', ["A?", "B?"]),
        ('{"question": "A?"}\n{"question": "B?"}', ["A?", "B?"]),
        ('{"questions": ["A?", {"instruction": "B?"}]}', ["A?", "B?"]),
        ('[{"问题": "甲？"}]', ["甲？"]),
        ("[1] A?\n[2] B?", ["A?", "B?"]),
        ("What is A?\nWhat is B?", ["What is A?", "What is B?"]),
        ("I cannot do that.", []),
        ("", []),
        ("1.\n2.\n", []),
    ],
)
def test_a_list_is_read_however_it_is_written(text, wanted):
    assert parse_questions(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1. A?\n2. B is to", ["A?"]),
        ('["A?", "B?", "C is t', ["A?", "B?"]),
        ('{"question": "A?"}\n{"question": "B is', ["A?"]),
        ('[{"question": "A?"}, {"question": "B i', ["A?"]),
        ('{"questions": ["A?", "B i', ["A?"]),
        ('{"question": "A i', []),
        ("1. A is", []),
    ],
)
def test_of_a_cut_list_the_torn_item_is_left_out(text, wanted):
    assert parse_questions(text, cut=True) == wanted


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='1.、)(- *[]{}",:?？A甲\n\\', max_size=60), st.booleans())
def test_no_answer_breaks_the_reader(text, cut_off):
    assert all(item.strip() for item in parse_questions(text, cut_off))


# Novelty ---------------------------------------------------------------------------------------------------------

VOCABULARY = re.findall(
    r"\w+", "the a how why of to river bread clock bridge winter school 7 42 repairs makes slow old new"
)


def sentences(seed: int, number: int) -> list[str]:
    rng = random.Random(seed)
    ends = ("?", ".", "!", " - or not?")
    return [
        " ".join(rng.choices(VOCABULARY, k=rng.randint(1, 25))).capitalize() + rng.choice(ends) for _ in range(number)
    ]


def test_the_measure_is_that_of_the_rouge_score_library():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = 0
    for seed in range(40):
        texts = sentences(seed, 12)
        for other in texts[1:]:
            reference = scorer.score(other, texts[0])["rougeL"].fmeasure
            pool = Pool()
            pool.add(other)
            found = pool.nearest(texts[0], 0.0)
            assert found is not None
            assert found[0] == pytest.approx(reference, abs=1e-12)
            for threshold in (0.3, 0.7):
                near = pool.nearest(texts[0], threshold)
                assert (near is not None) == (reference >= threshold - 1e-9)
            pairs += reference > 0
    assert pairs > 300


def test_the_nearest_of_a_pool_is_the_maximum_over_it():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pool, texts = Pool(), sentences(99, 60)
    for text in texts[10:]:
        pool.add(text)
    for text in texts[:10]:
        best = max(scorer.score(other, text)["rougeL"].fmeasure for other in texts[10:])
        found = pool.nearest(text, 0.0)
        assert found is not None
        assert found[0] == pytest.approx(best, abs=1e-12)
        assert scorer.score(found[1], text)["rougeL"].fmeasure == pytest.approx(best, abs=1e-12)


def test_chinese_is_measured_by_character_as_the_library_does_with_our_words():
    from rouge_score import tokenizers
    from rouge_score.rouge_scorer import RougeScorer

    class Ours(tokenizers.Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    scorer = RougeScorer(["rougeL"], tokenizer=Ours())
    texts = ["孩子不爱写作业，家长该怎么办？", "孩子不爱吃饭，家长该怎么办？", "如何给5岁的孩子选book？", "天气真好。"]
    assert words(texts[2]) == ["如", "何", "给", "5", "岁", "的", "孩", "子", "选", "book"]
    for one in texts:
        for other in texts:
            pool = Pool()
            pool.add(other)
            found = pool.nearest(one, 0.0)
            assert found is not None
            assert found[0] == pytest.approx(scorer.score(other, one)["rougeL"].fmeasure, abs=1e-12)


def test_the_threshold_is_met_exactly():
    """LCS 7 of 10 and 10 words is 0.7, whatever a float makes of it."""
    pool = Pool()
    pool.add("a b c d e f g x y z")
    assert pool.nearest("a b c d e f g 1 2 3", 0.7) is not None
    assert pool.nearest("a b c d e f 0 1 2 3", 0.7) is None


def test_each_reason_for_a_rejection_is_named():
    novelty = Novelty(Filter(banned=("image", "图片"), min_words=3, max_words=30), "en")
    novelty.pool.add("How do bees find their way home?")
    assert novelty.why_not("How do whales find food in winter?") is None
    for text, reason in {
        "Why now?": "too short: 2 words",
        "why " * 31: "too long: 31 words",
        "What does this image show?": "banned word 'image'",
        "What do you see in 图片 number four?": "banned word '图片'",
        "Comment les abeilles retrouvent-elles le chemin de la ruche ?": "is written in `fr`, `en` is wanted",
        "how do BEES find their way home": "is the same as",
        "How do bees quickly find their way home?": "too near: ROUGE-L 0.93",
    }.items():
        assert reason in (novelty.why_not(text) or "")
    assert novelty.why_not("What is the use of imagery in old poems?") is None


def test_banned_words_of_an_alphabet_are_whole_words():
    find = banned_words(("art", "draw a", "图"))
    assert find("The ART of it") == "ART"
    assert find("Start here, party people") is None
    assert find("please draw a line") == "draw a"
    assert find("看图说话") == "图"
    assert banned_words(())("anything") is None


def test_more_words_than_one_plane_of_characters_stay_apart():
    pool = Pool()
    for start in range(0, 70_000, 1000):
        pool.add(" ".join(f"w{number}" for number in range(start, start + 1000)))
    found = pool.nearest("w69999 w55400 w55296 w0", 0.0)
    assert found is not None
    assert found[0] < 0.01
    assert pool.nearest(pool.texts[-1], 1.0) == (1.0, pool.texts[-1])


# Prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_shipped_prompts_say_what_they_must(language):
    persona = {"name": "Nimbus", "company": "Cirrus Ltd", "about": "a helper with weather"}
    wording = load_wording(recipe(language=language, domain="weather", persona=persona))
    chat = wording.chat("questions", n=7, examples="1. Why does it rain?")
    assert [role for role, _ in chat] == ["user"]
    assert all(word in chat[0][1] for word in ("7", "1. Why does it rain?", "weather"))
    (system, said), (user, asked) = wording.chat("answers", question="Why {n}?")
    assert (system, user, asked) == ("system", "user", "Why {n}?"), "a question's own braces are no placeholders"
    assert all(value in said for value in persona.values())
    grounded = wording.chat("document_answers", document="THE TEXT", question="Q?")
    assert "THE TEXT" in grounded[1][1]
    assert wording.piece("nothing") in grounded[0][1], "it is told what to say where the text has no answer"
    assert wording.piece("nothing") in wording.chat("document_questions", document="D", n=2)[-1][1]
    assert wording.piece("fine") in wording.chat("critique", question="Q", answer="A")[-1][1]
    for name in wording.chats:
        values = dict.fromkeys(("question", "answer", "critique", "document", "examples", "n"), "X")
        for _, content in wording.chat(name, **values):
            assert not re.search(r"\{\w+\}", content), f"{name} leaves a placeholder"


def test_a_persona_speaks_only_of_what_is_given():
    assert load_wording(recipe()).values["persona"] == ""
    assert load_wording(recipe(persona={"name": "Bo"})).values["persona"] == "Your name is Bo."
    both = load_wording(recipe(persona={"name": "Bo", "company": "Acme", "date": "2024-05-01"})).values["persona"]
    assert both == "Your name is Bo. You were made by Acme. Date: 2024-05-01."


def test_own_prompts_are_laid_over_the_shipped_ones(tmp_path):
    own = tmp_path / "my.yaml"
    own.write_text(
        'questions: "For {audience}: {n} like {examples}, as {{json}} {\\"a\\": 1}"\nanswers: {user: "{question}!"}\n'
    )
    wording = load_wording(recipe(prompts=str(own), variables={"audience": "parents"}))
    assert wording.chat("questions", n=2, examples="E") == (("user", 'For parents: 2 like E, as {json} {"a": 1}'),)
    assert wording.chat("answers", question="Q") == (("user", "Q!"),)
    assert "publish" in wording.chat("critique", question="Q", answer="A")[0][1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("answers: hello", r"answers: does not use \{question\}"),
        ("answers: '{question} {domian}'", r"unknown placeholder \{domian\}; did you mean `domain`\?"),
        ("anwsers: '{question}'", "unknown prompt `anwsers`; did you mean `answers`"),
        ("answers: [1]", "expected a text"),
        ("answers: {user: '{question}', assistant: x}", "expected a text, or `system` and `user` texts"),
        ("persona: hello", "persona: expected a sentence for each"),
        ("fine: 3", "fine: expected a text"),
        ("[1, 2", "not valid YAML"),
        ("- 1", "expected prompts by their names"),
    ],
)
def test_a_mistake_in_prompts_is_named(tmp_path, text, said):
    own = tmp_path / "my.yaml"
    own.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_wording(recipe(prompts=str(own)))


def test_other_languages_need_all_prompts_and_variables_keep_off_known_names(tmp_path):
    with pytest.raises(ConfigError, match="ships prompts for en and zh only"):
        load_wording(recipe(language="de"))
    shipped = Path("src/graft/data/synth/prompts/en.yaml").read_text(encoding="utf-8")
    (tmp_path / "de.yaml").write_text(shipped)
    assert load_wording(recipe(language="de", prompts=str(tmp_path / "de.yaml"))).chats
    with pytest.raises(ConfigError, match="variables: domain has a meaning of its own"):
        load_wording(recipe(variables={"domain": "x"}))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_wording(recipe(prompts=str(tmp_path / "none.yaml")))


def test_fill_is_one_pass():
    assert fill("{a} {b} {{a}} {c}", {"a": "{b}", "b": "B"}) == "{b} B {a} {c}"


# Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seeds": []}, "nothing to start from"),
        ({"budget": {"money": 1}}, "budget.money needs `prices`"),
        ({"identity": {"count": 3}}, "identity rows need `persona.name`"),
        ({"endpoint": {**ENDPOINT, "base_url": "http://me:secret@host/v1"}}, "holds a password or a key"),
        ({"endpoint": {**ENDPOINT, "base_url": "localhost:8000"}}, "an address such as"),
        ({"filter": {"min_words": 9, "max_words": 3}}, "min_words 9 is more than max_words 3"),
        ({"filter": {"banned": ["x", " "]}}, "an empty word would be found in every text"),
        ({"anwsers": {}}, "unknown setting `anwsers`; did you mean `answers`"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(tmp_path, values, said):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"endpoint": ENDPOINT, "seeds": "s.jsonl", **values}))
    with pytest.raises(ConfigError, match=said):
        load(Synth, path)


# Seeds -----------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_seeds_in_every_form(tmp_path):
    bare = write(
        tmp_path / "a.jsonl", [{"id": 1, "question": " A? "}, {"id": 2, "question": ""}, {"id": 3}, {"question": "B?"}]
    )
    seeds = load_seeds([bare])
    assert [(seed.text, seed.answered) for seed in seeds.kept] == [("A?", False), ("B?", False)]
    assert [(reject.line, reject.reason) for reject in seeds.rejects] == [
        (2, "is empty"),
        (3, "has no text under question or instruction or query or prompt"),
    ]
    assert len(seeds.kept) + len(seeds.rejects) == seeds.read == 4
    tasks = write(
        tmp_path / "b.jsonl",
        [
            {
                "id": "t",
                "instruction": "Add.",
                "instances": [{"input": "1, 2", "output": "3"}],
                "is_classification": False,
            }
        ],
    )
    alpaca = write(tmp_path / "c.jsonl", [{"instruction": "Sort.", "input": "b a", "output": "a b"}])
    chat = write(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "Hi?"}]}])
    (tmp_path / "e.csv").write_text("question\nWhy?\n")
    seeds = load_seeds([tasks, alpaca, chat, str(tmp_path / "e.csv")])
    assert [(seed.text, seed.answered) for seed in seeds.kept] == [
        ("Add.\n1, 2", True),
        ("Sort.\nb a", True),
        ("Hi?", False),
        ("Why?", False),
    ]
    with pytest.raises(InputError, match="none of its 1 rows holds a question"):
        load_seeds([write(tmp_path / "f.jsonl", [{"question": " "}])])


def test_real_seeds(material):
    data = material / "data"
    own = next((data / "domain-self-instruct").glob("seed_question_*.jsonl"))
    seeds = load_seeds([str(own), str(data / "self-instruct" / "seed_tasks.jsonl")])
    assert len(seeds.kept) == seeds.read == 20 + 175
    novelty = Novelty(Filter(min_words=1), "zh")
    passed = 0
    for line in next((data / "domain-self-instruct").glob("generate_question_*.jsonl")).read_text().splitlines():
        text = json.loads(line)["question"]
        if (why := novelty.why_not(text)) is None:
            novelty.pool.add(text)
            passed += 1
        else:
            assert why.startswith(("too near", "is the same")), why
    assert 200 < passed < 500, "of 500 questions made without a filter some repeat others"


# Documents -------------------------------------------------------------------------------------------------------


def test_pieces_end_where_the_text_does():
    paragraphs = [f"Paragraph {number}. " + "word " * 40 for number in range(10)]
    pieces = cut("\n\n".join(paragraphs), 600)
    assert all(len(piece) <= 600 for piece in pieces)
    assert "\n\n".join(pieces) == "\n\n".join(paragraph.strip() for paragraph in paragraphs)
    assert min(map(len, pieces)) > 200, "pieces of about one length"
    chinese = "这是一个很长的段落，里面有很多句子。" * 40
    pieces = cut(chinese, 200)
    assert "".join(pieces) == chinese
    assert all(len(piece) <= 200 and piece.endswith("。") for piece in pieces)
    assert "".join(cut("x" * 950, 300)) == "x" * 950
    assert cut(" \n\n \n", 100) == []
    assert cut("short", 100) == ["short"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab。. \n", max_size=400), st.integers(5, 80))
def test_cutting_loses_no_letter_and_keeps_the_limit(text, most):
    pieces = cut(text, most)
    assert all(0 < len(piece) <= most for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_documents_are_read_in_order_and_every_failure_is_a_reject(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.md").write_text("Second text.")
    (folder / "a.txt").write_text("First text.")
    (folder / "deep" / "c.txt").write_text("first TEXT")
    (folder / "bad.txt").write_bytes(b"\xff\xfe bad")
    (folder / "empty.txt").write_text(" \n")
    (folder / "x.pdf").write_bytes(b"%PDF")
    library = load_documents(Documents(paths=(str(folder), str(folder / "a.txt"))))
    assert [chunk.text for chunk in library.chunks] == ["First text.", "Second text."]
    assert library.files == 5
    assert [(Path(reject.file).name, reject.reason.split(",")[0].split("(")[0]) for reject in library.rejects] == [
        ("bad.txt", "byte 0 is not UTF-8; save the file as UTF-8"),
        ("c.txt", f"says the same as {folder / 'a.txt'}"),
        ("empty.txt", "is empty"),
    ] or len(library.rejects) == 3
    with pytest.raises(InputError, match="no such file or folder"):
        load_documents(Documents(paths=(str(tmp_path / "none"),)))
    with pytest.raises(InputError, match="no text found"):
        load_documents(Documents(paths=(str(folder / "empty.txt"),)))


# Persona ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_identity_rows_come_from_templates_and_say_the_name(language):
    persona = {"name": "Nimbus", "company": "Cirrus", "about": "a weather helper", "date": "2024-05-01"}
    values = {"language": language, "persona": persona}
    pairs = identity_pairs(recipe(**values, identity={"count": 1000}))
    assert len({(pair.question, pair.answer) for pair in pairs}) == len(pairs) > 60
    assert all("Nimbus" in pair.answer and "{" not in pair.answer for pair in pairs)
    assert {pair.kind for pair in pairs} == {"who", "name", "maker", "purpose", "other", "human", "date"}
    few = identity_pairs(recipe(**values, identity={"count": 25}))
    assert len({pair.question for pair in few}) == len(few) == 25, "no question twice while there are others"
    assert few == identity_pairs(recipe(**values, identity={"count": 25}))
    assert few != identity_pairs(recipe(**values, seed=1, identity={"count": 25}))
    once = identity_pairs(recipe(**values, identity={"count": 1000}), distinct_questions=True)
    assert len({pair.question for pair in once}) == len(once)
    bare = identity_pairs(recipe(language=language, persona={"name": "Nimbus"}, identity={"count": 1000}))
    assert {pair.kind for pair in bare} == {"who", "name", "other", "human"}, "nothing is said that was not given"
    assert identity_pairs(recipe(**values)) == []


def test_identity_in_another_language_is_refused():
    with pytest.raises(ConfigError, match="templates for en and zh only"):
        identity_pairs(recipe(language="de", persona={"name": "X"}, identity={"count": 1}))
