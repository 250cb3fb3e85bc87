"""Each cleaning step does what its policy says, and leaves everything else to the last character."""

import json
import signal
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.config.clean import (
    Cut,
    Damage,
    Debris,
    Empty,
    Html,
    Language,
    Length,
    Personal,
    Refusal,
    Repair,
    Repetition,
    Rule,
    Rules,
)
from graft.data.clean.cut import cut_long
from graft.data.clean.damage import repair_damage, repair_text
from graft.data.clean.debris import remove_debris, without_debris
from graft.data.clean.html import convert_html, to_markdown
from graft.data.clean.language import UNKNOWN, detect_language, known_languages
from graft.data.clean.length import check_length, drop_empty
from graft.data.clean.personal import check_regions, find_personal, treat_personal
from graft.data.clean.refusal import drop_refusals, find_boilerplate
from graft.data.clean.repair import repair_order
from graft.data.clean.repetition import drop_repetition, repeated_share
from graft.data.clean.rules import apply_rules, check_rules
from graft.data.clean.step import Drop
from graft.data.clean.tongue import check_languages, filter_language
from graft.errors import ConfigError, GraftError
from graft.types import Conversation, Message, Origin

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def talk(*turns: str, **given) -> Conversation:
    """talk("u:Hi", "a:Hello"): the letter before the colon is the role."""
    messages = tuple(Message(ROLES[turn[0]], turn[2:]) for turn in turns)
    return Conversation("id", Origin("f.jsonl", 7), messages, **given)


def raw(text: str) -> Conversation:
    return Conversation("id", Origin("f.jsonl", 7), text=text)


def said(result) -> list[str]:
    assert isinstance(result, Conversation), result
    return [f"{message.role[0]}:{message.content}" for message in result.messages]


def reason(result) -> str:
    assert isinstance(result, Drop), result
    return result.reason


# Language -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("How do I change a bicycle tyre without tools?", "en"),
        ("¿Cómo puedo cambiar la rueda de una bicicleta?", "es"),
        ("Comment est-ce que je répare mon vélo ?", "fr"),
        ("Wie repariere ich mein Fahrrad?", "de"),
        ("Come posso riparare la mia bicicletta?", "it"),
        ("Como posso consertar a minha bicicleta?", "pt"),
        ("Hoe repareer ik mijn fiets het snelst?", "nl"),
        ("Как мне починить велосипед дома?", "ru"),
        ("كيف أصلح دراجتي في المنزل؟", "ar"),
        ("自転車の修理方法を教えてください", "ja"),
        ("자전거를 어떻게 고치나요?", "ko"),
        ("怎样在家里修理自行车？", "zh"),
        ("怎樣在家裡修理腳踏車？", "zh"),
        ("你好", "zh"),
        ("請問 Python 的 list 怎麼 sort", "zh"),
        ("東京大学の歴史", "ja"),
        ("Hello there", "en"),
        ("What does 你好 mean in Chinese?", "en"),
    ],
)
def test_languages_also_short_and_mixed(text, code):
    found, sure = detect_language(text)
    assert found == code
    assert 0.2 <= sure <= 1


@pytest.mark.parametrize("text", ["", " \n", "123 + 4 = 127", "???", "😀😀", "ok", "https://a.b/c"])
def test_what_is_no_language_is_not_guessed(text):
    assert detect_language(text) == (UNKNOWN, 0.0)


def test_code_is_no_language_and_a_long_text_is_bounded():
    code = "```python\nwhile True:\n    the.thing(and_the=other)\n```\n"
    assert detect_language(code + "Dies druckt die Zahlen von eins bis zehn.")[0] == "de"
    assert detect_language("Das ist ein ganz normaler Satz. " * 100_000)[0] == "de"


def test_known_languages_hold_the_great_ones_once():
    known = known_languages()
    assert {"en", "es", "fr", "de", "it", "ja", "ko", "zh", "ar", "ru", "pt", "nl"} < set(known)
    assert list(known) == sorted(set(known))
    assert UNKNOWN not in known
    assert "yue" not in known  # a member of zh


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_an_answer(text):
    code, sure = detect_language(text)
    assert code == UNKNOWN or code in known_languages()
    assert 0 <= sure <= 1


