"""The oldest versions that pyproject.toml allows, as pins for pip: python .ci/oldest.py EXTRA...

The core's own dependencies, those of the extras named, and of `dev` the libraries that tests compare with.
"""

import re
import sys
import tomllib
from pathlib import Path

COMPARED = ("accelerate", "compressed-tensors", "onnx-ir", "peft")

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
    wanted += [r for r in extras[extra] if not r.startswith("llmkit[")]
wanted += [r for r in extras["dev"] if r.startswith(COMPARED)]
pins = {}
for requirement in wanted:
    name, _, low = re.match(r"([\w.-]+)(>=|==)([\d.]+)", requirement).groups()
    pins[name] = low if low.count(".") >= 2 else low + ".0"
pins["torch"] = re.search(r"torch==([\d.]+)", " ".join(extras["cpu"]))[1]  # older ones have no CPU build on PyPI
sys.stdout.writelines(f"{name}=={version}\n" for name, version in sorted(pins.items()))
