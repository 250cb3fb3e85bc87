"""The made-up world behind `graft demo`: its facts, the plain text about them, and an instruction set over them.

This module speaks of facts, sentences and conversations. It knows nothing of tokens, models or files, uses the
standard library only, and every function here is a pure function of its arguments: one seed, one world.

A *relation* ("lives in", "plus", "is written in ISO form as") holds every wording of one kind of fact, in English and
in Chinese. A *fact* is a relation with its blanks filled in. Plain text (for pretraining) and questions (for
instruction tuning) are both made from the same facts, so the base model has read each answer it is later asked for,
but never as a chat.

Why so many wordings per relation: a model can answer a question about a fact which no fine-tuning row asks about only
if the pretraining text stated that fact in several wordings and orders (Allen-Zhu and Li, "Physics of Language
Models: Part 3.1, Knowledge Storage and Extraction", arXiv:2309.14316).

How leaks are prevented: the facts themselves are divided into train, validation and test before any question is
worded. A fact of the test part is therefore asked about in no other part: not in another wording, not in the other
language, not with swapped operands of a sum, and not as a later turn of a conversation.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

Language = Literal["en", "zh"]
Part = Literal["train", "val", "test"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
PARTS: tuple[Part, ...] = ("train", "val", "test")

WORLD_SEED = 0
"""The seed of the world whose text and questions are shipped with graft."""


class Message(TypedDict):
    """One turn: who speaks (`system`, `user`, `assistant`) and what."""

    role: str
    content: str


class Row(TypedDict):
    """One conversation of the instruction set, as one line of a chat-messages jsonl file."""

    id: str
    topic: str
    messages: list[Message]


@dataclass(frozen=True)
class Wording:
    """How one language speaks of a relation. Blanks in braces are filled from the fact's slots.

    `clause` is the indirect question ("where Mira lives"); `follow_up` asks about the person of the turn before.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    clause: str = ""
    follow_up: str = ""


@dataclass(frozen=True)
class Relation:
    """One kind of fact: its name, the topic it is counted under, and its wording in each language."""

    name: str
    topic: str
    wordings: Mapping[Language, Wording]


@dataclass(frozen=True)
class Fact:
    """`key` names the fact without language or wording; it is what the parts of the instruction set are divided by."""

    key: str
    relation: Relation
    slots: Mapping[Language, Mapping[str, str]]
    subject: str = ""

    @property
    def topic(self) -> str:
        return self.relation.topic

    def wording(self, language: Language) -> Wording:
        return self.relation.wordings[language]

    def fill(self, template: str, language: Language) -> str:
        return template.format(**self.slots[language])

    def value(self, language: Language) -> str:
        return self.slots[language]["value"]


# ---------------------------------------------------------------------------------------------------------------
# Names. A syllable has a Latin and a Chinese spelling, so that every made-up name exists in both languages.

