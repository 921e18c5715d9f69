"""What is read in a page: blocks and marks, commands, what is wrong as it stands; and what a reader says of it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def page(text: str) -> Path:
        path = tmp_path / "page.md"
        path.write_text(text)
        return path

    return page


def test_blocks_carry_their_marks(doc_blocks: ModuleType, write: Any) -> None:
    page = write(
        "# Page\n\n<!-- needs: gpu, hub (an index) -->\n<!-- exit: 2 -->\n```bash\nls\n```\n\n"
        "<!-- setup: bash\ntouch a\n-->\n```console\n$ cat a \\\n    b\nprinted\n$ ls\n```\n- in a list\n"
        "  ```python\n  x = 1\n  ```\n<!-- tested: tests/conftest.py -->\n\n```sh\nmake\n```\n"
    )
    found = doc_blocks.blocks(page)
    assert [(b.line, b.language, b.needs, b.exit_code, b.tested, b.hidden) for b in found] == [
        (6, "bash", ("gpu", "hub"), 2, None, False),
        (10, "bash", (), 0, None, True),
        (13, "console", (), 0, None, False),
        (20, "python", (), 0, None, False),
        (25, "sh", (), 0, "tests/conftest.py", False),
    ]
    assert doc_blocks.command_lines(found[2]) == ["cat a  b", "ls"]
    assert found[3].text == "x = 1"
    assert [block.runs for block in found] == [True, True, True, True, False]
    assert doc_blocks.wrong(page) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```bash\ntorchspec train --targt DIR\n```\n", "--targt"),
        ("```bash\ntorchspec train --target DIR train.lr=fast\n```\n", "train.lr: must be a number > 0"),
        ("```bash\ntorchspec train --algorithm dflash draft.unroll=3\n```\n", "draft.unroll: no such setting"),
        ("```bash\ntorchspec trian\n```\n", "no command 'trian'"),
        ("```bash\nOMP_NUM_THREADS=1 torchspec eval --drafft x | head\n```\n", "--drafft"),
        ("```bash\ntorchspec train ...\n```\n", "write the command out"),
        ("```bash\nif true; then\n```\n", "syntax error"),
        ("```bash\npytest tests/nowhere\n```\n", "tests/nowhere does not exist"),
        ("```\ntorchspec doctor\n```\n", "says its language"),
        ("```ruby\nputs 1\n```\n", "```ruby"),
        ("Text:\n\n    torchspec doctor\n", "belongs into a fence"),
        ("With `torchspec eval --speed` it\n", "--speed"),
        ("```python\nx = \n```\n", "invalid syntax"),
        ("```python\nfrom torchspec.devices.api import Devize\n```\n", "has no Devize"),
        ("```yaml\ntrain:\n  batchsize: 8\n```\n", "train.batchsize: no such setting"),
        ("```yaml\na: [1\n```\n", "not yaml"),
        ('```json\n{"a": }\n```\n', "not json"),
        ("```toml\na = \n```\n", "not toml"),
        ("<!-- needs: money -->\n```bash\nls\n```\n", "money"),
        ("<!-- needs: gpu -->\nNo fence.\n", "before no fence"),
        ("<!-- tested: tests/test_nowhere.py -->\n```bash\nls\n```\n", "tests/test_nowhere.py does not exist"),
    ],
)
def test_what_is_wrong_is_said(doc_blocks: ModuleType, write: Any, text: str, said: str) -> None:
    problems = doc_blocks.wrong(write(text))
    assert problems
    assert said in problems[0]


def test_what_may_stand_is_not_refused(doc_blocks: ModuleType, write: Any) -> None:
    page = write(
        "```bash\ntorchspec train --config run.yaml --nproc 8 draft.num_anchors=4   # a setting of DFlash\n"
        "torchspec doctor | head\n```\n```yaml\ntrain:\n  lr: 1e-4\n```\n```yaml\nother: {keys: 1}\n```\n"
        "```text\ntorchspec train: printed\n```\nA `torchspec train ...` in a sentence.\n"
    )
    assert doc_blocks.wrong(page) == []


@pytest.mark.parametrize(
    ("line", "plain", "alone"),
    [
        ("torchspec doctor   # look", True, True),
        ("torchspec train --objective kl=0.5,tv=0.5 engine.options='{a: 1}'", True, True),
        ("ls | head", False, True),
        ("ls > names", False, True),
        ("ls |", False, False),
        ("cd runs", False, False),
        ("A=1 torchspec doctor", False, False),
        ("cat > a <<'END'", False, False),
        ("echo 'half", False, False),
    ],
)
def test_lines_that_are_one_command_or_stand_alone(doc_blocks: ModuleType, line: str, plain: bool, alone: bool) -> None:
    assert doc_blocks.is_plain(line) is plain
    assert doc_blocks.stands_alone(line) is alone


def run(reader: Any, doc_blocks: ModuleType, page: Path) -> None:
    for block in doc_blocks.blocks(page):
        reader.run(block)


def test_the_blocks_of_a_page_share_a_folder(reader: Any, doc_blocks: ModuleType, write: Any) -> None:
    page = write(
        "<!-- setup: bash\nmkdir -p runs/a/checkpoints/step_01 runs/a/checkpoints/step_02\n-->\n"
        "```bash\ntouch made\nwc -l < train.jsonl > rows\n```\n<!-- exit: 3 -->\n```bash\ntest -f made\n"
        "test -d runs/a/checkpoints/STEP\nexit 3\n```\n```python\nx = open('rows').read()\n```\n"
        "```python\nassert int(x) == 12\n```\n```bash\ntorchspec --version\ntorchspec --version | grep torchspec\n```\n"
    )
    run(reader, doc_blocks, page)
    assert (reader.folder / "made").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```bash\nls nowhere\n```\n", "nowhere"),
        ("```bash\ntorchspec export --checkpoint runs/never --format hf --output d\n```\n", "runs/never"),
        ("```bash\ntorchspec train --target DIR --data mine.jsonl --output runs/a\n```\n", "mine.jsonl"),
        ("<!-- exit: 1 -->\n```bash\ntrue\n```\n", "exit code 0, not 1"),
        ("```python\nnowhere()\n```\n", "NameError"),
    ],
)
def test_what_does_not_work_is_said_with_its_place_and_remedy(
    reader: Any, doc_blocks: ModuleType, write: Any, text: str, said: str
) -> None:
    with pytest.raises(Exception, match=r"page\.md:") as caught:
        run(reader, doc_blocks, write(text))
    for words in (said, "<!-- needs: gpu -->", "<!-- setup: bash"):
        assert words in str(caught.value)
