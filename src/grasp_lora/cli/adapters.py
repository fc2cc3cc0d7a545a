"""The commands that take finished adapters: `predict`, `export` and `push`."""

import io
import json
import sys
from typing import Annotated

import typer

from grasp_lora.cli.options import AdapterArgument, BackboneOption, OptionsOf, RevisionOption, StepOutput, TrustOption
from grasp_lora.cli.terminal import log_to_terminal, say
from grasp_lora.errors import DataError
from grasp_lora.text.display import escaped, listed, quoted

_export = OptionsOf("grasp_lora.models.export", "ExportSettings")


def predict(
    adapter: AdapterArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, one a line from standard input.")
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
        typer.Option(help="Prompts on standard input, and answers, are JSON texts, so that they may have line breaks."),
    ] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Answer prompts with an adapter, one answer a line. A prompt is whole, as the adapter was trained on it."""
    from grasp_lora.bench.single import predict_texts

    log_to_terminal(False)
    answers = predict_texts(
        adapter,
        prompts or _prompts_on_standard_input(jsonl),
        backbone,
        device,
        max_new_tokens=max_new_tokens,
        stop=stop,
        chat=chat,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    on_terminal = sys.stdout.isatty()
    if not on_terminal and isinstance(sys.stdout, io.TextIOWrapper):  # else what Windows takes for a pipe's encoding
        sys.stdout.reconfigure(encoding="utf-8")
    for answer in answers:
        if jsonl:
            answer = json.dumps(answer, ensure_ascii=False)
        sys.stdout.write((escaped(answer) if on_terminal else answer) + "\n")


def _prompts_on_standard_input(jsonl: bool) -> list[str]:
    lines = []
    for number, content in enumerate(sys.stdin.buffer if sys.stdin else (), start=1):
        try:
            line = content.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"line {number} on standard input is not UTF-8 ({error.reason}); convert it first"
            ) from None
        if line.strip():
            lines.append(line.rstrip("\r\n"))
    if not jsonl:
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise DataError(f"prompt {number} on standard input is no JSON ({error})") from None
        if not isinstance(prompt, str):
            raise DataError(
                f'prompt {number} on standard input must be a JSON text, such as "one\\ntwo"; it is {quoted(line[:40])}'
            )
        prompts.append(prompt)
    return prompts


def export(
    adapter: AdapterArgument,
    output: StepOutput,
    rank: Annotated[int | None, _export("rank")] = None,
    prune_rank: Annotated[bool, _export("prune_rank", "--prune-rank")] = False,
    uniform_rank: Annotated[bool, _export("uniform_rank", "--uniform-rank")] = False,
    fold: Annotated[bool, _export("fold", "--fold")] = False,
    dtype: Annotated[str | None, _export("dtype")] = None,
    gguf: Annotated[bool, _export("gguf", "--gguf")] = False,
    backbone: BackboneOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make an adapter ready for others: smaller, in another dtype, or folded into its backbone.

    Prints the error that this costs, and what vLLM and llama.cpp need to take the result.
    """
    from grasp_lora.models.export import ExportSettings, export_folder
    from grasp_lora.recipes.load import backbone_of_run

    log_to_terminal(False)
    settings = ExportSettings(rank, prune_rank, uniform_rank, fold, dtype, gguf)
    backbone = backbone or backbone_of_run(adapter)
    for line in export_folder(
        adapter, output, settings, backbone, revision=revision, trust_remote_code=trust_remote_code
    ):
        say(line)
    say(f"-> {output}")


def push(
    adapter: Annotated[str, typer.Argument(help="Folder of a PEFT adapter.")],
    name: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub; it is made where it is not there.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, only say what would be done.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Let everyone see it; without this, only its owner.")
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Licence to state in the card, such as apache-2.0; default: the card's own."),
    ] = None,
) -> None:
    """Put an adapter on the Hugging Face hub: its own files, no data. Without --yes nothing is sent."""
    from grasp_lora.models.push import plan_upload, upload

    log_to_terminal(False)
    plan = plan_upload(adapter, name, public=public, licence=licence)
    say(f"{'uploading' if yes else 'would upload'} to {name} ({'private' if plan.private else 'public'}):")
    for file, size in plan.sizes.items():
        say(f"{file}: {size:,} bytes")
    if plan.left_out:
        say(f"left out: {listed(plan.left_out)}")
    for note in plan.notes:
        say(f"note: {note}")
    say(f"-> {upload(plan)}" if yes else "nothing was sent; add --yes to do it")