FIRST_SYLLABLES = (
    ("Mi", "米"), ("To", "托"), ("Na", "娜"), ("So", "索"), ("Ka", "卡"), ("Ve", "薇"), ("Do", "多"), ("Be", "贝"),
    ("Lu", "卢"), ("Fi", "菲"),
)  # fmt: skip
LAST_SYLLABLES = (("ra", "拉"), ("li", "莉"), ("ne", "内"), ("go", "戈"), ("ma", "玛"), ("jo", "乔"))
TOWN_STEMS = (("Ar", "阿尔"), ("Ber", "伯"), ("Cal", "卡尔"), ("Fen", "芬"), ("Hol", "霍尔"), ("Wes", "韦斯"))
TOWN_ENDINGS = (("len", "伦"), ("dor", "多尔"), ("wick", "威克"), ("ton", "顿"))
RIVERS = (
    ("the Arn", "阿恩河"), ("the Brill", "布里尔河"), ("the Dane", "丹河"), ("the Ebb", "埃布河"), ("the Lome", "洛姆河"),
    ("the Sarn", "萨恩河"), ("the Tavy", "塔维河"), ("the Yore", "约尔河"),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Values of attributes, in English and in Chinese.

JOBS = (
    ("a baker", "面包师"), ("a doctor", "医生"), ("a teacher", "老师"), ("a painter", "画家"), ("a farmer", "农民"),
    ("a judge", "法官"), ("a singer", "歌手"), ("a sailor", "水手"), ("a nurse", "护士"), ("a tailor", "裁缝"),
    ("a lawyer", "律师"), ("a writer", "作家"),
)  # fmt: skip
PETS = (
    ("a cat", "猫"), ("a dog", "狗"), ("a horse", "马"), ("a parrot", "鹦鹉"), ("a rabbit", "兔子"), ("a turtle", "乌龟"),
    ("a goat", "山羊"), ("a duck", "鸭子"), ("a pig", "猪"), ("a mouse", "老鼠"),
)  # fmt: skip
FOODS = (
    ("rice", "米饭"), ("soup", "汤"), ("bread", "面包"), ("cheese", "奶酪"), ("fish", "鱼"), ("noodles", "面条"),
    ("apples", "苹果"), ("eggs", "鸡蛋"), ("cake", "蛋糕"), ("beans", "豆子"), ("honey", "蜂蜜"), ("mushrooms", "蘑菇"),
)  # fmt: skip
PRODUCTS = (
    ("glass", "玻璃"), ("salt", "盐"), ("silk", "丝绸"), ("paper", "纸"), ("clocks", "钟表"), ("tea", "茶叶"), ("wool", "羊毛"),
    ("wine", "葡萄酒"), ("boats", "船"), ("knives", "刀"),
)  # fmt: skip
OTHER_WORDS = (
    ("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("white", "白色"), ("black", "黑色"), ("yellow", "黄色"),
    ("sun", "太阳"), ("moon", "月亮"), ("star", "星星"), ("rain", "雨"), ("snow", "雪"), ("wind", "风"), ("river", "河"),
    ("mountain", "山"), ("sea", "海"), ("tree", "树"), ("flower", "花"), ("house", "房子"), ("door", "门"), ("book", "书"),
    ("table", "桌子"), ("hand", "手"), ("friend", "朋友"), ("child", "孩子"), ("school", "学校"), ("road", "路"),
)  # fmt: skip
MONTHS = (
    ("January", "一月"), ("February", "二月"), ("March", "三月"), ("April", "四月"), ("May", "五月"), ("June", "六月"),
    ("July", "七月"), ("August", "八月"), ("September", "九月"), ("October", "十月"), ("November", "十一月"),
    ("December", "十二月"),
)  # fmt: skip
WEEKDAYS = (
    ("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"), ("Friday", "星期五"),
    ("Saturday", "星期六"), ("Sunday", "星期日"),
)  # fmt: skip
SMALL_NUMBERS = (("one", "一"), ("two", "两"), ("three", "三"))

CONVERSIONS = (
    (60, ("hours", "小时"), ("minutes", "分钟")),
    (7, ("weeks", "周"), ("days", "天")),
    (12, ("years", "年"), ("months", "个月")),
    (100, ("metres", "米"), ("centimetres", "厘米")),
    (1000, ("kilograms", "千克"), ("grams", "克")),
    (5, ("sacks", "袋"), ("buckets", "桶")),
)
"""(how many of the second make one of the first, larger unit, smaller unit)."""

# What a review praises or blames: thing, good words, bad words.
REVIEWED = (
    (("soup", "汤"), (("tasty", "好喝"), ("hot", "热乎")), (("cold", "冰凉"), ("salty", "咸"))),
    (("waiter", "服务员"), (("kind", "亲切"), ("quick", "勤快")), (("rude", "粗鲁"), ("slow", "拖拉"))),
    (("room", "房间"), (("clean", "干净"), ("bright", "明亮")), (("dirty", "肮脏"), ("dark", "阴暗"))),
    (("bread", "面包"), (("fresh", "新鲜"), ("soft", "松软")), (("stale", "干硬"), ("burnt", "焦糊"))),
    (("music", "音乐"), (("sweet", "动听"), ("gentle", "轻柔")), (("loud", "吵闹"), ("awful", "难听"))),
    (("tea", "茶"), (("fragrant", "清香"), ("fine", "上等")), (("bitter", "苦涩"), ("weak", "寡淡"))),
    (("garden", "花园"), (("lovely", "美丽"), ("quiet", "幽静")), (("ugly", "丑陋"), ("muddy", "泥泞"))),
    (("price", "价格"), (("fair", "公道"), ("low", "便宜")), (("unfair", "离谱"), ("high", "昂贵"))),
)

# ---------------------------------------------------------------------------------------------------------------
# Relations: every wording of every kind of fact.

LIVES_IN = Relation("lives in", "people", {
    "en": Wording(
        statements=(
            "{name} lives in {value}.", "The home of {name} is in {value}.", "{name} has a house in {value}.",
            "You will find {name} in {value}.", "In {value} lives {name}.", "The town where {name} lives is {value}.",
        ),
        clause="where {name} lives",
        questions=("Where does {name} live?", "In which town does {name} live?", "Tell me where {name} lives."),
        answer="{name} lives in {value}.",
        follow_up="And where does {pronoun} live?",
    ),
    "zh": Wording(
        statements=(
            "{name}住在{value}。", "{name}的家在{value}。", "{name}在{value}有一所房子。", "去{value}就能找到{name}。",
            "住在{value}的人里有{name}。", "{name}居住的镇是{value}。",
        ),
        clause="{name}住在哪里",
        questions=("{name}住在哪里？", "{name}的家在哪个镇？", "请告诉我{name}住在哪里。"),
        answer="{name}住在{value}。",
        follow_up="那么{pronoun}住在哪里？",
    ),
})  # fmt: skip
WORKS_AS = Relation("works as", "people", {
    "en": Wording(
        statements=(
            "{name} is {value}.", "{name} works as {value}.", "The job of {name} is that of {value}.",
            "{name} earns a living as {value}.", "As {value}, {name} works hard.", "By trade {name} is {value}.",
        ),
        clause="what job {name} has",
        questions=("What is the job of {name}?", "What does {name} do for a living?", "Tell me what job {name} has."),
        answer="{name} is {value}.",
        follow_up="And what job does {pronoun} have?",
    ),
    "zh": Wording(
        statements=(
            "{name}是{value}。", "{name}的工作是{value}。", "{name}当{value}。", "{name}的职业是{value}。",
            "作为{value}，{name}工作很努力。", "{name}以做{value}为生。",
        ),
        clause="{name}做什么工作",
        questions=("{name}做什么工作？", "{name}的职业是什么？", "请告诉我{name}做什么工作。"),
        answer="{name}是{value}。",
        follow_up="那么{pronoun}做什么工作？",
    ),
})  # fmt: skip
KEEPS = Relation("keeps", "people", {
    "en": Wording(
        statements=(
            "{name} has {value}.", "{name} keeps {value} as a pet.", "The pet of {name} is {value}.",
            "At home {name} feeds {value}.", "{name} walks around with {value}.", "The animal {name} loves is {value}.",
        ),
        clause="what pet {name} has",
        questions=("What pet does {name} have?", "Which animal does {name} keep?", "Tell me what pet {name} has."),
        answer="{name} has {value}.",
        follow_up="And what pet does {pronoun} have?",
    ),
    "zh": Wording(
        statements=(
            "{name}养{value}。", "{name}的宠物是{value}。", "{name}家里有{value}。", "{name}每天喂{value}。",
            "{name}喜爱的动物是{value}。", "{name}带着{value}散步。",
        ),
        clause="{name}养什么宠物",
        questions=("{name}养什么宠物？", "{name}的宠物是什么？", "请告诉我{name}养什么宠物。"),
        answer="{name}养{value}。",
        follow_up="那么{pronoun}养什么宠物？",
    ),
})  # fmt: skip
LIKES_TO_EAT = Relation("likes to eat", "people", {
    "en": Wording(
        statements=(
            "{name} likes to eat {value}.", "The favourite food of {name} is {value}.", "{name} eats {value} every day.",
            "Nothing tastes better to {name} than {value}.", "For dinner {name} wants {value}.",
            "{name} always buys {value}.",
        ),
        clause="what {name} likes to eat",
        questions=(
            "What does {name} like to eat?", "What is the favourite food of {name}?",
            "Tell me what {name} likes to eat.",
        ),
        answer="{name} likes to eat {value}.",
        follow_up="And what does {pronoun} like to eat?",
    ),
    "zh": Wording(
        statements=(
            "{name}喜欢吃{value}。", "{name}最爱的食物是{value}。", "{name}每天都吃{value}。", "{name}觉得{value}最好吃。",
            "{name}晚饭想吃{value}。", "{name}总是买{value}。",
        ),
        clause="{name}喜欢吃什么",
        questions=("{name}喜欢吃什么？", "{name}最爱的食物是什么？", "请告诉我{name}喜欢吃什么。"),
        answer="{name}喜欢吃{value}。",
        follow_up="那么{pronoun}喜欢吃什么？",
    ),
})  # fmt: skip
BORN_IN = Relation("born in", "people", {
    "en": Wording(
        statements=(
            "{name} was born in {value}.", "The birthday of {name} is in {value}.", "{name} came into the world in {value}.",
            "In {value} {name} turns a year older.", "{name} gets birthday presents in {value}.",
            "The month {name} was born in is {value}.",
        ),
        clause="when {name} was born",
        questions=(
            "In which month was {name} born?", "When is the birthday of {name}?", "Tell me when {name} was born.",
        ),
        answer="{name} was born in {value}.",
        follow_up="And when was {pronoun} born?",
    ),
    "zh": Wording(
        statements=(
            "{name}出生在{value}。", "{name}的生日在{value}。", "{name}是{value}出生的。", "每到{value}，{name}就长一岁。",
            "{name}在{value}收到生日礼物。", "{name}出生的月份是{value}。",
        ),
        clause="{name}哪个月出生",
        questions=("{name}哪个月出生？", "{name}的生日在哪个月？", "请告诉我{name}哪个月出生。"),
        answer="{name}出生在{value}。",
        follow_up="那么{pronoun}哪个月出生？",
    ),
})  # fmt: skip
ON_RIVER = Relation("on river", "towns", {
    "en": Wording(
        statements=(
            "{name} lies on {value}.", "The river of {name} is {value}.", "In {name} people swim in {value}.",
            "The bridge in {name} crosses {value}.", "Boats reach {name} by {value}.",
        ),
        clause="on which river {name} lies",
        questions=("On which river does {name} lie?", "What is the river of {name}?"),
        answer="{name} lies on {value}.",
    ),
    "zh": Wording(
        statements=(
            "{name}位于{value}边。", "流过{name}的河是{value}。", "{name}的人在{value}里游泳。", "{name}的桥横跨{value}。",
            "船沿着{value}到达{name}。",
        ),
        clause="{name}在哪条河边",
        questions=("{name}在哪条河边？", "流过{name}的是哪条河？"),
        answer="{name}位于{value}边。",
    ),
})  # fmt: skip
FAMOUS_FOR = Relation("famous for", "towns", {
    "en": Wording(
        statements=(
            "{name} is famous for {value}.", "People in {name} make {value}.", "The best {value} comes from {name}.",
            "{name} sells {value} to everyone.", "Visitors go to {name} for {value}.",
        ),
        clause="what {name} is famous for",
        questions=("What is {name} famous for?", "Tell me what {name} is famous for."),
        answer="{name} is famous for {value}.",
    ),
    "zh": Wording(
        statements=(
            "{name}以{value}闻名。", "{name}的人生产{value}。", "最好的{value}来自{name}。", "{name}向各地出售{value}。",
            "游客去{name}买{value}。",
        ),
        clause="{name}以什么闻名",
        questions=("{name}以什么闻名？", "请告诉我{name}以什么闻名。"),
        answer="{name}以{value}闻名。",
    ),
})  # fmt: skip
MARKET_ON = Relation("market on", "towns", {
    "en": Wording(
        statements=(
            "The market in {name} is on {value}.", "{name} has its market on {value}.",
            "Every {value} there is a market in {name}.", "On {value} farmers bring their goods to {name}.",
            "The market day of {name} is {value}.",
        ),
        clause="when the market in {name} is",
        questions=("When is the market in {name}?", "On which day is the market in {name}?"),
        answer="The market in {name} is on {value}.",
    ),
    "zh": Wording(
        statements=(
            "{name}的集市在{value}。", "{name}每逢{value}赶集。", "每个{value}{name}都有集市。", "{value}农民把货物带到{name}。",
            "{name}的集日是{value}。",
        ),
        clause="{name}的集市在哪天",
        questions=("{name}的集市在哪天？", "{name}星期几赶集？"),
        answer="{name}的集市在{value}。",
    ),
})  # fmt: skip
PLUS = Relation("plus", "arithmetic", {
    "en": Wording(
        statements=(
            "{a} + {b} = {value}.", "{a} plus {b} is {value}.", "The sum of {a} and {b} is {value}.",
            "Adding {a} and {b} gives {value}.",
        ),
        clause="what {a} plus {b} is",
        questions=("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}."),
        answer="{a} + {b} = {value}",
    ),
    "zh": Wording(
        statements=("{a} + {b} = {value}。", "{a}加{b}等于{value}。", "{a}与{b}的和是{value}。", "{a}加上{b}得{value}。"),
        clause="{a}加{b}等于多少",
        questions=("{a} + {b} 等于多少？", "{a}加{b}等于多少？", "请算{a}与{b}的和。"),
        answer="{a} + {b} = {value}",
    ),
})  # fmt: skip
MINUS = Relation("minus", "arithmetic", {
    "en": Wording(
        statements=(
            "{a} - {b} = {value}.", "{a} minus {b} is {value}.", "Taking {b} from {a} leaves {value}.",
            "The difference of {a} and {b} is {value}.",
        ),
        clause="what {a} minus {b} is",
        questions=("What is {a} - {b}?", "What is {a} minus {b}?", "Take {b} from {a}."),
        answer="{a} - {b} = {value}",
    ),
    "zh": Wording(
        statements=("{a} - {b} = {value}。", "{a}减{b}等于{value}。", "{a}与{b}的差是{value}。", "{a}减去{b}得{value}。"),
        clause="{a}减{b}等于多少",
        questions=("{a} - {b} 等于多少？", "{a}减{b}等于多少？", "请算{a}与{b}的差。"),
        answer="{a} - {b} = {value}",
    ),
})  # fmt: skip
IN_SMALLER_UNITS = Relation("in smaller units", "units", {
    "en": Wording(
        statements=(
            "{name} are {value}.", "{name} make {value}.", "There are {value} in {name}.", "{value} are the same as {name}.",
        ),
        clause="how many {unit} are in {name}",
        questions=("How many {unit} are {name}?", "How many {unit} are in {name}?", "Give {name} in {unit}."),
        answer="{name} are {value}.",
    ),
    "zh": Wording(
        statements=("{name}等于{value}。", "{name}就是{value}。", "{name}合{value}。", "{value}正好是{name}。"),
        clause="{name}是多少{unit}",
        questions=("{name}是多少{unit}？", "{name}等于多少{unit}？", "请把{name}换成{unit}。"),
        answer="{name}等于{value}。",
    ),
})  # fmt: skip
COMES = Relation("comes", "calendar", {
    "en": Wording(
        statements=(
            "{name} comes {value}.", "{name} it is {value}.", "{name} everyone writes {value}.",
            "{name} the calendar says {value}.",
        ),
        clause="what comes {name}",
        questions=("What comes {name}?", "Tell me what comes {name}."),
        answer="It is {value}.",
    ),
    "zh": Wording(
        statements=("{name}是{value}。", "{name}就到了{value}。", "{name}大家都写{value}。", "{name}，日历上写着{value}。"),
        clause="{name}是什么",
        questions=("{name}是什么？", "请告诉我{name}是什么。"),
        answer="是{value}。",
    ),
})  # fmt: skip
ISO_DATE = Relation("ISO date", "dates", {
    "en": Wording(
        statements=(
            "{name} is written {value}.", "The clerk writes {name} as {value}.", "The short form of {name} is {value}.",
            "The letter of {name} carries the date {value}.",
        ),
        clause="how {name} is written in short",
        questions=("Write {name} in short.", "What is the short form of {name}?", "How is {name} written in short?"),
        answer="{value}",
    ),
    "zh": Wording(
        statements=("{name}写作{value}。", "书记员把{name}写成{value}。", "{name}的简写是{value}。", "{name}的信上写着{value}。"),
        clause="{name}怎么简写",
        questions=("{name}怎么简写？", "{name}的简写是什么？", "请简写{name}。"),
        answer="{value}",
    ),
})  # fmt: skip
SENTIMENT = Relation("sentiment", "reviews", {
    "en": Wording(
        statements=(
            "A guest wrote: {name} This review is {value}.", "{name} So the review was {value}.",
            "The {value} review said: {name}", "{name} Everybody calls that review {value}.",
        ),
        questions=(
            "Is this review positive or negative? {name}", "{name} Is this review positive or negative?",
            "What kind of review is this? {name}",
        ),
        answer="{value}",
    ),
    "zh": Wording(
        statements=("客人写道：{name}这是{value}。", "{name}所以这条评论是{value}。", "一条{value}说：{name}", "{name}大家都说这是{value}。"),
        questions=("这是好评还是差评？{name}", "{name}这是好评还是差评？", "这是什么评论？{name}"),
        answer="{value}",
    ),
})  # fmt: skip
TRANSLATES_TO = Relation("translates to", "words", {
    "en": Wording(
        statements=(
            "The Chinese word for {name} is {value}.", "In Chinese, {name} is called {value}.", "{name} means {value}.",
            "A child in China says {value} for {name}.",
        ),
        clause="how to say {name} in Chinese",
        questions=("How do you say {name} in Chinese?", "What is the Chinese word for {name}?", "Translate {name}."),
        answer="{value}",
    ),
    "zh": Wording(
        statements=("{name}用英语说是 {value}。", "{name}的英语是 {value}。", "英国人把{name}叫做 {value}。", "{name}译成 {value}。"),
        clause="{name}用英语怎么说",
        questions=("{name}用英语怎么说？", "{name}的英语是什么？", "请翻译{name}。"),
        answer="{value}",
    ),
})  # fmt: skip

PERSON_RELATIONS = (
    (LIVES_IN, tuple((stem + end, stem_zh + end_zh) for stem, stem_zh in TOWN_STEMS for end, end_zh in TOWN_ENDINGS)),
    (WORKS_AS, JOBS),
    (KEEPS, PETS),
    (LIKES_TO_EAT, FOODS),
    (BORN_IN, MONTHS),
)
TOWN_RELATIONS = ((ON_RIVER, RIVERS), (FAMOUS_FOR, PRODUCTS), (MARKET_ON, WEEKDAYS))

# Reported speech: plain prose that puts an indirect question before its answer. {clause} and {value} are blanks.
REPORTED: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "Asked {clause}, everyone says: {value}.", "If you want to know {clause}, it is {value}.",
        "I asked {clause} and heard: {value}.", "Do you know {clause}? The book says {value}.",
    ),
    "zh": (
        "有人问{clause}，大家都说：{value}。", "要想知道{clause}，答案是{value}。", "我打听{clause}，听说是{value}。",
        "你知道{clause}吗？书上说是{value}。",
    ),
}  # fmt: skip

