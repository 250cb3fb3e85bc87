"""`graft data report`: everything worth knowing of a set before it is trained on, as data and as one HTML page.

Puts together what `data` says of the text and `tokens` of the ids. Rows are counted as they stream by; what is costly
(languages, near-duplicates, tokens) looks at a random sample, and the report says of how many.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graft import console
from graft.config.data import Source
from graft.config.train import Encode
from graft.data.alike.dedup import NEAR, conversation_text, near_groups
from graft.data.clean.language import UNKNOWN, detect_language
from graft.data.describing.describe import Describer, Description, common_terms, first_prompt
from graft.data.describing.sample import Reservoir
from graft.data.describing.strange import OUTLIER, SAME_REASON, Shown, Strange, Watch, shown
from graft.data.load import stream_sources
from graft.data.tally import Tally
from graft.data.write import stem_of
from graft.tokens.renderer import Renderer
from graft.tokens.statistics import TokenStatistics, token_statistics
from graft.types import Conversation, Reject
from graft.use.pages import environment
from graft.version import __version__
from graft.visible import escape_hidden, shorten

SAMPLES = 10
LEAST_CONFIDENT = 60
"""Characters from which a text should let its language be known."""
LEAST_OF_TEMPLATE = 400
"""Characters from which what the chat template adds hardly counts."""
LONGEST_CLEAN_REPORT = 4 << 20

Pool = Sequence[tuple[int, Conversation]]
"""The sample: each conversation with its number among the kept rows."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the report is about."""

    sources: tuple[Source, ...]
    sample: int = 20_000
    """Rows that the costly parts look at; 0 is all."""
    seed: int = 0
    encode: Encode = field(default_factory=Encode)
    batch_size: int = 16
    row_tokens: int = 4096
    workers: int = 1
    """Processes that encode and look for near-duplicates; more change nothing but the time."""


@dataclass(frozen=True, slots=True)
class Language:
    """The rows of the sample in one language."""

    code: str
    rows: int
    id: str
    """Of the first of them."""
    place: str


@dataclass(frozen=True, slots=True)
class NearGroup:
    """Rows of the sample that say nearly the same: how many, and the beginnings of the first two."""

    rows: int
    first: Shown
    second: Shown


@dataclass(frozen=True, slots=True)
class Near:
    """Near-duplicates within the sample; exact ones are among them."""

    threshold: float
    duplicates: int
    """Rows that nearly repeat an earlier one."""
    groups: int
    largest: tuple[NearGroup, ...]


@dataclass(frozen=True, slots=True)
class DataReport:
    """The whole report as data."""

    read: int
    kept: int
    rejected: int
    decisions: tuple[str, ...]
    """Format of each file with the evidence."""
    reasons: tuple[tuple[int, Reject], ...]
    """Kinds of reasons for rejecting with their count and first row, commonest first."""
    sample: int
    """Rows that languages, near-duplicates, terms and tokens were found in."""
    seed: int
    text: Description
    languages: tuple[Language, ...]
    near: Near
    terms: tuple[tuple[str, int], ...]
    """Words that tell what first prompts are about, with the rows of the sample that have them."""
    tokens: TokenStatistics | None
    model: str | None
    template: str | None
    samples: tuple[Shown, ...]
    strangest: tuple[Strange, ...]
    cleaned: Mapping[str, Mapping[str, Any]]
    """Report of `graft data clean` by the file that it lies in, where one lies beside a source."""


