"""Where Ray, vLLM and DeepSpeed live."""