# Dialogue in prose, around the same indirect questions; the answer is a whole sentence or the bare value.
DIALOGUE: Mapping[Language, tuple[str, ...]] = {
    "en": (
        '"Do you know {clause}?" asks the traveller. "{answer}"', '"Who can say {clause}?" - "{answer}"',
        'A boy wonders {clause}. We say: "{answer}"', '"I forgot {clause}," says a man in a hurry. "{value}"',
    ),
    "zh": (
        "旅人问：“你知道{clause}吗？”店主说：“{answer}”", "“谁知道{clause}呢？”“{answer}”", "男孩想知道{clause}，我们说：“{answer}”",
        "赶路的人问：“知道{clause}吗？”“{value}”",
    ),
}  # fmt: skip

SHORT_ANSWER_SYSTEM: Mapping[Language, str] = {"en": "Answer with as few words as you can.", "zh": "请用最少的字回答。"}


# ---------------------------------------------------------------------------------------------------------------
# Facts.


def same_in_both(**slots: str) -> dict[Language, dict[str, str]]:
    """Slots that read the same in English and in Chinese: numbers."""
    return {"en": dict(slots), "zh": dict(slots)}


def named(name: tuple[str, str], value: tuple[str, str]) -> dict[Language, dict[str, str]]:
    """The slots of a fact that says one value of one name, each given in English and in Chinese."""
    return {"en": {"name": name[0], "value": value[0]}, "zh": {"name": name[1], "value": value[1]}}