def data_report(asked: Asked, model: str | None = None, renderer: Renderer | None = None) -> DataReport:
    """Read the sources once and measure them.

    Raises:
        InputError: a file cannot be read or fits no format.
    """
    tally, describer, watch = Tally(), Describer(), Watch()
    reservoir: Reservoir[Conversation] = Reservoir(asked.sample, asked.seed)
    for item in console.track(stream_sources(asked.sources, tally), "read"):
        if isinstance(item, Reject):
            continue
        describer.add(item)
        watch.add_text(reservoir.seen, item)
        reservoir.add(item)
    pool = reservoir.items()
    languages = _languages(pool, watch)
    near = _near(pool, asked.workers)
    tokens = _tokens(pool, renderer, asked, watch) if renderer is not None else None
    drawn = random.Random(asked.seed).sample(pool, min(SAMPLES, len(pool)))  # noqa: S311  # no secret
    return DataReport(
        read=tally.read,
        kept=tally.kept,
        rejected=tally.rejected,
        decisions=tuple(tally.decisions),
        reasons=tuple(tally.commonest(50)),
        sample=len(pool),
        seed=asked.seed,
        text=describer.description(),
        languages=languages,
        near=near,
        terms=tuple(common_terms(first_prompt(conversation) for _, conversation in pool)),
        tokens=tokens,
        model=model,
        template=renderer.template_name if renderer is not None else None,
        samples=tuple(shown(row, conversation) for row, conversation in sorted(drawn, key=lambda item: item[0])),
        strangest=tuple(watch.strangest(SAMPLES)),
        cleaned=_clean_reports(asked.sources),
    )


def _languages(pool: Pool, watch: Watch) -> tuple[Language, ...]:
    found: dict[str, list[Any]] = {}
    for row, conversation in console.track(pool, "languages"):
        text = conversation_text(conversation)
        code, confidence = detect_language(text)
        if code != UNKNOWN and len(text) >= LEAST_CONFIDENT:
            watch.add("language", confidence, row, conversation)
        found.setdefault(code, [0, conversation.id, str(conversation.origin)])[0] += 1
    ranked = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
    return tuple(Language(code, rows, name, place) for code, (rows, name, place) in ranked)


def _near(pool: Pool, workers: int) -> Near:
    texts = (conversation_text(conversation) for _, conversation in pool)
    groups = (
        near_groups(console.track(texts, "near-duplicates", len(pool)), NEAR, workers) if pool else np.empty(0, int)
    )
    first, sizes = np.unique(groups, return_counts=True)
    several = sizes > 1
    largest = []
    for place in np.argsort(-sizes, kind="stable")[:5]:
        if not several[place]:
            break
        one, other = np.flatnonzero(groups == first[place])[:2]
        largest.append(NearGroup(int(sizes[place]), shown(*pool[int(one)]), shown(*pool[int(other)])))
    return Near(NEAR, int((sizes - 1).sum()), int(several.sum()), tuple(largest))


def _tokens(pool: Pool, renderer: Renderer, asked: Asked, watch: Watch) -> TokenStatistics:
    def heard(index: int, tokens: int, characters: int) -> None:
        row, conversation = pool[index]
        if characters >= LEAST_OF_TEMPLATE:
            watch.add("tokens", tokens / characters, row, conversation)

    conversations = [conversation for _, conversation in pool]
    return token_statistics(
        conversations, renderer, asked.encode, asked.batch_size, asked.row_tokens, asked.seed, heard, asked.workers
    )


def _clean_reports(sources: Sequence[Source]) -> dict[str, Mapping[str, Any]]:
    """What `graft data clean` wrote beside its output; a file of another kind is passed over."""
    found: dict[str, Mapping[str, Any]] = {}
    for source in sources:
        path = Path(source.path)
        if not path.name:
            continue
        beside = path.with_name(f"{stem_of(path)}.report.json")
        try:
            if not beside.is_file() or beside.stat().st_size > LONGEST_CLEAN_REPORT:
                continue
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            found[str(beside)] = content
    return found


def as_json(report: DataReport) -> dict[str, Any]:
    """The report as plain data for `--json`."""
    plain = asdict(report)
    if report.tokens is not None:
        shared = report.tokens.sharing
        for name, item in (("alone", shared.alone), ("step", shared.step), ("whole", shared.whole)):
            plain["tokens"]["sharing"][name]["ratio"] = round(item.ratio, 4)
    return plain


def as_page(report: DataReport) -> str:
    """The report as one HTML page that needs nothing beside it."""
    template = environment().get_template("data_report.html.j2")
    return template.render(
        report=report,
        cards=_cards(report),
        cleaned=[(name, _clean_steps(content), _flat(content)) for name, content in report.cleaned.items()],
        outlier=OUTLIER,
        same_reason=SAME_REASON,
        samples=SAMPLES,
        version=__version__,
    )


