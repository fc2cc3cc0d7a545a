"""What earlier versions had: for each recipe key and command that went, what to do instead. Every answer is one line."""

GONE_KEYS: dict[str, str] = {  # dotted key
    "data.split_seed": "leave it out; the recipe's seed draws the splits, and compare keeps them over its seeds",
    "final.start": "leave it out; the final run starts from the merge",
}
GONE_COMMANDS: dict[str, str] = {
    "push": "use the hub's own client: hf upload ORG/NAME FOLDER --private",
    "report": "the same run again writes the report anew",
    "schema": "grasp-lora recipes --schema prints it",
    "status": "the same run again says what is done and goes on",
    "sweep": "search with any tool around grasp_lora.run; docs/how-to/search-settings.md has Optuna in thirty lines",
}
