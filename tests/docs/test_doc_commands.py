"""Commands and programs of the documentation: their options and files exist."""

from __future__ import annotations

import doc_commands
import doc_pages
import pytest
from doc_commands import Files
from doc_pages import ROOT, Block, Command, Refused

pytest.importorskip("torch", reason="parses the options of zimage-export and of the benchmarks")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands_of(page: str) -> list[Command]:
    return [command for block in doc_pages.blocks(page, text_of(page)) for command in doc_pages.commands_in(block)]


@pytest.fixture(scope="module")
def bundles() -> set[str]:
    """Bundles that the pages' exports write."""
    return doc_commands.exported([command for page in doc_pages.pages() for command in commands_of(page)])


def check(page: str, text: str, bundles: set[str]) -> list[str]:
    """Problems of a page."""
    problems = []
    found = doc_pages.blocks(page, text)
    files = Files(bundles, doc_commands.shown_files(found))
    for block in found:
        try:
            if block.language == "python":
                doc_commands.check_python(block, files)
            for command in doc_pages.commands_in(block):
                try:
                    files.check(command, doc_commands.parse(command))
                except Refused as error:
                    problems.append(str(error))
        except Refused as error:
            problems.append(str(error))
    for command in doc_pages.inline_commands(page, text):
        try:
            doc_commands.parse(command)
        except Refused as error:
            problems.append(str(error))
    return problems


@pytest.mark.parametrize("page", doc_pages.pages())
def test_a_pages_commands_parse_and_its_files_exist(page: str, bundles: set[str]) -> None:
    assert check(page, text_of(page), bundles) == []


def test_the_pages_show_commands_at_all() -> None:
    """A page that is renamed, or a fence that is not understood, would make the test above pass on nothing."""
    shown = [command for page in doc_pages.pages() for command in commands_of(page)]
    programs = {command.program for command in shown}
    assert {"zimage", "zimage-export", "make", "pip", "python"} <= programs
    assert {"README.md", "docs/tensorrt.md", "docs/cookbook.md"} <= {command.page for command in shown}
    python = [block for page in doc_pages.pages() for block in doc_pages.blocks(page, text_of(page))]
    assert sum(block.language == "python" for block in python) > 10


@pytest.mark.parametrize(
    ("shown", "problem"),
    [
        ("zimage generate engines/nano -p 'a cat' --sead 3", "No such option: --sead"),
        ("zimage generate engines/nano -p 'a cat' --seed x", "Invalid value for '--seed'"),
        (
            "zimage paint engines/nano",
            "zimage has no command 'paint'; it has batch, explain, serve, workflow, generate",
        ),
        ("zimage keys lend anna", "zimage keys has no command 'lend'; it has add, list, revoke"),
        ("zimage keys add anna --max-cats 3", "No such option: --max-cats"),
        ("zimage log repeet 1f", "zimage log has no command 'repeet'; it has repeat"),
        ("zimage log --untill 2h", "No such option: --untill"),
        ("zimage generate", "Missing argument"),
        ("zimage generate engines/none -p 'a cat'", "there is no engines/none"),
        ("zimage generate engines/nano --like cat.png", "there is no cat.png, and no command before it makes one"),
        ("zimage generate engines/nano -p 'a cat' --lora style.safetensors=0.5", "there is no style.safetensors"),
        ("zimage generate engines/nano -p 'a cat' --second-pass size=2", "expected name=value of scale"),
        ("zimage batch none.csv -b engines/nano", "there is no none.csv"),
        ("zimage-export engines/nano.toml --precison fp16", "No such option: --precison"),
        ("zimage-export engines/none.toml", "there is no engines/none.toml"),
        ("zimage-export --checkpoint checkpoints/none --out x", "there is no checkpoints/none"),
        ("python -m zimage_rt.benchmarks.latency --devise cuda", "unrecognized arguments: --devise"),
        ("python -m zimage_rt.benchmarks.nothing", "nothing"),
        ("python -m zimage_rt.benchmarks.feature_cost", "Missing argument"),
        ("python docs/none.py", "there is no docs/none.py"),
        ("make pancakes", "pancakes"),
        ("make demo FLOUR=1", "the Makefile reads no FLOUR"),
        ("pip install 'zimage-rt[cli,teapot]'", "no extra teapot"),
        ("tests/hardware/none.sh", "there is no tests/hardware/none.sh"),
        ("zimage doctor && zimage doctor --jsn", "No such option: --jsn"),
        ("zimage generate engines/nano -p 'a \\\n", "No closing quotation"),
    ],
)
def test_a_wrong_command_is_seen(shown: str, problem: str, bundles: set[str]) -> None:
    (found,) = check("page.md", f"# Page\n\n```sh\n{shown}\n```\n", bundles)
    assert found.startswith("page.md:4: ")
    assert problem in " ".join(found.split())


