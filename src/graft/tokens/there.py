"""Whether what a run reads is there: asked before anything heavy is imported, so that a slip costs no waiting.

Speaks of paths. What is there may still not serve; whoever reads it says so.
"""

from __future__ import annotations

from graft.config.train import Train
from graft.data.reading.read import open_address
from graft.tokens.chat_template import OURS, read_template_file
from graft.tokens.load import find_folder


def refuse_missing(settings: Train) -> None:
    """Look for the model's folder, the files of data and the chat template that the settings name.

    Names of the hub are left to the hub.

    Raises:
        InputError: a folder or file is not there, or is of no kind that graft reads.
        ConfigError: the chat template is neither a file nor one of graft's.
    """
    find_folder(settings.model)
    for source in (*settings.data, *settings.val, *settings.test):
        open_address(source.path)
    template = settings.encode.template
    if template is not None and template not in OURS:
        read_template_file(template)
