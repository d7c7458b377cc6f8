"""Models and tokenizers: loading, scalar heads, models from scratch, forward inputs, chat templates."""