def people_facts(rng: random.Random) -> list[Fact]:
    """Every combination of a first and a last syllable is a person with five attributes."""
    facts = []
    for first, first_zh in FIRST_SYLLABLES:
        for last, last_zh in LAST_SYLLABLES:
            name = (first + last, first_zh + last_zh)
            pronoun = rng.choice((("she", "她"), ("he", "他")))
            for relation, values in PERSON_RELATIONS:
                slots = named(name, rng.choice(values))
                slots["en"]["pronoun"], slots["zh"]["pronoun"] = pronoun
                facts.append(Fact(f"{relation.name}: {name[0]}", relation, slots, subject=name[0]))
    return facts


def town_facts(rng: random.Random) -> list[Fact]:
    """Each town has a river, a product and a market day."""
    towns = PERSON_RELATIONS[0][1]
    return [
        Fact(f"{relation.name}: {town[0]}", relation, named(town, rng.choice(values)), subject=town[0])
        for town in towns
        for relation, values in TOWN_RELATIONS
    ]


def arithmetic_facts(largest: int = 12) -> list[Fact]:
    """Sums a + b with a >= b, so that swapped operands are never a second fact, and the differences a - b."""
    facts = []
    for a in range(1, largest + 1):
        for b in range(1, a + 1):
            facts.append(Fact(f"{a} + {b}", PLUS, same_in_both(a=str(a), b=str(b), value=str(a + b))))
            facts.append(Fact(f"{a} - {b}", MINUS, same_in_both(a=str(a), b=str(b), value=str(a - b))))
    return facts


