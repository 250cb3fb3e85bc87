"""The tasks that labelled sets are made for, and the columns that each is made of.

Speaks of tasks, roles and column names. Knows no templates and no files.
"""

from __future__ import annotations

from dataclasses import dataclass

LABEL = "label"
"""The role whose values are a few names, of which every prompt has the whole list as `choices`."""


@dataclass(frozen=True, slots=True)
class Role:
    """What a column is for in a task."""

    name: str
    aliases: tuple[str, ...]
    """Names of columns that mean it, likeliest first; the role's own name comes before them."""
    needed: bool = True
    joins: tuple[str, ...] = ()
    """Columns that belong before it where they are there too: the headline of an article to be classified."""


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of labelled set."""

    name: str
    about: str
    """What its templates ask for, in a few words."""
    roles: tuple[Role, ...]
    answer: str
    """The role that the model must produce."""
    usual: tuple[str, ...] = ()
    """Labels that such sets usually number 0, 1, ...: what a message proposes, never what is assumed."""

    @property
    def chooses(self) -> bool:
        """Whether the answer is one of a few labels."""
        return self.answer == LABEL


_TEXT = (
    *("sentence", "review", "content", "body", "comment", "utterance", "query", "message", "tweet", "post"),
    *("article", "description", "news", "document", "sms", "review_body", "question", "title", "headline"),
    *("文本", "内容", "评论", "句子", "标题", "问题"),
)
_CLASS = (
    *("labels", "category", "class", "intent", "topic", "sentiment", "polarity", "emotion", "target", "tag"),
    *("rating", "stars", "label_text", "class_index", "标签", "类别", "分类", "意图", "情感"),
)
_FIRST = ("sentence1", "text1", "sentence_a", "text_a", "question1", "s1", "text", "query", "句子1", "文本1")
_SECOND = ("sentence2", "text2", "sentence_b", "text_b", "question2", "s2", "paraphrase", "candidate", "句子2", "文本2")
_DOCUMENT = (
    *("article", "dialogue", "dialog", "text", "content", "body", "passage", "report", "story", "abstract", "news"),
    *("正文", "文章", "内容", "对话", "原文"),
)
_QUESTION = ("query", "ask", "instruction", "prompt", "problem", "问题", "提问")
_ANSWER = ("answers", "response", "output", "reply", "completion", "final_answer", "答案", "回答")
_CONTEXT = ("passage", "document", "paragraph", "article", "background", "reference", "text", "上下文", "材料", "原文")

_text = Role("text", _TEXT, joins=("title", "headline", "标题"))
_label = Role(LABEL, _CLASS)


def _classification(name: str, about: str, usual: tuple[str, ...] = ()) -> Task:
    return Task(name, about, (_text, _label), LABEL, usual)


def _pair(name: str, about: str, roles: tuple[str, str], usual: tuple[str, ...]) -> Task:
    first, second = roles
    return Task(name, about, (Role(first, _FIRST), Role(second, _SECOND), _label), LABEL, usual)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _classification("sentiment", "which feeling a text expresses", ("negative", "positive")),
        _classification("topic", "what a text is about"),
        _classification("intent", "what the writer of a message wants"),
        _classification("classification", "which of the labels fits a text"),
        _pair(
            "nli",
            "whether a text follows from another",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
        ),
        _pair("paraphrase", "whether two texts say the same", ("sentence1", "sentence2"), ("different", "same")),
        _pair("pair", "how two texts relate, by labels of your own", ("sentence1", "sentence2"), ()),
        Task(
            "summarisation",
            "a short version of a text or dialogue",
            (
                Role("document", _DOCUMENT),
                Role("summary", ("highlights", "summary1", "tldr", "摘要", "总结", "abstract")),
            ),
            "summary",
        ),
        Task(
            "extraction",
            "facts of a text as JSON",
            (
                Role("text", (*_TEXT, *_DOCUMENT)),
                Role("answer", ("json", "entities", "fields", "extraction", *_ANSWER)),
            ),
            "answer",
        ),
        Task(
            "translation",
            "a text in another language",
            (
                Role("source", ("src", "source_text", "input", "original", "sentence", "原文")),
                Role("target", ("tgt", "target_text", "output", "translation", "reference", "译文")),
                Role("source_language", ("source_lang", "src_lang"), needed=False),
                Role("target_language", ("target_lang", "tgt_lang"), needed=False),
            ),
            "target",
        ),
        Task(
            "closed-qa",
            "the answer to a question from a given text",
            (Role("context", _CONTEXT), Role("question", _QUESTION), Role("answer", _ANSWER)),
            "answer",
        ),
        Task(
            "open-qa",
            "the answer to a question, from what the model knows",
            (Role("question", _QUESTION), Role("answer", _ANSWER)),
            "answer",
        ),
        Task(
            "title",
            "a headline for a text",
            (Role("document", _DOCUMENT), Role("title", ("headline", "subject", "topic", "topic1", "标题", "题目"))),
            "title",
        ),
        Task(
            "rewriting",
            "the same content in other words or another style",
            (
                Role("source", ("src", "text", "input", "original", "sentence", "before", "informal", "原文", "原句")),
                Role(
                    "target", ("tgt", "rewrite", "rewritten", "output", "after", "formal", "paraphrase", "改写", "改后")
                ),
                Role("style", ("tone", "goal", "风格"), needed=False),
            ),
            "target",
        ),
    )
}
