"""Edits that break the documentation and the examples, each noticed by a few tests (tests/mutations.py)."""

from __future__ import annotations

from tests.edits import Mutation

BLOCKS, SITE, EXAMPLES = "tests/test_code_blocks.py", "tests/test_site.py", "tests/test_examples.py"

PAGE_EDITS = [
    Mutation(
        "a page names a flag that there is not",
        "docs/evaluation.md",
        "acs-fast evaluate RUN --redundancy --repeats 5",
        "acs-fast evaluate RUN --redundancies --repeats 5",
        "taken_by_the_parsers",
        BLOCKS,
    ),
    Mutation(
        "a block has no language, so nothing knows whether to run it",
        "docs/index.md",
        "```python",
        "```",
        "says_its_language",
        BLOCKS,
    ),
    Mutation(
        "a public function has no entry in the reference",
        "docs/api.md",
        "::: acs_fast.evaluate\n",
        "",
        "every_public_name",
        SITE,
    ),
    Mutation(
        "text of a setting becomes a tag",
        "docs/settings.py",
        '.replace("<", "&lt;")',
        "",
        "left_unrendered",
        SITE,
    ),
    Mutation(
        "the plain loader's labels are in the order of the disk",
        "examples/use_with_imagefolder.py",
        "sorted(path.name for path in root.iterdir() if path.is_dir())",
        "sorted((path.name for path in root.iterdir() if path.is_dir()), reverse=True)",
        "plain_loader",
        EXAMPLES,
    ),
]
