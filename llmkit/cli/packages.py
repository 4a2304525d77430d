"""The packages that llmkit needs, those of its extras, and the error for a missing one."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmkit.errors import RequirementError

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def requirements() -> list[tuple[Requirement, str | None]]:
    """What llmkit's own metadata requires, each with its extra; None for what it always needs.

    Raises:
        PackageNotFoundError: llmkit runs from a folder, not from an installation.
    """
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in requires("llmkit") or ()]
    return [(r, _extra_of(str(r.marker or ""))) for r in parsed if r.name != "llmkit"]


def missing_package(error: ModuleNotFoundError) -> RequirementError | None:
    """The line for a package that llmkit names and that is not installed; None where another module is missing."""
    from packaging.utils import canonicalize_name

    name = canonicalize_name((error.name or "").partition(".")[0])
    try:
        required = requirements()
    except PackageNotFoundError:
        return None
    extras = [extra for requirement, extra in required if canonicalize_name(requirement.name) == name]
    if not extras:
        return None
    extra = next((e for e in extras if e != "dev"), extras[0])
    what = f"llmkit[{extra}]" if extra else "llmkit"
    part = f"which the extra {extra!r} brings" if extra else "which llmkit needs"
    return RequirementError(f"the package {name} is not installed, {part}", hint=f"pip install '{what}'")


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def source() -> str:
    """What pip installs llmkit from in another environment: the folder that it came from, or its name in an index."""
    from urllib.request import url2pathname  # with it come sockets and TLS

    with suppress(PackageNotFoundError, ValueError):
        url = json.loads(distribution("llmkit").read_text("direct_url.json") or "{}").get("url")
        if isinstance(url, str):
            return url2pathname(urlsplit(url).path) if url.startswith("file:") else f"llmkit @ {url}"
    return "llmkit"


def _extra_of(marker: str) -> str | None:
    _, condition, rest = marker.partition("extra == ")
    return rest.strip("\"' ") if condition else None