def test_language_filter():
    english, chinese = (
        talk("u:How are you today, my friend?", "a:I am very well, thank you."),
        talk("u:你好", "a:我很好"),
    )
    keep = Language(keep=("en",))
    assert filter_language(english, keep, Counter()) is english
    assert reason(filter_language(chinese, keep, Counter())) == "language zh is not kept (100% sure)"
    assert "is skipped" in reason(filter_language(chinese, Language(skip=("zh",)), Counter()))
    unsure = talk("u:1+1", "a:2")
    assert filter_language(unsure, keep, Counter()) is unsure
    assert reason(filter_language(unsure, Language(keep=("en",), unknown="drop"), Counter())) == "language not known"
    long_question = talk("u:" + "Please translate this sentence. " * 3, "a:" + "这是一个很长的中文回答。" * 30)
    assert "zh" in reason(filter_language(long_question, keep, Counter()))
    with pytest.raises(ConfigError, match=r"no language `eng`; did you mean `en`\?"):
        check_languages(Language(keep=("eng",)))
    check_languages(Language(keep=known_languages()))


# HTML and debris ------------------------------------------------------------------------------------------------

EXPORT = (
    '<div class="markdown prose w-full break-words dark:prose-invert light">'
    "<p>Use <strong>this</strong> &amp; my_var where a &lt; b:</p>"
    '<pre><div class="bg-black rounded-md"><div class="flex items-center"><span>python</span>'
    '<button class="flex ml-auto gap-2"><svg stroke="currentColor"><path d="M1"></path></svg>Copy code</button></div>'
    '<div class="p-4"><code class="!whitespace-pre hljs language-python"><span class="hljs-keyword">def</span> f(x):'
    '\n\n\n    <span class="hljs-keyword">return</span> x &lt; 1_0  *  2\n</code></div></div></pre>'
    "<ol><li>One</li><li>Two</li></ol>"
    "<table><thead><tr><th>A</th><th>B</th></tr></thead><tbody><tr><td>1</td><td>x|y</td></tr></tbody></table>"
    '<p><span class="katex"><math><semantics><annotation encoding="application/x-tex">x^2</annotation></semantics>'
    '</math><span class="katex-html">x2</span></span></p></div>'
)
MARKDOWN = """Use **this** & my_var where a < b:

```python
def f(x):


    return x < 1_0  *  2
```

1. One
2. Two

| A | B |
| --- | --- |
| 1 | x\\|y |

$x^2$"""


def test_an_export_becomes_the_markdown_it_was_rendered_from():
    assert to_markdown(EXPORT) == MARKDOWN
    notes = Counter()
    result = convert_html(talk("u:Is a<b?", f"a:{EXPORT}"), Html(), notes)
    assert said(result) == ["u:Is a<b?", f"a:{MARKDOWN}"]
    assert notes == {"messages converted": 1}


def test_code_with_fences_in_it_gets_a_longer_fence():
    assert to_markdown("<pre><code>a\n```\nb</code></pre>") == "````\na\n```\nb\n````"


def test_what_a_user_typed_keeps_its_lines():
    assert (
        to_markdown('<div class="whitespace-pre-wrap">if x:\n    y &lt; 1\n\nwhy?</div>') == "if x:\n    y < 1\n\nwhy?"
    )


def test_prose_without_marks_is_converted_where_nobody_asked_for_html():
    html = "<p>Plain <em>prose</em></p><ul><li>a</li></ul>"
    assert said(convert_html(talk("u:Tell me", f"a:{html}"), Html(), Counter()))[1] == "a:Plain *prose*\n\n- a"