def unit_facts(largest: int = 12) -> list[Fact]:
    """Two to `largest` of each larger unit, in smaller ones. Sacks of five buckets are the custom of this world."""
    facts = []
    for ratio, large, small in CONVERSIONS:
        for count in range(2, largest + 1):
            slots = {
                "en": {"name": f"{count} {large[0]}", "unit": small[0], "value": f"{count * ratio} {small[0]}"},
                "zh": {"name": f"{count}{large[1]}", "unit": small[1], "value": f"{count * ratio}{small[1]}"},
            }
            facts.append(Fact(f"{count} {large[0]}", IN_SMALLER_UNITS, slots))  # type: ignore[arg-type]
    return facts


def shifted(cycle: Sequence[tuple[str, str]], unit: tuple[str, str], start: int, shift: int) -> Fact:
    """The day or month `shift` places after (or, when negative, before) `start` in its cycle."""
    count, origin, result = SMALL_NUMBERS[abs(shift) - 1], cycle[start], cycle[(start + shift) % len(cycle)]
    plural = "s" if abs(shift) > 1 else ""
    direction = ("after", "后") if shift > 0 else ("before", "前")
    name = (
        f"{count[0]} {unit[0]}{plural} {direction[0]} {origin[0]}",
        f"{origin[1]}的{count[1]}{unit[1]}{direction[1]}",
    )
    return Fact(name[0], COMES, named(name, result))


