"""`python -m grasp_lora`, the same as the command `grasp-lora`; for launchers that start a module."""

from grasp_lora.cli import main

main()
