"""Fine-tune vision-language models with 4-bit LoRA on one core, one GPU or a Ray cluster."""

__version__ = "0.1.0"
