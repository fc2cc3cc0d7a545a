"""The commands that take finished adapters: `predict`, `merge` and `export`."""

import io
import json
import sys
from typing import Annotated

import typer

from grasp_lora.cli.terminal import StepOutput, log_to_terminal, say
from grasp_lora.errors import DataError
from grasp_lora.text.display import escaped, quoted

BackboneOption = Annotated[str | None, typer.Option(help="Backbone; default: the one that the (first) adapter names.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a backbone on the hub.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the backbone.")]


def predict(
    adapter: Annotated[str, typer.Argument(help="PEFT adapter: a folder or a hub id.")],
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
    for number, content in enumerate(sys.stdin.buffer, start=1):
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


def merge(
    adapters: Annotated[list[str], typer.Argument(help="PEFT adapters to merge: folders or hub ids.")],
    output: StepOutput,
    backbone: BackboneOption = None,
    rule: Annotated[
        str, typer.Option(help="exact, svd, paper_sum, paper_sum_unscaled, lorahub, ties or dare_ties.")
    ] = "exact",
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Weight of an adapter, once per adapter in order; default: the rule's own."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result, for rules that end in an SVD.")] = None,
    density: Annotated[float, typer.Option(help="Share of weights that TIES and DARE keep.")] = 0.5,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Merge LoRA adapters into one ordinary PEFT adapter."""
    from grasp_lora.bench.single import merge_folders

    log_to_terminal(False)
    facts = merge_folders(
        adapters,
        output,
        backbone,
        rule,
        weight,
        rank,
        density,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    say(facts)


def export(
    adapter: Annotated[str, typer.Argument(help="PEFT adapter: a folder or a hub id.")],
    output: StepOutput,
    rank: Annotated[int | None, typer.Option(help="Best approximation of this rank; the error is printed.")] = None,
    prune_rank: Annotated[
        bool, typer.Option("--prune-rank", help="Drop the rank-one components that the mask has emptied.")
    ] = False,
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Pad all modules with zeros to one rank, as llama.cpp needs it.")
    ] = False,
    fold: Annotated[bool, typer.Option("--fold", help="Add it to the backbone and write the whole model.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default float32, but --fold needs one named.")
    ] = None,
    backbone: BackboneOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make an adapter ready for others: smaller, in another dtype, or folded into its backbone.

    Prints the error that this costs, and what vLLM and llama.cpp need to take the result.
    """
    from grasp_lora.bench.export import ExportSettings, export_folder

    log_to_terminal(False)
    settings = ExportSettings(rank, prune_rank, uniform_rank, fold, dtype)
    for line in export_folder(
        adapter, output, settings, backbone, revision=revision, trust_remote_code=trust_remote_code
    ):
        say(line)
    say(f"-> {output}")
