"""Chat: streamed text is whole characters and adds up; the session's history follows its commands."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.config.data import Source
from graft.config.train import Sampling
from graft.data.load import load_sources
from graft.errors import InputError
from graft.model.answers.generate import generate_batch
from graft.tokens.load import load_renderer
from graft.types import Message
from graft.use import chat as chat_module
from graft.use.chat import ChatSession, Detokenizer

TOKENIZERS = ["qwen2.5", "llama-2", "llama-3.1-instruct", "gpt-2", "mistral-v3", "phi-3", "chatglm3", "deepseek-llm"]
LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"], exclude_characters="\ufffd")
TEXTS = [
    "孩子不肯按时吃饭,怎么办?先陪他一起准备食物。",
    "emoji: 👩‍👩‍👧‍👦 🇨🇳 ✌🏽 and on",
    "  leading, double  blanks\n\n\tand tabs ",
    "rare: 𠮷𪚥 ﷽ ẞ é é",
    "plain English, don't stop.",
]


def _decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _pieces(decode, ids):
    detokenizer = Detokenizer(decode)
    return [piece for piece in (*map(detokenizer.push, ids), detokenizer.finish()) if piece]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, material):
    return AutoTokenizer.from_pretrained(material / "tokenizers" / request.param, local_files_only=True)


def test_pieces_add_up_to_the_full_decode_without_broken_characters(tokenizer):
    decode = _decoder(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = _pieces(decode, ids)
        assert "".join(pieces) == decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) > 4


def test_the_check_can_fail_decoding_token_by_token_breaks_characters(material_tokenizers):
    for each in material_tokenizers:
        ids = each(TEXTS[1] + TEXTS[3], add_special_tokens=False)["input_ids"]
        assert any("\ufffd" in _decoder(each)([token]) for token in ids)


def test_chinese_streams_before_the_end(tokenizer):
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(_decoder(tokenizer))
    seen = ""
    for count, token in enumerate(ids, start=1):
        seen += detokenizer.push(token)
        # At most the three tokens of an unfinished character are held back.
        assert count < 5 or seen.startswith(_decoder(tokenizer)(ids[: count - 3]).rstrip("\ufffd"))


def test_an_answer_cut_inside_a_character_ends_before_it(tokenizer):
    decode = _decoder(tokenizer)
    ids = tokenizer("好𪚥", add_special_tokens=False)["input_ids"]
    for end in range(1, len(ids)):
        text = "".join(_pieces(decode, ids[:end]))
        assert text == decode(ids[:end]).rstrip("\ufffd")
        assert "\ufffd" not in text


@settings(max_examples=150, deadline=None)
@given(text=st.text(LETTERS, max_size=40))
def test_pieces_add_up_for_any_text(material_tokenizers, text):
    for each in material_tokenizers:
        ids = each(text, add_special_tokens=False)["input_ids"]
        pieces = _pieces(_decoder(each), ids)
        assert "".join(pieces) == _decoder(each)(ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(300, 30000), max_size=30))
def test_pieces_add_up_for_any_ids_but_for_a_broken_end(material_tokenizers, ids):
    for each in material_tokenizers:
        decode = _decoder(each)
        assert "".join(_pieces(decode, ids)) == decode(ids).rstrip("\ufffd")


@pytest.fixture(scope="module")
def material_tokenizers(material):
    names = ["qwen2.5", "llama-2", "gpt-2"]
    return [AutoTokenizer.from_pretrained(material / "tokenizers" / name, local_files_only=True) for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def session(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return ChatSession(model, load_renderer(str(folder)), Sampling(max_new_tokens=12), system="Be brief.")


def test_an_answer_is_what_predict_would_say_and_joins_the_history(session):
    for question in ("What is 1 + 1?", "and 2 more?"):
        prompt = session.renderer.prompt_ids([*session.messages, Message("user", question)])
        (wanted,) = generate_batch(session.model, [prompt], session.renderer.stop_ids, session.sampling)
        said = "".join(session.ask(question))
        assert said == session.renderer.decode(wanted.ids).rstrip("\ufffd")
        assert session.messages[-2:] == [Message("user", question), Message("assistant", said)]
        assert session.speed.tokens == len(wanted.ids)
        assert session.speed.finish == ("stop" if wanted.stopped else "length")
    assert [message.role for message in session.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_the_stop_token_is_never_shown(session):
    free = "".join(session.ask("hello"))
    ids = generate_batch(session.model, [session.renderer.prompt_ids(session.messages[:2])], (), session.sampling)[
        0
    ].ids
    session.command("/reset")
    object.__setattr__(session.renderer, "stop_ids", (ids[3],))
    said = "".join(session.ask("hello"))
    assert said == session.renderer.decode(ids[: ids.index(ids[3])]).rstrip("\ufffd")
    assert free.startswith(said)
    assert session.speed.finish == "stop"


def test_commands_change_the_history(session):
    "".join(session.ask("one"))
    first = list(session.messages)
    "".join(session.ask("two"))
    second = list(session.messages)
    assert session.command("/undo").text == "taken back: two"
    assert session.messages == first
    "".join(session.ask("two"))
    assert session.messages == second
    reply = session.command("/retry")
    assert reply.answer
    assert session.messages == second[:-1]
    "".join(session.answer())
    assert session.messages == second  # greedy: the same answer
    assert not session.command("/reset").answer
    assert session.messages == [Message("system", "Be brief.")]
    session.command("/system 用中文回答")
    assert session.messages == [Message("system", "用中文回答")]
    session.command("/system")
    assert session.messages == []
    assert session.command("/exit").exit
    assert all(name in session.command("/help").text for name in chat_module.COMMANDS)


def test_retry_draws_anew_where_sampling_is_on(session):
    session.sampling = Sampling(max_new_tokens=12, temperature=1.5)
    answers = {"".join(session.ask("one"))}
    for _ in range(4):
        assert session.command("/retry").text == ""
        answers.add("".join(session.answer()))
    assert len(answers) > 1
    assert len(session.messages) == 3


def test_what_cannot_be_done_is_said_and_changes_nothing(session, tmp_path):
    before = list(session.messages)
    for line, said in [
        ("/rest", "did you mean `/reset`"),
        ("/xyz", "/help lists them all"),
        ("/undo", "no question yet"),
        ("/retry", "no question yet"),
        ("/save", "needs a file"),
        (f"/save {tmp_path}/a.jsonl", "nothing to save"),
    ]:
        with pytest.raises(InputError, match=said):
            session.command(line)
    assert session.messages == before
    "".join(session.ask("one"))
    with pytest.raises(InputError, match="cannot be written"):
        session.command(f"/save {tmp_path}/no/such/folder/a.jsonl")


def test_a_saved_chat_is_training_data(session, tmp_path):
    "".join(session.ask("你好"))
    out = tmp_path / "chat.jsonl"
    session.command(f"/save {out}")
    "".join(session.ask("again"))
    session.command(f"/save {out}")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [3, 5]
    loaded = load_sources([Source(path=str(out))])
    assert not loaded.rejects
    assert loaded.conversations[1].messages == tuple(session.messages)


def test_an_answer_that_is_stopped_keeps_what_was_said(session):
    pieces = session.ask("one")
    said = next(pieces) + next(pieces)
    pieces.close()  # what Ctrl-C comes to
    assert session.messages[-1] == Message("assistant", said)
    assert session.speed.finish == "interrupted"
    assert "stopped by you" in str(session.speed)
    after = session.renderer.prompt_ids([*session.messages, Message("user", "two")])
    (wanted,) = generate_batch(session.model, [after], session.renderer.stop_ids, session.sampling)
    assert "".join(session.ask("two")) == session.renderer.decode(wanted.ids).rstrip("\ufffd")


def test_an_interrupt_while_a_piece_is_written_ends_the_answer_at_once(session, monkeypatch, capsys):
    from graft.cli.chat import _show

    pieces = session.ask("one")
    written = []

    def write(text):
        written.append(text)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdout.write", write)
    _show(session, pieces)  # `pieces` is still referred to here, as in the program's loop
    assert session.messages[-1] == Message("assistant", "".join(written[:2]))
    assert session.speed.finish == "interrupted"


def test_an_interrupt_before_the_first_word_takes_the_question_back(session, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module.Stream, "__next__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        "".join(session.ask("one"))
    assert session.messages == [Message("system", "Be brief.")]


def test_a_conversation_beyond_the_context_is_said_and_can_go_on(session):
    with pytest.raises(InputError, match="the model's context is 256"):
        "".join(session.ask("word " * 400))
    assert session.messages == [Message("system", "Be brief.")]
    assert "".join(session.ask("one"))


def test_reasoning_is_kept_apart_in_the_history(session, monkeypatch):
    monkeypatch.setattr(chat_module.Detokenizer, "push", lambda self, token: "")
    monkeypatch.setattr(chat_module.Detokenizer, "finish", lambda self: "<think>\nhm\n</think>\n\nyes")
    "".join(session.ask("one"))
    assert session.messages[-1] == Message("assistant", "yes", reasoning="hm")


def test_piped_questions_are_answered_line_by_line(folder, monkeypatch, capsys):
    import io

    from graft.cli.chat import _talk

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    session = ChatSession(model, load_renderer(str(folder)), Sampling(max_new_tokens=6))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n/nonsense\ntwo\n/exit\nthree\n"))
    _talk(session)
    said = capsys.readouterr()
    assert said.out == "".join(message.content + "\n" for message in session.messages if message.role == "assistant")
    assert [message.content for message in session.messages if message.role == "user"] == ["one", "two"]
    assert "no such command" in said.err