def test_outputs_of_earlier_commands_exist(bundles: set[str]) -> None:
    page = """
```sh
VARIABLE=1 zimage generate engines/nano -p "a cat" \\
  --seed 3 -o first.png   # a comment
zimage generate engines/nano --like first.png -o second.png && zimage doctor --json
zimage-export engines/nano.toml --out engines/mine
zimage batch animals.csv -b engines/mine -o out
.venv/bin/zimage inspect engines/mine
zimage-export engines/nano.toml --checkpoint checkpoints/Z-Image-Turbo
python -m zimage_rt.benchmarks.random_checkpoint OUT
make cuda CUDA_ARCHITECTURES=90a-real
unknown --option
```

`animals.csv`, in GBK:
```
animal,colour
```
"""
    assert check("page.md", page, {*bundles, "engines/mine"}) == []
    commands = [c for block in doc_pages.blocks("page.md", page) for c in doc_pages.commands_in(block)]
    assert commands[0].words == ("zimage", "generate", "engines/nano", "-p", "a cat", "--seed", "3", "-o", "first.png")
    assert commands[0].environment == ("VARIABLE=1",)
    assert [command.line for command in commands[:3]] == [3, 5, 5]


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("Use `zimage generate --like` and `make demo`.", None),
        ("| `zimage explain … --steps 1,2` | `zimage inspect BUNDLE` |", None),
        ("Use `zimage generate --alike x.png`.", "zimage generate has no option --alike"),
        ("Use `zimage guess`.", "zimage has no command 'guess'"),
        ("Use `make pancakes`.", "pancakes"),
    ],
)
def test_parts_of_commands_in_sentences(sentence: str, problem: str | None, bundles: set[str]) -> None:
    found = check("page.md", sentence, bundles)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ('import zimage_rt\nengine = zimage_rt.Engine.load("engines/nano")\n', None),
        ("import zimage_rt\nzimage_rt.Engine.lode()\n", "page.md:3: zimage_rt.Engine has no lode"),
        ("from zimage_rt.errors import Oops\n", "page.md:2: zimage_rt.errors has no Oops"),
        ("engine.generate('a cat', sead=3)\n", "page.md:2: a request has no sead"),
        ("client.images.generate(prompt='a cat', size='256x256')\n", None),
        ('engine.load_lora("checkpoints/none.safetensors")\n', "page.md:2: there is no checkpoints/none.safetensors"),
        ("for x in\n", "page.md:2: "),
    ],
)
def test_programs(program: str, problem: str | None, bundles: set[str]) -> None:
    found = check("page.md", f"```python\n{program}```\n", bundles)
    assert len(found) == (problem is not None)
    assert problem is None or found[0].startswith(problem)


def test_an_open_block_is_seen() -> None:
    with pytest.raises(Refused, match=r"page.md:2: a block that nothing closes"):
        doc_pages.blocks("page.md", "text\n```sh\nzimage doctor\n")
    (block,) = doc_pages.blocks("page.md", "text\n\n```sh\nzimage doctor\n```\n")
    assert block == Block("page.md", 4, "sh", "zimage doctor", "text")


def test_the_release_script_runs_what_can_run_here() -> None:
    """It leaves out what needs a GPU or a checkpoint that no clone has, with the reason."""
    reasons = {
        "zimage generate engines/nano -p x": None,
        "zimage-export engines/nano.toml": None,
        "zimage-export engines/nano-fp16.toml --backend tensorrt_rtx --sm 89 --out engines/nano-ada": None,
        "zimage generate engines/nano --backend cuda -p x": "GPU",
        "zimage generate engines/z-image-turbo -p x": "6 B",
        ".venv/bin/python examples/lora_swap.py engines/nano": None,
        "python -m zimage_rt.benchmarks.latency": "benchmark",
        "zimage-export engines/z-image-turbo-comfyui.toml": "6 B",
        "zimage-export --checkpoint checkpoints/Z-Image-Turbo --out x": "no clone",
        "make demo": "CI",
    }
    for shown, reason in reasons.items():
        found = doc_commands.runnable(Command("page.md", 1, tuple(shown.split())), gpu=False)
        assert found is None if reason is None else reason in str(found)
