"""One vLLM engine: requests, its thread, samplers and loading of weights; no Ray."""
