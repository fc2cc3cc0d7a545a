"""The commands that take finished adapters: `predict` and `export`."""

import io
import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from grasp_lora.cli.options import AdapterArgument, BackboneOption, RevisionOption, StepOutput, TrustOption
from grasp_lora.cli.terminal import log_to_terminal, say
from grasp_lora.errors import RecipeError
from grasp_lora.recipes.text import RUN_FILE
from grasp_lora.storage.reading import is_there, reading
from grasp_lora.text.display import escaped

logger = logging.getLogger(__name__)


def predict(
    adapter: AdapterArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Whole prompts, or a file of rows. Without any, you are asked for a question; what is piped in is one "
            "prompt a line."
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="A question, put into the prompt that the adapter was trained with.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="The text that the question is about, or the only text of a prompt, as for labels."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A new file (.csv or .jsonl) for the rows with their predictions."),
    ] = None,
    sheet: Annotated[
        str | None, typer.Option(help="The sheet of a workbook of rows. Default: the first that is not hidden.")
    ] = None,
    backbone: BackboneOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens; default: as in the adapter's recipe, else 64.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that ends an answer; may be repeated. Default: as in the adapter's recipe, else the end of a line."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            help="Put prompts into the chat template, as what the user says. Default: as in the adapter's recipe."
        ),
    ] = None,
    jsonl: Annotated[
        bool,
        typer.Option(
            help="Prompts on standard input, and answers, are JSON texts, so that they may have line breaks; "
            "a prompt may be an object with a key prompt."
        ),
    ] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Answer with an adapter: prompts, one answer a line; a question; the rows of a file; or what you type.

    Whole prompts go to the model as they are; --question, --context and rows are put into the prompt of the training.
    """
    from grasp_lora.engine.predict import is_rows, predict_question, predict_rows, predict_texts, predict_typed
    from grasp_lora.engine.run_folder import ADAPTER_FOLDER

    log_to_terminal(False)
    if is_there(Path(adapter) / RUN_FILE):  # the folder of a run
        adapter = str(Path(adapter) / ADAPTER_FOLDER)
    settings = {
        "backbone": backbone,
        "device": device,
        "max_new_tokens": max_new_tokens,
        "stop": stop,
        "chat": chat,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    texts = {name: text for name, text in (("context", context), ("question", question)) if text is not None}
    rows = Path(prompts[0]) if prompts and len(prompts) == 1 and is_rows(prompts[0]) else None
    only_rows = "takes a file of rows; give such a file, or leave it out"
    for problem, wrong in {
        "a file of rows is given beside others; give one file at a time": rows is None
        and any(map(is_rows, prompts or [])),
        f"a prompt is given, and --{' and --'.join(texts)}, too; give one of them": texts and prompts,
        f"--output {only_rows}": output is not None and rows is None,
        f"--sheet {only_rows}": sheet is not None and rows is None,
    }.items():
        if wrong:
            raise RecipeError(problem)
    answers: Iterable[str]
    if texts:
        answers = [predict_question(adapter, texts, **settings)]
    elif rows is not None:
        predictions = predict_rows(adapter, rows, output, sheet=sheet, **settings)
        answers = [] if output else [json.dumps(row, ensure_ascii=False) for row in predictions]
    elif not (prompts or jsonl) and sys.stdin and sys.stdin.isatty():
        answers = predict_typed(adapter, _typed, **settings)
    else:
        answers = predict_texts(adapter, prompts or _prompts_on_standard_input(jsonl), **settings)
    if jsonl and rows is None:
        answers = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    on_terminal = sys.stdout.isatty()
    if not on_terminal and isinstance(sys.stdout, io.TextIOWrapper):  # else what Windows takes for a pipe's encoding
        sys.stdout.reconfigure(encoding="utf-8")
    if rows is None and isinstance(answers, list) and len(answers) > 1 and not (on_terminal or jsonl):
        broken = next((number for number, answer in enumerate(answers, start=1) if "\n" in answer), None)
        if broken is not None:
            text = "answer %d has several lines, so there are more lines than prompts; add --jsonl, which writes one line each"
            logger.warning(text, broken)
    for answer in answers:
        sys.stdout.write((escaped(answer) if on_terminal else answer) + "\n")


def _typed(field: str) -> str:
    """Ask for a field on the terminal; the end of the input and Ctrl-C end the command."""
    try:
        return input(f"{field} (empty line to go back or end): ")
    except (EOFError, KeyboardInterrupt):
        raise typer.Exit from None


def _prompts_on_standard_input(jsonl: bool) -> list[str]:
    """One prompt a line; with `jsonl` each is a JSON text, or an object with a key `prompt`."""
    from grasp_lora.data.records import text_of

    with reading(f"standard input ({'a JSON text' if jsonl else 'a prompt in UTF-8'} a line)"):
        text = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n") if sys.stdin else ""
        lines = text.removesuffix("\n").split("\n") if text else []  # U+2028 may stand in a prompt
        if not jsonl:
            return lines
        values = [json.loads(line) for line in lines if line.strip()]
        return [text_of(value["prompt"] if isinstance(value, dict) else value, "prompt") for value in values]


def export(
    adapter: AdapterArgument,
    output: StepOutput,
    fold: Annotated[
        bool, typer.Option("--fold", help="Add the adapter to its backbone and write the whole model.")
    ] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write adapter.gguf, for llama.cpp and Ollama.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Number format: float32, float16 or bfloat16. Default for --gguf: float32."),
    ] = None,
    backbone: BackboneOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make an adapter ready for programs that read no PEFT: folded into its backbone, or as a GGUF file."""
    from grasp_lora.models.export import export_folder
    from grasp_lora.recipes.load import backbone_of_run

    log_to_terminal(False)
    for line in export_folder(
        adapter,
        output,
        fold=fold,
        gguf=gguf,
        dtype=dtype,
        backbone=backbone or backbone_of_run(adapter),
        revision=revision,
        trust_remote_code=trust_remote_code,
    ):
        say(line, copied=True)
    say(f"-> {output}")