@pytest.mark.parametrize(
    "turns",
    [
        ("u:Is a<b and c>d?", "a:Yes, a<b."),
        ("u:What does List<String> mean?", "a:A list of <T>."),
        ("u:Make an HTML list", "a:<ul><li>a</li></ul>"),
        ("u:做一个网页", "a:<div><p>你好</p></div>"),
        ("u:Tell me", "a:<div>\n  <p>laid out by hand</p>\n</div>"),
        ("u:Tell me", 'a:<div style="float:left"><p>x</p></div>'),
        ("u:Tell me", "a:<!DOCTYPE html><html><body><p>x</p></body></html>"),
        ("u:<p>What is this?</p>", "a:A paragraph."),
        ("u:x", "a:Use `<br>` or <b>bold</b> for that."),
        ("u:x", "a:```html\n<p>hi</p>\n```"),
    ],
)
def test_html_that_is_meant_is_left_alone(turns):
    conversation = talk(*turns)
    assert convert_html(conversation, Html(), Counter()) is conversation


def test_tags_when_asked_and_depth_without_a_crash():
    page = raw("<p>One</p><p>Two</p>")
    assert convert_html(page, Html(), Counter()) is page
    assert convert_html(page, Html(when="tags"), Counter()).text == "One\n\nTwo"
    deep = "<div>" * 5000 + "x" + "</div>" * 5000
    assert "too deeply" in reason(convert_html(raw(deep), Html(when="tags"), Counter()))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1 / 1Sure, here", "Sure, here"),
        ("2 / 3\n\nHello", "Hello"),
        ("```\npythonCopy code\nimport os\n```", "```python\nimport os\n```"),
        ("```python\nCopy code\nimport os\n```", "```python\nimport os\n```"),
        ("```\npythonCopy codeimport os\n```", "```python\nimport os\n```"),
        ("```\npython复制代码\nimport os\n```", "```python\nimport os\n```"),
        ("```Copy code\n```\nhi", "hi"),
        ("Done.\nCopy code", "Done."),
        ("foo\n\nShare\nRegenerate response\n", "foo"),
        ("ChatGPT said:\n\nHello", "Hello"),
    ],
)
def test_debris_goes(before, after):
    assert without_debris(before) == after
    assert said(remove_debris(talk("u:x", f"a:{before}"), Debris(), Counter()))[1] == f"a:{after}"


@pytest.mark.parametrize(
    "text",
    [
        "1 / 2 cup of sugar",
        "1 / 4 = 0.25",
        "3 / 2\nis more than one",
        "Click Copy code to copy.",
        "```bash\ncp a b\nCopy code\n```",
        "```\nCopy the file\n```",
        "- Like\n- Comment\nShare",
        "  blanks at the ends  \n",
    ],
)
def test_words_of_somebody_stay(text):
    assert without_debris(text) == text


# Damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cafÃ© olÃ©", "café olé"),
        ("Itâ€™s â€œfineâ€\x9d", "It’s “fine”"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет"),
        ("e\u0301te\u0301", "été"),
        ("か\u3099", "が"),
        ("a\x00b\x1b[31mred\x1b[0m\r\nc\rd\ufeff", "abred\nc\nd"),
        ("twice\r\r\nconverted", "twice\nconverted"),
    ],
)
def test_certain_damage_is_repaired(before, after):
    assert repair_text(before) == after


@pytest.mark.parametrize(
    "text",
    [
        "naïve Ångström £5 – “q”",
        "CAFÉ» bon",
        "MAÇÃ\u00a0",
        "Why does é show as Ã© in my page?",
        "😀 👨\u200d👩\u200d👧 می\u200cخواهم",
        "你好，世界。ＡＢＣ ①",
        "\ttab\nline",
        "豈 \u212b",
    ],
)
def test_sound_text_is_not_touched(text):
    assert repair_text(text) == text


def test_lost_text_is_dropped_by_its_share():
    assert "3 of 13 characters (23.1%)" in reason(repair_damage(talk("u:x", "a:锟斤拷 and more."), Damage(), Counter()))
    long = talk("u:x", "a:" + "fine " * 100 + "\ufffd")
    notes = Counter()
    assert repair_damage(long, Damage(), notes) is long
    assert notes == {"lost characters": 1}
    assert isinstance(repair_damage(long, Damage(lost=0), Counter()), Drop)
    assert repair_damage(raw("\ufffd"), Damage(lost=1), Counter()).text == "\ufffd"


