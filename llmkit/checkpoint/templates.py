"""Chat templates with names of their own, as transformers lays them beside a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmkit.checkpoint.file_content import FileContent
from llmkit.formats.json_text import parse_object

_FOLDER, _DEFAULT, _SETTINGS = "additional_chat_templates", "chat_template.jinja", "tokenizer_config.json"


def with_named_templates(files: Mapping[str, FileContent], folder: Path) -> dict[str, FileContent]:
    """The files of a folder, with the templates of its `additional_chat_templates/` in `tokenizer_config.json`.

    There every version of transformers reads them, and the default one has to stand beside them: a
    `chat_template.jinja` would hide the others, as it hides what the settings have where it is read with them.
    """
    named = sorted((folder / _FOLDER).glob("*.jinja"))
    if not named or not files:
        return dict(files)
    contents = {path.stem: FileContent(path=path) for path in named}
    if _DEFAULT in files:
        contents = {"default": files[_DEFAULT]} | contents

    def settings() -> bytes:
        from llmkit.tokenization.checked import template_text

        stated = parse_object(files[_SETTINGS].read(), _SETTINGS) if _SETTINGS in files else {}
        listed = [
            {"name": name, "template": template_text(content.read(), f"{_FOLDER}/{name}.jinja")}
            for name, content in contents.items()
        ]
        return FileContent.of_json({**stated, "chat_template": listed}).read()

    kept = {name: content for name, content in files.items() if name != _DEFAULT}
    return kept | {_SETTINGS: FileContent(make=settings)}
