"""Text in and out: tokenizers, chat templates, the incremental detokenizer and stop strings."""