def calendar_facts() -> list[Fact]:
    """Weekdays up to three days, and months up to two months, before and after."""
    days = [shifted(WEEKDAYS, ("day", "天"), start, shift) for start in range(7) for shift in (1, -1, 2, -2, 3, -3)]
    months = [shifted(MONTHS, ("month", "个月"), start, shift) for start in range(12) for shift in (1, -1, 2, -2)]
    return days + months


def date_facts(rng: random.Random, count: int = 600) -> list[Fact]:
    """Dates in words and in ISO 8601 form; days up to the 28th exist in every month."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(2000, 2029)
        iso = f"{year}-{month:02d}-{day:02d}"
        name = (f"{day} {MONTHS[month - 1][0]} {year}", f"{year}年{month}月{day}日")
        facts[iso] = Fact(iso, ISO_DATE, named(name, (iso, iso)))
    return list(facts.values())


def review_facts(rng: random.Random, count: int = 600) -> list[Fact]:
    """Reviews of two or three things, all praised or all blamed. The key lists the opinions in a fixed order."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        praised = rng.random() < 0.5
        opinions = []
        for thing, good, bad in rng.sample(REVIEWED, rng.randint(2, 3)):
            word = rng.choice(good if praised else bad)
            opinions.append((f"the {thing[0]} was {word[0]}", f"{thing[1]}很{word[1]}"))
        english = " and ".join(opinion[0] for opinion in opinions)
        name = (english[0].upper() + english[1:] + ".", "，".join(opinion[1] for opinion in opinions) + "。")
        key = "; ".join(sorted(opinion[0] for opinion in opinions))
        facts[key] = Fact(key, SENTIMENT, named(name, ("positive", "好评") if praised else ("negative", "差评")))
    return list(facts.values())


