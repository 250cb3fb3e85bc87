"""`graft schema`."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON schema of a training recipe, for editors.

    Example:

    graft schema > recipe.schema.json
    """
    import json
    import sys

    from graft.config.train import Train

    sys.stdout.write(json.dumps(Train.model_json_schema(), indent=2, ensure_ascii=False) + "\n")
