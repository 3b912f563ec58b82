"""The Space: a page for the chain that space.json names."""

import json
import os
import sys
import zipfile
from pathlib import Path


HERE = Path(__file__).parent
for wheel in HERE.glob("cbd_hub-*.whl"):  # a version of cbd_hub that is no release comes along; requirements.txt has what it needs
    unpacked = HERE / ".cbd_hub"
    zipfile.ZipFile(wheel).extractall(unpacked)
    sys.path.insert(0, str(unpacked))

from cbd_hub.space.serving import serve  # noqa: E402


settings = json.loads((HERE / "space.json").read_text())
for name, value in settings["limits"].items():  # as it was deployed; a variable of the Space goes before it
    os.environ.setdefault(f"CBD_{name.upper()}", str(value))
named = os.environ.get("CBD_CHAIN")
serve(named or settings["chain"], revision=None if named else settings["revision"], dtype=settings["dtype"], mcp=True)