# Repair, empty, length -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["u:a", "u:b", "a:c"], ["u:a\n\nb", "a:c"]),
        (["s:x", "s:y", "u:a", "a:b", "a:c"], ["s:x\n\ny", "u:a", "a:b\n\nc"]),
        (["a:hello", "u:a", "a:b"], ["u:a", "a:b"]),
        (["s:x", "a:hello", "u:a", "a:b"], ["s:x", "u:a", "a:b"]),
        (["u:a", "a:b", "u:c"], ["u:a", "a:b"]),
        (["u:a", "a:b", "u:c", "u:d"], ["u:a", "a:b"]),
        (["u:a", "u: ", "a:b"], ["u:a", "a:b"]),
    ],
)
def test_repair(before, after):
    assert said(repair_order(talk(*before), Repair(), Counter())) == after


def test_repair_keeps_where_it_is_told_to_and_invents_nothing():
    keep = Repair(same_role="keep", first_answer="keep", trailing_user="keep")
    messy = talk("a:hello", "u:a", "u:b", "a:c", "u:d")
    assert repair_order(messy, keep, Counter()) is messy
    assert reason(repair_order(talk("a:hello"), Repair(), Counter())) == "no answer to a question is left"
    sound = talk("s:x", "u:a", "a:b", "u:c", "a:d")
    assert repair_order(sound, Repair(), Counter()) is sound
    weights = Conversation(
        "i", Origin("f", 1), (Message("user", "a"), Message("assistant", "b", weight=0.0), Message("assistant", "c"))
    )
    assert len(repair_order(weights, Repair(), Counter()).messages) == 3


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["s", "u", "a", "t"]), max_size=8))
def test_repair_never_loses_a_word_in_the_middle(roles):
    conversation = talk(*(f"{role}:word{index}" for index, role in enumerate(roles)))
    result = repair_order(conversation, Repair(), Counter())
    if isinstance(result, Drop):
        return
    words = " ".join(message.content for message in result.messages).split()
    assert words == sorted(words, key=lambda word: int(word[4:]))
    first, last = roles.index("u"), max(index for index, role in enumerate(roles) if role != "u")
    assert {f"word{index}" for index in range(first, last + 1)} <= set(words)


def test_empty():
    pair = talk("u:a", "a:b", "u:c", "a: ", "u:d", "a:e")
    assert said(drop_empty(pair, Empty(), Counter())) == ["u:a", "a:b", "u:d", "a:e"]
    assert said(drop_empty(pair, Empty(drop="rest"), Counter())) == ["u:a", "a:b"]
    assert reason(drop_empty(pair, Empty(drop="conversation"), Counter())) == "empty answer"
    assert reason(drop_empty(talk("u:", "a:b"), Empty(), Counter())) == "empty question"
    assert reason(drop_empty(raw(" \n"), Empty(), Counter())) == "empty text"
    call = Message("assistant", "", tool_calls=({"type": "function", "function": {"name": "f", "arguments": {}}},))
    calling = Conversation("i", Origin("f", 1), (Message("user", "a"), call))
    assert drop_empty(calling, Empty(), Counter()) is calling


def test_length():
    short = talk("u:abc", "a:de")
    assert check_length(short, Length(), Counter()) is short
    assert reason(check_length(short, Length(min_chars=6), Counter())) == "too short: 5 characters, min_chars is 6"
    assert "max_chars is 4" in reason(check_length(short, Length(max_chars=4), Counter()))
    assert "answers of 2 characters" in reason(check_length(short, Length(min_answer_chars=3), Counter()))
    drop = check_length(short, Length(max_turn_chars=2), Counter())
    assert (drop.field, drop.reason) == ("messages[0]", "too long: 3 characters, max_turn_chars is 2")
    assert isinstance(check_length(raw("ab"), Length(min_chars=3), Counter()), Drop)


# Refusals -------------------------------------------------------------------------------------------------------

