"""What answers prompts: the package's own decoding loop, and vLLM."""
