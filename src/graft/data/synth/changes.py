"""Whether a journal was begun with this recipe, as far as that matters: by what shapes the requests.

Speaks of settings and digests. Knows no requests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from graft import console
from graft.data.synth.journal import Journal
from graft.data.synth.material import Material
from graft.errors import InputError


def plan_of(material: Material) -> dict[str, dict[str, Any]]:
    """What shapes the requests: a change of any of it would ask, and pay, for answers anew. Texts as their digests."""
    settings, wording = material.settings, material.wording
    sampled = {"temperature", "top_p", "max_tokens"}
    return {
        "settings": {
            "language": settings.language,
            "seed": settings.seed,
            "endpoint": settings.endpoint.model_dump(mode="json", include={"model", "limit_field", "extra_body"}),
            "questions": settings.questions.model_dump(mode="json", exclude={"patience"}),
            "filter": settings.filter.model_dump(mode="json"),
            "answers": settings.answers.model_dump(mode="json", include=sampled),
            "critique": settings.critique.model_dump(mode="json", include=sampled),
            "documents": settings.documents.model_dump(mode="json", include={"questions_per_chunk"}),
        },
        "texts": {
            "prompts": _digest([wording.chats, wording.pieces]),
            "domain, persona or variables": _digest(wording.values),
            "seeds": _digest([seed.text for seed in material.seeds.kept]),
            "documents": _digest([chunk.text for chunk in material.library.chunks]),
        },
    }


def check_plan(journal: Journal, material: Material, scrub: Callable[[str], str], accept_changes: bool) -> None:
    """Begin the journal, or see that it was begun with this plan. `scrub` takes a key out of what is written.

    Raises:
        InputError: it was begun with another one; names what changed.
    """
    plan = json.loads(scrub(json.dumps(plan_of(material))))
    for line in journal.flawed:
        console.warn(f"{journal.path}:{line}: cannot be read; what was answered there will be asked again")
    if journal.plan is None:
        journal.begin(plan)
        return
    new = plan  # what stands in the file may have been edited: what has another form there has changed
    old = {name: found if isinstance(found := journal.plan.get(name), Mapping) else {} for name in new}
    changed = [name for name, digest in new["texts"].items() if old["texts"].get(name) != digest]
    changed += _changes(old["settings"], new["settings"])
    if not changed:
        return
    said = "; ".join(changed)
    if not accept_changes:
        raise InputError(
            f"{journal.path}: was begun with another recipe: {said}; choose another --out, or go on with "
            "--accept-changes: requests that come out the same keep their answers, all others are asked and paid anew"
        )
    console.warn(f"the recipe was changed ({said}); requests that come out the same keep their answers")
    journal.begin(plan)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += _changes(before, after, f"{prefix}{name}.")
        elif before != after:
            changed.append(f"{prefix}{name} was {before!r}, is {after!r}")
    return changed


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