def _cards(report: DataReport) -> list[tuple[str, str]]:
    """The numbers that are read first."""
    text, tokens = report.text, report.tokens
    cards = [(f"{report.kept:,}", "conversations kept"), (f"{report.rejected:,}", "rows rejected")]
    if report.languages:
        first = report.languages[0]
        cards.append((first.code, f"language of {100 * first.rows / max(1, report.sample):.0f} % of the rows"))
    if tokens is None or not tokens.examples:
        cards.append((f"{text.characters:,}", "characters"))
    else:
        cards.append((f"{tokens.nodes:,}", "tokens"))
        cards.append((f"{100 * tokens.targets / tokens.nodes:.1f} %", "of them supervised"))
        cards.append((f"{tokens.sharing.step.ratio:.2f} ×", "fewer tokens computed, on trees"))
    if report.near.duplicates:
        cards.append((f"{report.near.duplicates:,}", "rows nearly repeat another"))
    return cards


def _clean_steps(content: Mapping[str, Any]) -> list[tuple[str, list[int], str]]:
    """Name, counts (entered, changed, added, dropped, left) and commonest reason of each step of a clean report."""
    rows = []
    steps = content.get("steps")
    for step in steps if isinstance(steps, list) else ():
        if not isinstance(step, dict) or not isinstance(step.get("step"), str):
            continue
        counts = [step.get(name) for name in ("entered", "changed", "added", "dropped", "left")]
        reasons = step.get("reasons")
        first = next(iter(reasons.items()), None) if isinstance(reasons, dict) else None
        said = f"{first[1]} × {first[0]}" if first else ""
        rows.append((step["step"], [count if isinstance(count, int) else 0 for count in counts], said))
    return rows


def _flat(content: Mapping[str, Any], most: int = 200) -> list[tuple[str, str]]:
    """Names and values of a nested object, one line each; lists of objects are numbered."""
    lines: list[tuple[str, str]] = []
    todo: list[tuple[str, Any]] = [(str(key), value) for key, value in reversed([*content.items()])]
    while todo and len(lines) < most:
        name, value = todo.pop()
        if isinstance(value, dict) and value:
            todo += [(f"{name} › {key}", inner) for key, inner in reversed([*value.items()])]
        elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
            todo += [(f"{name} › {_name(inner, index)}", inner) for index, inner in reversed([*enumerate(value, 1)])]
        else:
            said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append((shorten(name, 120), shorten(said, 300)))
    if todo:
        lines.append(("…", f"and {len(todo):,} more entries"))
    return lines


def _name(value: Any, index: int) -> str:
    """A list's item by its own name, else by its number."""
    named = (
        next((value[key] for key in ("name", "step") if isinstance(value.get(key), str)), None)
        if isinstance(value, dict)
        else None
    )
    return named or str(index)


def summary(report: DataReport) -> list[str]:
    """The report in a few lines for the terminal."""
    text, tokens = report.text, report.tokens
    lines = [f"{report.read:,} rows read, {report.kept:,} kept, {report.rejected:,} rejected"]
    if report.sample < report.kept:
        lines.append(
            f"languages, near-duplicates{' and tokens' if tokens else ''} are those of {report.sample:,} rows drawn at "
            f"random (seed {report.seed}); --sample 0 takes all"
        )
    if report.languages:
        lines.append("languages: " + ", ".join(f"{item.code} {item.rows:,}" for item in report.languages[:8]))
    lines.append(f"duplicates: {text.duplicates:,} exact, {report.near.duplicates:,} near")
    if tokens is not None and tokens.examples:
        lines.append(
            f"tokens: {tokens.nodes:,}, {tokens.targets / tokens.nodes:.1%} supervised; {tokens.examples:,} examples, "
            f"longest {tokens.whole.most:,}, half up to {tokens.whole.median:,}"
        )
        lines += [
            f"max_length {limit.max_length:,} drops {limit.examples:,} examples of {limit.conversations:,} "
            f"conversations, {limit.targets / max(1, tokens.targets):.1%} of the supervised tokens"
            for limit in tokens.limits
            if limit.examples
        ]
        shared = tokens.sharing
        lines.append(
            f"trees: {shared.step.ratio:.2f}x fewer tokens computed in steps of {shared.batch_size} conversations "
            f"({shared.alone.ratio:.2f}x inside each one alone)"
        )
    return [escape_hidden(line) for line in lines]