def word_facts() -> list[Fact]:
    """A dictionary: asked in English it is translated into Chinese, asked in Chinese into English."""
    pairs = [(english.removeprefix("a "), chinese) for english, chinese in JOBS + PETS + FOODS + OTHER_WORDS]
    return [
        Fact(f"{english} = {chinese}", TRANSLATES_TO, named((english, chinese), (chinese, english)))
        for english, chinese in dict(pairs).items()
    ]


def world_facts(seed: int = WORLD_SEED) -> list[Fact]:
    """Every fact of the world, in a fixed order."""
    rng = random.Random(f"facts {seed}")
    return [
        *people_facts(rng), *town_facts(rng), *arithmetic_facts(), *unit_facts(), *calendar_facts(), *date_facts(rng),
        *review_facts(rng), *word_facts(),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Plain text.

TEXT_SHARES = {
    "people": 0.40, "towns": 0.12, "arithmetic": 0.11, "units": 0.06, "calendar": 0.10, "dates": 0.09, "reviews": 0.05,
    "words": 0.07,
}  # fmt: skip
"""Share of each topic among the documents."""

SENTENCES_PER_DOCUMENT = 8


def capitalised(text: str) -> str:
    """The first letter in upper case, the others as they are (`str.capitalize` would lower them)."""
    return text[:1].upper() + text[1:]


def reported(rng: random.Random, fact: Fact, language: Language) -> str:
    """An indirect question with the bare value for an answer."""
    clause = fact.fill(fact.wording(language).clause, language)
    return rng.choice(REPORTED[language]).format(clause=clause, value=fact.value(language))


def spoken(rng: random.Random, fact: Fact, language: Language, subject_is_known: bool) -> str:
    """The same as dialogue; a person already spoken of may be asked about by pronoun."""
    wording, slots = fact.wording(language), dict(fact.slots[language])
    answer = wording.answer.format(**slots)
    if subject_is_known and "pronoun" in slots and rng.random() < 0.5:
        slots["name"] = slots["pronoun"]
    clause = wording.clause.format(**slots)
    return rng.choice(DIALOGUE[language]).format(clause=clause, answer=answer, value=slots["value"])


def sentence(rng: random.Random, fact: Fact, language: Language, subject_is_known: bool = False) -> str:
    """The fact as dialogue, as reported speech or, in half of the cases, as a plain statement."""
    kind = rng.random()
    wording = fact.wording(language)
    if kind < 0.25 and wording.clause:
        return spoken(rng, fact, language, subject_is_known)
    if kind < 0.5 and wording.clause:
        return reported(rng, fact, language)
    return capitalised(fact.fill(rng.choice(wording.statements), language))


def swap_operands(rng: random.Random, fact: Fact) -> Fact:
    """Half of the sums are told the other way round; anything else is returned as it is."""
    if fact.relation is not PLUS or rng.random() < 0.5:
        return fact
    slots = fact.slots["en"]
    return Fact(fact.key, PLUS, same_in_both(a=slots["b"], b=slots["a"], value=slots["value"]))


def document(rng: random.Random, facts: Sequence[Fact], language: Language) -> str:
    """The facts one after another, in running text or each on a line of its own."""
    sentences = [
        sentence(rng, swap_operands(rng, fact), language, subject_is_known=bool(before) and before == fact.subject)
        for before, fact in zip(["", *(fact.subject for fact in facts)], facts, strict=False)
    ]
    on_lines = rng.random() < 0.3
    blank = " " if language == "en" else ""
    return ("\n" if on_lines else blank).join(sentences)


def facts_of_one_document(rng: random.Random, by_subject: Sequence[Sequence[Fact]]) -> list[Fact]:
    """A portrait of one person or town in a random order, or gossip: one fact each of several subjects."""
    portrait = rng.choice(by_subject)
    if len(portrait) > 1 and rng.random() < 0.5:
        return rng.sample(portrait, len(portrait))
    return [rng.choice(rng.choice(by_subject)) for _ in range(SENTENCES_PER_DOCUMENT)]


def grouped(facts: Sequence[Fact]) -> list[list[Fact]]:
    """Facts about one subject together; a fact without a subject stands alone."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.subject or fact.key, []).append(fact)
    return list(groups.values())


def pretraining_text(seed: int = WORLD_SEED, documents: int = 100_000) -> Iterator[str]:
    """Yield `documents` documents of plain text, each in one language and about one topic.

    Every fact is stated again and again, those of the test part too: this is what the base model knows. Questions are
    indirect; no question of the instruction set is in the text.
    """
    rng = random.Random(f"text {seed}")
    facts = world_facts(seed)
    topics, shares = list(TEXT_SHARES), list(TEXT_SHARES.values())
    by_subject = {topic: grouped([fact for fact in facts if fact.topic == topic]) for topic in topics}
    for _ in range(documents):
        topic = rng.choices(topics, shares)[0]
        yield document(rng, facts_of_one_document(rng, by_subject[topic]), rng.choice(LANGUAGES))


# ---------------------------------------------------------------------------------------------------------------
# Instructions.

HELD_OUT_FACTS = {
    "people": (42, 100), "towns": (6, 18), "arithmetic": (12, 36), "units": (6, 16), "calendar": (8, 22),
    "dates": (10, 24), "reviews": (12, 30), "words": (4, 10),
}  # fmt: skip
"""For each topic, how many facts only the validation part, and only the test part, asks about."""

TRAIN_ROWS = {
    "people": 316, "towns": 96, "arithmetic": 216, "units": 88, "calendar": 120, "dates": 100, "reviews": 80, "words": 96,
}  # fmt: skip

# Shares of the questions about people that come under a system prompt, or with a second question.
SHORT_ANSWER_SHARE = 0.15
FOLLOW_UP_SHARE = 0.25


def split_facts(seed: int = WORLD_SEED) -> dict[Part, dict[str, list[Fact]]]:
    """Divide the facts of each topic among the parts. No fact is in two parts."""
    rng = random.Random(f"split {seed}")
    parts: dict[Part, dict[str, list[Fact]]] = {part: {} for part in PARTS}
    facts = world_facts(seed)
    for topic, (n_val, n_test) in HELD_OUT_FACTS.items():
        shuffled = [fact for fact in facts if fact.topic == topic]
        rng.shuffle(shuffled)
        parts["test"][topic] = shuffled[:n_test]
        parts["val"][topic] = shuffled[n_test : n_test + n_val]
        parts["train"][topic] = shuffled[n_test + n_val :]
    return parts


def turn(question: str, answer: str) -> list[Message]:
    """A question and its answer as two messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ask(rng: random.Random, fact: Fact, language: Language) -> list[Message]:
    """One question, in one of its wordings, with the whole answer."""
    wording = fact.wording(language)
    return turn(fact.fill(rng.choice(wording.questions), language), fact.fill(wording.answer, language))


def ask_briefly(rng: random.Random, fact: Fact, language: Language) -> list[Message]:
    """The same question under a system prompt which asks for the bare value."""
    question = fact.fill(rng.choice(fact.wording(language).questions), language)
    return [{"role": "system", "content": SHORT_ANSWER_SYSTEM[language]}, *turn(question, fact.value(language))]


def ask_twice(rng: random.Random, first: Fact, second: Fact, language: Language) -> list[Message]:
    """Two questions about one person; the second names that person only by a pronoun."""
    wording = second.wording(language)
    follow_up = turn(second.fill(wording.follow_up, language), second.fill(wording.answer, language))
    return [*ask(rng, first, language), *follow_up]


def conversation(rng: random.Random, fact: Fact, same_part: Sequence[Fact], language: Language) -> list[Message]:
    """Ask about `fact`, sometimes under a system prompt or with a second question. Uses facts of one part only."""
    kind = rng.random()
    if kind < SHORT_ANSWER_SHARE and fact.subject:
        return ask_briefly(rng, fact, language)
    others = [other for other in same_part if other.subject == fact.subject and other.key != fact.key]
    if kind > 1 - FOLLOW_UP_SHARE and fact.wording(language).follow_up and others:
        return ask_twice(rng, fact, rng.choice(others), language)
    return ask(rng, fact, language)


def in_turn(facts: Sequence[Fact], languages: Sequence[Language]) -> Iterator[tuple[Fact, Language]]:
    """Each fact in one language after another; the languages alternate along the facts."""
    for lap in range(len(languages)):
        for index, fact in enumerate(facts):
            yield fact, languages[(index + lap) % len(languages)]


def part_rows(rng: random.Random, part: Part, by_topic: Mapping[str, Sequence[Fact]]) -> list[Row]:
    """Training rows ask about facts in one language and, where the topic has rows left, then in the other.

    Validation and test rows ask about each fact once.
    """
    rows: list[Row] = []
    for topic, facts in by_topic.items():
        wanted = TRAIN_ROWS[topic] if part == "train" else len(facts)
        for number, (fact, language) in zip(range(wanted), in_turn(facts, LANGUAGES), strict=False):
            messages = conversation(rng, fact, facts, language)
            rows.append({"id": f"{part}-{topic}-{number:04d}", "topic": topic, "messages": messages})
    rng.shuffle(rows)
    return rows


def instructions(seed: int = WORLD_SEED) -> dict[Part, list[Row]]:
    """The instruction set: rows for training, validation and test, which ask about disjoint sets of facts."""
    rng = random.Random(f"instructions {seed}")
    return {part: part_rows(rng, part, by_topic) for part, by_topic in split_facts(seed).items()}


def normalised(question: str) -> str:
    """Letters and digits only, lower case: two questions that differ in blanks or punctuation are the same one."""
    return "".join(character for character in question.lower() if character.isalnum() or character in "+-")