BOILERPLATE = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I cannot assist with this request.",
    "I apologize, but I am unable to provide medical advice.",
    "I cannot fulfill this request.",
    "As an AI language model, I don't have personal opinions. However, ...",
    "Sure! As an AI, I cannot feel pain.",
    "I'm just an AI assistant and cannot know.",
    "Unfortunately, as an AI language model, I cannot browse the internet.",
    "I am an AI language model and do not have feelings.",
    "My knowledge cutoff is September 2021.",
    "很抱歉，我无法回答这个问题。",
    "对不起，作为一个AI语言模型，我不能提供医疗建议。",
    "作为一个人工智能语言模型，我没有个人感情。",
    "作為一個人工智慧語言模型，我無法提供建議。",
    "我只是一个AI助手。",
    "Lo siento, pero no puedo ayudarte con eso.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Es tut mir leid, aber ich kann Ihnen dabei nicht helfen.",
    "Als KI-Sprachmodell habe ich keine Meinung.",
    "Mi dispiace, ma non posso aiutarti.",
    "Desculpe, mas não posso ajudar com isso.",
    "Het spijt me, maar ik kan je daar niet bij helpen.",
    "К сожалению, я не могу помочь с этим.",
    "申し訳ありませんが、その質問にはお答えできません。",
    "죄송하지만 도와드릴 수 없습니다.",
    "عذراً، لا أستطيع مساعدتك في ذلك.",
]
ANSWERS = [
    "As an AI engineer, I don't sleep much.",
    "AI language models cannot feel pain. They process text.",
    "Language models such as these cannot browse.",
    'He said: "As an AI, I cannot love." Then he left.',
    "I'm sorry to hear that. It must be hard.",
    "I cannot wait to see you!",
    "I am Vicuna, a language model trained by researchers.",
    "As a language model, I go by the name Gitclone.",
    "As an AI model trained by X, I can help you write code.",
    "- Agent: I'm sorry, but we are unable to fulfill your request.",
    "作为人工智能领域的专家，他没有放弃。",
    "人工智能无法完全取代人类。",
    "我是一个语言模型，由研究人员训练。",
    "作为一个老师，我没有时间。",
    "抱歉让你久等了，我们开始吧。",
    "Es tut mir leid, dass du krank bist. Ich kann dir einen Tee kochen.",
]


@pytest.mark.parametrize("answer", BOILERPLATE)
def test_boilerplate_is_found(answer):
    assert find_boilerplate(answer)


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_only_speak_of_ai_or_of_sorrow_stay(answer):
    conversation = talk("u:Say it", f"a:{answer}")
    assert drop_refusals(conversation, Refusal(), Counter()) is conversation


def test_what_goes_with_a_refusal():
    three = talk("s:x", "u:a", "a:b", "u:c", "a:I cannot help with that.", "u:d", "a:e")
    assert said(drop_refusals(three, Refusal(), Counter())) == ["s:x", "u:a", "a:b"]
    assert said(drop_refusals(three, Refusal(drop="pair"), Counter())) == ["s:x", "u:a", "a:b", "u:d", "a:e"]
    drop = drop_refusals(three, Refusal(drop="conversation"), Counter())
    assert (drop.field, drop.reason) == ("messages[4]", "refusal: 'I cannot help'")
    assert drop_refusals(three, Refusal(what=("disclaimer",)), Counter()) is three
    assert drop_refusals(raw("I cannot help with that."), Refusal(), Counter()).text


# Repetition -----------------------------------------------------------------------------------------------------


def test_loops_are_dropped_in_words_and_characters():
    for loop in ("the cat sat on " * 20, "很好很好" * 20, "no " * 60):
        drop = drop_repetition(talk("u:x", f"a:{loop}"), Repetition(), Counter())
        assert reason(drop).startswith("repeats itself: ")
    assert isinstance(drop_repetition(raw("la la la la " * 30), Repetition(), Counter()), Drop)


@pytest.mark.parametrize(
    "text",
    [
        "no " * 30,  # too short to judge
        "```\n" + "x = x + 1\n" * 50 + "```",
        "| a | b |\n" * 50,
        " ".join(f"word{n} and another" for n in range(50)),
    ],
)
def test_what_repeats_itself_with_reason_stays(text):
    conversation = talk("u:x", f"a:{text}")
    assert drop_repetition(conversation, Repetition(), Counter()) is conversation


