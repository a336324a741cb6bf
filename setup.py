"""All metadata of the package; pyproject.toml holds the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Read by pattern, so that building the package imports neither megagpt nor torch.
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megagpt/__init__.py").read_text()).group(1)
PINS = [
    line.strip()
    for line in (HERE / "requirements.txt").read_text().split("# tests and linters")[0].splitlines()
    if line.strip() and not line.startswith("#")
]
EXTRAS = {
    "harness": ["lm_eval==0.4.13"],
    "completion": ["argcomplete==3.7.2"],
    "serve": ["fastapi==0.165.0", "uvicorn==0.54.0"],
    "images": ["scikit-learn==1.9.1"],
}
"""EleutherAI's evaluation harness, for megagpt evaluate --harness; completion of a shell; a web
server, for megagpt serve; k-means and the digits of data_prep/images.py."""
SHIPPED = ["megagpt.ds_configs", "megagpt.launch", "megagpt.data_prep"]

setup(
    name="megagpt",
    version=VERSION,
    description="Trains the GPT-3 family (125M to 175B) with DeepSpeed, from raw text on a laptop "
    "to a multi-node GPU cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # What lies beside the package in the repository travels inside it: megagpt.files.shipped()
    # finds it in both.
    packages=[*find_packages(include=["megagpt", "megagpt.*"]), *SHIPPED],
    package_dir={name: name.removeprefix("megagpt.") for name in SHIPPED},
    package_data={
        "megagpt": ["py.typed"],
        "megagpt.ds_configs": ["*.json"],
        "megagpt.launch": ["*.sh", "*.sbatch", "runs/*.toml", "sites/*.sh"],
        "megagpt.hub": ["*.md"],
        "megagpt.log": ["*.toml"],
        "megagpt.plan": ["*.json"],
        "megagpt.report": ["*.css", "*.html", "*.js", "*.mplstyle", "uplot/*"],
        "megagpt.serve": ["*.html"],
        "megagpt.start": ["*.jinja"],
        "megagpt.tasks": ["*.txt"],
        "megagpt.tokenizer": ["*.bpe", "LICENSE*"],
        "megagpt.use": ["*.jinja"],
    },
    install_requires=PINS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megagpt=megagpt.cli:main"]},
)