@pytest.mark.parametrize("before", ["| a | b |\n|---|---|\n| 1 | 2 |", "    | a | b |", "* * *"])
def test_a_table_hides_itself_and_not_the_loop_below_it(before):
    loop = "\n\n" + "the cat sat on the mat again. " * 30
    assert isinstance(drop_repetition(talk("u:Hi", "a:" + before + loop), Repetition(), Counter()), Drop)


def test_a_quotation_ends_with_its_line():
    said = "> What are you?\n\nAs an AI language model, I don't have feelings."
    assert find_boilerplate(said) is not None
    assert find_boilerplate("> As an AI language model, I don't have feelings.\n\nThat is what it said.") is None


@pytest.fixture
def patience():
    """An end to what would take hours: no measure of speed, the tests need milliseconds."""

    def give_up(*_):
        raise AssertionError("more than 20 s: time grows with the square of the length or faster")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_long_runs_of_one_character_take_no_hours(patience):
    blanks = " " * 300_000
    assert repeated_share(f"{blanks}x\n{'-' * 300_000}x", 4, 40)[0] == 0
    assert without_debris(f"```{blanks}!") == f"```{blanks}!"
    assert without_debris(f"```{blanks}python{blanks}\n{blanks}Copy code\nx = 1\n```") == "```python\nx = 1\n```"
    assert repair_text("a" + "\r" * 300_000 + "b") == "a" + "\n" * 300_000 + "b"
    page = talk("u:Hi", f"a:<p>1</p><{'a' * 300_000}!</p>")
    assert convert_html(page, Html(), Counter()) is not None


def test_repeated_share():
    assert repeated_share("a b c d " * 3, 4, 4) == (1 - 4 / 9, "a b c d")
    assert repeated_share("a b", 4, 1) == (0.0, "")


# Personal data --------------------------------------------------------------------------------------------------

ALL = ("email", "phone", "card", "iban", "id", "ip")


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("write to John.Doe@corp-mail.com.", "email", "john.doe@corp-mail.com"),
        ("邮箱zhang@163.com。", "email", "zhang@163.com"),
        ("call +49 30 901820 today", "phone", "+4930901820"),
        ("call (650) 253-0000", "phone", "+16502530000"),
        ("手机号13800138000。", "phone", "+8613800138000"),
        ("card 4111 1111 1111 1111, please", "card", "4111111111111111"),
        ("IBAN DE89 3704 0044 0532 0130 00 AND MORE", "iban", "DE89370400440532013000"),
        ("身份证号360426199101010071。", "id", "360426199101010071"),
        ("CPF 390.533.447-05", "id", "39053344705"),
        ("SSN: 536-90-4399", "id", "536904399"),
        ("from 8.8.8.8 it came", "ip", "8.8.8.8"),
        ("at 2001:4860:4860::8888", "ip", "2001:4860:4860::8888"),
    ],
)
def test_personal_data_is_found_and_masked(text, kind, value):
    found = find_personal(text, ALL, ("US", "CN"))
    assert [(item.kind, item.value) for item in found] == [(kind, value)]
    masked = treat_personal(talk(f"u:{text}", "a:ok"), Personal(action="mask", regions=("US", "CN")), Counter())
    assert said(masked)[0] == f"u:{text[: found[0].start]}[{kind.upper()}_1]{text[found[0].end :]}"


@pytest.mark.parametrize(
    "text",
    [
        "a@example.com",
        "card 4111 1111 1111 1112",
        "身份证号360426199101010072。",
        "DE89 3704 0044 0532 0130 01",
        "192.168.0.1 or 127.0.0.1, version 8.8.8.8",
        "3.14159265358979323846",
        "order 1234567890123456789, ISBN 978-3-16-148410-0",
        "536-90-4399",
        "a @ b, x@y, 12:34:56",
        "1969-07-20 20:17:40",
    ],
)
def test_numbers_that_are_nobodys_stay(text):
    assert find_personal(text, ALL) == []


def test_placeholders_are_the_same_for_the_same_value():
    call = {"type": "function", "function": {"name": "mail", "arguments": {"to": "A@b.com", "n": [1, "c@d.com"]}}}
    conversation = Conversation(
        "i",
        Origin("f", 1),
        (
            Message("user", "a@b.com and c@d.com"),
            Message("assistant", "", tool_calls=(call,), reasoning="to A@B.com"),
        ),
    )
    notes = Counter()
    masked = treat_personal(conversation, Personal(action="mask"), notes)
    assert masked.messages[0].content == "[EMAIL_1] and [EMAIL_2]"
    assert masked.messages[1].reasoning == "to [EMAIL_1]"
    assert masked.messages[1].tool_calls[0]["function"]["arguments"] == {"to": "[EMAIL_1]", "n": [1, "[EMAIL_2]"]}
    assert call["function"]["arguments"]["to"] == "A@b.com"  # the original is not changed
    assert notes == {"email": 5}
    assert treat_personal(conversation, Personal(), Counter()) is conversation
    assert reason(treat_personal(conversation, Personal(action="drop"), Counter())) == "personal data: 2 email"
    assert treat_personal(conversation, Personal(action="mask", kinds=("ip",)), Counter()) is conversation
    with pytest.raises(ConfigError, match="no country `USA`"):
        check_regions(Personal(regions=("USA",)))


# Rules ----------------------------------------------------------------------------------------------------------


def rules(**rule) -> Rules:
    return Rules(rules=(Rule(name="mine", **rule),))


def test_rules():
    conversation = talk("s:secret", "u:My cat", "a:Your cat, Tom")
    replaced = apply_rules(conversation, rules(pattern=r"(\w+) cat", action="replace", by=r"\1 dog"), Counter())
    assert said(replaced) == ["s:secret", "u:My dog", "a:Your dog, Tom"]
    drop = apply_rules(conversation, rules(pattern="tom", action="drop", ignore_case=True), Counter())
    assert (drop.field, drop.reason) == ("messages[2]", "rule mine matches 'Tom'")
    assert apply_rules(conversation, rules(pattern="secret", action="drop"), Counter()) is conversation
    assert isinstance(
        apply_rules(conversation, rules(pattern="secret", action="drop", where="system"), Counter()), Drop
    )
    assert apply_rules(conversation, rules(pattern="^Your", action="keep"), Counter()) is conversation
    assert (
        reason(apply_rules(conversation, rules(pattern="dog", action="keep"), Counter())) == "rule mine matches nowhere"
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"pattern": "(a", "action": "drop"}, "rule mine: pattern '\\(a': missing \\)"),
        ({"pattern": "(a)", "action": "replace", "by": r"\2"}, r"rule mine: by .* invalid group reference"),
        ({"pattern": "(a)", "action": "replace", "by": r"\g<x>"}, r"rule mine: by .* unknown group"),
    ],
)
def test_wrong_rules_are_refused_before_any_row(rule, message):
    with pytest.raises(ConfigError, match=message):
        check_rules(rules(**rule))


def test_a_pattern_that_would_never_end_is_stopped():
    slow = Rules(rules=(Rule(name="slow", pattern=r"(?:a|aa|a?)*c(\w+\s?)*$", action="drop"),), seconds=0.2)
    check_rules(slow)
    with pytest.raises(GraftError, match=r"rule slow: .* more than 0.2 s for one text of f.jsonl:7"):
        apply_rules(talk("u:" + "b cab" * 2000 + "!", "a:x"), slow, Counter())


# Cutting --------------------------------------------------------------------------------------------------------


def words(messages, tools) -> int:
    """A tokenizer of blanks, which also counts a tool as ten."""
    return sum(len(message.content.split()) for message in messages) + 10 * len(tools)


def test_cut_at_turn_boundaries():
    long = talk("s:be brief", *(turn for n in range(5) for turn in (f"u:question {n} is", f"a:answer {n} is")))
    parts = cut_long(long, Cut(max_tokens=16), Counter(), words)
    assert [part.id for part in parts] == ["id/1", "id/2", "id/3"]
    assert all(part.messages[0].content == "be brief" and words(part.messages, ()) <= 16 for part in parts)
    joined = [message for part in parts for message in part.messages[1:]]
    assert joined == list(long.messages[1:])  # nothing lost, nothing cut
    assert cut_long(long, Cut(max_tokens=32), Counter(), words) is long
    tools = ({"type": "function", "function": {"name": "f"}},)
    with_tools = cut_long(talk(*said(long), tools=tools), Cut(max_tokens=18), Counter(), words)
    assert len(with_tools) == 5
    assert all(part.tools == tools for part in with_tools)


def test_cut_of_one_that_is_too_long_alone():
    big = talk("u:a", "a:b", "u:long", "a:" + "w " * 50, "u:c", "a:d")
    notes = Counter()
    assert [said(part) for part in cut_long(big, Cut(max_tokens=20), notes, words)] == [["u:a", "a:b"], ["u:c", "a:d"]]
    assert notes == {"questions with answers over max_tokens, dropped": 1}
    kept = cut_long(big, Cut(max_tokens=20, too_long="keep"), Counter(), words)
    assert [len(part.messages) for part in kept] == [2, 2, 2]
    assert "no question with its answer fits" in reason(
        cut_long(talk("u:a", "a:" + "w " * 50), Cut(max_tokens=20), Counter(), words)
    )
    assert cut_long(raw("w " * 99), Cut(max_tokens=16), Counter(), words).text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=12), st.integers(16, 60))
def test_parts_fit_and_hold_every_exchange_that_fits(sizes, budget):
    turns = [turn for n, (q, a) in enumerate(sizes) for turn in ("u:" + f"q{n} " * q, "a:" + f"a{n} " * a)]
    notes = Counter()
    result = cut_long(talk(*turns), Cut(max_tokens=budget), notes, words)
    parts = [] if isinstance(result, Drop) else result if isinstance(result, list) else [result]
    assert all(words(part.messages, ()) <= budget for part in parts)
    assert sum(len(part.messages) for part in parts) == 2 * sum(q + a <= budget for q, a in sizes)


# Real data ------------------------------------------------------------------------------------------------------


def answers_of(path):
    for row in json.loads(path.read_text()):
        yield talk(f"u:{row['instruction']}\n{row.get('input') or ''}", f"a:{row['output']}")


def test_real_rows_without_damage_html_or_debris_are_left_as_they_are(material):
    rows = list(answers_of(material / "data" / "stanford_alpaca" / "alpaca_5000.json"))
    assert sum("<" in row.messages[1].content for row in rows) > 10  # some hold HTML that was asked for
    for row in rows:
        assert convert_html(row, Html(), Counter()) is row
        assert remove_debris(row, Debris(), Counter()) is row
        assert repair_damage(row, Damage(), Counter()) is row


def test_real_answers_refuse_rarely_and_identities_never(material):
    rows = list(answers_of(material / "data" / "stanford_alpaca" / "alpaca_5000.json"))
    assert sum(drop_refusals(row, Refusal(), Counter()) is not row for row in rows) <= 2
    for name in ("dummy_en.json", "dummy_cn.json"):
        identities = json.loads((material / "data" / "llama-lora-fine-tuning" / name).read_text())
        assert len(identities) > 900
        for row in identities:
            turns = [f"{'ua'[index % 2]}:{message['value']}" for index, message in enumerate(row["conversations"])]
            conversation = talk(*turns)
            assert drop_refusals(conversation, Refusal(), Counter()) is conversation


def test_real_short_texts_are_in_their_language(material):
    titles = (material / "data" / "thucnews_titles" / "dev.txt").read_text().splitlines()[:500]
    assert {detect_language(title.split("\t")[0])[0] for title in titles} == {"zh"}
    lines = (material / "data" / "sst2" / "dev.tsv").read_text().splitlines()[1:400]
    english = [detect_language(line.split("\t")[-1])[0] for line in lines]
    assert len(english) > 300
    assert english.count("en") >= 0.95 * len(english)


def test_real_rows_hardly_loop(material):
    for name in ("stanford_alpaca/alpaca_5000.json", "llamafactory_demos/alpaca_zh_demo.json"):
        rows = list(answers_of(material / "data" / name))
        looping = [row for row in rows if isinstance(drop_repetition(row, Repetition(), Counter()), Drop)]
        assert len(looping) <= len(rows) / 500
